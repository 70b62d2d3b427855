"""GRPO of Qwen3-VL for temporal grounding, from an SFT checkpoint: parse, build, train.

    python train_rl.py --config configs/training/rl_config.yaml --data_config configs/data/video_config.yaml \\
        --model_path outputs/sft/checkpoint-best --output_dir outputs/rl [training.temperature=1.0 ...]
"""

from __future__ import annotations

import torch

from utils.attach import attach
from utils.common import run_command, settle_accelerator, settle_world

attach()
settle_accelerator()

from datasets.video_dataset import VideoTemporalDataset, require_annotations  # noqa: E402
from rewards import CompositeReward  # noqa: E402
from trainers.memory_plan import describe_memory  # noqa: E402
from trainers.merging import plan_start, settle_start  # noqa: E402
from trainers.model import load_policy, load_processor, resolve_source  # noqa: E402
from trainers.parts import LearningRates  # noqa: E402
from trainers.plan import describe_groups, describe_plan  # noqa: E402
from trainers.rl_trainer import RolloutSettings, VideoGRPOTrainer  # noqa: E402
from trainers.rollout_batches import batches_per_epoch, check_batch_shape  # noqa: E402
from trainers.run_keeper import TrainingSetup, advising_on_memory  # noqa: E402
from utils.config import RLConfig  # noqa: E402
from utils.curves import plot_curves  # noqa: E402
from utils.logging_utils import get_logger, is_rank_zero, setup_logging  # noqa: E402
from utils.prompts import PromptContract  # noqa: E402
from utils.run import start_run, training_config, training_parser  # noqa: E402


@advising_on_memory(VideoGRPOTrainer.memory_advice)  # loading, training and the last validation
def main() -> int:
    """Train, and return the exit status."""
    args = training_parser(
        __doc__, sections="model, lora, rewards and training", starts_from="SFT checkpoint to start from"
    ).parse_intermixed_args()
    config = training_config(RLConfig, args)
    reward = CompositeReward(config.rewards_for_prompt)
    rates = LearningRates.from_training(config.training)
    setup_logging()
    require_annotations(config.data)  # at once, before anything is written or loaded
    run = None if args.dry_run else start_run(args.output_dir, config, args.resume_from_checkpoint)
    start = (config.model, config.lora, rates)
    model_config = settle_start(*start, args.output_dir) if run is not None else plan_start(*start)
    if args.deepspeed:
        settle_world()
    device = {} if torch.accelerator.is_available() else {"use_cpu": True}
    training_args = config.training.to_training_arguments(args.output_dir, args.deepspeed, **device)
    processor = load_processor(resolve_source(model_config.name_or_path), model_config)
    train_set = VideoTemporalDataset(
        config.data, processor, config.prompt, with_answer=False, seed=config.training.seed
    )
    val_set = None
    if config.data.val:
        num_val = config.training.max_eval_samples
        val_set = VideoTemporalDataset(
            config.data, processor, config.prompt, split="val", with_answer=False, max_samples=num_val
        )
    check_batch_shape(training_args, len(train_set))
    policy = load_policy(model_config, config.lora, rates, deepspeed=bool(args.deepspeed))
    contract = PromptContract.current(config.prompt, config.data, policy.vision_tower)
    contract.warn_if_other(policy.contract)
    if run is None:
        num_batches = batches_per_epoch(training_args, len(train_set))
        plan = describe_plan(policy.model, rates, train_set, val_set, training_args, num_batches=num_batches)
        needed = describe_memory(policy.model, config, training_args, train_set, args.deepspeed)
        if is_rank_zero():
            print(f"{plan}\n{needed}\n{describe_groups(train_set, training_args, reward)}")  # noqa: T201
        return 0
    setup = TrainingSetup.from_config(config, rates, contract, run)
    rollout = RolloutSettings.from_training(config.training)
    trainer = VideoGRPOTrainer(policy, train_set, val_set, reward, training_args, setup, rollout)
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
