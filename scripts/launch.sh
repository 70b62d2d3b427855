# Sourced by sft.sh and rl.sh: starts a training script on one or several GPUs, on one or several machines.
#   launch ENTRY.py CONFIG OUTPUT_DIR ARGUMENTS...
# Flags it reads are those of `launch_help`, --config, --data_config, --output_dir and --sft_checkpoint; all else goes to
# the training script. Several machines: scripts/plan_nodes.py works out who is who.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

launch_help() {
    cat <<'HELP'
On this machine:

  --num_gpus N          processes to start here, one for each GPU (default: all GPUs of this machine; 1 without a GPU).
                        On a machine without a GPU, N processes train on the CPU over gloo
  --deepspeed FILE      train with DeepSpeed: configs/deepspeed/ds_zero2.json or ds_zero3_offload.json

On several machines (nodes). Nothing is started by ssh: start the same command on every node, with its own --node_rank
where there is no --hostfile. Code, environment, data and --output_dir must be under the same paths everywhere; a shared
file system does. Under SLURM: sbatch scripts/slurm/SCRIPT.sbatch does all of this.

  --num_nodes N         machines (default: 1, or as many as the hostfile lists)
  --node_rank R         which of them this is, from 0 to N-1; only needed without a hostfile
  --master_addr ADDR    host name or IP address of node 0, as the others reach it (default: the hostfile's first host)
  --master_port PORT    a free port on node 0 (default: 29500; one machine alone takes any free port)
  --hostfile FILE       lines "host slots=N" as for DeepSpeed and OpenMPI, N being the processes on that host. From it
                        follow --num_nodes, --num_gpus, --master_addr and, by this machine's name and addresses,
                        --node_rank; a flag beside it wins. What was chosen is printed

With several networks choose one by NCCL_SOCKET_IFNAME (GPUs) and GLOO_SOCKET_IFNAME, e.g. eth0, on every node.
SIGTERM is handed on to every process; TORCH_ELASTIC_SHUTDOWN_TIMEOUT (110) seconds later they are killed.
HELP
}

fail() {
    echo "error: $1" >&2
    exit 2
}

find_python() {
    python=${VTG_PYTHON:-$root/.venv/bin/python}
    if [ ! -x "$python" ]; then
        # An environment made another way (conda, the manual path) is the one that is active.
        python=$(command -v python3 || true)
        [ -n "$python" ] && "$python" -c "import torch" 2>/dev/null ||
            fail "no environment with torch: run env/install.sh, activate yours, or set VTG_PYTHON"
    fi
}

show_help() { # show_help ENTRY.py: the head of the script that was started, the flags above, those of the entry
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"
    launch_help | sed "s/SCRIPT/$(basename "$0" .sh)/"
    printf '\nEverything else goes to %s:\n\n' "$(basename "$1")"
    exec "$python" "$1" --help
}

launch() {
    local entry=$root/$1 config=$2 output_dir=$3 data_config=""
    local num_gpus="" num_nodes="" node_rank="" master_addr="" master_port="" hostfile="" sft_checkpoint=""
    local rest=() plan=() cluster name value gpus
    shift 3
    find_python
    while [ $# -gt 0 ]; do
        case $1 in
            -h | --help) show_help "$entry" ;;
            --num_gpus | --num_nodes | --node_rank | --master_addr | --master_port | --hostfile | \
                --config | --data_config | --output_dir | --sft_checkpoint)
                [ -n "${2-}" ] || fail "$1 needs a value"
                printf -v "${1#--}" '%s' "$2"
                shift 2 ;;
            --num_gpus=* | --num_nodes=* | --node_rank=* | --master_addr=* | --master_port=* | --hostfile=* | \
                --config=* | --data_config=* | --output_dir=* | --sft_checkpoint=*)
                name=${1%%=*}
                [ -n "${1#*=}" ] || fail "$name needs a value"
                printf -v "${name#--}" '%s' "${1#*=}"
                shift ;;
            *)
                rest+=("$1")
                shift ;;
        esac
    done
    for name in num_nodes node_rank master_addr master_port hostfile; do
        [ -z "${!name}" ] || plan+=("--$name=${!name}")
    done
    if [ ${#plan[@]} -gt 0 ]; then
        cluster=$("$python" "$root/scripts/plan_nodes.py" "${plan[@]}" ${num_gpus:+"--num_gpus=$num_gpus"}) || exit $?
        while IFS='=' read -r name value; do
            printf -v "$name" '%s' "$value"
        done <<<"$cluster"
    fi
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
    num_gpus=${num_gpus:-$((gpus > 0 ? gpus : 1))}
    [[ $num_gpus =~ ^[1-9][0-9]*$ ]] || fail "--num_gpus must be a whole number >= 1, got $num_gpus"
    if [ "$gpus" -gt 0 ] && [ "$num_gpus" -gt "$gpus" ]; then
        fail "--num_gpus $num_gpus${hostfile:+ (or slots in $hostfile)}, but this machine has $gpus GPU(s)"
    fi
    if [ "$gpus" -eq 0 ]; then
        # Without a GPU: processes talk over gloo, DeepSpeed uses its CPU accelerator, threads do not wait by spinning.
        export DS_ACCELERATOR=cpu OMP_WAIT_POLICY=passive
    fi
    if [ -z "$data_config" ] && ! grep -q '^data:' "$config" 2>/dev/null; then # the record of a run has its data too
        data_config=$root/configs/data/video_config.yaml
    fi
    set -- --config "$config" ${data_config:+--data_config "$data_config"} --output_dir "$output_dir" \
        ${sft_checkpoint:+--model_path "$sft_checkpoint"} ${rest[@]+"${rest[@]}"}
    if [ ${#plan[@]} -eq 0 ] && [ "$num_gpus" -eq 1 ] && [[ " $* " != *" --deepspeed"[\ =]* ]]; then
        exec "$python" "$entry" "$@"
    fi
    # Saving a checkpoint takes longer than the 30 s that torchrun leaves its processes after a SIGTERM.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}
    local torchrun=("$python" "$root/scripts/torchrun.py" --nproc_per_node "$num_gpus")
    if [ ${#plan[@]} -eq 0 ]; then
        exec "${torchrun[@]}" --standalone "$entry" "$@"
    fi
    exec "${torchrun[@]}" --nnodes "$num_nodes" --node_rank "$node_rank" --master_addr "$master_addr" \
        --master_port "$master_port" "$entry" "$@"
}
