"""Rows of the timeline picture: reads predictions and labels in every form they come in, and scores them.

What a row looks like on paper is the business of `inference.visualize`.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from utils.common import UserError
from utils.spans import Span, temporal_iou

EMPTY_WINDOW = "an empty window: start = end"
"""What is said of a window without length, here and on the command line."""

_MAX_PREDICTIONS = 100


@dataclass(frozen=True)
class Lane:
    """One row of the picture."""

    kind: Literal["ground truth", "prediction"]
    label: str
    windows: tuple[Span, ...]
    note: str = ""
    """Said in words where no window can be drawn, or where the only one has no length."""
    ious: tuple[float, ...] = ()
    """Per window, with the labelled window it fits best; one value for a row without windows; empty = not scored."""
    verdict: str = ""
    """In place of an IoU where the event is labelled absent."""


def timeline_lanes(
    predictions: Sequence[Any],
    ground_truths: Sequence[Sequence[float]] | None = None,
    labels: Sequence[str] | None = None,
) -> list[Lane]:
    """The rows of the picture, the ground truth first; for the arguments see `visualize_temporal_grounding`.

    Raises `UserError` for windows that are not pairs of numbers, for a wrong number of labels and for ground truths
    beside predictions of several queries.
    """
    answers = _as_list(predictions, "predictions")
    truths = None if ground_truths is None else _windows(ground_truths, "ground_truths")
    if len(answers) > _MAX_PREDICTIONS:
        raise UserError(f"a picture holds at most {_MAX_PREDICTIONS} predictions, got {len(answers)}; split them up")
    num_queries = len(distinct_queries(answers))
    if num_queries > 1 and truths is not None:
        raise UserError(f"ground_truths belong to one query, the predictions answer {num_queries}; draw each by itself")
    lanes = [] if truths is None else [_truth_lane(truths)]
    for index, (item, name) in enumerate(zip(answers, _prediction_names(answers, labels), strict=False)):
        windows, note = _read_prediction(item, f"predictions[{index}]")
        lanes.append(_prediction_lane(name, windows, note, truths))
    return lanes if answers else [*lanes, Lane("prediction", "Prediction", (), "no prediction")]


def _read_prediction(item: Any, where: str) -> tuple[list[Span] | None, str]:
    """Windows of one answer (None = unreadable, empty = absence stated) and what to say where there is none."""
    absent = "the answer says that the event does not happen"
    if item is None:
        return None, "the answer could not be read"
    if not isinstance(item, Mapping):
        windows = _windows([item] if _is_window(item) else item, where)
        return windows, "" if windows else absent
    if item.get("parsed", True) in (False, None):
        raw = " ".join(str(item.get("raw_text") or "").split())
        return None, f"the answer could not be read: “{shorten(raw, 70)}”" if raw else "the answer is empty"
    if "segments" in item:
        windows = _windows(item["segments"], f"{where}['segments']")
        return windows, "" if windows else absent
    if "start_time" not in item or "end_time" not in item:
        raise UserError(f"{where} has neither segments nor start_time and end_time; pass what predict() returned")
    if item["start_time"] is None or item["end_time"] is None:
        return [], absent
    return _windows([(item["start_time"], item["end_time"])], where), ""


def _as_list(value: Any, where: str) -> list[Any]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Collection):
        raise UserError(f"{where} must be a list, got {value!r}; write {where}=[...] even for one")
    return list(value)


def _is_window(value: Any) -> bool:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        return False
    parts = list(value)
    return len(parts) == 2 and all(isinstance(part, Real) for part in parts)


def _windows(values: Any, where: str) -> list[Span]:
    pairs = _as_list(values, where)
    for pair in pairs:
        if not _is_window(pair):
            raise UserError(f"{where} must hold (start, end) pairs in seconds, got {pair!r}; e.g. [(10.0, 15.0)]")
    return [Span(float(start), float(end)) for start, end in pairs]


def _prediction_names(predictions: list[Any], labels: Sequence[str] | None) -> list[str]:
    if labels is not None:
        if len(labels) != len(predictions):
            raise UserError(f"labels must name every prediction: {len(predictions)} expected, got {len(labels)}")
        return list(labels)
    if len(distinct_queries(predictions)) > 1:
        return [_query_of(item) or "Prediction" for item in predictions]
    return [f"Prediction {number}" for number in range(1, len(predictions) + 1)] if predictions[1:] else ["Prediction"]


def _query_of(item: Any) -> str | None:
    return item["query"] if isinstance(item, Mapping) and "query" in item else None


def distinct_queries(predictions: Iterable[Any]) -> list[str]:
    """The distinct queries the predictions carry, in order."""
    return list(dict.fromkeys(query for item in predictions if (query := _query_of(item))))


def _truth_lane(truths: list[Span]) -> Lane:
    return Lane("ground truth", "Ground truth", tuple(truths), "" if truths else "the event is not in the video")


def _prediction_lane(label: str, windows: list[Span] | None, note: str, truths: list[Span] | None) -> Lane:
    if truths == []:  # labelled absent: there is no IoU, the answer is right or wrong
        return Lane("prediction", label, tuple(windows or ()), note, verdict="right" if windows == [] else "wrong")
    if not windows:
        return Lane("prediction", label, (), note, ious=(0.0,) if truths else ())
    ious = tuple(max(temporal_iou(window, truth) for truth in truths) for window in windows) if truths else ()
    return Lane("prediction", label, tuple(windows), _note(windows), ious=ious)


def _note(windows: Sequence[Span]) -> str:
    if not any(is_finite(window) for window in windows):
        return "not a window in time"
    return EMPTY_WINDOW if len(windows) == 1 and is_empty(windows[0]) else ""


def is_empty(window: Span) -> bool:
    """Whether `window` is a point in time: it starts where it ends."""
    return window.start == window.end


def is_finite(window: Span) -> bool:
    """Whether both ends of `window` are numbers that a time axis can hold."""
    return math.isfinite(window.start) and math.isfinite(window.end)


def wrap(text: str, width: int, max_lines: int) -> list[str]:
    """Lines of at most `width` columns (a wide character takes two), cut off with an ellipsis after `max_lines`."""
    lines = [""]
    for word in text.split():
        for piece in _pieces(word, width):
            joined = f"{lines[-1]} {piece}".strip()
            if _columns(joined) <= width:
                lines[-1] = joined
            else:
                lines.append(piece)
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], shorten(" ".join(lines[max_lines - 1 :]), width)]
    return [line for line in lines if line]


def _pieces(word: str, width: int) -> list[str]:
    """`word`, cut where it is wider than a line (a text without spaces is one word)."""
    pieces = [""]
    for character in word:
        if _columns(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces


def shorten(text: str, width: int) -> str:
    """`text` in at most `width` columns, cut off with an ellipsis."""
    if _columns(text) <= width:
        return text
    while text and _columns(text) > width - 1:
        text = text[:-1]
    return text.rstrip() + "…"


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
