"""A tiny Qwen3-VL and a small demo set for every test that needs one, each built once per process.

from tests.tiny import demo_data, demo_rows, tiny_checkpoint

@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts.make_demo_data import DemoData, all_sentences, make_demo_data
from scripts.make_tiny_model import build_tiny_checkpoint, prompt_texts
from utils.config import PromptConfig
from utils.rows import Row

_checkpoints: dict[tuple[Any, ...], Path] = {}
_demo_data: dict[tuple[Any, ...], DemoData] = {}


def tiny_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, *, prompt: PromptConfig | None = None, **settings: Any
) -> Path:
    """The folder of a tiny random checkpoint (model and processor); never write into it, copy it.

    `settings` go to `build_tiny_checkpoint` (hidden, layers, vision_hidden, vision_layers, tie, seed). The tokenizer
    knows the words of `prompt` (the default prompt if None) about the demo's sentences.
    """
    prompt = prompt or PromptConfig()
    key = (prompt.model_dump_json(), *sorted(settings.items()))
    if key not in _checkpoints:
        folder = tmp_path_factory.mktemp("tiny") / "tiny_model"
        _checkpoints[key] = build_tiny_checkpoint(folder, prompt_texts(all_sentences(), prompt), **settings)
    return _checkpoints[key]


def demo_data(tmp_path_factory: pytest.TempPathFactory, **settings: Any) -> DemoData:
    """A small demo set on disk: `.annotations["train"]` is the path of its JSONL; never write into its folder.

    `settings` go to `make_demo_data` (num_train 8, num_val 4, num_test 4 unless given, level, seed).
    """
    settings = {"num_train": 8, "num_val": 4, "num_test": 4, "workers": 1, **settings}
    key = tuple(sorted(settings.items()))
    if key not in _demo_data:
        _demo_data[key] = make_demo_data(tmp_path_factory.mktemp("demo"), **settings)
    return _demo_data[key]


def demo_rows(tmp_path_factory: pytest.TempPathFactory, split: str = "train", **settings: Any) -> list[Row]:
    """The rows of one split of `demo_data(...)`; their videos exist and resolve against `row.file`."""
    return demo_data(tmp_path_factory, **settings).rows[split]
