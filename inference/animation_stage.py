"""The page that an animation is played on: the rows drawn once, the place of the clip, the cursor of each frame."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import font_manager
from matplotlib.colors import to_rgb
from PIL import Image, ImageDraw, ImageFont

from inference.timeline_bars import draw_blocks, rows_height
from inference.timeline_page import LEADERS, MARGIN, Sheet, close_page, open_page, title_height
from inference.timeline_rows import Block
from inference.timeline_text import format_time
from utils.curves import figure_style


class Stage:
    """Everything that stays the same from frame to frame, and where the clip and the cursor go.

    `width` is that of the page in pixels (even), `picture_size` height and width of the clip on it, `query` the title.
    """

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
