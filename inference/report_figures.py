"""The figures of the report: recall over thresholds, IoU, errors against duration and position, start and end.

Each is one matplotlib axes on the paper of a palette; titles and captions are the page's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from inference.report_data import Evaluation, Judged
from utils.curves import figure_style
from utils.metrics import baseline_predictions, best_constant_predictions, sample_scores
from utils.palette import Palette

SIZE = (4.5, 3.0)
"""Inches."""
NUM_IOU_BINS, NUM_GROUPS = 20, 8
SHOWN_SHARE = 97.0
"""Per cent of the points that an axis of seconds makes room for; the caption counts the others."""
FARTHEST_S = 1e9
"""Seconds at which every axis ends: a model may write times whose sums are beyond the largest float."""
WIDE = 200
"""An axis from one value to so many times it has no room for more than one label in each power of ten."""


@dataclass(frozen=True)
class Picture:
    """One figure of the page."""

    name: str
    """Of its files: `<name>-light.svg`, `<name>-dark.svg`."""
    title: str
    caption: str
    summary: str
    """What it shows, for those who do not see it."""
    draw: Callable[[Axes, Palette], None]

    def figure(self, palette: Palette) -> Figure:
        """Drawn on the paper of `palette`."""
        with figure_style(palette):
            figure = Figure(figsize=SIZE, layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.add_subplot()
            self.draw(axes, palette)
            # ticks are made when the figure is saved, by then with the colours of light paper
            axes.tick_params(colors=palette.muted, length=3)
            axes.grid(color=palette.faint, linewidth=0.8)
        return figure


def pictures(ours: Evaluation, theirs: Evaluation | None) -> list[Picture]:
    """The figures that have something to show."""
    if not ours.grounded:
        return []
    shown = [_recall(ours, theirs), _histogram(ours, theirs)]
    placed = [row for row in ours.grounded if row.offsets_s is not None]
    if not placed:
        return shown
    return [*shown, _offsets(placed), *_lengths(placed), _against_duration(placed), _against_position(placed)]


# ---------------------------------------------------------------------------------------------- IoU
def _recall(ours: Evaluation, theirs: Evaluation | None) -> Picture:
    samples = [row.record for row in ours.grounded]
    constants = {
        "whole video": baseline_predictions(samples, "whole_video"),
        "best constant": best_constant_predictions(samples)[0],
    }
    flat = {
        name: recalls([sample_scores(row, ours.protocol)["mIoU"] for row in rows]) for name, rows in constants.items()
    }
    curve, other = recalls(_ious(ours)), recalls(_ious(theirs)) if theirs and theirs.grounded else None

    def draw(axes: Axes, palette: Palette) -> None:
        above_zero = slice(1, None)  # every IoU is at least 0
        for (name, values), dashes in zip(flat.items(), ((1, 1.5), (4, 2)), strict=True):
            line = axes.plot(THRESHOLDS[above_zero], values[above_zero], color=palette.muted, label=name)
            line[0].set(linewidth=1.4, dashes=dashes)
        if theirs is not None and other is not None:
            axes.plot(THRESHOLDS[above_zero], other[above_zero], color=palette.saliency, label=_short(theirs.name))
        line = axes.plot(THRESHOLDS[above_zero], curve[above_zero], color=palette.prediction, label=_short(ours.name))
        line[0].set_linewidth(2.6)
        axes.set(xlim=(0, 1), ylim=(0, 100), xlabel="IoU threshold m", ylabel="R1@m, %")
        _legend(axes, palette)

    said = ", ".join(f"{curve[round(100 * m)]:.1f} % at {m}" for m in (0.1, 0.3, 0.5, 0.7, 0.9))
    return Picture("recall", "Recall over thresholds", "Share of queries whose IoU is at least m.", said, draw)


THRESHOLDS = np.arange(101) / 100


def recalls(ious: Sequence[float]) -> np.ndarray:
    """Percent of `ious` that are at least each of `THRESHOLDS`, (101,)."""
    ordered = np.sort(np.asarray(ious, dtype=np.float64))
    return 100 * (1 - np.searchsorted(ordered, THRESHOLDS, side="left") / len(ordered))


def _histogram(ours: Evaluation, theirs: Evaluation | None) -> Picture:
    ious = np.array(_ious(ours))
    edges = np.linspace(0, 1, NUM_IOU_BINS + 1)
    none = 100 * float((ious == 0).mean())

    def draw(axes: Axes, palette: Palette) -> None:
        shares = _shares(ious, edges)
        middles, width = (edges[:-1] + edges[1:]) / 2, 0.9 / NUM_IOU_BINS
        axes.bar(middles, shares, width=width, color=palette.prediction, label=_short(ours.name))
        axes.bar(middles[:1], [none], width=width, color=palette.muted, label="IoU 0")
        if theirs is not None and theirs.grounded:
            line = _shares(np.array(_ious(theirs)), edges)
            axes.stairs(line, edges, color=palette.saliency, linewidth=1.8, label=_short(theirs.name))
        axes.set(xlim=(0, 1), xlabel="IoU", ylabel="queries, %")
        _legend(axes, palette)

    caption = f"{none:.1f} % have IoU 0: no overlap, absence answered, or an answer that cannot be read."
    quarters = np.quantile(ious, (0.25, 0.5, 0.75))
    summary = f"quartiles of IoU {quarters[0]:.2f}, {quarters[1]:.2f}, {quarters[2]:.2f}; {none:.1f} % have IoU 0"
    return Picture("iou", "IoU of the answers", caption, summary, draw)


def _shares(ious: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return 100 * np.histogram(ious, edges)[0] / len(ious)


def _ious(evaluation: Evaluation) -> list[float]:
    return [row.scores["mIoU"] for row in evaluation.grounded]


# ---------------------------------------------------------------------------------------------- errors
def _against_duration(rows: Sequence[Judged]) -> Picture:
    durations = np.array([row.record["duration"] for row in rows])
    is_log = durations.max() > 20 * durations.min()
    return _errors("duration", "Error against duration", rows, durations, "duration of the clip, s", is_log)


def _against_position(rows: Sequence[Judged]) -> Picture:
    middles = np.array([100 * sum(row.record["gt"][0][:2]) / 2 / row.record["duration"] for row in rows])
    return _errors("position", "Error against position", rows, middles, "middle of the labelled window, % of the clip")


def _errors(
    name: str, title: str, rows: Sequence[Judged], places: np.ndarray, label: str, is_log: bool = False
) -> Picture:
    """The boundary error (mean of start and end, seconds) over `places`, with its median in groups of equal size."""
    errors = np.abs(_within([row.offsets_s for row in rows])).mean(axis=1)
    most = _reach(errors)
    centres, medians, low, high = grouped(places, errors)

    def draw(axes: Axes, palette: Palette) -> None:
        axes.scatter(places, errors, s=11, color=palette.muted, alpha=_alpha(len(rows)), linewidths=0, rasterized=True)
        axes.fill_between(centres, low, high, color=palette.prediction, alpha=0.22, linewidth=0, label="middle half")
        axes.plot(centres, medians, "o-", color=palette.prediction, markersize=5, label="median")
        if is_log:
            axes.set_xscale("log")
            _label_powers(axes.xaxis, places.min(), places.max())
        axes.set(ylim=(0, most), xlabel=label, ylabel="error of start and end, s")
        _legend(axes, palette)

    caption = f"Mean of |start error| and |end error|, {len(rows)} queries.{_left_out(int((errors > most).sum()))}"
    said = ", ".join(f"{median:.1f} s at {centre:.0f}" for centre, median in zip(centres, medians, strict=True))
    return Picture(name, title, caption, f"median error over {label}: {said}", draw)


def grouped(places: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of up to `NUM_GROUPS` groups of neighbours in `places`, of equal size: median place, and median and quartiles of
    `values`. Equal places are never in two groups."""
    edges = np.unique(np.quantile(places, np.linspace(0, 1, min(NUM_GROUPS, max(1, len(places) // 5)) + 1)))
    group = np.clip(np.searchsorted(edges, places, side="right") - 1, 0, max(len(edges) - 2, 0))
    chosen = [group == number for number in np.unique(group)]
    quartiles = np.array([np.quantile(values[mask], (0.5, 0.25, 0.75)) for mask in chosen])
    return np.array([np.median(places[mask]) for mask in chosen]), *quartiles.T


def _offsets(rows: Sequence[Judged]) -> Picture:
    starts, ends = _within([row.offsets_s for row in rows]).T
    far = np.maximum(np.abs(starts), np.abs(ends))
    most = _reach(far)

    def draw(axes: Axes, palette: Palette) -> None:
        axes.axhline(0, color=palette.muted, linewidth=1)
        axes.axvline(0, color=palette.muted, linewidth=1)
        axes.scatter(
            starts, ends, s=12, color=palette.prediction, alpha=_alpha(len(rows)), linewidths=0, rasterized=True
        )
        corners = {"too long": (0.02, 0.97), "late": (0.98, 0.97), "early": (0.02, 0.03), "too short": (0.98, 0.03)}
        for words, (x, y) in corners.items():
            text = axes.text(x, y, words, transform=axes.transAxes, color=palette.muted, fontsize=10.5, style="italic")
            text.set(ha="left" if x < 0.5 else "right", va="bottom" if y < 0.5 else "top")
        axes.set(xlim=(-most, most), ylim=(-most, most))
        axes.set(xlabel="start, predicted − labelled, s", ylabel="end, predicted − labelled, s")

    caption = f"One point a query, {len(rows)} of them.{_left_out(int((far > most).sum()))}"
    said = f"median start offset {np.median(starts):+.2f} s, median end offset {np.median(ends):+.2f} s"
    return Picture("offsets", "Start and end", caption, said, draw)


def _lengths(rows: Sequence[Judged]) -> list[Picture]:
    """One picture, or none where no window has a length."""
    predicted, labelled = _within([row.lengths_s for row in rows]).T
    usable = (predicted > 0) & (labelled > 0)
    shown, truth = predicted[usable], labelled[usable]
    if not len(shown):
        return []

    def draw(axes: Axes, palette: Palette) -> None:
        low, high = 0.8 * min(shown.min(), truth.min()), 1.25 * max(shown.max(), truth.max())
        axes.plot([low, high], [low, high], color=palette.muted, linewidth=1)
        axes.scatter(truth, shown, s=12, color=palette.prediction, alpha=_alpha(len(shown)), linewidths=0)
        axes.collections[-1].set_rasterized(True)
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        for axis in (axes.xaxis, axes.yaxis):
            _label_powers(axis, low, high)
        axes.set(xlabel="labelled length, s", ylabel="predicted length, s")

    empty = f" {len(rows) - len(shown)} windows without length are left out." if len(shown) < len(rows) else ""
    caption = f"On the line both are equally long. A level band is a model that always answers alike.{empty}"
    ratio = f"median of predicted over labelled length {np.median(shown / truth):.2f}"
    return [Picture("lengths", "Length", caption, ratio, draw)]


def _within(seconds: Sequence[Any]) -> np.ndarray:
    """An array whose values are no farther from 0 than `FARTHEST_S`."""
    return np.clip(np.array(seconds, dtype=np.float64), -FARTHEST_S, FARTHEST_S)


def _reach(values: np.ndarray) -> float:
    """Where an axis of seconds ends, so that nearly all of `values` have room."""
    return max(float(np.percentile(values, SHOWN_SHARE)) * 1.1, 0.1)


def _label_powers(axis: Axis, low: float, high: float) -> None:
    """Plain numbers on a logarithmic axis from `low` to `high`, as many as have room."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < WIDE * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes, palette: Palette) -> None:
    """Above the axes, where it hides nothing, the newest line first."""
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2,
        labelcolor=palette.ink, fontsize=10, columnspacing=1.6, labelspacing=0.3,
    )  # fmt: skip


def _alpha(num_points: int) -> float:
    """How dark a point is: many of them must not become one blot."""
    return float(np.clip(30 / np.sqrt(num_points + 1), 0.12, 0.75))


def _left_out(count: int) -> str:
    return f" {count} {'lies' if count == 1 else 'lie'} outside the picture." if count else ""


def _short(name: str) -> str:
    shown = name if len(name) <= 24 else f"{name[:23]}…"
    return shown.replace("$", r"\$")  # matplotlib reads formulas between dollar signs
