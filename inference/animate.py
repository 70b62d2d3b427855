"""The timeline under the playing clip, with a cursor that moves along the time axis: an MP4 or a GIF.

The rows are those of the picture (`inference.visualize`), drawn once: from frame to frame only the clip and the cursor
change. Decoding and encoding are `utils.video_stream`, `utils.video_writer` and `utils.gif_writer`.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from inference.animation_stage import Stage
from inference.timeline_page import MARGIN, TimeAxis, sheet_for
from inference.timeline_rows import Block, GroundTruths, timeline_blocks
from inference.visualize import thumbnail_budget, title_of
from utils.common import UserError
from utils.gif_writer import ColourTable, write_gif
from utils.logging_utils import get_logger
from utils.palette import palette_of
from utils.video import probe_video, read_clip
from utils.video_file import Stretch, VideoFile
from utils.video_stream import frames_on_display
from utils.video_writer import write_mp4_stream


@dataclass(frozen=True)
class Limits:
    """What one kind of file is made with, and how large it may become."""

    fps: float
    """Frames a second, unless another rate is asked for."""
    max_fps: float
    width: int
    """Pixels, unless another width is asked for."""
    picture_share: float
    """The clip is at most this high, as a share of the width."""
    max_frames: int
    max_pixels: float
    """Pixels of the clip in all frames together; a GIF takes up to a byte for each."""
    max_page_pixels: float
    """Pixels of all frames together; a GIF is put together in memory."""


MP4 = Limits(
    fps=15, max_fps=60, width=960, picture_share=0.5625, max_frames=5400, max_pixels=math.inf, max_page_pixels=math.inf
)
GIF = Limits(fps=8, max_fps=25, width=640, picture_share=0.375, max_frames=400, max_pixels=20e6, max_page_pixels=200e6)
_KINDS = {".mp4": MP4, ".gif": GIF}
Shown = Iterable[tuple[float, np.ndarray]]
"""Times (seconds on the file's clock) and the clip's frames at them."""

_MIN_WIDTH, _MAX_WIDTH = 240, 1920

_PIXELS_PER_INCH = 80
"""Scale of the rows at the usual widths: words stay readable, so a narrow page has a shorter axis."""
_NARROWEST, _WIDEST = 8.0, 12.0
"""Inches; beyond them the rows are scaled."""


def animate_temporal_grounding(
    *,
    video_path: str | os.PathLike[str],
    predictions: Sequence[Any],
    ground_truths: GroundTruths | None = None,
    output_path: str | os.PathLike[str],
    query: str | None = None,
    labels: Sequence[str] | None = None,
    saliency: Any = None,
    theme: str = "light",
    video_start: float | None = None,
    video_end: float | None = None,
    fps: float | None = None,
    width: int | None = None,
) -> Path:
    """Write the clip with its timeline and a moving cursor; returns the path of the file. There is no sound.

    It plays at the video's own speed. An MP4 has 15 frames a second and 960 pixels of width, a GIF 8 and 640, unless
    `fps` and `width` say otherwise. Long clips are thinned (fewer frames a second, the speed stays): an MP4 holds at
    most 5,400 frames (6 minutes at 15), a GIF at most 400 and 20 million pixels of the clip (some 190 frames of 16:9),
    which keeps it below about 20 MB; the log says so.

    Args:
        video_path: the video file.
        predictions: with `ground_truths`, `query`, `labels`, `saliency` and `theme` as for
            `inference.visualize.visualize_temporal_grounding`; all times are on the file's clock.
        output_path: where it goes, by its suffix mp4 or gif; replaced when there is one.
        video_start: show only the stretch from here (seconds on the file's clock); the time axis is then the stretch.
        video_end: show only up to here.
        fps: frames a second, at most 60 (MP4) or 25 (GIF).
        width: pixels, 240 to 1920; an odd one is made even.

    Raises `UserError` for another suffix, a rate or width out of range, input that the picture refuses, a video that
    cannot be read, and a file that cannot be written (a full disk).
    """
    limits = _KINDS[animation_suffix(output_path)]
    blocks = timeline_blocks(predictions, ground_truths, labels, saliency)
    palette = palette_of(theme)
    _check_size(limits, fps, width)
    path = Path(output_path)
    with VideoFile(video_path) as file:
        stretch = file.scan(video_start, video_end)
        page_width = 2 * ((width or limits.width) // 2)
        inches = min(max(page_width / _PIXELS_PER_INCH, _NARROWEST), _WIDEST)
        sheet = sheet_for(blocks, _clock(file, stretch, blocks), palette, inches)
        size = _picture_size(file, page_width, limits)
        stage = Stage(blocks, sheet, title_of(query, predictions), page_width, size)
        times_s, rate = frame_times(sheet.clock, limits, fps, size, stage.size)
        if rate < (fps or limits.fps):
            _say_thinned(path, rate, fps or limits.fps, limits)
        pictures = frames_on_display(file, stretch, times_s, *size)
        shown = tqdm(zip(times_s.tolist(), pictures, strict=True), path.name, len(times_s), leave=False, disable=None)
        with _plain_disk_errors(path):
            if limits is GIF:
                _write_gif(path, stage, shown, [*(times_s - times_s[0]), len(times_s) / rate], _samples(file, stretch))
            else:
                _write_mp4(path, stage, shown, len(times_s), rate)
    return path


def animation_suffix(path: str | os.PathLike[str]) -> str:
    """The suffix of `path` in small letters; `UserError` for any but .mp4 and .gif."""
    suffix = Path(path).suffix.lower()
    if suffix not in _KINDS:
        raise UserError(f"an animation is written as .mp4 or .gif, got {os.fspath(path)!r}; change its suffix")
    return suffix


def frame_times(
    clock: TimeAxis, limits: Limits, fps: float | None, picture_size: tuple[int, int], page_size: tuple[int, int]
) -> tuple[np.ndarray, float]:
    """When the frames are, in seconds on the file's clock, and how many there are in a second.

    As many as asked for, or as the limits allow over the whole stretch.
    """
    length = clock.end_s - clock.start_s
    room = limits.max_pixels / math.prod(picture_size), limits.max_page_pixels / math.prod(page_size)
    most = max(1, int(min(limits.max_frames, *room)))
    rate = min(fps or limits.fps, most / length)
    count = max(1, min(most, math.ceil(length * rate - 1e-6)))
    return clock.start_s + np.arange(count) / rate, rate


def _clock(file: VideoFile, stretch: Stretch, blocks: Sequence[Block]) -> TimeAxis:
    """The stretch as a time axis; the length of the whole video, for the saliency, only where it is another."""
    is_whole = stretch.start_s == 0 and stretch.end_s >= (file.header_end_s or math.inf)
    video_s = stretch.end_s if is_whole else max(probe_video(file.path).duration_s, stretch.end_s)
    return TimeAxis.around(blocks, video_s, stretch.start_s, stretch.end_s)


def _write_mp4(path: Path, stage: Stage, shown: Shown, num_frames: int, rate: float) -> None:
    frames = (stage.frame(time, picture) for time, picture in shown)
    gop_size = max(24, round(2 * rate))  # a player finds any moment quickly
    write_mp4_stream(path, frames, size=stage.size, num_frames=num_frames, fps=rate, gop_size=gop_size)


def _write_gif(path: Path, stage: Stage, shown: Shown, times_s: list[float], samples: np.ndarray) -> None:
    """Rows and cursor keep their colours; the clip shares what is left of the table."""
    middle = (stage.sheet.clock.start_s + stage.sheet.clock.end_s) / 2
    with_cursor = stage.background.copy()
    stage.draw_cursor(with_cursor, middle)
    table = ColourTable(with_cursor, samples)
    still = table.nearest(stage.background)

    def numbers(time_s: float, picture: np.ndarray) -> np.ndarray:
        drawn = stage.background.copy()
        stage.draw_cursor(drawn, time_s)
        result = still.copy()
        is_moved = (drawn != stage.background).any(-1)
        result[is_moved] = table.nearest(drawn[is_moved][None])[0]
        result[stage.picture_at] = table.dithered(picture)
        return result

    write_gif(path, (numbers(time, picture) for time, picture in shown), times_s, table.colours)


def _samples(file: VideoFile, stretch: Stretch) -> np.ndarray:
    """A few small frames, to choose the colours of a GIF by."""
    budget = thumbnail_budget(12, stretch.end_s - stretch.start_s)
    return read_clip(file.path, budget, start_s=stretch.start_s, end_s=stretch.end_s, backend="pyav").frames


def _picture_size(file: VideoFile, width: int, limits: Limits) -> tuple[int, int]:
    """Height and width of the clip on the page: as large as fits, in its own shape, both even."""
    most_wide = width - 2 * round(width * MARGIN / _WIDEST)
    scale = min(most_wide / file.width, limits.picture_share * width / file.height)
    return max(2, 2 * round(file.height * scale / 2)), max(2, 2 * round(file.width * scale / 2))


def _check_size(limits: Limits, fps: float | None, width: int | None) -> None:
    if fps is not None and not 0 < fps <= limits.max_fps:
        raise UserError(f"fps must be above 0 and at most {limits.max_fps:g} for this kind of file, got {fps}")
    if width is not None and not _MIN_WIDTH <= width <= _MAX_WIDTH:
        raise UserError(f"width must be {_MIN_WIDTH} to {_MAX_WIDTH} pixels, got {width}")


def _say_thinned(path: Path, rate: float, wanted: float, limits: Limits) -> None:
    remedy = "choose a stretch (video_start, video_end)" + (" or write an .mp4" if limits is GIF else "")
    get_logger().info(
        "%s: a long clip, thinned to %.2f of %g frames a second to keep the file small; %s", path, rate, wanted, remedy
    )


@contextmanager
def _plain_disk_errors(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into a `UserError` about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left on the disk that holds {path}; free some space and run again") from error
        raise UserError(f"{path} cannot be written: {error.strerror or error}; choose another folder") from error
