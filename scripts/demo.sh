#!/usr/bin/env bash
# The whole job on this machine, in minutes, without downloads of weights or data: install, make synthetic videos and a
# tiny random Qwen3-VL, fine-tune it, predict on held-out videos, print the table.
#
#   scripts/demo.sh [--output_dir outputs/demo]
#
# Run again it goes on where it stopped (after Ctrl-C too); when all is done it only scores and prints again.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }

output=outputs/demo
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --output_dir) [ $# -ge 2 ] || { echo "error: --output_dir needs a value" >&2; exit 2; }; output=$2; shift 2 ;;
        *) echo "error: unknown argument $1 (see --help)" >&2; exit 2 ;;
    esac
done
python=$("$root/env/install.sh" --print_python)
cd "$root"
export OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
step() { printf '\n== %s\n' "$*"; }
started=$SECONDS

configs=(--config configs/demo/sft_config.yaml --data_config configs/demo/video_config.yaml)
places=(
    "model.name_or_path=$output/tiny_model"
    "data.train=$output/data/train.jsonl" "data.val=$output/data/val.jsonl" "data.test=$output/data/test.jsonl"
    "training.metrics_dir=$output/metrics" "training.logging_dir=$output/logs"
)
step "1/4 synthetic videos with annotations"
"$python" scripts/make_demo_data.py --output_dir "$output/data"
step "2/4 tiny random Qwen3-VL"
"$python" scripts/make_tiny_model.py --output_dir "$output/tiny_model" --annotations "$output/data/train.jsonl" \
    --data_config configs/demo/video_config.yaml
step "3/4 supervised fine-tuning"
if [ -f "$output/sft/checkpoint-final/manifest.json" ]; then
    echo "$output/sft is trained already"
else
    "$python" train_sft.py "${configs[@]}" --output_dir "$output/sft" --resume_from_checkpoint auto "${places[@]}"
fi
step "4/4 predictions on held-out videos"
"$python" scripts/demo_report.py "${configs[@]}" --checkpoint "$output/sft/checkpoint-best" \
    --output_dir "$output/report" "${places[@]}"
echo "curves:     $output/metrics/sft.png"
echo "checkpoint: $output/sft/checkpoint-best"
echo "done in $((SECONDS - started)) s after set-up"
