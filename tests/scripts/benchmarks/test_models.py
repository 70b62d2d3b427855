"""The sizes are those of the released models, and what trains in them is what is said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from scripts.bench import SIZES as CHOICES
from scripts.benchmarks.models import SIZES, build_model, demo_processor, make_clip, make_trainable, model_config
from trainers.parts import part_of
from trainers.shared_prefix import vision_is_frozen


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return demo_processor().tokenizer


@pytest.mark.parametrize(("size", "billions"), [("2b", 2.13), ("4b", 4.44), ("8b", 8.77)])
def test_sizes_are_the_released_ones(size: str, billions: float, tokenizer: Any) -> None:
    """Totals of the published checkpoints, to two decimals; a tied head counts once."""
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(model_config(size, tokenizer))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)
    tied = model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert tied == SIZES[size].tie
    assert model.model.language_model.rotary_emb.mrope_section == [24, 20, 20]


def test_a_real_size_trains_lora_on_the_language_models_attention(tokenizer: Any) -> None:
    config = model_config("2b", tokenizer)
    with torch.device("meta"):
        wrapped = make_trainable(Qwen3VLForConditionalGeneration(config), "2b")
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    layers, projections, matrices = 28, 4, 2
    assert len(trained) == layers * projections * matrices
    assert all("lora_" in name and "language_model" in name for name in trained)
    assert vision_is_frozen(wrapped)
    assert any(
        module.gradient_checkpointing for module in wrapped.modules() if hasattr(module, "gradient_checkpointing")
    )


def test_the_command_line_offers_every_size() -> None:
    assert CHOICES == ("tiny", *SIZES)


@pytest.mark.parametrize(
    ("size", "vision", "parts"),
    [
        ("tiny", None, {"language", "head", "mm_projector", "vision_tower"}),
        ("tiny", False, {"language", "head"}),
        ("4b", None, {"language"}),
        ("4b", True, {"language", "mm_projector", "vision_tower"}),
    ],
)
def test_vision_trains_where_asked(size: str, vision: bool | None, parts: set[str], tokenizer: Any) -> None:
    """On the tiny weights, with a real size's way of training."""
    model = make_trainable(build_model("tiny", "cpu", tokenizer), size, vision=vision)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {part_of(name) for name in trained} == parts
    assert vision_is_frozen(model) == (not parts & {"mm_projector", "vision_tower"})
    assert all("lora_" in name for name in trained if size != "tiny" and part_of(name) == "language")


def test_clips_of_other_seeds_are_other_clips_of_that_length() -> None:
    one, same, other = (make_clip(demo_processor(), 150, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(one.frames, same.frames)
    assert one.frames.shape == other.frames.shape and not np.array_equal(one.frames, other.frames)
