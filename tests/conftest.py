"""What every test process needs. Fixtures live beside the tests that use them (`tests/trainers/conftest.py`, ...)."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    """An entry script's `main` sets the logger up for itself; the next test finds it as it was."""
    logger = logging.getLogger("vtg")
    before = logger.level, logger.propagate, list(logger.handlers)
    logger.propagate = True  # caplog listens at the root
    yield
    logger.level, logger.propagate, logger.handlers[:] = before
