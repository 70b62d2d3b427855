"""What a timeline is given, in every form it comes in: predictions, labelled windows, saliency. Checks and reads only.

Which rows come of it is the business of `inference.timeline_rows`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from inference.timeline_text import shorten
from utils.common import UserError
from utils.spans import Span

ABSENT = "the answer says that the event does not happen"
UNREADABLE = "the answer could not be read"


@dataclass(frozen=True)
class Answer:
    """One prediction: its windows, the best score first where they have scores, else as written."""

    windows: tuple[Span, ...] | None
    """None = unreadable, empty = absence stated."""
    scores: tuple[float | None, ...] = ()
    """One for each window, None for a window without; empty = no window has one."""
    note: str = ""
    """What to say where there is no window."""


@dataclass(frozen=True, eq=False)
class Saliency:
    """A curve over the video."""

    values: np.ndarray
    """float64, shape (N,), N >= 1; NaN where there is none."""
    times_s: np.ndarray | None = None
    """float64, shape (N,), strictly increasing, seconds on the file's clock; None = of N clips of equal length."""

    def on(self, duration_s: float) -> tuple[np.ndarray, np.ndarray]:
        """Times, and bounds of the stretches that the values stand for, shapes (N,) and (N + 1,); seconds.

        A value stands for its clip, or for the time up to half way to its neighbours.

        >>> Saliency(np.array([0.1, 0.9])).on(8.0)
        (array([2., 6.]), array([0., 4., 8.]))
        """
        if self.times_s is None:
            bounds = np.linspace(0.0, duration_s, len(self.values) + 1)
            return (bounds[:-1] + bounds[1:]) / 2, bounds
        middles = (self.times_s[:-1] + self.times_s[1:]) / 2
        return self.times_s, np.concatenate([self.times_s[:1], middles, self.times_s[-1:]])


def read_answer(item: Any, where: str) -> Answer:
    """One entry of `predictions`; see `inference.visualize.visualize_temporal_grounding`."""
    if item is None:
        return Answer(None, note=UNREADABLE)
    if not isinstance(item, Mapping):
        return _answer(_scored_windows([item] if _is_window(item, (2, 3)) else item, where))
    if item.get("parsed", True) in (False, None):
        raw = " ".join(str(item.get("raw_text") or "").split())
        return Answer(None, note=f"{UNREADABLE}: “{shorten(raw, 70)}”" if raw else "the answer is empty")
    scores = item.get("scores")
    if "segments" in item:
        return _answer(_with_scores(_scored_windows(item["segments"], f"{where}['segments']"), scores, where))
    if "start_time" not in item or "end_time" not in item:
        raise UserError(f"{where} has neither segments nor start_time and end_time; pass what predict() returned")
    if item["start_time"] is None or item["end_time"] is None:
        return Answer((), note=ABSENT)
    return _answer(_with_scores(_scored_windows([(item["start_time"], item["end_time"])], where), scores, where))


def read_windows(values: Any, where: str) -> list[Span]:
    """Labelled windows: `(start, end)` pairs, without scores."""
    pairs = as_list(values, where)
    for pair in pairs:
        if not _is_window(pair, (2,)):
            raise UserError(f"{where} must hold (start, end) pairs in seconds, got {pair!r}; e.g. [(10.0, 15.0)]")
    return [Span(float(start), float(end)) for start, end in pairs]


def read_saliency(value: Any, where: str = "saliency") -> Saliency:
    """Values of clips of equal length, or `(times, values)`; NaN and None are gaps.

    Raises `UserError` for no values, for what is not a number or infinite, and for times that do not fit the values or
    do not increase.
    """
    times, values = value if _is_pair_of_lists(value) else (None, value)
    numbers = _numbers(values, f"{where} values" if times is not None else where)
    if np.isinf(numbers).any():
        raise UserError(f"{where} holds an infinite value; give NaN where there is none")
    if times is None:
        return Saliency(numbers)
    at = _numbers(times, f"{where} times")
    if len(at) != len(numbers):
        raise UserError(f"{where}=(times, values) needs one time for each value, got {len(at)} and {len(numbers)}")
    if not np.isfinite(at).all() or (np.diff(at) <= 0).any():
        raise UserError(f"{where} times must be finite and strictly increasing seconds, got {at.tolist()[:8]}")
    return Saliency(numbers, at)


def as_list(value: Any, where: str) -> list[Any]:
    """`value` as a list; `UserError` for a single thing, a text or a mapping."""
    if isinstance(value, (str, Mapping)) or not isinstance(value, Collection):
        raise UserError(f"{where} must be a list, got {value!r}; write {where}=[...] even for one")
    return list(value)


def query_of(item: Any) -> str | None:
    """The query that a prediction carries."""
    return item["query"] if isinstance(item, Mapping) and "query" in item else None


def distinct_queries(predictions: Iterable[Any]) -> list[str]:
    """The distinct queries the predictions carry, in order."""
    return list(dict.fromkeys(query for item in predictions if (query := query_of(item))))


def _answer(pairs: Sequence[tuple[Span, float | None]]) -> Answer:
    if not pairs:
        return Answer((), note=ABSENT)
    if all(score is None for _, score in pairs):
        return Answer(tuple(window for window, _ in pairs))
    ordered = sorted(pairs, key=lambda pair: -math.inf if pair[1] is None else pair[1], reverse=True)
    return Answer(tuple(window for window, _ in ordered), tuple(score for _, score in ordered))


def _scored_windows(values: Any, where: str) -> list[tuple[Span, float | None]]:
    items = as_list(values, where)
    for item in items:
        if not _is_window(item, (2, 3)):
            raise UserError(
                f"{where} must hold (start, end) pairs in seconds, or (start, end, score), got {item!r}; "
                "e.g. [(10.0, 15.0)]"
            )
    parts = [list(item) for item in items]
    for part in parts:
        _check_score(part[2] if len(part) == 3 else 0.0, where)
    return [(Span(float(part[0]), float(part[1])), float(part[2]) if len(part) == 3 else None) for part in parts]


def _with_scores(
    pairs: Sequence[tuple[Span, float | None]], scores: Any, where: str
) -> list[tuple[Span, float | None]]:
    """The windows with the scores that stand beside them in the dictionary."""
    if scores is None:
        return list(pairs)
    given = as_list(scores, f"{where}['scores']")
    if len(given) != len(pairs):
        raise UserError(f"{where} has {len(pairs)} windows and {len(given)} scores; give one score for each window")
    if any(score is not None for _, score in pairs):
        raise UserError(f"{where} has scores in its windows and again under 'scores'; give them once")
    for score in given:
        _check_score(score, where)
    return [(window, float(score)) for (window, _), score in zip(pairs, given, strict=True)]


def _check_score(score: Any, where: str) -> None:
    if not isinstance(score, Real) or not math.isfinite(score):
        raise UserError(f"{where} has the score {score!r}; a score must be a finite number")


def _is_window(value: Any, lengths: Collection[int]) -> bool:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        return False
    parts = list(value)
    return len(parts) in lengths and all(isinstance(part, Real) for part in parts)


def _is_pair_of_lists(value: Any) -> bool:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Collection) or len(value) != 2:
        return False
    return all(isinstance(part, Collection) and not isinstance(part, str) for part in value)


def _numbers(value: Any, where: str) -> np.ndarray:
    """float64, shape (N,), N >= 1; None becomes NaN."""
    try:
        numbers = np.asarray(list(value), dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"{where} must be a list of numbers, got {shorten(repr(value), 80)}") from None
    if numbers.ndim != 1 or len(numbers) == 0:
        raise UserError(f"{where} must be a list of at least one number, got the shape {numbers.shape}")
    return numbers
