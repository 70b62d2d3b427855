"""Decoding alone: clips like a benchmark's, decoders against each other, and memory over many decodes.

`make_clip` writes a moving, textured picture: x264 with B-frames and a key frame every 250 frames, as most files of the
public datasets have. Each way of reading is measured in turn within every repeat, medians are given, and every read
sums all pixels it claims to have.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from utils import video_file
from utils.video import FrameBudget, VideoClip, read_clip
from utils.video_writer import write_mp4_stream

HEIGHTS = {"32p": (32, 32), "360p": (360, 640), "720p": (720, 1280)}
FPS = 30
BUDGET = FrameBudget(2.0, 4, 768, 16384, 262144, 16777216)
"""The shipped configuration's."""


def make_clip(path: Path, size: str, seconds: float, *, gop_size: int | None = None) -> Path:
    """Write a clip of `size` ("32p", "360p", "720p") unless it is there; two seconds of CPU for ten of 720p."""
    if not path.is_file():
        height, width = HEIGHTS[size]
        count = round(seconds * FPS)
        frames = _moving_frames(count, height, width)
        write_mp4_stream(path, frames, size=(height, width), num_frames=count, fps=FPS, crf=23, gop_size=gop_size)
    return path


def _moving_frames(count: int, height: int, width: int) -> Iterator[np.ndarray]:
    """uint8 (H, W, 3): a window that glides over a landscape of smooth noise, with a bright patch of its own motion."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (2 * height // 8 + 2, 2 * width // 8 + 2, 3), dtype=np.uint8)
    fine = rng.integers(0, 24, (2 * height, 2 * width, 1), dtype=np.uint8)
    ground = np.repeat(np.repeat(coarse, 8, axis=0), 8, axis=1)[: 2 * height, : 2 * width] // 2 + 40
    ground = np.ascontiguousarray(ground + fine)
    side = height // 4
    for i in range(count):
        y = round((np.sin(i / 90) + 1) / 2 * height)
        x = round((np.cos(i / 140) + 1) / 2 * width)
        frame = ground[y : y + height, x : x + width].copy()
        top, left = (i * 3) % (height - side), (i * 5) % (width - side)
        frame[top : top + side, left : left + side] = 235
        yield frame


def checksum(clip: VideoClip) -> int:
    """Sum of all pixels: every byte is touched."""
    return int(clip.frames.sum(dtype=np.int64))


def measure_backends(
    path: Path, ways: Sequence[str], repeats: int, *, num_threads: int, start_s: float | None = None,
    end_s: float | None = None, budget: FrameBudget = BUDGET,
) -> dict[str, float]:  # fmt: skip
    """Median seconds of one read by each backend, after a read to warm up; decoders use up to `num_threads`."""
    before, video_file.MAX_THREADS = video_file.MAX_THREADS, num_threads
    taken: dict[str, list[float]] = {way: [] for way in ways}
    try:
        for turn in range(repeats + 1):
            for way in ways:
                started = time.perf_counter()
                checksum(read_clip(path, budget, start_s=start_s, end_s=end_s, backend=way))
                if turn:
                    taken[way].append(time.perf_counter() - started)
    finally:
        video_file.MAX_THREADS = before
    return {way: statistics.median(found) for way, found in taken.items()}
