"""Fixtures of the trainer tests: a small configuration on the tiny checkpoint, and what `train_sft.py` builds from
it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datasets.video_dataset import VideoTemporalDataset
from rewards import CompositeReward
from trainers.merging import settle_start
from trainers.model import load_policy, load_processor, resolve_source
from trainers.parts import LearningRates
from trainers.rl_trainer import RolloutSettings, VideoGRPOTrainer
from trainers.run_keeper import TrainingSetup
from trainers.sft_trainer import VideoSFTTrainer
from utils.common import REPO_ROOT, seed_everything
from utils.config import RLConfig, SFTConfig, load_config
from utils.prompts import PromptContract
from utils.run import start_run

DEMO_CONFIGS = [REPO_ROOT / "configs/demo/sft_config.yaml", REPO_ROOT / "configs/demo/video_config.yaml"]


@pytest.fixture
def config_with(tiny_model: Path, demo_data: Path, tmp_path: Path) -> Callable[..., SFTConfig]:
    """`config_with("training.max_steps=3", ...)`: the demo's configuration, small and offline."""

    def build(*overrides: str) -> SFTConfig:
        common = [
            f"model.name_or_path={tiny_model}",
            *(f"data.{split}={demo_data / split}.jsonl" for split in ("train", "val", "test")),
            "data.cache_dir=null",
            "training.per_device_train_batch_size=4",
            "training.per_device_eval_batch_size=8",
            "training.max_eval_samples=8",
            "training.max_steps=4",
            "training.dataloader_num_workers=0",
            "training.eval_strategy=no",
            "training.save_strategy=no",
            "training.save_total_limit=null",
            "training.logging_steps=1",
            "training.disable_tqdm=true",
            "training.use_cpu=true",
            "training.report_to=none",
            f"training.metrics_dir={tmp_path / 'metrics'}",
            f"training.logging_dir={tmp_path / 'logs'}",
        ]
        return load_config(SFTConfig, DEMO_CONFIGS, [*common, *overrides])

    return build


@pytest.fixture
def trainer_for(tmp_path: Path) -> Callable[..., VideoSFTTrainer]:
    """`trainer_for(config, output_dir=None, resume=None)`: the trainer as `train_sft.py` builds it."""

    def build(config: SFTConfig, output_dir: Path | None = None, resume: str | None = None) -> VideoSFTTrainer:
        folder = output_dir or tmp_path / "run"
        args: Any = config.training.to_training_arguments(output_dir=folder)
        run = start_run(folder, config, resume)
        seed_everything(config.training.seed)
        processor = load_processor(resolve_source(config.model.name_or_path))
        train_set = VideoTemporalDataset(config.data, processor, config.prompt)
        val_set = VideoTemporalDataset(
            config.data,
            processor,
            config.prompt,
            split="val",
            with_answer=False,
            max_samples=config.training.max_eval_samples,
        )
        rates = LearningRates.from_training(config.training)
        policy = load_policy(config.model, config.lora, rates)
        contract = PromptContract.current(config.prompt, config.data, policy.vision_tower)
        setup = TrainingSetup.from_config(config, rates, contract, run)
        return VideoSFTTrainer(policy, train_set, val_set, args, setup)

    return build


RL_CONFIGS = [REPO_ROOT / "configs/demo/rl_config.yaml", REPO_ROOT / "configs/demo/video_config.yaml"]


@pytest.fixture
def rl_config_with(answering_model: Path, demo_data: Path, tmp_path: Path) -> Callable[..., RLConfig]:
    """`rl_config_with("training.max_steps=3", ...)`: the demo's GRPO, small: 2 prompts x 4 completions a step."""

    def build(*overrides: str) -> RLConfig:
        common = [
            f"model.name_or_path={answering_model}",
            *(f"data.{split}={demo_data / split}.jsonl" for split in ("train", "val", "test")),
            "data.cache_dir=null",
            "training.num_generations=4",
            "training.per_device_train_batch_size=4",
            "training.gradient_accumulation_steps=2",
            "training.per_device_eval_batch_size=8",
            "training.max_eval_samples=8",
            "training.max_steps=3",
            "training.dataloader_num_workers=0",
            "training.eval_strategy=no",
            "training.save_strategy=no",
            "training.save_total_limit=null",
            "training.logging_steps=1",
            "training.disable_tqdm=true",
            "training.use_cpu=true",
            "training.report_to=none",
            f"training.metrics_dir={tmp_path / 'metrics'}",
            f"training.logging_dir={tmp_path / 'logs'}",
        ]
        return load_config(RLConfig, RL_CONFIGS, [*common, *overrides])

    return build


@pytest.fixture
def rl_trainer_for(tmp_path: Path) -> Callable[..., VideoGRPOTrainer]:
    """`rl_trainer_for(config, output_dir=None, resume=None)`: the trainer as `train_rl.py` builds it."""

    def build(config: RLConfig, output_dir: Path | None = None, resume: str | None = None) -> VideoGRPOTrainer:
        folder = output_dir or tmp_path / "rl"
        run = start_run(folder, config, resume)
        rates = LearningRates.from_training(config.training)
        model = settle_start(config.model, config.lora, rates, folder)
        args: Any = config.training.to_training_arguments(output_dir=folder)
        seed_everything(config.training.seed)
        processor = load_processor(resolve_source(model.name_or_path))
        train_set = VideoTemporalDataset(config.data, processor, config.prompt, with_answer=False)
        val_set = VideoTemporalDataset(
            config.data, processor, config.prompt, split="val", with_answer=False,
            max_samples=config.training.max_eval_samples,
        )  # fmt: skip
        policy = load_policy(model, config.lora, rates)
        contract = PromptContract.current(config.prompt, config.data, policy.vision_tower)
        setup = TrainingSetup.from_config(config, rates, contract, run)
        rollout = RolloutSettings.from_training(config.training)
        return VideoGRPOTrainer(policy, train_set, val_set, CompositeReward(config.rewards), args, setup, rollout)

    return build
