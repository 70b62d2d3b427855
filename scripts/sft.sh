#!/usr/bin/env bash
# Supervised fine-tuning on one or several GPUs.
#
#   scripts/sft.sh --num_gpus 4 --deepspeed configs/deepspeed/ds_zero2.json
#   scripts/sft.sh --num_gpus 1 --output_dir outputs/sft-2b --model_path Qwen/Qwen3-VL-2B-Instruct training.learning_rate=5e-5
#
# --num_gpus N    processes to start with torchrun (default: all GPUs of this machine, 1 without a GPU);
#                 on a machine without a GPU, N processes train on the CPU over gloo
# Everything else goes to train_sft.py; --config, --data_config and --output_dir have the defaults below.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${VTG_PYTHON:-$root/.venv/bin/python}
if [ ! -x "$python" ]; then
    # An environment made another way (conda, the manual path) is the one that is active.
    python=$(command -v python3) && "$python" -c "import torch" 2>/dev/null ||
        { echo "error: no environment with torch: run env/install.sh, activate yours, or set VTG_PYTHON" >&2; exit 2; }
fi

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; "$python" "$root/train_sft.py" --help; }

num_gpus="" config=$root/configs/training/sft_config.yaml data_config=$root/configs/data/video_config.yaml
output_dir=outputs/sft rest=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --num_gpus | --config | --data_config | --output_dir)
            [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
            printf -v "${1#--}" '%s' "$2"; shift 2 ;;
        --num_gpus=* | --config=* | --data_config=* | --output_dir=*)
            name=${1%%=*}; printf -v "${name#--}" '%s' "${1#*=}"; shift ;;
        *) rest+=("$1"); shift ;;
    esac
done
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
num_gpus=${num_gpus:-$((gpus > 0 ? gpus : 1))}
[[ $num_gpus =~ ^[1-9][0-9]*$ ]] || { echo "error: --num_gpus must be a whole number >= 1, got $num_gpus" >&2; exit 2; }
if [ "$gpus" -gt 0 ] && [ "$num_gpus" -gt "$gpus" ]; then
    echo "error: --num_gpus $num_gpus, but this machine has $gpus GPU(s)" >&2; exit 2
fi
if [ "$gpus" -eq 0 ]; then
    # Without a GPU: processes talk over gloo, DeepSpeed uses its CPU accelerator, threads do not wait by spinning.
    export DS_ACCELERATOR=cpu OMP_WAIT_POLICY=passive
fi
arguments=(--config "$config" --data_config "$data_config" --output_dir "$output_dir" ${rest[@]+"${rest[@]}"})
if [ "$num_gpus" -eq 1 ]; then
    exec "$python" "$root/train_sft.py" "${arguments[@]}"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m torch.distributed.run --standalone --nproc_per_node "$num_gpus" "$root/train_sft.py" "${arguments[@]}"
