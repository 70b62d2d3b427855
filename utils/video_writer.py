"""Writing small H.264 files, for demo data, tests and pictures. Re-exported by `utils.video`; reading is over there."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np

from utils.common import UserError, atomic_open

VARIABLE_RATE_TIME_BASE = Fraction(1, 90000)
"""Clock tick of files with explicit times: 90 kHz, the usual video clock; times are kept to 6 microseconds."""

SMALL_PIXELS = 256 * 256
"""Pictures up to here are encoded by x264's plain code, which writes the same bytes on every machine and at any load;
its AVX-512 code does not (seen on a busy AMD EPYC), and at this size gains nothing."""


def write_mp4(
    path: str | os.PathLike[str],
    frames: np.ndarray,
    *,
    fps: float | None = None,
    times_s: Sequence[float] | np.ndarray | None = None,
    crf: int = 12,
    gop_size: int | None = None,
) -> None:
    """Write RGB frames as H.264 (yuv420p) in an mp4, atomically; the same input gives the same bytes up to
    `SMALL_PIXELS` a picture.

    The last frame is shown for as long as the one before it.

    Args:
        frames: uint8, shape (T, H, W, 3), H and W even (yuv420p halves both).
        fps: constant frame rate; frame i is shown at i / fps. Exactly one of `fps` and `times_s` is given.
        times_s: shape (T,), presentation times in seconds for a variable rate: finite, >= 0, strictly increasing.
        crf: x264 quality, 0 (lossless) to 51.
        gop_size: at most this many frames from one key frame to the next; None leaves x264's choice (250).

    Raises:
        UserError: frames or times of the wrong kind.
    """
    _check_frames(frames)
    ticks = _presentation_ticks(len(frames), fps, times_s)
    _encode(path, frames, frames.shape[1:3], ticks, crf, gop_size, keeps_order=times_s is not None)


def write_mp4_stream(
    path: str | os.PathLike[str],
    frames: Iterable[np.ndarray],
    *,
    size: tuple[int, int],
    num_frames: int,
    fps: float,
    crf: int = 18,
    gop_size: int | None = None,
) -> None:
    """`write_mp4` for frames that come one at a time, so that a long video never lies in memory.

    Args:
        frames: `num_frames` arrays, uint8, shape (H, W, 3).
        size: (H, W), both even.

    Raises:
        UserError: sides that are odd, or a rate that is none.
    """
    _check_frames(np.empty((1, *size, 3), dtype=np.uint8))
    _encode(path, frames, size, _presentation_ticks(num_frames, fps, None), crf, gop_size, keeps_order=False)


def _encode(
    path: str | os.PathLike[str],
    frames: Iterable[np.ndarray],
    size: tuple[int, ...],
    timing: tuple[Fraction, list[int]],
    crf: int,
    gop_size: int | None,
    *,
    keeps_order: bool,
) -> None:
    import av

    time_base, ticks = timing
    with atomic_open(path, "wb") as handle, av.open(handle, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=_nominal_rate(time_base, ticks))
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = time_base
        stream.codec_context.thread_count = 1  # x264's output depends on its number of threads
        stream.options = {"crf": str(crf), "preset": "veryfast"}
        if size[0] * size[1] <= SMALL_PIXELS:
            stream.options |= {"x264-params": "asm=0"}
        if keeps_order:
            stream.codec_context.max_b_frames = 0  # reordered frames keep their times, but not how long the last shows
        if gop_size is not None:
            stream.codec_context.gop_size = gop_size
        gap = ticks[-1] - ticks[-2] if len(ticks) > 1 else 1
        durations = dict(zip(ticks, np.diff([*ticks, ticks[-1] + gap]).tolist(), strict=True))
        pictures = (av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24") for frame in frames)
        for picture, tick in zip(itertools.chain(pictures, [None]), [*ticks, 0], strict=True):
            if picture is not None:
                picture.pts, picture.time_base = tick, time_base
            for packet in stream.encode(picture):
                packet.duration = durations[packet.pts or 0]  # x264 forgets it, and the last frame would end at a guess
                container.mux(packet)


def _check_frames(frames: np.ndarray) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) == 0:
        raise UserError(f"frames must be uint8 of shape (T, H, W, 3) with T >= 1, got {frames.dtype} {frames.shape}")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise UserError(f"frames must have even height and width (H.264 yuv420p), got {frames.shape[1:3]}; pad or crop")


def _presentation_ticks(
    count: int, fps: float | None, times_s: Sequence[float] | np.ndarray | None
) -> tuple[Fraction, list[int]]:
    """The file's time base and each frame's time in it."""
    if (fps is None) == (times_s is None):
        raise UserError("exactly one of fps (constant rate) and times_s (variable rate) must be given")
    if fps is not None:
        if not (np.isfinite(fps) and fps >= 0.001):
            raise UserError(f"fps must be finite and at least 0.001, got {fps}")
        return 1 / Fraction(fps).limit_denominator(100_000), list(range(count))
    times = np.asarray(times_s, dtype=np.float64)
    if times.shape != (count,) or not np.isfinite(times).all() or times[0] < 0:
        raise UserError(f"times_s must hold one finite time >= 0 for each of the {count} frames, got {times_s}")
    ticks = [round(float(time) / VARIABLE_RATE_TIME_BASE) for time in times]
    if any(after <= before for before, after in zip(ticks, ticks[1:], strict=False)):
        raise UserError(f"times_s must increase strictly (by at least 1/90000 s), got {times_s}")
    return VARIABLE_RATE_TIME_BASE, ticks


def _nominal_rate(time_base: Fraction, ticks: list[int]) -> Fraction:
    """The mean frame rate, which x264 only needs for its rate control."""
    if len(ticks) == 1:
        return Fraction(25) if time_base == VARIABLE_RATE_TIME_BASE else 1 / time_base
    return Fraction(len(ticks) - 1) / ((ticks[-1] - ticks[0]) * time_base)
