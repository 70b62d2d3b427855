"""What every test process needs. Fixtures live beside the tests that use them (`tests/trainers/conftest.py`, ...)."""

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

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

from utils.common import REPO_ROOT  # noqa: E402
from utils.config import PromptConfig  # noqa: E402


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


def _script(name: str) -> ModuleType:
    """A tool of scripts/ as a module; the folder is no package."""
    spec = importlib.util.spec_from_file_location(name, REPO_ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and worker processes look their module up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small easy demo set: `train.jsonl` (24 videos, 48 queries), `val.jsonl` and `test.jsonl` (8 and 16 each)."""
    folder = tmp_path_factory.mktemp("demo") / "data"
    _script("make_demo_data").make_demo_data(folder, num_train=24, num_val=8, num_test=8, workers=1)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3-VL checkpoint with tied embeddings, in the Hugging Face layout."""
    make_tiny = _script("make_tiny_model")
    sentences = _script("make_demo_data").all_sentences()
    texts = make_tiny.prompt_texts(sentences, PromptConfig(question="When does it happen that {sentence}?"))
    return make_tiny.build_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model", texts)


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    """An entry script's `main` sets the logger up for itself; the next test finds it as it was."""
    logger = logging.getLogger("vtg")
    before = logger.level, logger.propagate, list(logger.handlers)
    logger.propagate = True  # caplog listens at the root
    yield
    logger.level, logger.propagate, logger.handlers[:] = before
