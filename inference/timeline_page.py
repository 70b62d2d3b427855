"""The page of a timeline: sizes in inches, the stretch of time it shows, its title and its axes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from inference.timeline_rows import Block, is_finite
from inference.timeline_text import fit, format_time, wrap
from utils.palette import Palette

MARGIN, TITLE_LINE, LEADERS, TICKS = 0.18, 0.27, 0.3, 0.52
"""Inches: the border, a line of the title, the gap above the rows, the axis below them."""

_LEFT, _RIGHT, _SCORES = 1.45, 2.45, 0.75
_COLUMNS_PER_INCH = 94 / 12
_MAX_QUERY_LINES = 4
_MAX_OVERHANG = 0.12
"""How far, in video lengths, the axis follows a window that lies outside the video; the rest becomes an arrow."""

_TICK_STEPS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800)


@dataclass(frozen=True)
class TimeAxis:
    """What the page shows of the file's clock, in seconds."""

    video_s: float
    """Length of the whole video."""
    start_s: float
    end_s: float
    """The stretch shown: the video or a part of it."""
    first: float
    last: float
    """Ends of the axis: the stretch, and a little of what lies outside it where a window does."""

    @classmethod
    def around(
        cls, blocks: Iterable[Block], video_s: float, start_s: float = 0.0, end_s: float | None = None
    ) -> TimeAxis:
        """The axis that holds a stretch and, as far as there is room, every window."""
        end = video_s if end_s is None else end_s
        windows = [window for block in blocks for lane in block.lanes for window in lane.windows if is_finite(window)]
        edges = [edge for window in windows for edge in window]
        room = _MAX_OVERHANG * (end - start_s)
        below, above = min([start_s, *edges]), max([end, *edges])
        first = max(start_s - room, start_s + 1.15 * (below - start_s))
        return cls(video_s, start_s, end, first, min(end + room, end + 1.15 * (above - end)))

    @property
    def span_s(self) -> float:
        """Length of the axis."""
        return self.last - self.first

    @property
    def reading_s(self) -> float:
        """The length that decides how times are written: a stretch late in a long video needs hours too."""
        return max(self.span_s, self.end_s)

    def share(self, time_s: float) -> float:
        """Where `time_s` lies, from 0 at the left end of the axis to 1 at its right end."""
        return (time_s - self.first) / self.span_s


@dataclass(frozen=True)
class Sheet:
    """What everything on a page is drawn with."""

    clock: TimeAxis
    palette: Palette
    width: float = 12.0
    """Inches."""
    has_scores: bool = False
    score_range: tuple[float, float] = (0.0, 1.0)
    """The scores drawn faintest and in full."""

    @property
    def right(self) -> float:
        """Inches right of the axis, for what is listed there."""
        return _RIGHT + _SCORES * self.has_scores

    @property
    def axis_width(self) -> float:
        """Length of the time axis in inches."""
        return self.width - _LEFT - self.right

    @property
    def points_per_second(self) -> float:
        """Scale of the time axis."""
        return 72 * self.axis_width / self.clock.span_s

    def title(self, query: str) -> list[str]:
        """The lines that `query` takes as a title; none for an empty one."""
        columns = round(_COLUMNS_PER_INCH * self.width)
        return wrap(f"“{query}”", columns, _MAX_QUERY_LINES) if query else []


def sheet_for(blocks: Sequence[Block], clock: TimeAxis, palette: Palette, width: float = 12.0) -> Sheet:
    """The sheet for these rows. Scores from 0 to 1 are taken as they are, others (logits) from lowest to highest."""
    lanes = [lane for block in blocks for lane in block.lanes]
    scores = [score for lane in lanes for score in lane.scores if score is not None]
    ends = (min(scores, default=0.0), max(scores, default=1.0))
    return Sheet(clock, palette, width, bool(scores), (0.0, 1.0) if 0 <= ends[0] and ends[1] <= 1 else ends)


def open_page(
    sheet: Sheet, title: Sequence[str], *, above: float, rows: float, dpi: float | None = None
) -> tuple[Figure, Axes, Axes]:
    """A page with its title, an area of `above` inches and under it the rows, `rows` inches high.

    Returns the figure and the two axes over the same seconds, `frames` and `windows`.
    """
    figure = Figure(figsize=(sheet.width, MARGIN + title_height(title) + above + rows + TICKS), dpi=dpi)
    FigureCanvasAgg(figure)
    _draw_title(figure, sheet, title)
    strip = _add_axes(figure, sheet, "frames", TICKS + rows, above)
    bars = _add_axes(figure, sheet, "windows", TICKS, rows)
    return figure, strip, bars


def title_height(title: Sequence[str]) -> float:
    """Inches that a title of these lines takes."""
    return TITLE_LINE * len(title) + (0.1 if title else 0.0)


def close_page(strip: Axes, bars: Axes, sheet: Sheet) -> None:
    """The ticks, and both axes cut to the time shown."""
    _draw_ticks(bars, sheet)
    for axes in (strip, bars):
        axes.set_xlim(sheet.clock.first, sheet.clock.last)


def _add_axes(figure: Figure, sheet: Sheet, label: str, bottom: float, height: float) -> Axes:
    """Axes over the time range, placed in inches from the lower edge."""
    total = figure.get_figheight()
    box = (_LEFT / sheet.width, bottom / total, sheet.axis_width / sheet.width, height / total)
    return figure.add_axes(box, label=label, frameon=False)


def _draw_title(figure: Figure, sheet: Sheet, lines: Sequence[str]) -> None:
    for number, line in enumerate(lines):
        y = 1 - (MARGIN + TITLE_LINE * (number + 0.5)) / figure.get_figheight()
        text = figure.text(MARGIN / sheet.width, y, line, fontsize=13.5, fontweight="bold", va="center")
        text.set(color=sheet.palette.ink, parse_math=False)  # a query may hold dollar signs
        fit(text, sheet.width - 2 * MARGIN)


def _draw_ticks(axes: Axes, sheet: Sheet) -> None:
    clock = sheet.clock
    length = clock.end_s - clock.start_s
    most = min(9.0, 1.6 * sheet.axis_width)
    step = next((step for step in _TICK_STEPS_S if length / step <= most), length / 5)
    numbers = range(-int(-clock.start_s / step + 1e-9), int(clock.end_s / step + 1e-9) + 1)
    ticks = [step * number for number in numbers if step * number >= clock.start_s - 1e-9]
    digits = 0 if step >= 1 else 1
    axes.set_xticks(ticks, [format_time(tick, clock.end_s, digits) for tick in ticks])
    axes.set_yticks([])
    unit = "minutes : seconds" if clock.end_s < 3600 else "hours : minutes : seconds"
    axes.set_xlabel("seconds" if clock.end_s < 60 else unit, fontsize=10, labelpad=3)
    axes.grid(axis="x", color=sheet.palette.faint, linewidth=0.8)
    axes.tick_params(axis="x", labelsize=10.5, length=3)
