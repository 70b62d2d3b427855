"""Constant answers that need no video, to be printed beside a model's: what they score, a model has not earned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from utils.common import UserError
from utils.samples import Sample, duration_of, sample_windows
from utils.spans import Span

BASELINES = {"whole_video": (0.0, 1.0), "centre": (0.25, 0.75)}
"""Start and end of the constant answers, as shares of the duration."""


def baseline_predictions(samples: Iterable[Sample], kind: Literal["whole_video", "centre"]) -> list[dict[str, Any]]:
    """The same samples with a constant answer.

    `whole_video` answers `[0, duration]`, `centre` the middle half `[duration / 4, 3 * duration / 4]`.
    Raises `UserError` for another kind and for a duration that is missing or not a number above 0.
    """
    if kind not in BASELINES:
        raise UserError(f"unknown baseline {kind!r}; choose from {', '.join(BASELINES)}")
    return _answered(samples, *BASELINES[kind])


def best_constant_predictions(samples: Iterable[Sample], steps: int = 32) -> tuple[list[dict[str, Any]], Span]:
    """The same samples with the constant answer that has the highest mIoU on them, and that answer in shares.

    It is searched among all windows that begin and end at multiples of 1/`steps` of the duration, on the very rows it
    is scored on, which favours it. Without a row that has a labelled window it is the whole video.
    """
    rows = list(samples)
    durations = [duration_of(row) for row in rows]
    shares = [
        [(start / duration, end / duration) for start, end in sample_windows(row, "gt") or []]
        for row, duration in zip(rows, durations, strict=True)
    ]
    best = _best_constant([windows for windows in shares if windows], steps)
    return _answered(rows, *best), best


def _answered(samples: Iterable[Sample], start: float, end: float) -> list[dict[str, Any]]:
    durations = [(sample, duration_of(sample)) for sample in samples]
    return [{**sample, "pred": [[start * duration, end * duration]]} for sample, duration in durations]


def _best_constant(shares: Sequence[Sequence[tuple[float, float]]], steps: int) -> Span:
    """Of `shares[row][window]`, in shares of the duration. Equal means are told apart by the window, not by order."""
    if not shares:
        return Span(0.0, 1.0)
    starts, ends = np.array([window for windows in shares for window in windows], dtype=np.float64).T
    first = np.cumsum([0, *map(len, shares[:-1])])
    usable = np.isfinite(starts) & np.isfinite(ends) & (ends > starts)

    def mean_iou(window: Span) -> float:
        both = np.minimum(ends, window.end) - np.maximum(starts, window.start)
        either = np.maximum(ends, window.end) - np.minimum(starts, window.start)
        ious = np.where(usable & (both > 0), both / np.where(usable, either, 1.0), 0.0)
        return round(float(np.maximum.reduceat(ious, first).mean()), 12)  # sums differ with the order of the rows

    grid = [Span(a / steps, b / steps) for a in range(steps) for b in range(a + 1, steps + 1)]
    return max(grid, key=lambda window: (mean_iou(window), window))
