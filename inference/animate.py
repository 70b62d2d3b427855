"""The timeline under the playing clip, with a cursor that moves along the time axis: an MP4 or a GIF.

The rows are those of the picture (`inference.visualize`), drawn once: from frame to frame only the clip and the cursor
change. Decoding and encoding are `utils.video_stream`, `utils.video_writer` and `utils.gif_writer`.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.colors import to_rgb
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from inference.timeline_bars import draw_blocks, rows_height
from inference.timeline_page import LEADERS, MARGIN, Sheet, TimeAxis, close_page, open_page, sheet_for, title_height
from inference.timeline_rows import Block, GroundTruths, timeline_blocks
from inference.timeline_text import format_time
from inference.visualize import thumbnail_budget, title_of
from utils.common import UserError
from utils.curves import figure_style
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


MP4 = Limits(fps=15, max_fps=60, width=960, picture_share=0.5625, max_frames=5400, max_pixels=math.inf)
GIF = Limits(fps=8, max_fps=25, width=640, picture_share=0.375, max_frames=400, max_pixels=20e6)
_KINDS = {".mp4": MP4, ".gif": GIF}
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
        whole = video_start is None and video_end is None
        video_s = stretch.end_s if whole else max(probe_video(video_path).duration_s, stretch.end_s)
        clock = TimeAxis.around(blocks, video_s, stretch.start_s, stretch.end_s)
        page_width = 2 * ((width or limits.width) // 2)
        inches = min(max(page_width / _PIXELS_PER_INCH, _NARROWEST), _WIDEST)
        sheet = sheet_for(blocks, clock, palette, inches)
        stage = Stage(blocks, sheet, title_of(query, predictions), page_width, _picture_size(file, page_width, limits))
        times_s, rate = frame_times(clock, limits, fps, stage.picture_size)
        if rate < (fps or limits.fps):
            _say_thinned(path, rate, fps or limits.fps, limits)
        pictures = frames_on_display(file, stretch, times_s, *stage.picture_size)
        shown = tqdm(zip(times_s.tolist(), pictures, strict=True), path.name, len(times_s), leave=False, disable=None)
        with _plain_disk_errors(path):
            if limits is GIF:
                _write_gif(path, stage, shown, [*(times_s - times_s[0]), len(times_s) / rate], _samples(file, stretch))
            else:
                frames = (stage.frame(time, picture) for time, picture in shown)
                size = {"size": stage.size, "num_frames": len(times_s)}
                write_mp4_stream(path, frames, **size, fps=rate, gop_size=max(24, round(2 * rate)))
    return path


def animation_suffix(path: str | os.PathLike[str]) -> str:
    """The suffix of `path` in small letters; `UserError` for any but .mp4 and .gif."""
    suffix = Path(path).suffix.lower()
    if suffix not in _KINDS:
        raise UserError(f"an animation is written as .mp4 or .gif, got {os.fspath(path)!r}; change its suffix")
    return suffix


def frame_times(
    clock: TimeAxis, limits: Limits, fps: float | None, picture_size: tuple[int, int]
) -> tuple[np.ndarray, float]:
    """When the frames are, in seconds on the file's clock, and how many there are in a second.

    As many as asked for, or as the limits allow over the whole stretch.
    """
    length = clock.end_s - clock.start_s
    most = max(1, int(min(limits.max_frames, limits.max_pixels / math.prod(picture_size))))
    rate = min(fps or limits.fps, most / length)
    count = max(1, min(most, math.ceil(length * rate - 1e-6)))
    return clock.start_s + np.arange(count) / rate, rate


class Stage:
    """Everything that stays the same from frame to frame, and where the clip and the cursor go."""

    def __init__(
        self, blocks: Sequence[Block], sheet: Sheet, query: str, width: int, picture_size: tuple[int, int]
    ) -> None:
        self.sheet, self.picture_size = sheet, picture_size
        self._dpi = width / sheet.width
        title = sheet.title(query)
        above = picture_size[0] / self._dpi + LEADERS
        with figure_style(sheet.palette):
            figure, strip, bars = open_page(
                sheet, title, above=above, rows=rows_height(blocks, sheet), dpi=self._dpi + 1e-6
            )
            strip.set_axis_off()
            draw_blocks(bars, blocks, sheet)
            close_page(strip, bars, sheet)
            figure.canvas.draw()
            drawn = np.asarray(figure.canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined]
        box = bars.get_window_extent()
        self._left, self._length = box.x0, box.width
        self._rows = (round(drawn.shape[0] - box.y1), round(drawn.shape[0] - box.y0))
        self.background = _with_even_sides(drawn, sheet.palette.paper)
        top = round((MARGIN + title_height(title)) * self._dpi)
        left = (self.background.shape[1] - picture_size[1]) // 2
        self.picture_at = (slice(top, top + picture_size[0]), slice(left, left + picture_size[1]))
        self._colour = np.rint(np.array(to_rgb(sheet.palette.cursor)) * 255).astype(np.uint8)
        bold = font_manager.FontProperties(family="DejaVu Sans", weight="bold")
        self._font = ImageFont.truetype(font_manager.findfont(bold), max(6, round(10 / 72 * self._dpi)))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a frame in pixels, both even."""
        return self.background.shape[0], self.background.shape[1]

    def frame(self, time_s: float, picture: np.ndarray) -> np.ndarray:
        """The page at `time_s`, uint8 (H, W, 3)."""
        frame = self.background.copy()
        frame[self.picture_at] = picture
        self.draw_cursor(frame, time_s)
        return frame

    def cursor_columns(self, time_s: float) -> slice:
        """The columns of pixels that the cursor covers."""
        thick = max(2, round(self.size[1] / 480))
        middle = self._left + self.sheet.clock.share(time_s) * self._length
        first = min(max(round(middle - thick / 2), 0), self.size[1] - thick)
        return slice(first, first + thick)

    def draw_cursor(self, frame: np.ndarray, time_s: float) -> None:
        """A line over the rows, and the time above it."""
        columns = self.cursor_columns(time_s)
        frame[self._rows[0] - round(0.06 * self._dpi) : self._rows[1], columns] = self._colour
        clock = self.sheet.clock
        words = format_time(time_s, clock.reading_s, 1)
        half = self._font.getlength(words) / 2
        x = min(max((columns.start + columns.stop) / 2, self._left + half), self._left + self._length - half)
        first, last = self._rows[0] - round(LEADERS * self._dpi), self._rows[0]
        band = Image.fromarray(np.ascontiguousarray(frame[first:last]))
        middle = (x, (0.5 * LEADERS - 0.02) * self._dpi)
        ImageDraw.Draw(band).text(middle, words, fill=tuple(self._colour.tolist()), font=self._font, anchor="mm")
        frame[first:last] = np.asarray(band)


def _with_even_sides(drawn: np.ndarray, paper: str) -> np.ndarray:
    """`drawn` with a line of paper below and at the right where a side is odd (yuv420p halves both)."""
    height, width = drawn.shape[0] + drawn.shape[0] % 2, drawn.shape[1] + drawn.shape[1] % 2
    even = np.empty((height, width, 3), dtype=np.uint8)
    even[:] = np.rint(np.array(to_rgb(paper)) * 255)
    even[: drawn.shape[0], : drawn.shape[1]] = drawn
    return even


def _write_gif(
    path: Path, stage: Stage, shown: Iterator[tuple[float, np.ndarray]], times_s: list[float], samples: np.ndarray
) -> None:
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
