# Sourced by sft.sbatch and rl.sbatch: one launcher on every node of the job, and an end that leaves a checkpoint.
#   run_job scripts/sft.sh ARGUMENTS...

run_job() {
    local script=$1 hosts=() status=0 srun_pid
    shift
    case " $* " in *" --help "* | *" -h "*) exec "$script" --help ;; esac
    [ -n "${SLURM_JOB_ID-}" ] || {
        echo "error: no SLURM job: sbatch this file (\"sbatch scripts/slurm/$(basename "$script" .sh).sbatch ...\"), or run $script" >&2
        exit 2
    }
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    [ ${#hosts[@]} -gt 0 ] || { echo "error: scontrol names no host for '$SLURM_JOB_NODELIST'" >&2; exit 2; }
    # Jobs that share node 0 meet on ports of their own, below those that the system gives away (from 32768).
    local port=$((20000 + SLURM_JOB_ID % 10000))
    echo "job $SLURM_JOB_ID on ${hosts[*]}; node 0 is ${hosts[0]}, port $port"
    [ -z "${SLURM_CPUS_PER_TASK-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun no longer takes the first
    # When a node fails, the others hang in a collective: they get a minute, which is enough to end after a last save.
    srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=60 bash scripts/slurm/node.sh "$script" --num_nodes "${#hosts[@]}" \
        --master_addr "${hosts[0]}" --master_port "$port" --resume_from_checkpoint auto "$@" &
    srun_pid=$!
    told_to_stop=false
    trap 'stop "$srun_pid"' TERM
    wait_for "$srun_pid" || status=$?
    if "$told_to_stop" && [ "$status" -ne 0 ] && still_ours; then
        echo "job $SLURM_JOB_ID goes back into the queue, to go on from its last complete checkpoint"
        scontrol requeue "$SLURM_JOB_ID" || echo "error: cannot requeue; submit again with the same arguments" >&2
    fi
    exit "$status"
}

# A SIGTERM would make srun kill its tasks at once. It hands a SIGUSR1 on to them, which node.sh turns into SIGTERM.
stop() {
    "$told_to_stop" || echo "SIGTERM: the run saves a checkpoint and ends"
    told_to_stop=true
    kill -USR1 "$1" 2>/dev/null || true
}

# Waits for a process through signals, which interrupt `wait`, and returns its status.
wait_for() {
    local status=0
    while :; do
        wait "$1" && status=0 || status=$?
        kill -0 "$1" 2>/dev/null || return "$status"
    done
}

# Whether the job still runs: not when scancel ended it, which sends a SIGTERM as well.
still_ours() {
    [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T 2>/dev/null)" = RUNNING ]
}
