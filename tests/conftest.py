"""What every test process needs. Fixtures live beside the tests that use them (`tests/trainers/conftest.py`, ...)."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Set before torch is imported, and inherited by the processes that tests start.
for _name, _value in {
    "OMP_NUM_THREADS": "1",  # sums in the same order on every machine; several processes share few cores
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",  # or its threads make every fork warn
    "HF_HUB_OFFLINE": "1",  # no test waits for a network
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(_name, _value)

from utils.attach import attach  # noqa: E402

attach()

from tests import tiny  # noqa: E402
from utils.config import PromptConfig  # noqa: E402


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small easy demo set: the folder of `train.jsonl` (24 videos), `val.jsonl` and `test.jsonl` (8 each)."""
    return tiny.demo_data(tmp_path_factory, num_train=24, num_val=8, num_test=8).annotations["train"].parent


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3-VL checkpoint with tied embeddings, in the Hugging Face layout."""
    return tiny.tiny_checkpoint(tmp_path_factory, prompt=PromptConfig(question="When {sentence}?"))


@pytest.fixture(scope="session")
def answering_model(tiny_model: Path, demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full checkpoint that has learnt to answer in windows, if not the right ones: something to reward."""
    from datasets.video_dataset import VideoTemporalDataset
    from trainers.model import load_policy, load_processor, resolve_source
    from trainers.parts import LearningRates
    from trainers.run_keeper import TrainingSetup
    from trainers.sft_trainer import VideoSFTTrainer
    from utils.common import REPO_ROOT, seed_everything
    from utils.config import SFTConfig, load_config
    from utils.prompts import PromptContract

    folder = tmp_path_factory.mktemp("answering")
    overrides = [
        f"model.name_or_path={tiny_model}",
        *(f"data.{split}={demo_data / split}.jsonl" for split in ("train", "val")),
        "data.cache_dir=null",
        "training.per_device_train_batch_size=16",
        "training.max_steps=40",
        "training.dataloader_num_workers=0",
        "training.eval_strategy=no",
        "training.save_strategy=no",
        "training.disable_tqdm=true",
        "training.use_cpu=true",
        "training.report_to=none",
    ]
    names = ("sft_config.yaml", "video_config.yaml")
    config = load_config(SFTConfig, [REPO_ROOT / "configs/demo" / name for name in names], overrides)
    seed_everything(0)
    processor = load_processor(resolve_source(str(tiny_model)))
    train_set = VideoTemporalDataset(config.data, processor, config.prompt)
    rates = LearningRates.from_training(config.training)
    policy = load_policy(config.model, config.lora, rates)
    contract = PromptContract.current(config.prompt, config.data)
    args: Any = config.training.to_training_arguments(output_dir=folder)
    trainer = VideoSFTTrainer(policy, train_set, None, args, TrainingSetup.from_config(config, rates, contract, None))
    trainer.train()
    return trainer.save_named("checkpoint-final")


@pytest.fixture(scope="session")
def answering_adapter(answering_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA checkpoint on `answering_model`, of the demo's GRPO shape, as train_sft.py leaves one."""
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    from trainers.model import add_lora, load_processor, resolve_source
    from trainers.parts import LearningRates
    from utils.checkpoints import write_manifest
    from utils.common import REPO_ROOT
    from utils.config import RLConfig, load_config
    from utils.prompts import PromptContract

    source = resolve_source(str(answering_model))
    base = Qwen3VLForConditionalGeneration.from_pretrained(answering_model, dtype=torch.float32)
    lora = load_config(RLConfig, [REPO_ROOT / "configs/demo/rl_config.yaml"]).lora
    torch.manual_seed(0)
    model = add_lora(base, lora, LearningRates(1e-4, 0.0, 0.0, 0.0), fp32_copies=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.005)
    folder = tmp_path_factory.mktemp("adapter") / "checkpoint-best"
    model.save_pretrained(folder)
    load_processor(source).save_pretrained(folder)
    PromptContract.load(answering_model).save(folder)
    write_manifest(folder)
    return folder


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    """An entry script's `main` sets the logger up for itself; the next test finds it as it was."""
    logger = logging.getLogger("vtg")
    before = logger.level, logger.propagate, list(logger.handlers)
    logger.propagate = True  # caplog listens at the root
    yield
    logger.level, logger.propagate, logger.handlers[:] = before


_WORLD = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}


@pytest.fixture(autouse=True)
def _world_as_it_was() -> Iterator[None]:
    """A run with --deepspeed makes its process a world of one; a process that a later test starts is no part of it."""
    yield
    for name, value in _WORLD.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
