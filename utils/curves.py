"""Training curves: a metrics file in, one PNG of panels out. Also the look that every figure of the project shares;
its colours are in `utils.palette`.

Figures are made through matplotlib's objects, never through pyplot, so a notebook's or a user's backend stays as it is.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from utils.common import UserError, atomic_open
from utils.logging_utils import get_logger, read_metrics
from utils.palette import AMBER, BLUE, GREEN, INK, LIGHT, PURPLE, VERMILION, Palette
from utils.palette import FAINT as FAINT  # the colours may be imported from here too
from utils.palette import MUTED as MUTED

CYCLE = (BLUE, VERMILION, GREEN, PURPLE, AMBER, "#56B4E9")

_WIDE_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC")


def _style(palette: Palette) -> dict[str, Any]:
    """Settings of matplotlib for figures on the paper of `palette`."""
    return {
        "font.size": 11.0,
        "text.color": palette.ink,
        "axes.facecolor": palette.paper,
        "axes.labelcolor": palette.muted,
        "axes.edgecolor": palette.muted,
        "axes.linewidth": 0.8,
        "axes.titlesize": 13.0,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlecolor": palette.ink,
        "axes.titlepad": 10.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": palette.faint,
        "grid.linewidth": 0.8,
        "xtick.color": palette.muted,
        "ytick.color": palette.muted,
        "legend.frameon": False,
        "lines.linewidth": 2.0,
        "lines.solid_capstyle": "round",
        "figure.facecolor": palette.paper,
        "savefig.facecolor": "auto",
        "svg.hashsalt": "vtg",  # the same picture gives the same file
    }


@contextmanager
def figure_style(palette: Palette = LIGHT) -> Iterator[None]:
    """The colours of `palette` whatever the user's matplotlibrc says, for the figures made and saved inside."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    families = ["DejaVu Sans", *(name for name in _WIDE_FONTS if name in installed)]
    with matplotlib.style.context({**_style(palette), "font.family": families}, after_reset=True):
        yield


def save_figure(figure: Figure, output_path: str | os.PathLike[str], *, dpi: int = 160) -> Path:
    """Write `figure` as png, svg or pdf, by the suffix of `output_path`, atomically; returns the path."""
    path = Path(output_path)
    kind = figure_format(path)
    undated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    with figure_style(), _one_line_for_missing_glyphs(path), atomic_open(path, "wb") as handle:
        figure.savefig(handle, format=kind, dpi=dpi, metadata=undated)
    return path


@contextmanager
def _one_line_for_missing_glyphs(path: Path) -> Iterator[None]:
    """Matplotlib warns once for every character that no font has; say it once, with the remedy."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    glyphs = [warning for warning in caught if "missing from font" in str(warning.message)]
    for warning in caught:
        if warning not in glyphs:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if glyphs:
        get_logger().warning(
            "%s: no installed font has some of its characters, they are shown as boxes; for Chinese, Japanese or "
            "Korean install a Noto Sans CJK font",
            path,
        )


def figure_format(path: str | os.PathLike[str]) -> str:
    """The picture format that the suffix of `path` names; `UserError` for any but png, svg and pdf."""
    suffix = Path(path).suffix.lower().lstrip(".")
    if suffix not in ("png", "svg", "pdf"):
        raise UserError(f"a picture is written as .png, .svg or .pdf, got {os.fspath(path)!r}; change its suffix")
    return suffix


@dataclass(frozen=True)
class Series:
    """One metric over the steps; values are finite."""

    name: str
    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Panel:
    """A panel of the picture: the metrics it shows (a name ending in `/` stands for all below it) and how."""

    title: str
    unit: str
    metrics: tuple[str, ...]
    smooth: bool = False
    """Draw the raw values faintly under a running mean."""
    mark_best: tuple[str, ...] = ()
    """Metrics whose highest value is marked."""
    from_zero: bool = False
    log_if_apart: bool = False
    """A logarithmic axis when the peaks of the lines lie far apart."""
    without: tuple[str, ...] = ()
    """Endings of names that are left out."""
    digits: int = 1
    """Decimals of a marked best."""


PANELS = (
    Panel(
        "Reward",
        "mean of the completions",
        ("reward/total", "reward/"),
        smooth=True,
        without=("_std", "zero_spread"),
    ),
    Panel(
        "Validation reward",
        "mean of the answers",
        ("eval/reward", "eval/reward/"),
        mark_best=("eval/reward",),
        digits=3,
    ),
    Panel("Groups without spread", "share of groups", ("reward/zero_spread",), smooth=True, from_zero=True),
    Panel("KL from the start", "nats a token", ("train/kl",), smooth=True, from_zero=True),
    Panel("Entropy", "nats a token", ("train/entropy",), smooth=True, from_zero=True),
    Panel("Completion length", "tokens, mean", ("train/completions/mean_length",), smooth=True, from_zero=True),
    Panel("Training loss", "loss", ("train/loss",), smooth=True),
    Panel("Learning rate", "per parameter group", ("train/learning_rate/",), from_zero=True, log_if_apart=True),
    Panel(
        "Validation",
        "%",
        ("eval/mIoU", "eval/R1@0.5", "eval/R1@0.3", "eval/R1@0.7"),
        mark_best=("eval/mIoU", "eval/R1@0.5"),
        from_zero=True,
    ),
    Panel("Gradient norm", "norm", ("train/grad_norm",), smooth=True, from_zero=True),
    Panel("Unparsable answers", "% of validation answers", ("eval/parse_failure_rate",), from_zero=True),
    Panel("Throughput", "samples per second", ("train/samples_per_second",), smooth=True, from_zero=True),
)


def plot_curves(metrics_path: str | os.PathLike[str], output_path: str | os.PathLike[str]) -> Path:
    """Draw the curves of the last run in a metrics file (see `utils.logging_utils.MetricsWriter`); returns the path.

    Panels whose metrics were never written are left out. Raises `UserError` if the file is missing, if it holds none of
    the metrics of `PANELS`, or if the suffix is not png, svg or pdf.
    """
    figure_format(output_path)
    records = read_metrics(metrics_path)
    with figure_style():
        figure = draw_curves(records)
        if figure is None:
            known = ", ".join(name for panel in PANELS for name in panel.metrics)
            raise UserError(f"metrics file {os.fspath(metrics_path)} holds nothing to plot; looked for {known}")
        return save_figure(figure, output_path)


def draw_curves(records: Sequence[Mapping[str, Any]], panels: Sequence[Panel] = PANELS) -> Figure | None:
    """The figure of the panels that `records` have values for, one axes each; None if there is none."""
    filled = [(panel, lines) for panel in panels if (lines := _panel_series(records, panel))]
    if not filled:
        return None
    rows = 1 if len(filled) <= 3 else 2 if len(filled) <= 8 else 3
    columns = math.ceil(len(filled) / rows)
    figure = Figure(figsize=(5.0 * columns, 3.7 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr, call-arg]
    steps = [step for _, lines in filled for line in lines for step in line.steps]
    for index, (panel, lines) in enumerate(filled):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw_panel(axes, panel, lines)
        _set_step_axis(axes, min(steps), max(steps))
    return figure


def smoothed(values: Sequence[float], sigma: float | None = None) -> list[float]:
    """Gaussian mean around every value, cut off at the ends; it does not lag behind the curve as a running mean does.

    `sigma` is in values, by default a fiftieth of the curve.

    >>> [round(value, 3) for value in smoothed([0.0, 0.0, 3.0, 0.0, 0.0], sigma=1.0)]
    [0.232, 0.771, 1.208, 0.771, 0.232]
    """
    width = max(1.0, len(values) / 50) if sigma is None else sigma
    reach = min(len(values) - 1, math.ceil(4 * width))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    total = np.convolve(values, kernel)[reach : reach + len(values)]
    weight = np.convolve(np.ones(len(values)), kernel)[reach : reach + len(values)]
    return (total / weight).tolist()


def _panel_series(records: Sequence[Mapping[str, Any]], panel: Panel) -> list[Series]:
    found = list(dict.fromkeys(key for record in records for key in record))
    names: list[str] = []
    for metric in panel.metrics:
        names += [name for name in found if name == metric or (metric.endswith("/") and name.startswith(metric))]
    shown = [name for name in dict.fromkeys(names) if not (panel.without and name.endswith(panel.without))]
    return [line for name in shown if (line := _series(records, name)).steps]


def _series(records: Sequence[Mapping[str, Any]], name: str) -> Series:
    points = [(record["step"], record[name]) for record in records if _is_finite(record.get(name, None))]
    return Series(name, [int(step) for step, _ in points], [float(value) for _, value in points])


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _draw_panel(axes: Axes, panel: Panel, lines: Sequence[Series]) -> None:
    axes.set_title(panel.title)
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    for index, line in enumerate(lines):
        is_covering = any(line.values == other.values for other in lines[:index])  # dashes let the other show through
        dashes = (0, (3, 2)) if is_covering else "-"
        colour = CYCLE[index % len(CYCLE)]
        _draw_series(axes, panel, line, label=_label(panel, line, lines), color=colour, linestyle=dashes)
    axes.margins(y=0.1)
    highest = max(max(line.values) for line in lines)
    if panel.log_if_apart and _are_apart(lines):
        _use_log_scale(axes, lines)
    elif panel.from_zero:
        axes.set_ylim(0, 1.15 * highest if highest > 0 else 1.0)
    if len(panel.metrics) > 1 or panel.metrics[0].endswith("/"):  # the title alone does not name the line
        axes.legend(fontsize=10.5, loc="best", labelcolor=INK)


def _draw_series(axes: Axes, panel: Panel, line: Series, **look: Any) -> None:
    if panel.smooth and len(line.steps) > 20:
        axes.plot(line.steps, line.values, color=look["color"], alpha=0.3, linewidth=1.0, label="_raw")
        axes.plot(line.steps, smoothed(line.values), **look)
    else:
        axes.plot(line.steps, line.values, marker="o" if len(line.steps) <= 25 else "", markersize=5, **look)
    if line.name in panel.mark_best:
        step, value = _best(line)
        star = {"markersize": 16, "color": look["color"], "markeredgecolor": "white", "zorder": 5}
        axes.plot([step], [value], marker="*", **star)


def _label(panel: Panel, line: Series, lines: Sequence[Series]) -> str:
    label = line.name.rsplit("/", 1)[-1].replace("_", " ")
    if line.name in panel.mark_best:
        step, value = _best(line)
        return f"{label}, best {value:.{panel.digits}f} at step {step:,}"
    frozen = panel.log_if_apart and not any(line.values) and any(any(other.values) for other in lines)
    return f"{label} (frozen)" if frozen else label


def _best(line: Series) -> tuple[int, float]:
    """Step and value of the first highest point."""
    index = max(range(len(line.values)), key=line.values.__getitem__)
    return line.steps[index], line.values[index]


def _are_apart(lines: Sequence[Series]) -> bool:
    """Whether the peaks of two lines differ so much that one would lie flat on the axis of the other."""
    peaks = [max(line.values) for line in lines if max(line.values) > 0]
    return bool(peaks) and max(peaks) > 5 * min(peaks)


def _use_log_scale(axes: Axes, lines: Sequence[Series]) -> None:
    """Down to a hundredth of the lowest peak: a warm-up and a decay that touch 0 would reach for minus infinity."""
    peaks = [max(line.values) for line in lines if max(line.values) > 0]
    axes.set_yscale("log", nonpositive="mask")
    axes.set_ylim(min(peaks) / 100, 3 * max(peaks))


def _set_step_axis(axes: Axes, first: int, last: int) -> None:
    """The same range in every panel. A single step has no range of its own: it gets one step on either side."""
    room = 0.03 * (last - first) or 1.0
    axes.set_xlim(first - room, last + room)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
