"""Rows of the timeline: which there are, in which block, and how well each prediction does.

Reading what is given is `inference.timeline_input`, what a row looks like on paper `inference.timeline_bars`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from inference.timeline_input import (
    Answer,
    Saliency,
    as_list,
    distinct_queries,
    query_of,
    read_answer,
    read_saliency,
    read_windows,
)
from utils.common import UserError, nearest
from utils.spans import Span, temporal_iou

EMPTY_WINDOW = "an empty window: start = end"
"""What is said of a window without length, here and on the command line."""

GroundTruths = Sequence[Sequence[float]] | Mapping[str, Sequence[Sequence[float]] | None]
"""Windows of the one query, or of each by its name; None = not labelled."""

_MAX_PREDICTIONS = 100


@dataclass(frozen=True)
class Lane:
    """One row of the picture."""

    kind: Literal["ground truth", "prediction", "saliency"]
    label: str
    windows: tuple[Span, ...] = ()
    name: str = ""
    """Id in the drawing: its bars are `<name>-1`, `<name>-2`, ..."""
    scores: tuple[float | None, ...] = ()
    """Per window, the highest first; empty = no window has one."""
    note: str = ""
    """Said in words where no window can be drawn, or where the only one has no length."""
    ious: tuple[float, ...] = ()
    """Per window, with the labelled window it fits best; one value for a row without windows; empty = not scored."""
    verdict: str = ""
    """In place of an IoU where the event is labelled absent."""
    curve: Saliency | None = None


@dataclass(frozen=True)
class Block:
    """Rows that belong to one query, the ground truth first."""

    lanes: tuple[Lane, ...]
    heading: str = ""
    """The query, where the picture has several."""

    @property
    def truths(self) -> tuple[Span, ...]:
        """The labelled windows."""
        return next((lane.windows for lane in self.lanes if lane.kind == "ground truth"), ())


def timeline_blocks(
    predictions: Sequence[Any],
    ground_truths: GroundTruths | None = None,
    labels: Sequence[str] | None = None,
    saliency: Any = None,
) -> list[Block]:
    """The rows of the picture, one block for each query in order; see `visualize_temporal_grounding`.

    Raises `UserError` for windows that are not pairs of numbers, scores or saliency that are not numbers, a wrong
    number of labels, and ground truths or saliency that do not say to which of several queries they belong.
    """
    answers = as_list(predictions, "predictions")
    if len(answers) > _MAX_PREDICTIONS:
        raise UserError(f"a picture holds at most {_MAX_PREDICTIONS} predictions, got {len(answers)}; split them up")
    groups = _groups(answers)
    truths = _by_query(ground_truths, groups, "ground_truths")
    curves = _by_query(saliency, groups, "saliency")
    names = _prediction_names(groups, len(answers), labels)
    blocks = []
    for number, (query, indices) in enumerate(groups.items(), start=1):
        prefix = f"query-{number}-" if len(groups) > 1 else ""
        heading = (query or "(no query)") if len(groups) > 1 else ""
        rows = _query_lanes(prefix, truths.get(query), [(index, answers[index], names[index]) for index in indices])
        blocks.append(Block((*rows, *_saliency_lanes(prefix, curves.get(query), "saliency")), heading))
    if len(groups) > 1 and saliency is not None and not isinstance(saliency, Mapping):
        blocks.append(Block(tuple(_saliency_lanes("", saliency, "saliency"))))
    return blocks


def _groups(answers: Sequence[Any]) -> dict[str | None, list[int]]:
    """Indices of the predictions by query, in order of appearance; with at most one query they are one group."""
    queries = distinct_queries(answers)
    if len(queries) < 2:
        return {queries[0] if queries else None: list(range(len(answers)))}
    groups: dict[str | None, list[int]] = {}
    for index, item in enumerate(answers):
        groups.setdefault(query_of(item) or None, []).append(index)
    return groups


def _by_query(given: Any, groups: Mapping[str | None, Any], what: str) -> Mapping[str | None, Any]:
    """`given` by query: a mapping as it is, anything else as that of the only query there is."""
    if isinstance(given, Mapping):
        for query in given:
            if query not in groups or query is None:
                known = [name for name in groups if name]
                hint = nearest(str(query), known)
                remedy = f"did you mean {hint!r}?" if hint else f"they carry {', '.join(map(repr, known)) or 'none'}"
                raise UserError(f"{what} holds the query {query!r}, which no prediction carries; {remedy}")
        return given
    if len(groups) == 1:
        return dict.fromkeys(groups, given)
    if what == "ground_truths" and given is not None:
        raise UserError(
            f"a list of ground_truths belongs to one query, the predictions answer {len(groups)}; give a mapping: "
            "ground_truths={query: [(start, end), ...], ...}"
        )
    return {}


def _query_lanes(prefix: str, given: Any, answers: Sequence[tuple[int, Any, str]]) -> list[Lane]:
    truths = None if given is None else read_windows(given, "ground_truths")
    lanes = [] if truths is None else [_truth_lane(f"{prefix}ground-truth", truths)]
    for index, item, label in answers:
        answer = read_answer(item, f"predictions[{index}]")
        lanes.append(replace(_prediction_lane(label, answer, truths), name=f"prediction-{index + 1}"))
    return lanes if answers else [*lanes, Lane("prediction", "Prediction", note="no prediction")]


def _saliency_lanes(prefix: str, given: Any, where: str) -> list[Lane]:
    if given is None:
        return []
    curve = read_saliency(given, where)
    note = "" if any(math.isfinite(value) for value in curve.values) else "no values"
    return [Lane("saliency", "Saliency", name=f"{prefix}saliency", note=note, curve=curve)]


def _prediction_names(
    groups: Mapping[str | None, Sequence[int]], count: int, labels: Sequence[str] | None
) -> dict[int, str]:
    """Each prediction's name; by default they are numbered within their query."""
    if labels is not None:
        if len(labels) != count:
            raise UserError(f"labels must name every prediction: {count} expected, got {len(labels)}")
        return dict(enumerate(labels))
    names = {}
    for indices in groups.values():
        for number, index in enumerate(indices, start=1):
            names[index] = f"Prediction {number}" if len(indices) > 1 else "Prediction"
    return names


def _truth_lane(name: str, truths: list[Span]) -> Lane:
    note = "" if truths else "the event is not in the video"
    return Lane("ground truth", "Ground truth", tuple(truths), name=name, note=note)


def _prediction_lane(label: str, answer: Answer, truths: list[Span] | None) -> Lane:
    windows = answer.windows
    lane = Lane("prediction", label, windows or (), scores=answer.scores, note=answer.note)
    if truths == []:  # labelled absent: there is no IoU, the answer is right or wrong
        return replace(lane, verdict="right" if windows == () else "wrong")
    if not windows:
        return replace(lane, ious=(0.0,) if truths else ())
    ious = tuple(max(temporal_iou(window, truth) for truth in truths) for window in windows) if truths else ()
    return replace(lane, note=_note(windows), ious=ious)


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
