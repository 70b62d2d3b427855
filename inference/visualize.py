"""The timeline picture: key frames along the time axis above the labelled and the predicted windows, IoU beside each.

All times are seconds on the file's clock. What the rows are is read by `inference.timeline_rows` and drawn by
`inference.timeline_bars`; `inference.animate` shows the same rows under the playing clip. Scores of whole test sets
belong to `utils.metrics`, curves to `utils.curves`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from inference.timeline_bars import draw_blocks, rows_height
from inference.timeline_input import distinct_queries
from inference.timeline_page import LEADERS, Sheet, TimeAxis, close_page, open_page, sheet_for
from inference.timeline_rows import GroundTruths, timeline_blocks
from inference.timeline_text import format_time, format_window
from utils.common import UserError
from utils.curves import figure_format, figure_style, save_figure
from utils.palette import palette_of
from utils.spans import Span
from utils.video import FrameBudget, probe_video, read_clip

__all__ = ["draw_timeline", "format_time", "format_window", "visualize_temporal_grounding"]


def visualize_temporal_grounding(
    *,
    video_path: str | os.PathLike[str],
    predictions: Sequence[Any],
    ground_truths: GroundTruths | None = None,
    output_path: str | os.PathLike[str],
    query: str | None = None,
    labels: Sequence[str] | None = None,
    num_frames: int | None = None,
    backend: str = "decord",
    saliency: Any = None,
    theme: str = "light",
) -> Path:
    """Draw predictions and ground truth under the key frames of a video; returns the path of the picture.

    Args:
        video_path: the video file.
        predictions: one entry per answer: `(start, end)` in seconds, `(start, end, score)` for a candidate, a list of
            such windows, a dictionary as `VideoTemporalInference.predict` returns (with `scores` beside `segments` for
            candidates), `[]` (the answer says that the event is absent) or None (an answer that could not be read).
            Dictionaries that carry different `query` keys are grouped by query. Candidates are listed by score, each on
            a line of its own; the lower the score, the fainter the bar (scores outside 0 to 1: from the lowest to the
            highest in the picture).
        ground_truths: the labelled windows `[(start, end), ...]`; `[]` = labelled absent; None = no label, no IoU. For
            several queries a mapping `{query: windows}`.
        output_path: where the picture goes, by its suffix png, svg or pdf; replaced when there is one.
        query: the title; by default the query the predictions carry.
        labels: a name for each prediction, by default `Prediction 1`, `Prediction 2`, ...
        num_frames: key frames to show, by default 5 to 12 by the shape of the video.
        backend: decoder, see `utils.video.read_clip`.
        saliency: a curve over the video: values of clips of equal length from its start to its end (QVHighlights), or
            `(times, values)` with times in seconds; NaN leaves a gap. Of several queries a mapping, or one for all.
        theme: `light` or `dark`.

    Raises `UserError` for another suffix or theme, for windows that are not pairs of numbers, scores or saliency that
    are not numbers, a wrong number of labels, a bare list of ground truths beside several queries and for a video that
    cannot be read. Input is checked before anything is decoded.
    """
    figure_format(output_path)
    timeline_blocks(predictions, ground_truths, labels, saliency)
    palette_of(theme)
    if num_frames is not None and num_frames < 1:
        raise UserError(f"num_frames must be at least 1, got {num_frames}")
    info = probe_video(video_path)
    wanted = num_frames or _default_num_frames(info.width / info.height)
    clip = read_clip(video_path, thumbnail_budget(wanted, info.duration_s), backend=backend)
    figure = draw_timeline(
        clip.frames,
        clip.times_s + clip.start_s,
        max(info.duration_s, clip.start_s + clip.duration_s),
        predictions=predictions,
        ground_truths=ground_truths,
        query=query,
        labels=labels,
        aspect=info.width / info.height,  # the decoder rounds sizes, and so shapes, for the model
        saliency=saliency,
        theme=theme,
    )
    return save_figure(figure, output_path)


def draw_timeline(
    frames: np.ndarray,
    times_s: Sequence[float] | np.ndarray,
    duration_s: float,
    *,
    predictions: Sequence[Any],
    ground_truths: GroundTruths | None = None,
    query: str | None = None,
    labels: Sequence[str] | None = None,
    aspect: float | None = None,
    saliency: Any = None,
    theme: str = "light",
) -> Figure:
    """The figure of `visualize_temporal_grounding`, from frames that are already there.

    `frames` is uint8 (T, H, W, 3) RGB with T >= 1, `times_s` (T,) their times, `duration_s` the length of the video and
    `aspect` the width of a frame over its height as shown, by default W / H.
    The figure has two axes, `frames` and `windows`, over the same seconds. Bars carry ids: `ground-truth-1`,
    `prediction-2-1` (the first window of the second prediction), ...; of several queries `query-2-ground-truth-1`. The
    curve is `saliency-1`, `saliency-line-1` (its first stretch without a gap), ...
    Raises `UserError` for a `duration_s` that is not above 0 and for windows as `visualize_temporal_grounding` does.
    """
    if not duration_s > 0:
        raise UserError(f"duration_s must be above 0 to draw a time axis, got {duration_s}")
    blocks = timeline_blocks(predictions, ground_truths, labels, saliency)
    sheet = sheet_for(blocks, TimeAxis.around(blocks, duration_s), palette_of(theme))
    tile = _tile_size(len(frames), aspect or frames.shape[2] / frames.shape[1], sheet)
    truths = blocks[0].truths if len(blocks) == 1 else ()
    with figure_style(sheet.palette):
        title = sheet.title(title_of(query, predictions))
        figure, strip, bars = open_page(sheet, title, above=tile[1] + LEADERS, rows=rows_height(blocks, sheet))
        _draw_strip(strip, frames, times_s, truths, sheet, tile)
        draw_blocks(bars, blocks, sheet)
        close_page(strip, bars, sheet)
    return figure


def title_of(query: str | None, predictions: Sequence[Any]) -> str:
    """The title: `query`, else the one query that the predictions carry, else none."""
    queries = [query] if query else distinct_queries(predictions)
    return queries[0] if len(queries) == 1 else ""


def thumbnail_budget(num_frames: int, duration_s: float) -> FrameBudget:
    """Small frames, `num_frames` of them spread over the video."""
    pixels = 256 * 256
    return FrameBudget(
        fps=num_frames / max(duration_s, 1e-3),
        min_frames=num_frames,
        max_frames=num_frames,
        min_pixels_per_frame=1024,
        max_pixels_per_frame=pixels,
        total_pixels=num_frames * pixels,
    )


def _draw_strip(
    axes: Axes, frames: np.ndarray, times_s: Sequence[float] | np.ndarray, truths: Sequence[Span], sheet: Sheet,
    tile: tuple[float, float],
) -> None:  # fmt: skip
    """The frames side by side, each with a line to its time; frames inside a labelled window have its colour."""
    slot = sheet.clock.video_s / len(frames)
    width = tile[0] * sheet.clock.span_s / sheet.axis_width  # in seconds; heights are in inches
    for index, (frame, time) in enumerate(zip(frames, times_s, strict=True)):
        centre = (index + 0.5) * slot
        inside = any(truth.start <= time < truth.end for truth in truths)
        colour = sheet.palette.truth if inside else sheet.palette.muted
        box = (centre - width / 2, centre + width / 2, LEADERS, LEADERS + tile[1])
        axes.imshow(frame, extent=box, aspect="auto", interpolation="antialiased")
        outline = Rectangle((box[0], LEADERS), width, tile[1], fill=False, edgecolor=colour, clip_on=False)
        outline.set_linewidth(2.4 if inside else 0.8)
        axes.add_patch(outline)
        axes.plot([centre, time], [LEADERS, 0.06], color=colour, linewidth=1.3 if inside else 0.8, clip_on=False)
        axes.plot([time], [0.06], marker="v", markersize=4, color=colour, clip_on=False)
    axes.set_ylim(0, LEADERS + tile[1])
    axes.set_axis_off()
    _name_outside(axes, sheet, LEADERS + tile[1] / 2)


def _name_outside(axes: Axes, sheet: Sheet, middle: float) -> None:
    clock = sheet.clock
    before, after = (clock.first, 0.0, "before\nthe video"), (clock.video_s, clock.last, "after\nthe video")
    for start, end, words in (before, after):
        if (end - start) / clock.span_s * sheet.axis_width > 0.75:
            text = axes.text((start + end) / 2, middle, words, ha="center", va="center", fontsize=10)
            text.set_color(sheet.palette.muted)


def _default_num_frames(aspect: float) -> int:
    """As many frames as make the strip about two thirds of an inch high."""
    return min(12, max(5, round(8.1 / (0.65 * aspect))))


def _tile_size(num_frames: int, aspect: float, sheet: Sheet) -> tuple[float, float]:
    """Width and height in inches of one frame when all of them fill the video's part of the axis; tall ones shrink."""
    share = sheet.clock.video_s / sheet.clock.span_s
    height = min(1.5, 0.95 * sheet.axis_width * share / num_frames / aspect)
    return height * aspect, height
