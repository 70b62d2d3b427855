# Sourced by sft.sh and rl.sh: starts a training script on one or several GPUs.
#   launch ENTRY.py CONFIG OUTPUT_DIR ARGUMENTS...
# Flags it reads: --num_gpus, --config, --data_config, --output_dir, --sft_checkpoint; all else goes to the script.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

find_python() {
    python=${VTG_PYTHON:-$root/.venv/bin/python}
    if [ ! -x "$python" ]; then
        # An environment made another way (conda, the manual path) is the one that is active.
        python=$(command -v python3) && "$python" -c "import torch" 2>/dev/null ||
            { echo "error: no environment with torch: run env/install.sh, activate yours, or set VTG_PYTHON" >&2; exit 2; }
    fi
}

launch() {
    local entry=$root/$1 config=$2 output_dir=$3 data_config=$root/configs/data/video_config.yaml
    local num_gpus="" sft_checkpoint="" rest=() name gpus
    shift 3
    find_python
    while [ $# -gt 0 ]; do
        case $1 in
            -h | --help)
                sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"
                exec "$python" "$entry" --help ;;
            --num_gpus | --config | --data_config | --output_dir | --sft_checkpoint)
                [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
                printf -v "${1#--}" '%s' "$2"; shift 2 ;;
            --num_gpus=* | --config=* | --data_config=* | --output_dir=* | --sft_checkpoint=*)
                name=${1%%=*}; printf -v "${name#--}" '%s' "${1#*=}"; shift ;;
            *) rest+=("$1"); shift ;;
        esac
    done
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
    num_gpus=${num_gpus:-$((gpus > 0 ? gpus : 1))}
    [[ $num_gpus =~ ^[1-9][0-9]*$ ]] ||
        { echo "error: --num_gpus must be a whole number >= 1, got $num_gpus" >&2; exit 2; }
    if [ "$gpus" -gt 0 ] && [ "$num_gpus" -gt "$gpus" ]; then
        echo "error: --num_gpus $num_gpus, but this machine has $gpus GPU(s)" >&2; exit 2
    fi
    if [ "$gpus" -eq 0 ]; then
        # Without a GPU: processes talk over gloo, DeepSpeed uses its CPU accelerator, threads do not wait by spinning.
        export DS_ACCELERATOR=cpu OMP_WAIT_POLICY=passive
    fi
    set -- --config "$config" --data_config "$data_config" --output_dir "$output_dir" \
        ${sft_checkpoint:+--model_path "$sft_checkpoint"} ${rest[@]+"${rest[@]}"}
    if [ "$num_gpus" -eq 1 ] && [[ " $* " != *" --deepspeed"[\ =]* ]]; then  # DeepSpeed needs a launcher for one too
        exec "$python" "$entry" "$@"
    fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    exec "$python" -m torch.distributed.run --standalone --nproc_per_node "$num_gpus" "$entry" "$@"
}
