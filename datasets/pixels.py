"""Frames -> the patches that the vision tower reads: the video processor's own numbers in one pass over memory.

The stock processor walks five times over the float32 pixels of a clip (150 to 190 MB at the default budget), and each
walk but the normalisation takes fresh memory from the system, page by page. Here bytes are put in patch order, turned
to float32 and normalised while they are in the CPU's cache, and written once. Whatever this file does not know (float
frames, resizing, several videos, another processor class) is left to the stock code.
"""

from __future__ import annotations

import copy
import functools
import mmap
from typing import Any

import torch
from transformers import BatchFeature
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

_HUGE_PAGE_BYTES = 2 * 2**20
_HUGE_PAGES_FROM = 4 * _HUGE_PAGE_BYTES
"""Smaller tensors come from the allocator, which hands memory out again without asking the system."""


def with_quick_pixels(processor: Any) -> Any:
    """A processor with the settings of `processor` and the same output, whose video processor is quick; `processor`
    itself where its video processor is not the stock class. `processor` is left as it is."""
    if type(processor.video_processor) is not Qwen3VLVideoProcessor:
        return processor
    quick = copy.copy(processor)
    quick.video_processor = OnePassVideoProcessor.like(processor.video_processor)
    return quick


class OnePassVideoProcessor(Qwen3VLVideoProcessor):
    """A `Qwen3VLVideoProcessor` with the same output, bit for bit, several times sooner for one clip of uint8 frames
    at its final size."""

    @classmethod
    def like(cls, stock: Qwen3VLVideoProcessor) -> OnePassVideoProcessor:
        """One with the settings of `stock`, which it shares."""
        made = cls.__new__(cls)
        made.__dict__ = stock.__dict__
        return made

    def _preprocess(self, videos: list[torch.Tensor], **settings: Any) -> BatchFeature:
        levels = self._levels(settings)
        if levels is None or len(videos) != 1 or videos[0].dtype != torch.uint8 or videos[0].shape[1] != len(levels[0]):
            return super()._preprocess(videos, **settings)
        sizes = {name: settings[name] for name in ("patch_size", "temporal_patch_size", "merge_size")}
        patches, grid = cut_patches(videos[0], *levels, **sizes)
        data = {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([grid])}
        return BatchFeature(data=data, tensor_type=settings.get("return_tensors"))

    def _levels(self, settings: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What is subtracted from a channel's bytes and what they are divided by; None where that is not all."""
        if settings["do_resize"] or not (settings["do_rescale"] and settings["do_normalize"]):
            return None
        mean, std, factor = settings["image_mean"], settings["image_std"], settings["rescale_factor"]
        if not (isinstance(mean, (list, tuple)) and isinstance(std, (list, tuple))):
            return None
        return _byte_levels(tuple(mean), tuple(std), factor)


def cut_patches(
    frames: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    *,
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
) -> tuple[torch.Tensor, list[int]]:
    """`(frames - mean) / std` in patches, in the order of `Qwen3VLVideoProcessor.patchify`.

    Args:
        frames: uint8 (T, C, H, W), in any memory order; H and W are multiples of patch_size * merge_size.
        mean: float32 (C,), in units of a byte.
        std: the same.

    Returns:
        float32 (patches, C * temporal_patch_size * patch_size ** 2), and the grid [t, h, w] in patches.
    """
    num_frames, channels, height, width = frames.shape
    grid = [-(-num_frames // temporal_patch_size), height // patch_size, width // patch_size]
    blocks = (grid[1] // merge_size, merge_size, patch_size, grid[2] // merge_size, merge_size, patch_size)
    cell = (channels, temporal_patch_size, patch_size, patch_size)
    patches = empty((grid[0] * grid[1] * grid[2], channels * temporal_patch_size * patch_size**2))
    rows = patches.view(grid[0], blocks[0], blocks[3], merge_size, merge_size, *cell)
    levels = [level.view(channels, 1, 1, 1) for level in (mean, std)]
    for time in range(grid[0]):
        few = frames[time * temporal_patch_size : (time + 1) * temporal_patch_size]
        if short := temporal_patch_size - len(few):
            few = torch.cat([few, few[-1:].expand(short, -1, -1, -1)])  # the last frame stands for those that lack
        planes = few.contiguous().view(temporal_patch_size, channels, *blocks).permute(2, 5, 3, 6, 1, 0, 4, 7)
        for row, source in zip(rows[time], planes, strict=True):  # a row of blocks stays in the CPU's cache
            row.copy_(source).sub_(levels[0]).div_(levels[1])
    return patches, grid


def empty(shape: tuple[int, ...]) -> torch.Tensor:
    """An uninitialised float32 tensor; a large one lies in huge pages where the system has them.

    Memory fresh from the system costs a page fault for each 4 KiB: ten times what it takes to write it.
    """
    num_bytes = 4 * int(torch.Size(shape).numel())
    if num_bytes < _HUGE_PAGES_FROM or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape)
    size = -(-num_bytes // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32, count=num_bytes // 4).view(shape)


@functools.lru_cache(maxsize=16)
def _byte_levels(
    mean: tuple[float, ...], std: tuple[float, ...], factor: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Mean and deviation in units of a byte, (C,) each, if with them each of the 256 values a channel's byte can have
    becomes what the stock code makes of it; None if not."""
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, len(mean), 16, 16)
    wanted = Qwen3VLVideoProcessor().rescale_and_normalize(every, True, factor, True, mean, std)
    levels = torch.tensor(mean) * (1.0 / factor), torch.tensor(std) * (1.0 / factor)
    found = (every.float() - levels[0].view(-1, 1, 1)) / levels[1].view(-1, 1, 1)
    return levels if torch.equal(found, wanted) else None
