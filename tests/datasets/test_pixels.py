"""What the model reads of a sample is the stock processor's output, bit for bit; what is not known is left to it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datasets import pixels
from datasets.encoding import encode_prompt
from datasets.pixels import Pixels, empty, patching_of, pixel_values, with_pixel_values, without_patches
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
    sample, wanted = encode_prompt(processor, build_messages(PromptConfig(), "x"), clip), stock_inputs(processor, clip)
    assert sample["pixels"].source.dtype == torch.uint8 and "pixel_values_videos" not in sample
    assert sample["pixels"].shape == wanted["pixel_values_videos"].shape
    found = with_pixel_values(sample)
    for name in ("pixel_values_videos", "video_grid_thw"):
        assert found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]), name
    for name in ("input_ids", "mm_token_type_ids"):
        assert torch.equal(found[name], wanted[name][0]), name


def test_the_ways_of_a_gpu_and_of_threads_give_the_same(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    patching = patching_of(processor)
    assert patching is not None
    frames = torch.from_numpy(some_clip(8, 96, 64).frames)
    wanted, found = pixel_values([Pixels(frames, patching)]), torch.full((96, 1536), torch.nan)
    pixels._cut_at_once(frames, patching, found)
    assert torch.equal(found, wanted)
    monkeypatch.setattr(pixels, "_THREADS_FROM", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(pixel_values([Pixels(frames, patching)]), wanted)


def test_the_frames_are_not_copied_and_the_processor_is_left_alone(processor: Any) -> None:
    stock, before = processor.video_processor, dict(processor.video_processor.__dict__)
    clip = some_clip(4, 32, 32)
    sample = encode_prompt(processor, build_messages(PromptConfig(), "x"), clip)
    assert sample["pixels"].source.data_ptr() == clip.frames.ctypes.data
    assert processor.video_processor is stock and stock.__dict__ == before


@pytest.mark.parametrize(
    "case", ["another class", "no normalising", "no rescaling", "one mean for all", "a list of one"]
)
def test_what_is_not_known_is_left_to_the_stock_code(processor: Any, case: str) -> None:
    class Own(type(processor.video_processor)):  # type: ignore[misc]
        pass

    other = copy.deepcopy(processor)
    if case == "another class":
        other.video_processor.__class__ = Own
    elif case == "one mean for all":
        other.video_processor.image_mean = other.video_processor.image_std = 0.25
    elif case == "a list of one":
        other.video_processor.image_mean = other.video_processor.image_std = [0.25]
    else:
        setattr(other.video_processor, {"no normalising": "do_normalize", "no rescaling": "do_rescale"}[case], False)
    assert patching_of(other) is None
    clip = some_clip(3, 64, 32)
    sample, wanted = encode_prompt(other, build_messages(PromptConfig(), "x"), clip), stock_inputs(other, clip)
    assert sample["pixels"].patching is None
    assert torch.equal(pixel_values([sample["pixels"]]), wanted["pixel_values_videos"].float())


def test_what_the_model_reads_is_float32_whatever_else_is() -> None:
    batch = {"pixels": [Pixels(torch.ones(2, 1536, dtype=torch.uint8))], "indices": [0]}
    torch.set_default_dtype(torch.float64)
    try:
        blind = pixels.blinded(batch)
        assert pixel_values(batch["pixels"]).dtype == pixel_values(blind["pixels"]).dtype == torch.float32
        assert empty((2, 3), torch.device("cpu")).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert batch["pixels"] != blind["pixels"] and batch["pixels"] == list(batch["pixels"])  # compared as objects


def test_frames_that_cannot_be_divided_are_refused(processor: Any) -> None:
    patching = patching_of(processor)
    assert patching is not None
    with pytest.raises(ValueError, match="frames of 48 x 32 x 3 are no whole blocks of 32 x 32"):
        without_patches(processor, patching).video_processor(
            videos=[torch.zeros(2, 3, 48, 32, dtype=torch.uint8)], do_sample_frames=False, do_resize=False
        )


def test_arithmetic_that_is_not_the_stock_one_is_not_used(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release that normalises in another way: each byte's value is compared first."""
    pixels._byte_levels.cache_clear()
    monkeypatch.setattr(pixels.Qwen3VLVideoProcessor, "rescale_and_normalize", lambda self, videos, *_: videos.float())
    try:
        assert pixels._byte_levels((0.5,) * 3, (0.5,) * 3, 1 / 255) is None
    finally:
        pixels._byte_levels.cache_clear()


def test_huge_pages_are_plain_memory() -> None:
    large = empty((3, 2**20 + 1), torch.device("cpu"))
    assert large.shape == (3, 2**20 + 1) and large.dtype == torch.float32 and large.is_contiguous()
    large.fill_(2.0)
    assert float(large.double().sum()) == 2 * large.numel()


def test_patches_of_several_clips_are_joined(processor: Any) -> None:
    """Clips of different sizes, one of them by the stock code."""
    patching = patching_of(processor)
    frames = [torch.from_numpy(some_clip(*shape).frames) for shape in ((3, 32, 64), (20, 256, 288))]
    ready = Pixels(torch.randn(5, 1536))
    clips = [Pixels(frames[0], patching), ready, Pixels(frames[1], patching)]
    wanted = torch.cat([pixel_values([clip]) for clip in clips])
    assert torch.equal(pixel_values(clips), wanted)
    assert pixel_values([ready]) is ready.source


def test_a_worker_sends_a_clip_as_bytes(processor: Any) -> None:
    """Through the pipe of a data loader: frames, how they are cut, and no float."""
    sample = encode_prompt(processor, build_messages(PromptConfig(), "x"), some_clip(4, 64, 64))
    loader = torch.utils.data.DataLoader([sample], batch_size=1, collate_fn=lambda rows: rows[0], num_workers=1)
    (received,) = loader
    assert received["pixels"].source.dtype == torch.uint8 and received["pixels"].patching == sample["pixels"].patching
    assert torch.equal(pixel_values([received["pixels"]]), pixel_values([sample["pixels"]]))
