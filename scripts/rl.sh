#!/usr/bin/env bash
# GRPO with temporal rewards from an SFT checkpoint, on one or several GPUs, on one or several machines.
#
#   scripts/rl.sh --sft_checkpoint outputs/sft/checkpoint-best --num_gpus 4
#   scripts/rl.sh --sft_checkpoint outputs/sft/checkpoint-best --num_gpus 4 --deepspeed configs/deepspeed/ds_zero2.json training.temperature=1.0
#   scripts/rl.sh --sft_checkpoint outputs/sft/checkpoint-best --hostfile hosts.txt            # the same on every node
#   scripts/rl.sh --sft_checkpoint outputs/sft/checkpoint-best --num_nodes 2 --node_rank 0 --master_addr node1 --num_gpus 8
#                                                                                              # and --node_rank 1 on node2
# Configuration:
#
# --sft_checkpoint FOLDER  where training begins: an adapter or full weights (default: the config's model.name_or_path)
# --config FILE            model, lora, rewards, training (default: configs/training/rl_config.yaml)
# --data_config FILE       data, prompt (default: those of --config, or configs/data/video_config.yaml)
# --output_dir FOLDER      the run's folder (default: outputs/rl)
#
set -euo pipefail
# shellcheck source=launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch train_rl.py "$root/configs/training/rl_config.yaml" outputs/rl "$@"
