"""Supervised fine-tuning of Qwen3-VL for temporal grounding: parse, build, train.

    python train_sft.py --config configs/training/sft_config.yaml --data_config configs/data/video_config.yaml \\
        --output_dir outputs/sft [training.learning_rate=2e-5 ...]
"""

from __future__ import annotations

import torch

from utils.attach import attach
from utils.common import run_command, settle_accelerator, settle_world

attach()
settle_accelerator()

from datasets.video_dataset import VideoTemporalDataset, require_annotations  # noqa: E402
from trainers.memory_plan import describe_memory  # noqa: E402
from trainers.model import load_policy, load_processor, resolve_source  # noqa: E402
from trainers.parts import LearningRates  # noqa: E402
from trainers.plan import describe_batch, describe_plan  # noqa: E402
from trainers.run_keeper import TrainingSetup, advising_on_memory  # noqa: E402
from trainers.sft_trainer import VideoSFTTrainer  # noqa: E402
from utils.config import SFTConfig  # noqa: E402
from utils.curves import plot_curves  # noqa: E402
from utils.logging_utils import get_logger, is_rank_zero, setup_logging  # noqa: E402
from utils.prompts import PromptContract  # noqa: E402
from utils.run import start_run, training_config, training_parser  # noqa: E402


@advising_on_memory(VideoSFTTrainer.memory_advice)  # loading, training and the last validation
def main() -> int:
    """Train, and return the exit status."""
    args = training_parser(
        __doc__, sections="model, lora and training", starts_from="base model or checkpoint"
    ).parse_intermixed_args()
    config = training_config(SFTConfig, args)
    if args.deepspeed:
        settle_world()
    # Before any model is built: under ZeRO-3 these arguments decide how weights are loaded.
    device = {} if torch.accelerator.is_available() else {"use_cpu": True}
    training_args = config.training.to_training_arguments(args.output_dir, args.deepspeed, **device)
    require_annotations(config.data)  # at once, before anything is written or loaded
    run = None if args.dry_run else start_run(args.output_dir, config, args.resume_from_checkpoint)
    setup_logging()
    processor = load_processor(resolve_source(config.model.name_or_path), config.model)
    train_set = VideoTemporalDataset(config.data, processor, config.prompt, seed=config.training.seed)
    val_set = None
    if config.data.val:
        num_val = config.training.max_eval_samples
        val_set = VideoTemporalDataset(
            config.data, processor, config.prompt, split="val", with_answer=False, max_samples=num_val
        )
    rates = LearningRates.from_training(config.training)
    policy = load_policy(config.model, config.lora, rates, deepspeed=bool(args.deepspeed))
    contract = PromptContract.current(config.prompt, config.data, policy.vision_tower)
    if run is None:
        if is_rank_zero():
            print(describe_plan(policy.model, rates, train_set, val_set, training_args))  # noqa: T201
            print(describe_memory(policy.model, config, training_args, train_set, args.deepspeed))  # noqa: T201
            print(describe_batch(train_set, min(2, training_args.per_device_train_batch_size)))  # noqa: T201
        return 0
    setup = TrainingSetup.from_config(config, rates, contract, run)
    trainer = VideoSFTTrainer(policy, train_set, val_set, training_args, setup)
    contract.save(run.output_dir)
    trainer.train(resume_from_checkpoint=str(run.resume_from) if run.resume_from else None)
    if trainer.exit_status:
        return trainer.exit_status
    trainer.finish()
    if is_rank_zero():
        get_logger().info("curves: %s", plot_curves(run.metrics_path, run.curves_path))
    return 0


if __name__ == "__main__":
    run_command(main)
