#!/usr/bin/env bash
# What srun starts once on every node: the launcher, with this node's rank and number of GPUs.
#   node.sh scripts/sft.sh ARGUMENTS...
# A SIGUSR1 (see job.sh) becomes one SIGTERM to the launcher, which hands it on to the training processes.
set -euo pipefail
script=$1
shift
told=false
tell() {
    "$told" || kill -TERM "$launcher" 2>/dev/null || true
    told=true # a second SIGTERM would cut the saving short
}
trap '' USR1 # ignored from here on by all that is started below: srun sends it to every process of the step
"$script" --node_rank "$SLURM_NODEID" ${SLURM_GPUS_ON_NODE:+--num_gpus "$SLURM_GPUS_ON_NODE"} "$@" &
launcher=$!
trap tell USR1
trap 'told=true' TERM # SLURM itself ends the step: it has told every process, the launcher too
while :; do
    wait "$launcher" && status=0 || status=$?
    kill -0 "$launcher" 2>/dev/null || exit "$status"
done
