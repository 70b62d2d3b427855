"""The timeline picture: key frames along the time axis above the labelled and the predicted windows, IoU beside each.

All times are seconds on the file's clock. What the rows are is read by `inference.timeline_rows`; scores of whole test
sets belong to `utils.metrics`, curves to `utils.curves`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.text import Text

from inference.timeline_rows import Lane, distinct_queries, is_empty, is_finite, timeline_lanes, wrap
from utils.common import UserError
from utils.curves import BLUE, FAINT, GREEN, INK, MUTED, figure_format, figure_style, save_figure
from utils.spans import Span
from utils.video import FrameBudget, probe_video, read_clip

# the layout, in inches
_WIDTH, _LEFT, _RIGHT, _MARGIN = 12.0, 1.45, 2.45, 0.18
_AXIS_WIDTH = _WIDTH - _LEFT - _RIGHT
_TITLE_LINE, _LEADERS, _TICKS = 0.27, 0.3, 0.52
_LANE, _LANE_LINE = 0.36, 0.2

_MAX_LISTED_WINDOWS = 4
_MAX_QUERY_LINES, _TITLE_COLUMNS = 4, 94
_MAX_OVERHANG = 0.12
"""How far, in video lengths, the axis follows a window that lies outside the video; the rest becomes an arrow."""

_COLOURS = {"ground truth": GREEN, "prediction": BLUE}
_TICK_STEPS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800)


def visualize_temporal_grounding(
    *,
    video_path: str | os.PathLike[str],
    predictions: Sequence[Any],
    ground_truths: Sequence[Sequence[float]] | None = None,
    output_path: str | os.PathLike[str],
    query: str | None = None,
    labels: Sequence[str] | None = None,
    num_frames: int | None = None,
    backend: str = "decord",
) -> Path:
    """Draw predictions and ground truth under the key frames of a video; returns the path of the picture.

    Args:
        video_path: the video file.
        predictions: one entry per answer: `(start, end)` in seconds, a list of such windows, a dictionary as
            `VideoTemporalInference.predict` returns, `[]` (the answer says that the event is absent) or None (an answer
            that could not be read).
        ground_truths: the labelled windows `[(start, end), ...]`; `[]` = labelled absent; None = no label, no IoU.
        output_path: where the picture goes, by its suffix png, svg or pdf; replaced when there is one.
        query: the title; by default the query the predictions carry.
        labels: a name for each prediction, by default `Prediction 1`, `Prediction 2`, ...
        num_frames: key frames to show, by default 5 to 12 by the shape of the video.
        backend: decoder, see `utils.video.read_clip`.

    Raises `UserError` for another suffix, for windows that are not pairs of numbers, for a wrong number of labels and
    for a video that cannot be read. Input is checked before anything is decoded.
    """
    figure_format(output_path)
    timeline_lanes(predictions, ground_truths, labels)
    if num_frames is not None and num_frames < 1:
        raise UserError(f"num_frames must be at least 1, got {num_frames}")
    info = probe_video(video_path)
    wanted = num_frames or _default_num_frames(info.width / info.height)
    clip = read_clip(video_path, _thumbnail_budget(wanted, info.duration_s), backend=backend)
    figure = draw_timeline(
        clip.frames,
        clip.times_s + clip.start_s,
        max(info.duration_s, clip.start_s + clip.duration_s),
        predictions=predictions,
        ground_truths=ground_truths,
        query=query,
        labels=labels,
        aspect=info.width / info.height,  # the decoder rounds sizes, and so shapes, for the model
    )
    return save_figure(figure, output_path)


def draw_timeline(
    frames: np.ndarray,
    times_s: Sequence[float] | np.ndarray,
    duration_s: float,
    *,
    predictions: Sequence[Any],
    ground_truths: Sequence[Sequence[float]] | None = None,
    query: str | None = None,
    labels: Sequence[str] | None = None,
    aspect: float | None = None,
) -> Figure:
    """The figure of `visualize_temporal_grounding`, from frames that are already there.

    `frames` is uint8 (T, H, W, 3) RGB with T >= 1, `times_s` (T,) their times, `duration_s` the length of the video and
    `aspect` the width of a frame over its height as shown, by default W / H.
    The figure has two axes, `frames` and `windows`, over the same seconds. Bars carry ids: `ground-truth-1`,
    `prediction-2-1` (the first window of the second prediction), ...
    Raises `UserError` for a `duration_s` that is not above 0 and for windows as `visualize_temporal_grounding` does.
    """
    if not duration_s > 0:
        raise UserError(f"duration_s must be above 0 to draw a time axis, got {duration_s}")
    lanes = timeline_lanes(predictions, ground_truths, labels)
    truths = next((lane.windows for lane in lanes if lane.kind == "ground truth"), ())
    limits = _axis_range(lanes, duration_s)
    share = duration_s / (limits[1] - limits[0])
    tile = _tile_size(len(frames), aspect or frames.shape[2] / frames.shape[1], share)
    title = _title_lines([query] if query else distinct_queries(predictions))
    lanes_height = sum(_lane_height(lane) for lane in lanes)
    title_height = _TITLE_LINE * len(title) + (0.1 if title else 0.0)
    with figure_style():
        height = _MARGIN + title_height + tile[1] + _LEADERS + lanes_height + _TICKS
        figure = Figure(figsize=(_WIDTH, height))
        FigureCanvasAgg(figure)
        _draw_title(figure, title, height)
        strip = _add_axes(figure, "frames", _TICKS + lanes_height, tile[1] + _LEADERS)
        bars = _add_axes(figure, "windows", _TICKS, lanes_height)
        _draw_strip(strip, frames, times_s, duration_s, truths, limits, tile)
        _draw_lanes(bars, lanes, truths, limits)
        _draw_outside(strip, bars, duration_s, limits)
        _draw_ticks(bars, duration_s)
        for axes in (strip, bars):
            axes.set_xlim(*limits)
    return figure


def _add_axes(figure: Figure, label: str, bottom: float, height: float) -> Axes:
    """Axes over the time range, placed in inches from the lower edge."""
    total = figure.get_figheight()
    return figure.add_axes(
        (_LEFT / _WIDTH, bottom / total, _AXIS_WIDTH / _WIDTH, height / total), label=label, frameon=False
    )


def _title_lines(queries: Sequence[str]) -> list[str]:
    return wrap(f"“{queries[0]}”", _TITLE_COLUMNS, _MAX_QUERY_LINES) if len(queries) == 1 else []


def _draw_title(figure: Figure, lines: list[str], height: float) -> None:
    for number, line in enumerate(lines):
        y = 1 - (_MARGIN + _TITLE_LINE * (number + 0.5)) / height
        text = figure.text(_MARGIN / _WIDTH, y, line, fontsize=13.5, fontweight="bold", color=INK, va="center")
        text.set_parse_math(False)  # a query may hold dollar signs
        _fit(text, _WIDTH - 2 * _MARGIN)


def _axis_range(lanes: Sequence[Lane], duration_s: float) -> tuple[float, float]:
    """The video, and a little of what lies outside it where a window does."""
    edges = [edge for lane in lanes for window in lane.windows if is_finite(window) for edge in window]
    room = _MAX_OVERHANG * duration_s
    below, above = min([0.0, *edges]), max([duration_s, *edges])
    first = max(-room, 1.15 * below)
    return first, min(duration_s + room, duration_s + 1.15 * (above - duration_s))


def _draw_strip(
    axes: Axes, frames: np.ndarray, times_s: Sequence[float] | np.ndarray, duration_s: float,
    truths: Sequence[Span], limits: tuple[float, float], tile: tuple[float, float],
) -> None:  # fmt: skip
    """The frames side by side, each with a line to its time; frames inside a labelled window have its colour."""
    slot = duration_s / len(frames)
    width = tile[0] * (limits[1] - limits[0]) / _AXIS_WIDTH  # in seconds; heights are in inches
    bottom, top = _LEADERS, _LEADERS + tile[1]
    for index, (frame, time) in enumerate(zip(frames, times_s, strict=True)):
        centre = (index + 0.5) * slot
        left, right = centre - width / 2, centre + width / 2
        inside = any(truth.start <= time < truth.end for truth in truths)
        colour = GREEN if inside else MUTED
        axes.imshow(frame, extent=(left, right, bottom, top), aspect="auto", interpolation="antialiased")
        outline = Rectangle((left, bottom), width, tile[1], fill=False, edgecolor=colour, clip_on=False)
        outline.set_linewidth(2.4 if inside else 0.8)
        axes.add_patch(outline)
        axes.plot([centre, time], [bottom, 0.06], color=colour, linewidth=1.3 if inside else 0.8, clip_on=False)
        axes.plot([time], [0.06], marker="v", markersize=4, color=colour, clip_on=False)
    axes.set_ylim(0, top)
    axes.set_axis_off()


def _draw_lanes(axes: Axes, lanes: Sequence[Lane], truths: Sequence[Span], limits: tuple[float, float]) -> None:
    axes.set_ylim(sum(_lane_height(lane) for lane in lanes), 0)  # in inches, downwards
    for truth in truths:
        if is_finite(truth):
            axes.axvspan(truth.start, truth.end, color=GREEN, alpha=0.13, linewidth=0)
    top, num_predictions = 0.0, 0
    axes.axhline(0, color=FAINT, linewidth=0.8)
    for lane in lanes:
        num_predictions += lane.kind == "prediction"
        gid = "ground-truth" if lane.kind == "ground truth" else f"prediction-{num_predictions}"
        _draw_lane(axes, lane, gid, top + _lane_height(lane) / 2, limits)
        top += _lane_height(lane)
        axes.axhline(top, color=FAINT, linewidth=0.8)
    if any(lane.ious for lane in lanes):
        several = any(lane.kind == "ground truth" and len(lane.windows) > 1 for lane in lanes)
        heading = "best IoU" if several else "IoU"
        _side_text(axes, _RIGHT - _MARGIN, -0.14, heading, ha="right", color=MUTED, fontsize=10)


def _draw_lane(axes: Axes, lane: Lane, gid: str, middle: float, limits: tuple[float, float]) -> None:
    colour = _COLOURS[lane.kind]
    lines = wrap(lane.label, 14, 2)
    label = _side_text(axes, -_AXIS_WIDTH - 0.12, middle, "\n".join(lines), ha="right", color=colour, fontweight="bold")
    label.set(fontsize=10.5 if len(lines) == 1 else 9, linespacing=1.0)
    _fit(label, _LEFT - 0.2)
    for number, window in enumerate(lane.windows, start=1):
        if is_finite(window):
            _draw_window(axes, window, colour, f"{gid}-{number}", middle, limits)
    if lane.note:
        _draw_note(axes, lane, gid, middle, limits)
    _list_windows(axes, lane, middle, span=limits[1] - limits[0])


def _draw_note(axes: Axes, lane: Lane, gid: str, middle: float, limits: tuple[float, float]) -> None:
    """The words of a row: at its left end, or beside the cross of a window without length, where there is more room."""
    x, ha, room = 0.008, "left", 0.98
    if lane.windows and is_finite(lane.windows[0]):
        mark = min(max((lane.windows[0].start - limits[0]) / (limits[1] - limits[0]), 0.01), 0.99)  # cross or arrow
        x, ha, room = (mark + 0.025, "left", 1 - mark) if mark < 0.5 else (mark - 0.025, "right", mark)
    note = axes.text(x, middle, lane.note, transform=axes.get_yaxis_transform(), ha=ha, va="center", color=INK)
    note.set(fontstyle="italic", fontsize=10.5, parse_math=False, gid=f"{gid}-note")
    _fit(note, room * _AXIS_WIDTH)
    note.set_path_effects([withStroke(linewidth=3, foreground="white")])  # keeps the grid out of the words


def _draw_window(axes: Axes, window: Span, colour: str, gid: str, middle: float, limits: tuple[float, float]) -> None:
    """A bar at the true times; a cross where it has no length, an arrow where it leaves the picture."""
    points_per_second = 72 * _AXIS_WIDTH / (limits[1] - limits[0])
    if window.end <= window.start:
        axes.plot([window.start], [middle], marker="x", markersize=8, markeredgewidth=2, color=colour, gid=gid)
    else:
        bar = Rectangle((window.start, middle - 0.12), window.end - window.start, 0.24, facecolor=colour, gid=gid)
        # an outline keeps a window visible that is narrower than a pixel; wider ones end exactly where they end
        is_narrow = (window.end - window.start) * points_per_second < 2
        bar.set(edgecolor=colour, linewidth=1.6 if is_narrow else 0, joinstyle="miter")
        axes.add_patch(bar)
    inset = 7 / points_per_second
    if window.end > limits[1]:
        _draw_arrow(axes, ">", limits[1] - inset, middle, colour, on_bar=window.start < limits[1] - 2 * inset)
    if window.start < limits[0]:
        _draw_arrow(axes, "<", limits[0] + inset, middle, colour, on_bar=window.end > limits[0] + 2 * inset)


def _draw_arrow(axes: Axes, marker: str, time: float, middle: float, colour: str, *, on_bar: bool) -> None:
    axes.plot([time], [middle], marker=marker, markersize=9, color="white" if on_bar else colour, zorder=4)


def _list_windows(axes: Axes, lane: Lane, middle: float, span: float) -> None:
    """The times and the IoU of a row in figures, at its right."""
    shown = min(len(lane.windows), _MAX_LISTED_WINDOWS)
    hidden = len(lane.windows) - shown
    if hidden:
        shown, hidden = shown - 1, hidden + 1
    num_lines = _num_lines(lane)
    first = middle - _LANE_LINE * (num_lines - 1) / 2
    for line in range(num_lines):
        y = first + _LANE_LINE * line
        is_window = line < shown
        times = format_window(lane.windows[line], span) if is_window else f"and {hidden} more" if hidden else "–"
        _fit(_side_text(axes, 0.14, y, times, ha="left", color=INK, fontsize=10.5), _RIGHT - _MARGIN - 0.6)
        if line < len(lane.ious) and (is_window or not lane.windows):
            _score_text(axes, lane, y, f"{lane.ious[line]:.2f}")
    if lane.verdict:
        _score_text(axes, lane, middle, lane.verdict)


def _score_text(axes: Axes, lane: Lane, y: float, words: str) -> None:
    colour = _COLOURS[lane.kind]
    _side_text(axes, _RIGHT - _MARGIN, y, words, ha="right", color=colour, fontsize=11, fontweight="bold")


def _side_text(axes: Axes, inches: float, y: float, words: str, **style: Any) -> Text:
    """Text beside the rows, `inches` from their right end; `y` in the rows' own inches."""
    text = axes.text(1 + inches / _AXIS_WIDTH, y, words, transform=axes.get_yaxis_transform(), va="center", **style)
    text.set_parse_math(False)
    return text


def _draw_outside(strip: Axes, bars: Axes, duration_s: float, limits: tuple[float, float]) -> None:
    """Hatch what is not video."""
    for start, end, words in ((limits[0], 0.0, "before\nthe video"), (duration_s, limits[1], "after\nthe video")):
        if end <= start:
            continue
        bars.axvspan(start, end, facecolor="#f3f4f6", edgecolor=FAINT, hatch="////", linewidth=0, zorder=0)
        inches = (end - start) / (limits[1] - limits[0]) * _AXIS_WIDTH
        if inches > 0.75:
            middle = _LEADERS + (strip.get_ylim()[1] - _LEADERS) / 2
            strip.text((start + end) / 2, middle, words, ha="center", va="center", color=MUTED, fontsize=10)


def _draw_ticks(axes: Axes, duration_s: float) -> None:
    step = next((step for step in _TICK_STEPS_S if duration_s / step <= 9), duration_s / 5)
    ticks = [step * number for number in range(int(duration_s / step + 1e-9) + 1)]
    axes.set_xticks(ticks, [format_time(tick, duration_s, digits=0 if step >= 1 else 1) for tick in ticks])
    axes.set_yticks([])
    unit = "seconds" if duration_s < 60 else "minutes : seconds" if duration_s < 3600 else "hours : minutes : seconds"
    axes.set_xlabel(unit, fontsize=10, labelpad=3)
    axes.grid(axis="x", color=FAINT, linewidth=0.8)
    axes.tick_params(axis="x", labelsize=10.5, length=3)


def format_window(window: Span, span_s: float) -> str:
    """`window` as text, in the clock that suits a picture of `span_s` seconds.

    >>> format_window(Span(3.0, 9.25), 8), format_window(Span(-3.0, 9.2), 40), format_window(Span(65.0, 3600.0), 7200)
    ('3.00 – 9.25 s', '−3.0 – 9.2 s', '0:01:05 – 1:00:00')
    >>> format_window(Span(6.0, 6.0), 40)
    '6.0 s (empty)'
    """
    digits = 2 if span_s < 10 else 0 if span_s >= 3600 and window.end - window.start >= 2 else 1
    unit = " s" if span_s < 60 else ""
    if is_empty(window):
        return f"{format_time(window.start, span_s, digits)}{unit} (empty)"
    return f"{format_time(window.start, span_s, digits)} – {format_time(window.end, span_s, digits)}{unit}"


def format_time(seconds: float, span_s: float, digits: int) -> str:
    """`12.5`, `3:05` or `1:02:03`, by the length of the picture in seconds, with `digits` decimals."""
    if not abs(seconds) < 1e7:  # a model may answer anything, and a hundred digits would fill the page
        return f"{seconds:.3g}"
    sign, value = ("−" if seconds < 0 else ""), round(abs(seconds), digits)
    if span_s < 60:
        return f"{sign}{value:.{digits}f}"
    minutes, rest = divmod(value, 60)
    tail = f"{rest:0{3 + digits if digits else 2}.{digits}f}"
    if span_s < 3600:
        return f"{sign}{minutes:.0f}:{tail}"
    return f"{sign}{minutes // 60:.0f}:{minutes % 60:02.0f}:{tail}"


def _num_lines(lane: Lane) -> int:
    """Lines of text that a row lists at its right."""
    return max(1, min(len(lane.windows), _MAX_LISTED_WINDOWS))


def _lane_height(lane: Lane) -> float:
    """Height of a row in inches."""
    return max(_LANE, _LANE_LINE * _num_lines(lane) + 0.1)


def _default_num_frames(aspect: float) -> int:
    """As many frames as make the strip about two thirds of an inch high."""
    return min(12, max(5, round(_AXIS_WIDTH / (0.65 * aspect))))


def _tile_size(num_frames: int, aspect: float, share: float) -> tuple[float, float]:
    """Width and height in inches of one frame when all of them fill `share` of the axis; tall ones are made smaller."""
    height = min(1.5, 0.95 * _AXIS_WIDTH * share / num_frames / aspect)
    return height * aspect, height


def _fit(text: Text, inches: float) -> None:
    """Shrink `text` to `inches`: columns are counted, and capital letters are wider than the rest."""
    figure = text.get_figure(root=True)
    assert figure is not None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # said once, when the picture is saved
        width = text.get_window_extent().width / figure.dpi
    if width > inches:
        text.set_fontsize(float(text.get_fontsize()) * inches / width)


def _thumbnail_budget(num_frames: int, duration_s: float) -> FrameBudget:
    pixels = 256 * 256
    return FrameBudget(
        fps=num_frames / max(duration_s, 1e-3),
        min_frames=num_frames,
        max_frames=num_frames,
        min_pixels_per_frame=1024,
        max_pixels_per_frame=pixels,
        total_pixels=num_frames * pixels,
    )
