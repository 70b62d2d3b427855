"""All frames in one call equal transformers' loop over frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

import trainers.vision_attention
from trainers.model import load_base
from trainers.vision_attention import FRAMEWISE
from utils.config import ModelConfig

GRIDS = {
    "one video": [(4, 2, 4)],
    "two of one size": [(3, 2, 2), (5, 2, 2)],
    "sizes that change": [(2, 4, 4), (3, 2, 4), (1, 4, 4)],
}


def features(model: Any, grids: list[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The tower's output and deepstack features for random patches, and the gradient of their sum of sines."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(sum(t * h * w for t, h, w in grids), 1536, generator=generator)
    output = model.model.get_video_features(patches, torch.tensor(grids), return_dict=True)
    parts = [*output.pooler_output, *(video for layer in output.deepstack_features for video in layer)]
    flat = torch.cat([part.flatten() for part in parts])
    flat.sin().sum().backward()
    return flat.detach(), torch.cat([p.grad.flatten() for p in model.model.visual.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("most", [2**28, 100], ids=["one call", "limited calls"])
def test_equal_to_the_loop_over_frames(tiny_model: Path, name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers.vision_attention, "MAX_SCORES", most)
    stock = Qwen3VLForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32)
    ours = load_base(str(tiny_model), ModelConfig(name_or_path=str(tiny_model), attn_implementation="sdpa"),
                     dtype=torch.float32)  # fmt: skip
    assert ours.model.visual.config._attn_implementation == FRAMEWISE
    values, gradient = features(ours, GRIDS[name])
    wanted, wanted_gradient = features(stock, GRIDS[name])
    assert torch.allclose(values, wanted, atol=1e-5)
    assert (gradient - wanted_gradient).norm() / wanted_gradient.norm() < 1e-5


def test_frames_of_one_size_are_one_call(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    plain = trainers.vision_attention.sdpa_attention_forward

    def counting(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(tuple(query.shape))
        return plain(module, query, *args, **kwargs)

    monkeypatch.setattr(trainers.vision_attention, "sdpa_attention_forward", counting)
    model = load_base(str(tiny_model), ModelConfig(name_or_path=str(tiny_model), attn_implementation="sdpa"),
                      dtype=torch.float32)  # fmt: skip
    features(model, [(6, 2, 4), (4, 2, 4)])
    assert {shape[0] for shape in calls} == {10}
    assert len(calls) == len(model.model.visual.blocks)


def test_a_saved_model_asks_for_plain_attention(tiny_model: Path, tmp_path: Path) -> None:
    model = load_base(str(tiny_model), ModelConfig(name_or_path=str(tiny_model)), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert FRAMEWISE not in (tmp_path / "config.json").read_text()
    again = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.vision_config._attn_implementation == "sdpa"
