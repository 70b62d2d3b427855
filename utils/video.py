"""Video in: which frames to take, how large, and the clip with their true times.

Sampling, sizes and the clip live here; `utils.video_file` knows what a file holds, `utils.video_backends` decodes it,
`utils.video_writer` writes test and demo files.

Two clocks. The file's clock is 0 when the first video frame is shown; `start_s` and `end_s` are on it. The clip's clock
is 0 at `start_s`; `times_s`, and so the markers the model reads, are on it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.common import UserError, nearest
from utils.video_backends import read_decord, read_pyav, read_qwen
from utils.video_file import VideoFile, VideoReadError
from utils.video_writer import write_mp4

__all__ = [
    "BACKENDS",
    "VIRTUAL_FPS",
    "FrameBudget",
    "VideoClip",
    "VideoInfo",
    "VideoReadError",
    "clip_from_frames",
    "plan_num_frames",
    "plan_size",
    "probe_video",
    "read_clip",
    "require_backend",
    "resize_clip",
    "write_mp4",
]

BACKENDS = ("auto", "decord", "pyav", "qwen_vl_utils")
"""`auto` is PyAV for every file: measured, decord was nowhere faster (docs/benchmarks.md, "Decoding"), because what a
file holds, and when it shows it, must be looked up by PyAV first in any case. It needs no second package, and leaves
room for another choice."""

SIZE_FACTOR = 32
"""Height and width are multiples of this: patches of 16 pixels, merged 2 x 2."""

TEMPORAL_PATCH = 2
"""Frames that become one visual token in time; a last odd frame is repeated by the processor."""

MAX_ASPECT = 200
"""Longer shapes are refused, as Qwen's own resizing does."""

VIRTUAL_FPS = 1_000_000
"""Rate of the clock that carries true times to the processor, which prints mean(index) / fps with one decimal.

Indices are whole numbers, so at a file's own rate they could not say when a variable-rate frame is shown. In
microseconds their rounding moves a time by at most 5e-7 s, nothing beside the 0.05 s that printing one decimal costs;
milliseconds would already break that bound at the edges.
"""


@dataclass(frozen=True)
class FrameBudget:
    """How densely a clip is sampled and how large its frames may be; the keys of the same names in `data`.

    `total_pixels` bounds frames x height x width (an odd number of frames counts as the next even one, which is what
    the processor makes of it). It wins over everything else: first it lowers the pixels per frame, down to
    `min_pixels_per_frame`, then the number of frames, below `min_frames` if need be.
    """

    fps: float
    min_frames: int
    max_frames: int
    min_pixels_per_frame: int
    max_pixels_per_frame: int
    total_pixels: int

    def __post_init__(self) -> None:
        smallest = self.smallest_frame
        rules = (
            (math.isfinite(self.fps) and self.fps > 0, f"data.fps must be > 0, got {self.fps}"),
            (
                1 <= self.min_frames <= self.max_frames,
                f"data.min_frames must be from 1 to data.max_frames, got {self.min_frames} and {self.max_frames}",
            ),
            (
                smallest <= self.max_pixels_per_frame,
                f"data.max_pixels_per_frame must be at least {smallest} (data.min_pixels_per_frame, and one visual "
                f"token of {SIZE_FACTOR} x {SIZE_FACTOR}), got {self.max_pixels_per_frame}",
            ),
            (
                TEMPORAL_PATCH * smallest <= self.total_pixels,
                f"data.total_pixels must hold two frames of {smallest} pixels, got {self.total_pixels}; raise it or "
                "lower data.min_pixels_per_frame",
            ),
        )
        broken = [message for holds, message in rules if not holds]
        if broken:
            raise UserError("; ".join(broken))

    @property
    def smallest_frame(self) -> int:
        """Pixels a frame is never planned below to meet the total: the minimum, or one visual token."""
        return max(self.min_pixels_per_frame, SIZE_FACTOR**2)

    @property
    def most_frames(self) -> int:
        """Frames that fit, however small: `max_frames`, or what `total_pixels` holds at the smallest size."""
        fit = self.total_pixels // self.smallest_frame
        return min(self.max_frames, fit - fit % TEMPORAL_PATCH)


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds, without decoding it. Sizes are those of the picture as shown, after rotation."""

    duration_s: float
    """From the first frame shown to the end of the last."""
    width: int
    height: int
    num_frames: int
    average_fps: float


@dataclass(frozen=True, eq=False)
class VideoClip:
    """Sampled frames and when each is shown."""

    frames: np.ndarray
    """uint8 RGB, shape (T, H, W, 3), T >= 1."""
    times_s: np.ndarray
    """float64, shape (T,), strictly increasing, >= 0, on the clip's clock (0 at `start_s`)."""
    start_s: float
    """Where the clip begins on the file's clock."""
    duration_s: float
    """Length of the stretch the frames were taken from."""

    def __post_init__(self) -> None:
        frames, times = self.frames, self.times_s
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or len(frames) == 0:
            raise UserError(f"frames must be uint8 of shape (T, H, W, 3), T >= 1, got {frames.dtype} {frames.shape}")
        if times.shape != (len(frames),):
            raise UserError(f"times_s must hold one time for each of the {len(frames)} frames, got shape {times.shape}")
        if not np.isfinite(times).all() or times[0] < 0 or (np.diff(times) <= 0).any():
            raise UserError(f"times_s must be finite, >= 0 and strictly increasing, got {times.tolist()}")

    def metadata(self) -> dict[str, Any]:
        """Fields of transformers' `VideoMetadata`, on a clock where index / fps is each frame's true time.

        A new dict each time: the processor appends to `frames_indices` in place when their number is odd.
        """
        indices = np.rint(self.times_s * VIRTUAL_FPS).astype(np.int64).tolist()
        return {
            "fps": float(VIRTUAL_FPS),
            "frames_indices": indices,
            "total_num_frames": max(round(self.duration_s * VIRTUAL_FPS), indices[-1] + 1),
            "duration": self.duration_s,
        }

    def subsample(self, n: int) -> VideoClip:
        """The clip with `n` of its frames, spread evenly (first and last kept when n >= 2); itself when it has no more.

        Raises:
            UserError: n < 1.
        """
        if n < 1:
            raise UserError(f"a clip needs at least one frame, asked for {n}")
        if n >= len(self.frames):
            return self
        kept = _nearest_frames(np.arange(len(self.frames), dtype=np.float64), n)
        return VideoClip(self.frames[kept], self.times_s[kept], self.start_s, self.duration_s)


def plan_num_frames(length_s: float, available: int, budget: FrameBudget) -> int:
    """How many frames to take from a stretch of `length_s` seconds that has `available` frames.

    round(length * fps), between `min_frames` and `max_frames`, made even where a frame more is to be had (it costs
    nothing: the processor would repeat the last one), never more than there are or than `total_pixels` holds.
    """
    wanted = min(max(round(length_s * budget.fps), budget.min_frames), budget.max_frames)
    if wanted % TEMPORAL_PATCH:
        if wanted + 1 <= budget.max_frames:
            wanted += 1
        elif wanted - 1 >= budget.min_frames:
            wanted -= 1
    return min(wanted, available, budget.most_frames)


def plan_size(num_frames: int, height: int, width: int, budget: FrameBudget) -> tuple[int, int]:
    """The size (height, width) at which `num_frames` frames of a height x width picture fit the budget.

    Multiples of 32, near the picture's own aspect and size, between `min_pixels_per_frame` and the maximum per frame
    (`max_pixels_per_frame`, or an equal share of `total_pixels` when that is less, but not below the minimum). Equal to
    `smart_resize` of qwen-vl-utils (factor 32) wherever that keeps the maximum; where the grid of 32 allows no size in
    between, or a long shape comes out with a side of 0, the maximum holds and the minimum or the aspect gives way.

    Raises:
        UserError: a side below 1, or one side more than 200 times the other.
    """
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT * min(height, width):
        raise UserError(f"frames of {width} x {height} pixels: no side may be more than {MAX_ASPECT} times the other")
    padded = num_frames + num_frames % TEMPORAL_PATCH
    least = budget.smallest_frame
    most = min(budget.max_pixels_per_frame, max(least, budget.total_pixels // padded))
    size = tuple(max(SIZE_FACTOR, round(side / SIZE_FACTOR) * SIZE_FACTOR) for side in (height, width))
    if size[0] * size[1] < least:
        grow = math.sqrt(least / (height * width))
        size = tuple(math.ceil(side * grow / SIZE_FACTOR) * SIZE_FACTOR for side in (height, width))
    if size[0] * size[1] > most:
        shrink = math.sqrt(height * width / most)
        size = tuple(max(1, math.floor(side / shrink / SIZE_FACTOR)) * SIZE_FACTOR for side in (height, width))
        longest = most // min(size) // SIZE_FACTOR * SIZE_FACTOR  # binds only where the short side was raised to 32
        size = tuple(min(side, longest) for side in size)
    return size[0], size[1]


def _nearest_frames(times_s: np.ndarray, n: int) -> np.ndarray:
    """Indices of the `n` frames nearest to n times spread evenly from the first to the last, strictly increasing.

    One frame is taken from the middle. For a constant rate this is Qwen's own rule (evenly spread frame numbers).
    """
    if n == 1:
        targets = np.array([(times_s[0] + times_s[-1]) / 2])
    else:
        targets = np.linspace(times_s[0], times_s[-1], n)
    after = np.clip(np.searchsorted(times_s, targets), 1, max(1, len(times_s) - 1))
    before = after - 1
    after = np.minimum(after, len(times_s) - 1)
    indices = np.where(targets - times_s[before] <= times_s[after] - targets, before, after)
    order = np.arange(n)
    return np.clip(np.maximum.accumulate(indices - order), 0, len(times_s) - n) + order


def read_clip(
    path: str | os.PathLike[str],
    budget: FrameBudget,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    backend: str = "auto",
) -> VideoClip:
    """Sample and decode [start_s, end_s) of a video file, resized into the budget.

    Only frames shown from `start_s` until before `end_s` are taken, and only that stretch is read (decord also walks
    over the rest of the file's packets, without decoding). When no frame begins inside, the one on display at `start_s`
    is taken, at time 0. `end_s` may pass the end of the video by half a second, or by one frame where that is longer.

    Args:
        path: a video file.
        budget: sampling rate and limits.
        start_s: where to begin, seconds on the file's clock; None is its beginning.
        end_s: where to stop; None is its end.
        backend: `auto` (the fastest: see `BACKENDS`), `pyav`, `decord` (files it cannot read exactly go to PyAV), or
            `qwen_vl_utils` (its `fetch_video` chooses the frames by its own rules, for parity with published
            evaluations; the times are still the true ones).

    Raises:
        VideoReadError: the file cannot be read, or not in that stretch.
        UserError: unknown backend, or one whose package is missing.
    """
    require_backend(backend)
    with VideoFile(path) as file:
        if backend == "qwen_vl_utils":
            return _read_as_qwen(file, budget, start_s, end_s)
        stretch = file.scan(start_s, end_s)
        length_s = stretch.end_s - stretch.start_s

        def choose(times_s: np.ndarray) -> np.ndarray:
            return _nearest_frames(times_s, plan_num_frames(length_s, len(times_s), budget))

        try:
            height, width = plan_size(len(choose(stretch.times_s)), file.height, file.width, budget)
        except UserError as error:
            raise VideoReadError(path, str(error)) from None
        read = read_decord if backend == "decord" else read_pyav
        frames, times_s = read(file, stretch, choose, height, width)
    return VideoClip(frames, np.maximum(times_s - stretch.start_s, 0.0), stretch.start_s, length_s)


def require_backend(backend: str) -> None:
    """Raise UserError unless `backend` is one of `BACKENDS`."""
    if backend not in BACKENDS:
        hint = nearest(backend, BACKENDS)
        raise UserError(
            f"data.backend must be one of {', '.join(BACKENDS)}, got {backend!r}"
            + (f"; did you mean {hint!r}?" if hint else "")
        )


def _read_as_qwen(file: VideoFile, budget: FrameBudget, start_s: float | None, end_s: float | None) -> VideoClip:
    # `fetch_video` counts total_pixels over temporal patches, this project over frames.
    limits = {
        "fps": budget.fps,
        "min_frames": budget.min_frames,
        "max_frames": budget.max_frames,
        "min_pixels": budget.min_pixels_per_frame,
        "max_pixels": budget.max_pixels_per_frame,
        "total_pixels": budget.total_pixels / TEMPORAL_PATCH,
    }
    frames, times_s, stretch = read_qwen(file, start_s, end_s, limits)
    clip = VideoClip(
        frames, np.maximum(times_s - stretch.start_s, 0.0), stretch.start_s, stretch.end_s - stretch.start_s
    )
    fit = budget.total_pixels // (clip.frames.shape[1] * clip.frames.shape[2])  # it may pass the total by 5 %
    return clip.subsample(max(1, fit - fit % TEMPORAL_PATCH)) if fit < len(clip.frames) else clip


def probe_video(path: str | os.PathLike[str]) -> VideoInfo:
    """Length, size and rate of a video file, from its header and last packets; all its packets where the header is
    silent or contradicts itself. Nothing but the first frame is decoded.

    Raises:
        VideoReadError: not a readable video, or one that ends before its header says.
    """
    with VideoFile(path) as file:
        header_end, num_frames = file.header_end_s, file.header_num_frames
        rate = file.average_rate
        if header_end and rate and abs(num_frames / rate - header_end) <= max(0.01 * header_end, 2 / rate):
            duration_s = file.scan(start_s=max(0.0, header_end - 1.0)).end_s
        else:
            stretch = file.scan()
            duration_s, num_frames = stretch.end_s, len(stretch.ticks)
        return VideoInfo(duration_s, file.width, file.height, num_frames, num_frames / duration_s)


def clip_from_frames(
    frames: Sequence[Any] | np.ndarray,
    *,
    times_s: Sequence[float] | np.ndarray | None = None,
    fps: float | None = None,
) -> VideoClip:
    """A clip from frames already in memory, kept at their size (`resize_clip` fits them to a budget).

    Args:
        frames: array (T, H, W, 3) uint8 RGB, or a sequence of (H, W, 3) arrays or PIL images of one size.
        times_s: when each frame is shown, shape (T,), seconds, strictly increasing.
        fps: constant rate instead: frame i is shown at i / fps. Exactly one of the two is given; there is no default,
            because a wrong rate gives wrong answers in silence.

    The clip lasts until the last frame has been shown for as long as the one before it.
    """
    if (times_s is None) == (fps is None):
        raise UserError("frames need their times: give exactly one of times_s (seconds, one per frame) and fps")
    array = _stack_frames(frames)
    if fps is not None:
        if not (math.isfinite(fps) and fps > 0):
            raise UserError(f"fps must be finite and > 0, got {fps}")
        return VideoClip(array, np.arange(len(array)) / float(fps), 0.0, len(array) / float(fps))
    times = np.asarray(times_s, dtype=np.float64)
    clip = VideoClip(array, times, 0.0, float(times.flat[-1]) if times.size else 0.0)
    last_gap = float(times[-1] - times[-2]) if len(times) > 1 else 0.0
    return VideoClip(array, times, 0.0, clip.duration_s + last_gap)


def _stack_frames(frames: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Frames as one array (T, H, W, 3); the checks of kind are `VideoClip`'s."""
    if isinstance(frames, np.ndarray):
        return frames
    arrays = [np.asarray(frame.convert("RGB") if hasattr(frame, "convert") else frame) for frame in frames]
    if not arrays:
        raise UserError("frames is empty: a clip needs at least one frame")
    for i, array in enumerate(arrays):
        if array.shape != arrays[0].shape:
            raise UserError(f"frames must all have one size: frame 0 is {arrays[0].shape}, frame {i} is {array.shape}")
    return np.stack(arrays)


def resize_clip(clip: VideoClip, budget: FrameBudget) -> VideoClip:
    """The clip within the budget: frames dropped evenly where there are too many, the rest resized (bicubic).

    `fps` and `min_frames` do not apply: frames in memory cannot be sampled again.
    """
    from PIL import Image

    clip = clip.subsample(budget.most_frames)
    num_frames, height, width, _ = clip.frames.shape
    size = plan_size(num_frames, height, width, budget)
    if size == (height, width):
        return clip
    resized = [Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC) for frame in clip.frames]
    return VideoClip(np.stack([np.asarray(image) for image in resized]), clip.times_s, clip.start_s, clip.duration_s)
