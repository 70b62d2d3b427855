#!/usr/bin/env bash
# GRPO with temporal rewards on one or several GPUs, from an SFT checkpoint.
#
#   scripts/rl.sh --sft_checkpoint outputs/sft/checkpoint-best --num_gpus 4
#   scripts/rl.sh --sft_checkpoint outputs/sft/checkpoint-best --num_gpus 4 --deepspeed configs/deepspeed/ds_zero2.json training.temperature=1.0
#
# --sft_checkpoint FOLDER  where training begins: an adapter or full weights (default: the config's model.name_or_path)
# --num_gpus N             processes to start with torchrun (default: all GPUs of this machine, 1 without a GPU);
#                          on a machine without a GPU, N processes train on the CPU over gloo
# Everything else goes to train_rl.py; --config, --data_config and --output_dir have the defaults below.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch train_rl.py "$root/configs/training/rl_config.yaml" outputs/rl "$@"
