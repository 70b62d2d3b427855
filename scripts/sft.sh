#!/usr/bin/env bash
# Supervised fine-tuning on one or several GPUs, on one or several machines.
#
#   scripts/sft.sh --num_gpus 4 --deepspeed configs/deepspeed/ds_zero2.json
#   scripts/sft.sh --num_gpus 1 --output_dir outputs/sft-2b --model_path Qwen/Qwen3-VL-2B-Instruct training.learning_rate=5e-5
#   scripts/sft.sh --hostfile hosts.txt --deepspeed configs/deepspeed/ds_zero2.json            # the same on every node
#   scripts/sft.sh --num_nodes 2 --node_rank 0 --master_addr node1 --num_gpus 8                # and --node_rank 1 on node2
#
# Configuration:
#
# --config FILE         model, lora, training (default: configs/training/sft_config.yaml)
# --data_config FILE    data, prompt (default: those of --config, or configs/data/video_config.yaml)
# --output_dir FOLDER   the run's folder (default: outputs/sft)
#
set -euo pipefail
# shellcheck source=launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch train_sft.py "$root/configs/training/sft_config.yaml" outputs/sft "$@"
