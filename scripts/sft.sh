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
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch train_sft.py "$root/configs/training/sft_config.yaml" outputs/sft "$@"
