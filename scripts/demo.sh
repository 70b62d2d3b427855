#!/usr/bin/env bash
# The whole job on this machine, in minutes, without downloads of weights or data: install, make synthetic videos and a
# tiny random Qwen3-VL, fine-tune it, train it on by GRPO, predict on held-out videos, print the table.
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
rl_configs=(--config configs/demo/rl_config.yaml --data_config configs/demo/video_config.yaml)
places=(
    "data.train=$output/data/train.jsonl" "data.val=$output/data/val.jsonl" "data.test=$output/data/test.jsonl"
    "data.cache_dir=$output/cache" "training.metrics_dir=$output/metrics" "training.logging_dir=$output/logs"
)
step "1/5 synthetic videos with annotations"
"$python" scripts/make_demo_data.py --output_dir "$output/data"
step "2/5 tiny random Qwen3-VL"
"$python" scripts/make_tiny_model.py --output_dir "$output/tiny_model" --annotations "$output/data/train.jsonl" \
    --data_config configs/demo/video_config.yaml
step "3/5 supervised fine-tuning"
if [ -f "$output/sft/checkpoint-final/manifest.json" ]; then
    echo "$output/sft is trained already"
else
    "$python" train_sft.py "${configs[@]}" --output_dir "$output/sft" --resume_from_checkpoint auto \
        --model_path "$output/tiny_model" "${places[@]}"
fi
echo "SFT done $((SECONDS - started)) s after set-up"
step "4/5 GRPO: LoRA on the fine-tuned model, rewarded by the IoU of sampled answers"
if [ -f "$output/rl/checkpoint-final/manifest.json" ]; then
    echo "$output/rl is trained already"
else
    "$python" train_rl.py "${rl_configs[@]}" --output_dir "$output/rl" --resume_from_checkpoint auto \
        --model_path "$output/sft/checkpoint-best" "${places[@]}"
fi
step "5/5 predictions on held-out videos"
"$python" scripts/demo_report.py "${configs[@]}" --checkpoint "$output/sft/checkpoint-best" \
    --rl_checkpoint "$output/rl/checkpoint-best" --output_dir "$output/report" \
    "model.name_or_path=$output/tiny_model" "${places[@]}"
echo "curves:     $output/metrics/sft.png $output/metrics/rl.png"
echo "rollouts:   $output/rl/rollouts.jsonl"
echo "checkpoint: $output/sft/checkpoint-best $output/rl/checkpoint-best"
echo "done in $((SECONDS - started)) s after set-up"
