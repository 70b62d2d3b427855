"""Patches made in one pass are the stock processor's, bit for bit; what is not known is left to it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datasets import pixels
from datasets.collate_fns import join_patches
from datasets.encoding import encode_prompt
from datasets.pixels import OnePassVideoProcessor, cut_patches, empty, with_quick_pixels
from trainers.model import load_processor, resolve_source
from utils.config import PromptConfig
from utils.prompts import build_messages
from utils.video import VideoClip


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Any:
    return load_processor(resolve_source(str(tiny_model)))


def some_clip(count: int, height: int, width: int) -> VideoClip:
    frames = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return VideoClip(frames, np.arange(count) / 2.0, 0.0, count / 2)


def stock_inputs(processor: Any, clip: VideoClip) -> Any:
    """What transformers' own code gives, without this project's encoding."""
    messages = build_messages(PromptConfig(), "x")
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return processor(
        text=[text], videos=[torch.from_numpy(clip.frames).permute(0, 3, 1, 2)], video_metadata=[clip.metadata()],
        do_sample_frames=False, do_resize=False, cap_pixels_per_frame=True, return_tensors="pt",
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(2, 32, 32), (1, 32, 64), (7, 96, 64), (20, 256, 288)])
@pytest.mark.parametrize("levels", ["released", "by channel"])
def test_equal_to_the_stock_processor(processor: Any, shape: tuple[int, int, int], levels: str) -> None:
    """An odd number of frames, both kinds of memory, and means that differ from channel to channel."""
    processor = copy.deepcopy(processor)
    if levels == "by channel":
        processor.video_processor.image_mean = [0.48145466, 0.4578275, 0.40821073]
        processor.video_processor.image_std = [0.26862954, 0.26130258, 0.27577711]
    clip = some_clip(*shape)
    found, wanted = encode_prompt(processor, build_messages(PromptConfig(), "x"), clip), stock_inputs(processor, clip)
    for name in ("pixel_values_videos", "video_grid_thw"):
        assert found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]), name
    for name in ("input_ids", "mm_token_type_ids"):
        assert torch.equal(found[name], wanted[name][0]), name


def test_the_quick_way_is_taken_and_the_processor_is_left_alone(
    processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut, stock, before = [], processor.video_processor, dict(processor.video_processor.__dict__)
    real = cut_patches
    monkeypatch.setattr(pixels, "cut_patches", lambda *args, **sizes: cut.append(sizes) or real(*args, **sizes))
    encode_prompt(processor, build_messages(PromptConfig(), "x"), some_clip(4, 32, 32))
    assert cut == [{"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}]
    assert processor.video_processor is stock and stock.__dict__ == before


@pytest.mark.parametrize("case", ["float frames", "two clips", "resizing", "no normalising"])
def test_what_is_not_known_is_left_to_the_stock_code(
    processor: Any, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(pixels, "cut_patches", lambda *_args, **_sizes: pytest.fail("not for this"))
    frames = torch.from_numpy(some_clip(4, 64, 64).frames).permute(0, 3, 1, 2)
    videos = {"float frames": [frames.float()], "two clips": [frames, frames]}.get(case, [frames])
    options = {"do_sample_frames": False, "cap_pixels_per_frame": True, "do_resize": case == "resizing"}
    options["do_normalize"] = case != "no normalising"
    quick, stock = OnePassVideoProcessor.like(processor.video_processor), processor.video_processor
    found, wanted = (one(videos=videos, return_tensors="pt", **options) for one in (quick, stock))
    assert torch.equal(found["pixel_values_videos"], wanted["pixel_values_videos"])
    assert torch.equal(found["video_grid_thw"], wanted["video_grid_thw"])


def test_arithmetic_that_is_not_the_stock_one_is_not_used(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release that normalises in another way: each byte's value is compared first."""
    pixels._byte_levels.cache_clear()
    monkeypatch.setattr(pixels.Qwen3VLVideoProcessor, "rescale_and_normalize", lambda self, videos, *_: videos.float())
    try:
        assert pixels._byte_levels((0.5,) * 3, (0.5,) * 3, 1 / 255) is None
    finally:
        pixels._byte_levels.cache_clear()


def test_another_video_processor_is_used_as_it_is(processor: Any) -> None:
    class Own(type(processor.video_processor)):  # type: ignore[misc]
        pass

    other = copy.copy(processor)
    other.video_processor = Own()
    assert with_quick_pixels(other) is other


def test_huge_pages_are_plain_memory() -> None:
    large = empty((3, 2**20 + 1))
    assert large.shape == (3, 2**20 + 1) and large.dtype == torch.float32 and large.is_contiguous()
    large.fill_(2.0)
    assert float(large.double().sum()) == 2 * large.numel()


def test_patches_of_several_clips_are_joined_and_those_of_one_are_not_copied() -> None:
    clips = [torch.randn(2**11, 1536), torch.randn(3, 1536), torch.randn(2**10, 1536)]
    assert torch.equal(join_patches(clips), torch.cat(clips))
    assert join_patches(clips[:1]) is clips[0]
