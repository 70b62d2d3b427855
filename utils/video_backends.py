"""The three ways to get a stretch's pixels: PyAV, decord, and qwen-vl-utils' `fetch_video`.

Which frames a file holds, and when each is shown, always comes from `utils.video_file`; PyAV and decord only supply the
pixels of frames named by their time, so they agree on every time, and decord is never asked for a frame that the file
does not have: asked for one, it hangs inside native code or repeats a neighbour in silence.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from importlib import import_module
from typing import Any, TypeVar

import numpy as np

from utils.common import UserError
from utils.video_file import CLOCK_SLACK_S, END_SLACK_S, Stretch, VideoFile, VideoReadError, decoder_threads

logger = logging.getLogger(__name__)

LOST_FRAMES = 3
LOST_FRACTION = 0.1
"""Frames that a stretch promises and the decoder may not give: a few (an open group of pictures), or this share."""

DECORD_TIME_SLACK_S = 2e-3
"""decord holds times as float32, and moves them by its own reading of the stream's start."""

DECORD_DEADLINE_S = 60.0
DECORD_DEADLINE_PER_PACKET_S = 0.05
"""After this long a call into decord counts as hung: far beyond the slowest honest decode (4K on a busy core)."""

LONGEST_WAIT_S = math.inf
"""A call into decord is never waited for longer. `utils.decode_child`, whose parent waits for it in turn, sets it."""

Choose = Callable[[np.ndarray], np.ndarray]
"""Given the times of the frames there are (seconds, ascending), the indices of those to read, ascending."""

Pixels = tuple[np.ndarray, np.ndarray]
"""frames: uint8 RGB, shape (n, H, W, 3); times_s: float64, shape (n,), on the file's clock."""

Result = TypeVar("Result")


def read_pyav(file: VideoFile, stretch: Stretch, choose: Choose, height: int, width: int) -> Pixels:
    """Read the chosen frames by PyAV; choose again among those that decode when a few of the stretch's do not."""
    chosen = choose(stretch.times_s)
    frames, found = file.decode(stretch, stretch.ticks[chosen], height, width)
    if not found.all():
        exists = file.decodable(stretch)
        lost = int((~exists).sum())
        if lost > max(LOST_FRAMES, LOST_FRACTION * len(exists)) or lost == len(exists):
            raise VideoReadError(file.path, f"{lost} of the {len(exists)} frames wanted do not decode (damaged)")
        logger.warning("%s: %d of %d frames do not decode; sampled from the others", file.path, lost, len(exists))
        stretch = stretch.only(exists)
        chosen = choose(stretch.times_s)
        frames, found = file.decode(stretch, stretch.ticks[chosen], height, width)
    if not found.all():
        raise VideoReadError(file.path, "its frames do not decode alike twice (damaged)")
    return frames, stretch.times_s[chosen]


def read_decord(file: VideoFile, stretch: Stretch, choose: Choose, height: int, width: int) -> Pixels:
    """Read the chosen frames by decord, or by PyAV where decord cannot read this file exactly.

    decord counts packets, not frames, so frames hidden by an edit list or lost in a damaged part shift its numbers,
    give duplicates or hang it. It is used only where its table of times equals the file's own, and never waited for
    without an end.
    """
    decord = import_backend("decord")
    if _decord_hung.is_set():
        return read_pyav(file, stretch, choose, height, width)
    chosen = choose(stretch.times_s)

    def read() -> np.ndarray | None:
        reader = open_decord(file, width, height)
        first = decord_index(reader, file, stretch)
        return None if first is None else reader.get_batch(first + chosen).asnumpy()

    try:
        frames = with_deadline(read, decord_deadline_s(len(stretch.log.ticks)))
    except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, AssertionError) as error:
        # Worth no warning: PyAV reads the same frames (decord 0.6 knows no AV1, for one).
        logger.info("decord cannot read %s; read by PyAV instead (%s)", file.path, str(error).split("\n")[0])
        frames = None
    except FutureTimeoutError:
        logger.warning("decord hangs on %s; this process reads by PyAV from here on (data.backend: pyav)", file.path)
        frames = None
    if frames is None or frames.shape != (len(chosen), height, width, 3):
        return read_pyav(file, stretch, choose, height, width)
    return frames, stretch.times_s[chosen]


_decord_hung = threading.Event()
"""Set once a call into decord did not come back: its thread spins on, so no second one is risked."""


def decord_hung() -> bool:
    """Whether a call into decord did not come back in this process, one of whose threads is then stuck for good."""
    return _decord_hung.is_set()


def decord_deadline_s(num_packets: int) -> float:
    """How long a call into decord is waited for that reads this many packets."""
    return min(DECORD_DEADLINE_S + DECORD_DEADLINE_PER_PACKET_S * num_packets, LONGEST_WAIT_S)


def open_decord(file: VideoFile, width: int = -1, height: int = -1) -> Any:
    """A `decord.VideoReader` that raises instead of repeating a neighbour for a frame it cannot decode.

    Opened for each read and never kept: readers do not survive a fork of DataLoader workers.
    """
    decord = import_backend("decord")
    decord.logging.set_level(decord.logging.QUIET)
    return decord.VideoReader(
        os.path.abspath(file.path),
        width=width,
        height=height,
        num_threads=decoder_threads(file.width * file.height),
        fault_tol=1e-9,  # 0 would switch the check off; a share this small allows no repeated frame at all
    )


def decord_index(reader: Any, file: VideoFile, stretch: Stretch) -> int | None:
    """decord's number of the stretch's first frame, or None unless decord and the file agree on what there is to show.

    They agree when decord's table has, from that frame on, exactly the stretch's times, and nothing before time 0 or
    past the end of the video, which is where edit lists hide frames. Containers that seek by guessing (MPEG-TS) and
    open groups of pictures (HEVC's default, some H.264) are left out: there decord counts from the wrong frame, without
    a sign.
    """
    if not file.seeks_exactly or any(is_open for _, _, is_open in stretch.log.groups()):
        return None
    table = reader.get_frame_timestamp(np.arange(len(reader))).astype(np.float64)[:, 0]
    header_end = file.header_end_s
    slack = DECORD_TIME_SLACK_S + 1e-6 * abs(table[-1])
    if table[0] < -slack or (header_end is not None and table[-1] > header_end + slack):
        return None
    first = int(np.searchsorted(table, stretch.times_s[0] - slack))
    part = table[first : first + len(stretch.times_s)]
    if len(part) < len(stretch.times_s) or np.abs(part - stretch.times_s).max() > slack:
        return None
    return first


def with_deadline(function: Callable[[], Result], seconds: float) -> Result:
    """Run `function` in a thread of its own and wait at most `seconds`; raises `concurrent.futures.TimeoutError`, and
    `decord_hung` is true from then on.

    The thread is a daemon: one stuck in native code neither blocks the caller nor the end of the process.
    """
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # handed to the caller, who raises it
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return future.result(timeout=seconds)
    except FutureTimeoutError:
        if not future.done():  # what `function` itself raised may be one, too
            _decord_hung.set()
        raise


def read_qwen(
    file: VideoFile, start_s: float | None, end_s: float | None, limits: dict[str, float]
) -> tuple[np.ndarray, np.ndarray, Stretch]:
    """Read a stretch by qwen-vl-utils' `fetch_video`: its sampling (an even number of frames, by average frame rate)
    and its sizes; only the times are replaced by the true ones.

    Args:
        file: the opened file.
        start_s: with `end_s` the stretch, seconds on the file's clock.
        end_s: see above.
        limits: fps, min_frames, max_frames, min_pixels, max_pixels, total_pixels as `fetch_video` takes them.

    Returns:
        Frames and times as the other readers, and the whole stretch.

    Raises:
        VideoReadError: fewer than two frames, a file on which its decord would hang or shift frames, or a variable
            rate that makes it read another stretch.
    """
    fetch = import_backend("qwen_vl_utils").fetch_video
    stretch, everything = file.scan(start_s, end_s), file.scan()
    remedy = "set data.backend to decord or pyav"
    if len(stretch.ticks) < 2:
        raise VideoReadError(file.path, f"qwen_vl_utils needs at least two frames, the stretch has one; {remedy}")
    reader = open_decord(file)
    if len(reader) != len(everything.ticks) or decord_index(reader, file, everything) != 0:
        raise VideoReadError(file.path, f"qwen_vl_utils would read hidden or missing frames of this file; {remedy}")
    request: dict[str, Any] = {"type": "video", "video": os.path.abspath(file.path), **limits}
    if start_s is not None or end_s is not None:
        request |= {"video_start": stretch.start_s, "video_end": stretch.end_s}
    seconds = decord_deadline_s(len(everything.ticks))
    try:
        video, metadata = with_deadline(
            lambda: fetch(request, image_patch_size=16, return_video_metadata=True), seconds
        )
    except FutureTimeoutError:
        raise VideoReadError(file.path, f"qwen_vl_utils did not come back in {seconds:.0f} s; {remedy}") from None
    except (ValueError, RuntimeError, OSError, AttributeError, IndexError, AssertionError) as error:
        raise VideoReadError(file.path, f"qwen_vl_utils refuses it ({error}); {remedy}") from error
    times_s = everything.times_s[np.asarray(metadata["frames_indices"], dtype=np.int64)]
    if times_s[0] < stretch.start_s - END_SLACK_S or times_s[-1] > stretch.end_s + CLOCK_SLACK_S:
        raise VideoReadError(file.path, f"qwen_vl_utils reads {times_s[0]:.2f} to {times_s[-1]:.2f} s; {remedy}")
    return video.permute(0, 2, 3, 1).round().clamp(0, 255).byte().numpy(), times_s, stretch


def import_backend(name: str) -> Any:
    """Import a decoder's package; a missing one is a `UserError` that names the key and the alternatives."""
    try:
        return import_module(name)
    except (ImportError, OSError) as error:
        others = " or ".join(other for other in ("decord", "pyav", "qwen_vl_utils") if other != name)
        raise UserError(
            f"data.backend is {name!r} but that package cannot be imported ({error}); "
            f"pip install {name.replace('_', '-')}, or set data.backend to {others}"
        ) from error
