"""The figure of docs/benchmarks.md: how the gain of `grpo` grows with completions and with the prompt's length."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from scripts.benchmarks.grpo import measure_times, summary
from scripts.benchmarks.grpo_ways import Cell, Work, make_way
from utils.common import atomic_open
from utils.curves import figure_format, figure_style, save_figure
from utils.palette import BLUE, INK, MUTED, VERMILION

GENERATIONS, LENGTHS = (2, 4, 8, 16), (300, 1200, 2500, 5000)
COLUMNS = ("sweep", "prompt_tokens", "generations", "completion_tokens", "update_ratio", "step_ratio", "token_ratio",
           "update_s_shared", "update_s_unshared", "step_s_shared", "step_s_unshared")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Measure the cells, write CSV and picture; a sweep that is not measured keeps its rows of the CSV."""
    figure_format(args.out)
    numbers = args.out.with_suffix(".csv")
    sweeps = ("G", "P") if args.sweep == "both" else (args.sweep,)
    kept = read_rows(numbers) if numbers.is_file() else []
    measured = [row for row in kept if row["sweep"] not in sweeps]
    curve_row("", Cell(150, 2, 4, repeats=1))  # warms up
    for sweep in sweeps:
        for cell in curve_cells(sweep, args.repeats):
            measured.append(row := curve_row(sweep, cell))
            write_rows(numbers, measured)
            print(f"P {row['prompt_tokens']} G {row['generations']}: update {row['update_ratio']:.2f}x, "
                  f"step {row['step_ratio']:.2f}x", flush=True)  # fmt: skip
    save_figure(draw(read_rows(numbers)), args.out)
    print(f"{args.out} and {numbers}")


def curve_cells(sweep: str, repeats: int) -> list[Cell]:
    """The cells of one panel: over the number of completions ("G") or the length of the prompt ("P")."""
    if sweep == "G":
        return [Cell(1200, size, 32, repeats=repeats) for size in GENERATIONS]
    return [Cell(length, 8, 32, repeats=repeats) for length in LENGTHS]


def curve_row(sweep: str, cell: Cell) -> dict[str, Any]:
    """Measure a cell; a row of the CSV. The ratios are of the project's own two paths."""
    work = Work(cell)
    times = measure_times({name: make_way(name, work) for name in ("shared", "unshared")}, cell)
    numbers = summary(work, times, None)
    length, size, answer = work.length, cell.generations, cell.completion_tokens
    return {
        "sweep": sweep,
        "prompt_tokens": length,
        "generations": size,
        "completion_tokens": answer,
        "update_ratio": numbers["update_ratio"],
        "step_ratio": numbers["step_ratio"],
        "token_ratio": size * (length + answer) / (length + size * answer),
        **{f"{phase}_s_{way}": times[way][phase] for phase in ("update", "step") for way in ("shared", "unshared")},
    }


def write_rows(path: Path, measured: Sequence[Mapping[str, Any]]) -> None:
    """The CSV, ratios and seconds to four digits."""
    with atomic_open(path) as handle:
        writer = csv.DictWriter(handle, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in measured:
            short = {key: f"{value:.4g}" for key, value in row.items() if isinstance(value, float)}
            writer.writerow({**row, **short})


def read_rows(path: Path) -> list[dict[str, Any]]:
    """What `write_rows` wrote."""
    with open(path, encoding="utf-8", newline="") as handle:
        return [
            {key: value if key == "sweep" else float(value) for key, value in row.items()}
            for row in csv.DictReader(handle)
        ]


def draw(measured: Sequence[Mapping[str, Any]]) -> Figure:
    """Two panels: the ratios over the number of completions and over the length of the prompt."""
    with figure_style():
        figure = Figure(figsize=(10.4, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr, call-arg]
        left, right = figure.subplots(1, 2, sharey=True)
        by_group = [row for row in measured if row["sweep"] == "G"]
        by_length = [row for row in measured if row["sweep"] == "P"]
        _panel(left, by_group, "generations", "More completions, prompt of 1,200 tokens", "completions of a prompt, G")
        _panel(right, by_length, "prompt_tokens", "Longer prompt, G = 8", "tokens of the prompt, P")
        left.set_ylabel("times as fast as row by row")
        left.legend(loc="upper left", labelcolor=INK)
    return figure


def _panel(axes: Axes, measured: Sequence[Mapping[str, Any]], key: str, title: str, label: str) -> None:
    measured = sorted(measured, key=lambda row: row[key])
    places = [row[key] for row in measured]
    lines = (("token_ratio", "times fewer tokens", MUTED, "--"), ("update_ratio", "update", BLUE, "-"),
             ("step_ratio", "whole step", VERMILION, "-"))  # fmt: skip
    for column, name, colour, style in lines:
        marker = "" if column == "token_ratio" else "o"
        axes.plot(places, [row[column] for row in measured], style, color=colour, marker=marker, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:,.0f}" for place in places])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.set_xlabel(label)
