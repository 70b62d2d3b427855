"""Frames -> the patches that the vision tower reads: the video processor's own numbers, made where the model is.

The stock processor walks five times over the float32 pixels of a clip (150 to 190 MB at the default budget), each walk
but the normalisation in memory fresh from the system, and a data worker then hands all of it to the training process.
Here a sample holds its clip as uint8 frames, a quarter of that and often a map of the cache's file (`Pixels`).
`pixel_values` cuts and normalises them in one pass, on the model's device. Whatever this file does not know (another
processor class, odd settings, arithmetic that is not the stock code's) is left to the stock processor; the sample then
holds what it gave.
"""

from __future__ import annotations

import copy
import functools
import math
import mmap
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

VALUES = "pixel_values_videos"
"""The model's name for what it reads: float32 (patches, patch_dim), the patches of all clips one after the other."""

CHANNELS = 3
"""Of a frame: red, green, blue."""
_THREADS_FROM = 2**21
"""Values; fewer are cut sooner than threads are started."""
_HUGE_PAGE_BYTES = 2 * 2**20
_HUGE_PAGES_FROM = 4 * _HUGE_PAGE_BYTES
"""Smaller tensors come from the allocator, which hands memory out again without asking the system."""


# ---------------------------------------------------------------------------------------------- what a sample holds
@dataclass(frozen=True)
class Patching:
    """How a video processor makes patches of uint8 frames at their final size."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    mean: tuple[float, ...]
    """Subtracted from the bytes of each channel: float32 values."""
    std: tuple[float, ...]
    """What they are then divided by."""

    @property
    def patch_dim(self) -> int:
        """Values of a patch."""
        return len(self.mean) * self.temporal_patch_size * self.patch_size**2

    def grid(self, shape: Sequence[int]) -> list[int]:
        """[t, h, w] in patches, of frames (T, H, W, C). Raises ValueError where they cannot be divided."""
        num_frames, height, width, channels = shape
        if height % (side := self.patch_size * self.merge_size) or width % side or channels != len(self.mean):
            raise ValueError(f"frames of {height} x {width} x {channels} are no whole blocks of {side} x {side}")
        return [math.ceil(num_frames / self.temporal_patch_size), height // self.patch_size, width // self.patch_size]


@dataclass(frozen=True, eq=False)
class Pixels:
    """The pixels of one clip on their way to the model; `pixel_values` makes of them what it reads."""

    source: Tensor
    """uint8 frames (T, H, W, C), or the stock processor's patches (patches, patch_dim) where `patching` is None."""
    patching: Patching | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of what the model reads: (patches, patch_dim)."""
        if self.patching is None:
            return self.source.shape[0], self.source.shape[1]
        return math.prod(self.patching.grid(self.source.shape)), self.patching.patch_dim

    def pin_memory(self) -> Pixels:
        """A copy that a GPU takes without waiting; a `DataLoader` with `pin_memory` asks for it."""
        return replace(self, source=self.source.pin_memory())

    def write(self, target: Tensor) -> None:
        """Write the patches to `target`, float32 (patches, patch_dim), on its device."""
        source = self.source.to(target.device, non_blocking=True)
        if self.patching is None:
            target.copy_(source)
        else:
            cut_patches(source, self.patching, target)


def pixel_values(clips: Sequence[Pixels], device: torch.device | str = "cpu") -> Tensor:
    """What the vision tower reads of `clips`, one after the other: float32 (patches, patch_dim) on `device`.

    Bit for bit what the stock video processor gives for the same frames. Do not write to it: it may be the clip's own.
    """
    if len(clips) == 1 and clips[0].patching is None:
        return clips[0].source.to(device, torch.float32)
    counts = [clip.shape[0] for clip in clips]
    values = empty((sum(counts), clips[0].shape[1]), torch.device(device))
    for clip, target in zip(clips, values.split(counts), strict=True):
        clip.write(target)
    return values


def with_pixel_values(inputs: Mapping[str, Any], device: torch.device | str = "cpu") -> dict[str, Any]:
    """A sample or a batch with `pixel_values_videos` on `device` in place of its `pixels`."""
    rest = dict(inputs)
    pixels = rest.pop("pixels")
    return rest | {VALUES: pixel_values([pixels] if isinstance(pixels, Pixels) else pixels, device)}


def blinded(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of whose videos the model reads zeros, and all else as it is: times, questions and answers."""
    return {**batch, "pixels": [Pixels(torch.zeros(clip.shape, dtype=torch.float32)) for clip in batch["pixels"]]}


# ---------------------------------------------------------------------------------------------- the processor
def patching_of(processor: Any) -> Patching | None:
    """How `processor` makes patches; None where that is not known to the last bit."""
    stock = processor.video_processor
    if type(stock) is not Qwen3VLVideoProcessor or not (stock.do_rescale and stock.do_normalize):
        return None
    mean, std = stock.image_mean, stock.image_std
    by_channel = all(isinstance(level, (list, tuple)) and len(level) == CHANNELS for level in (mean, std))
    if not by_channel or not isinstance(stock.rescale_factor, (int, float)):
        return None
    levels = _byte_levels(tuple(mean), tuple(std), stock.rescale_factor)
    sizes = stock.patch_size, stock.temporal_patch_size, stock.merge_size
    return None if levels is None else Patching(*sizes, *(tuple(level.tolist()) for level in levels))


def without_patches(processor: Any, patching: Patching) -> Any:
    """A processor with the settings of `processor` and the same tokens, which leaves the patches to `pixel_values`.
    `processor` is left as it is."""
    quick = copy.copy(processor)
    quick.video_processor = _GridProcessor.__new__(_GridProcessor)
    quick.video_processor.__dict__ = {**processor.video_processor.__dict__, "patching": patching}
    return quick


class _GridProcessor(Qwen3VLVideoProcessor):
    """A `Qwen3VLVideoProcessor` that gives the grid of each clip alone, which is all that the tokens depend on."""

    patching: Patching

    def _preprocess(self, videos: list[Tensor], **settings: Any) -> BatchFeature:
        grids = [self.patching.grid(video.permute(0, 2, 3, 1).shape) for video in videos]
        return BatchFeature({"video_grid_thw": torch.tensor(grids)}, tensor_type=settings.get("return_tensors"))


# ---------------------------------------------------------------------------------------------- the arithmetic
def cut_patches(frames: Tensor, patching: Patching, target: Tensor) -> None:
    """Write `(frames - mean) / std` in patches, in the order of `Qwen3VLVideoProcessor.patchify`.

    Args:
        frames: uint8 (T, H, W, C), in any memory order; H and W are multiples of patch_size * merge_size.
        patching: as `patching_of` gives it.
        target: float32 (patches, patch_dim), contiguous, on the device of `frames`.
    """
    if short := -len(frames) % patching.temporal_patch_size:
        frames = torch.cat([frames, frames[-1:].expand(short, -1, -1, -1)])  # the last one stands for those that lack
    if target.device.type == "cpu":
        _cut_by_block(frames.numpy(), patching, target.numpy())
    else:
        _cut_at_once(frames, patching, target)


def _cut_at_once(frames: Tensor, patching: Patching, target: Tensor) -> None:
    """As suits a GPU: all blocks in one kernel, twice over what it wrote."""
    split, order, cell = _blocks(frames.shape, patching)
    mean, std = (target.new_tensor(level).view(-1, 1, 1, 1) for level in (patching.mean, patching.std))
    target.view(cell).copy_(frames.reshape(split).permute(order)).sub_(mean).div_(std)


def _cut_by_block(frames: np.ndarray, patching: Patching, target: np.ndarray) -> None:
    """As suits a CPU: a row of blocks is finished while it is in the cache. On as many threads as torch has, of our
    own: those of torch wait for each other after each operation, and on cores that data workers use, for long."""
    split, order, cell = _blocks(frames.shape, patching)
    mean, std = (np.array(level, dtype=np.float32).reshape(-1, 1, 1, 1) for level in (patching.mean, patching.std))
    steps = list(zip(target.reshape(cell), frames.reshape(split).transpose(order), strict=True))

    def cut(step: tuple[np.ndarray, np.ndarray]) -> None:
        for row, source in zip(*step, strict=True):
            np.copyto(row, source)
            np.subtract(row, mean, out=row)
            np.divide(row, std, out=row)

    num_threads = min(torch.get_num_threads(), len(steps))
    if num_threads == 1 or target.size < _THREADS_FROM:
        for step in steps:
            cut(step)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(cut, steps))


def _blocks(shape: Sequence[int], patching: Patching) -> tuple[list[int], list[int], list[int]]:
    """How frames (T, H, W, C) are split, how the parts are put in order, and the shape that gives: (time, rows,
    columns, merge, merge, C, steps, side, side)."""
    (times, height, width), channels = patching.grid(shape), shape[3]
    steps, merge, side = patching.temporal_patch_size, patching.merge_size, patching.patch_size
    split = [times, steps, height // merge, merge, side, width // merge, merge, side, channels]
    order = [0, 2, 5, 3, 6, 8, 1, 4, 7]
    return split, order, [split[axis] for axis in order]


def empty(shape: tuple[int, int], device: torch.device) -> Tensor:
    """An uninitialised float32 tensor; a large one in the CPU's memory lies in huge pages where the system has them.

    Memory fresh from the system costs a page fault for each 4 KiB: ten times what it takes to write it.
    """
    num_bytes = 4 * math.prod(shape)
    if device.type != "cpu" or num_bytes < _HUGE_PAGES_FROM or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=torch.float32, device=device)
    size = -(-num_bytes // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32, count=num_bytes // 4).view(shape)


@functools.lru_cache(maxsize=16)
def _byte_levels(mean: tuple[float, ...], std: tuple[float, ...], factor: float) -> tuple[Tensor, Tensor] | None:
    """Mean and deviation in units of a byte, (C,) each, if with them each of the 256 values a channel's byte can have
    becomes what the stock code makes of it; None if not."""
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, len(mean), 16, 16)
    wanted = Qwen3VLVideoProcessor().rescale_and_normalize(every, True, factor, True, mean, std)
    levels = torch.tensor(mean) * (1.0 / factor), torch.tensor(std) * (1.0 / factor)
    found = (every.float() - levels[0].view(-1, 1, 1)) / levels[1].view(-1, 1, 1)
    return levels if torch.equal(found, wanted) else None
