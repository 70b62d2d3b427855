"""The rows of a timeline on paper: bars, crosses, the saliency curve, words in a row and the figures beside it.

`y` is in inches downwards from the top of the rows, `x` in seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.text import Text

from inference.timeline_page import MARGIN, Sheet
from inference.timeline_rows import Block, Lane, is_finite
from inference.timeline_text import fit, format_time, format_window, wrap
from utils.spans import Span

_LANE, _LINE, _HEADING_LINE, _CURVE = 0.36, 0.2, 0.23, 0.62
_BAR, _THIN_BAR = 0.24, 0.14
_MAX_LISTED_WINDOWS, _MAX_LISTED_CANDIDATES = 4, 6
_MAX_HEADING_LINES, _COLUMNS_PER_INCH = 2, 9.0
_FAINTEST = 0.25
"""Opacity of the candidate with the lowest score."""


def rows_height(blocks: Sequence[Block], sheet: Sheet) -> float:
    """Height of all rows in inches."""
    return sum(_heading_height(block, sheet) + sum(map(_lane_height, block.lanes)) for block in blocks)


def draw_blocks(axes: Axes, blocks: Sequence[Block], sheet: Sheet) -> None:
    """All rows, one block under the other."""
    axes.set_ylim(rows_height(blocks, sheet), 0)
    top = 0.0
    for block in blocks:
        if block.heading:
            _draw_heading(axes, block, top, sheet)
        top = _draw_block(axes, block, top + _heading_height(block, sheet), sheet)
    _shade_outside(axes, sheet)


def opacity(score: float | None, score_range: tuple[float, float]) -> float:
    """How opaque the bar of a window with this score is, from 0.25 to 1; 1 without a score.

    >>> opacity(0.5, (0.0, 1.0)), opacity(-2.0, (-2.0, 3.0)), opacity(7.0, (7.0, 7.0)), opacity(None, (0.0, 1.0))
    (0.625, 0.25, 1.0, 1.0)
    """
    low, high = score_range
    if score is None or high <= low:
        return 1.0
    return _FAINTEST + (1 - _FAINTEST) * (score - low) / (high - low)


def _draw_block(axes: Axes, block: Block, top: float, sheet: Sheet) -> float:
    """The rows from `top` on; returns where they end."""
    bottom = top + sum(map(_lane_height, block.lanes))
    for truth in filter(is_finite, block.truths):
        shade = Rectangle((truth.start, top), truth.end - truth.start, bottom - top, linewidth=0, zorder=0.5)
        shade.set_facecolor(to_rgba(sheet.palette.truth, 0.13))
        axes.add_patch(shade)
    heads = top - 0.14
    axes.axhline(top, color=sheet.palette.faint, linewidth=0.8)
    for lane in block.lanes:
        _draw_lane(axes, lane, top, sheet)
        top += _lane_height(lane)
        axes.axhline(top, color=sheet.palette.faint, linewidth=0.8)
    _draw_column_heads(axes, block, heads, sheet)
    return top


def _draw_heading(axes: Axes, block: Block, top: float, sheet: Sheet) -> None:
    """The query above its rows, where the grid makes room for it."""
    height, room = _heading_height(block, sheet), _heading_room(sheet)
    gap = Rectangle((sheet.clock.first, top), sheet.clock.span_s, height, linewidth=0, zorder=0.6)
    gap.set_facecolor(sheet.palette.paper)
    axes.add_patch(gap)
    lines = _heading_lines(block, sheet)
    for number, line in enumerate(lines, start=1):
        y = top + height - 0.17 - _HEADING_LINE * (len(lines) - number)
        text = _side_text(axes, sheet, MARGIN - sheet.width + sheet.right, y, line, ha="left", fontsize=11.5)
        text.set(color=sheet.palette.ink, fontweight="bold")
        fit(text, room)


def _heading_lines(block: Block, sheet: Sheet) -> list[str]:
    return wrap(block.heading, round(_COLUMNS_PER_INCH * _heading_room(sheet)), _MAX_HEADING_LINES)


def _heading_room(sheet: Sheet) -> float:
    """Width of a heading in inches: up to where the columns of figures have their names."""
    return sheet.width - 2 * MARGIN - 1.6


def _draw_column_heads(axes: Axes, block: Block, y: float, sheet: Sheet) -> None:
    style = {"ha": "right", "color": sheet.palette.muted, "fontsize": 10}
    if any(lane.ious for lane in block.lanes):
        words = "best IoU" if len(block.truths) > 1 else "IoU"
        _side_text(axes, sheet, _iou_column(sheet), y, words, **style)
    if any(lane.scores for lane in block.lanes):
        _side_text(axes, sheet, _score_column(sheet), y, "score", **style)


def _draw_lane(axes: Axes, lane: Lane, top: float, sheet: Sheet) -> None:
    middle = top + _lane_height(lane) / 2
    _draw_label(axes, lane, middle, sheet)
    if lane.curve:
        _draw_curve(axes, lane, top, sheet)
    for number, (window, y, alpha) in enumerate(_placed(lane, middle, sheet), start=1):
        if is_finite(window):
            colour = to_rgba(_colour(lane, sheet), alpha)
            _draw_window(axes, window, colour, f"{lane.name}-{number}", y, sheet, _THIN_BAR if lane.scores else _BAR)
    if lane.note:
        _draw_note(axes, lane, middle, sheet)
    if not lane.curve:
        _list_windows(axes, lane, middle, sheet)


def _draw_label(axes: Axes, lane: Lane, middle: float, sheet: Sheet) -> None:
    lines = wrap(lane.label, 14, 2)
    label = _side_text(axes, sheet, -sheet.axis_width - 0.12, middle, "\n".join(lines), ha="right", fontweight="bold")
    label.set(color=_colour(lane, sheet), fontsize=10.5 if len(lines) == 1 else 9, linespacing=1.0)
    fit(label, sheet.width - sheet.axis_width - sheet.right - 0.2)


def _placed(lane: Lane, middle: float, sheet: Sheet) -> Iterator[tuple[Span, float, float]]:
    """Each window with its height on the page and its opacity.

    Candidates overlap, so each lies on the line that lists it; those that are not listed share the last line.
    """
    lines = _line_heights(lane, middle)
    for index, window in enumerate(lane.windows):
        if lane.scores:
            yield window, lines[min(index, len(lines) - 1)], opacity(lane.scores[index], sheet.score_range)
        else:
            yield window, middle, 1.0


def _draw_note(axes: Axes, lane: Lane, middle: float, sheet: Sheet) -> None:
    """The words of a row: at its left end, or beside the cross of a window without length, where there is more room."""
    x, ha, room = 0.008, "left", 0.98
    if lane.windows and is_finite(lane.windows[0]):
        mark = min(max(sheet.clock.share(lane.windows[0].start), 0.01), 0.99)  # cross or arrow
        x, ha, room = (mark + 0.025, "left", 1 - mark) if mark < 0.5 else (mark - 0.025, "right", mark)
    note = axes.text(x, middle, lane.note, transform=axes.get_yaxis_transform(), ha=ha, va="center")
    note.set(fontstyle="italic", fontsize=10.5, parse_math=False, gid=f"{lane.name}-note", color=sheet.palette.ink)
    fit(note, room * sheet.axis_width)
    note.set_path_effects([withStroke(linewidth=3, foreground=sheet.palette.paper)])  # keeps the grid out of the words


def _draw_window(axes: Axes, window: Span, colour: Any, gid: str, y: float, sheet: Sheet, height: float) -> None:
    """A bar at the true times; a cross where it has no length, an arrow where it leaves the picture."""
    if window.end <= window.start:
        axes.plot([window.start], [y], marker="x", markersize=8, markeredgewidth=2, color=colour, gid=gid)
    else:
        length = window.end - window.start
        bar = Rectangle((window.start, y - height / 2), length, height, facecolor=colour, gid=gid)
        # an outline keeps a window visible that is narrower than a pixel; wider ones end exactly where they end
        is_narrow = length * sheet.points_per_second < 2
        bar.set(edgecolor=colour, linewidth=1.6 if is_narrow else 0, joinstyle="miter")
        axes.add_patch(bar)
    clock, inset = sheet.clock, 7 / sheet.points_per_second
    if window.end > clock.last:
        on_bar = window.start < clock.last - 2 * inset
        _draw_arrow(axes, ">", clock.last - inset, y, sheet.palette.paper if on_bar else colour, height)
    if window.start < clock.first:
        on_bar = window.end > clock.first + 2 * inset
        _draw_arrow(axes, "<", clock.first + inset, y, sheet.palette.paper if on_bar else colour, height)


def _draw_arrow(axes: Axes, marker: str, time: float, y: float, colour: Any, height: float) -> None:
    axes.plot([time], [y], marker=marker, markersize=37.5 * height, color=colour, zorder=4)


def _draw_curve(axes: Axes, lane: Lane, top: float, sheet: Sheet) -> None:
    """The saliency as a filled curve, from 0 (or the lowest value, if that is below) to the highest; gaps stay free."""
    assert lane.curve is not None
    known = lane.curve.values[np.isfinite(lane.curve.values)]
    if len(known) == 0:
        return
    low, high = min(0.0, float(known.min())), float(known.max())
    base, room = top + _CURVE - 0.06, _CURVE - 0.16
    for run, (times, values) in enumerate(curve_runs(lane, sheet.clock.video_s), start=1):
        y = base - room * (values - low) / (high - low if high > low else 1.0)
        fill = axes.fill_between(times, base, y, linewidth=0, gid=f"{lane.name}-{run}")
        fill.set_facecolor(to_rgba(sheet.palette.saliency, 0.35))
        axes.plot(times, y, color=sheet.palette.saliency, linewidth=1.5, gid=f"{lane.name}-line-{run}")
    _list_peak(axes, lane, top + _CURVE / 2, sheet)


def curve_runs(lane: Lane, video_s: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """Points of the curve, one run between two gaps each; a run reaches as far as its first and last value stand."""
    assert lane.curve is not None
    times, bounds = lane.curve.on(video_s)
    is_known = np.isfinite(lane.curve.values)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_known, [False]]).astype(int))).reshape(-1, 2)
    runs = []
    for first, last in edges.tolist():
        values = lane.curve.values[first:last]
        at = np.concatenate([bounds[first : first + 1], times[first:last], bounds[last : last + 1]])
        runs.append((at, np.concatenate([values[:1], values, values[-1:]])))
    return runs


def _list_peak(axes: Axes, lane: Lane, y: float, sheet: Sheet) -> None:
    assert lane.curve is not None
    times, _ = lane.curve.on(sheet.clock.video_s)
    peak = int(np.nanargmax(lane.curve.values))
    unit = " s" if sheet.clock.reading_s < 60 else ""
    at = format_time(float(times[peak]), sheet.clock.reading_s, 1) + unit
    words = f"highest {lane.curve.values[peak]:.3g} at {at}"
    text = _side_text(axes, sheet, 0.14, y, words, ha="left", color=sheet.palette.ink, fontsize=10.5)
    fit(text, sheet.right - MARGIN - 0.14)


def _list_windows(axes: Axes, lane: Lane, middle: float, sheet: Sheet) -> None:
    """The times, the score and the IoU of a row in figures, at its right."""
    shown = _num_listed(lane)
    hidden = len(lane.windows) - shown
    room = sheet.right - MARGIN - (1.4 if sheet.has_scores else 0.6)
    for line, y in enumerate(_line_heights(lane, middle)):
        is_window = line < shown
        times = f"and {hidden} more" if hidden else "–"
        if is_window:
            times = format_window(lane.windows[line], sheet.clock.reading_s)
        text = _side_text(axes, sheet, 0.14, y, times, ha="left", color=sheet.palette.ink, fontsize=10.5)
        fit(text, room)
        if is_window and lane.scores and lane.scores[line] is not None:
            _figure_text(axes, sheet, _score_column(sheet), y, f"{lane.scores[line]:.2f}", sheet.palette.ink)
        if line < len(lane.ious) and (is_window or not lane.windows):
            _figure_text(axes, sheet, _iou_column(sheet), y, f"{lane.ious[line]:.2f}", _colour(lane, sheet), bold=True)
    if lane.verdict:
        _figure_text(axes, sheet, _iou_column(sheet), middle, lane.verdict, _colour(lane, sheet), bold=True)


def _figure_text(
    axes: Axes, sheet: Sheet, inches: float, y: float, words: str, colour: str, *, bold: bool = False
) -> None:
    look: dict[str, Any] = {"fontsize": 11, "fontweight": "bold"} if bold else {"fontsize": 10.5}
    fit(_side_text(axes, sheet, inches, y, words, ha="right", color=colour, **look), 0.6)


def _side_text(axes: Axes, sheet: Sheet, inches: float, y: float, words: str, **style: Any) -> Text:
    """Text beside the rows, `inches` from their right end."""
    x = 1 + inches / sheet.axis_width
    text = axes.text(x, y, words, transform=axes.get_yaxis_transform(), va="center", **style)
    text.set_parse_math(False)
    return text


def _shade_outside(axes: Axes, sheet: Sheet) -> None:
    """Hatch what is not video."""
    clock, palette = sheet.clock, sheet.palette
    for start, end in ((clock.first, clock.start_s), (clock.end_s, clock.last)):
        if end > start:
            look: dict[str, Any] = {
                "facecolor": palette.outside,
                "edgecolor": palette.faint,
                "hatch": "////",
                "linewidth": 0,
            }
            axes.axvspan(start, end, zorder=0, **look)


def _colour(lane: Lane, sheet: Sheet) -> str:
    palette = sheet.palette
    return {"ground truth": palette.truth, "prediction": palette.prediction, "saliency": palette.saliency}[lane.kind]


def _iou_column(sheet: Sheet) -> float:
    return sheet.right - MARGIN


def _score_column(sheet: Sheet) -> float:
    return sheet.right - MARGIN - 0.8


def _num_lines(lane: Lane) -> int:
    """Lines of text that a row lists at its right."""
    return max(1, min(len(lane.windows), _MAX_LISTED_CANDIDATES if lane.scores else _MAX_LISTED_WINDOWS))


def _num_listed(lane: Lane) -> int:
    """Windows that are listed; the last line tells how many are not."""
    return len(lane.windows) if len(lane.windows) <= _num_lines(lane) else _num_lines(lane) - 1


def _line_heights(lane: Lane, middle: float) -> list[float]:
    first = middle - _LINE * (_num_lines(lane) - 1) / 2
    return [first + _LINE * line for line in range(_num_lines(lane))]


def _lane_height(lane: Lane) -> float:
    return _CURVE if lane.curve else max(_LANE, _LINE * _num_lines(lane) + 0.1)


def _heading_height(block: Block, sheet: Sheet) -> float:
    return 0.19 + _HEADING_LINE * len(_heading_lines(block, sheet)) if block.heading else 0.0
