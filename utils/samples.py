"""Reading one sample of an evaluation: its windows, scores and duration, with an error that names it.

What a sample is stands in `utils.metrics`; here is only what makes sure of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from utils.common import UserError
from utils.spans import Span

Sample = Mapping[str, Any]

Scored = tuple[Span, float | None]
"""A predicted window and its score."""


def refuse_duplicates(samples: Iterable[Sample]) -> None:
    """Raise UserError for a qid that comes twice: a sampler that pads its last batch, or a file given twice, would
    shift every average."""
    seen: set[Any] = set()
    for sample in samples:
        qid = field_of(sample, "qid")
        if qid in seen:
            raise UserError(f"qid {qid!r} occurs more than once; score every query once")
        seen.add(qid)


def field_of(sample: Sample, key: str) -> Any:
    """The sample's value. Raises UserError where it has none."""
    if key not in sample:
        name = sample.get("qid", "(no qid)")
        raise UserError(f"sample {name!r} has no {key!r}; a sample has qid, gt, pred and duration")
    return sample[key]


def sample_windows(sample: Sample, key: str) -> list[Span] | None:
    """The windows under `key` without their scores; None where the sample has None. Raises UserError for no windows."""
    windows = _read_windows(sample, key)
    return None if windows is None else [window for window, _ in windows]


def scored_windows(sample: Sample) -> list[Scored] | None:
    """The predicted windows with their scores. Raises UserError where only some of them have one."""
    windows = _read_windows(sample, "pred")
    if windows and len({score is None for _, score in windows}) > 1:
        raise UserError(
            f"sample {field_of(sample, 'qid')!r}: some windows of pred have a score and others have none, so they "
            f"cannot be ranked; give all of them a score, or list them best first without: {sample['pred']!r}"
        )
    return windows


def _read_windows(sample: Sample, key: str) -> list[Scored] | None:
    windows = field_of(sample, key)
    if windows is None:
        return None
    try:
        return [_window(window) for window in windows]
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"sample {field_of(sample, 'qid')!r}: {key} must be a list of [start, end] in seconds, got {windows!r}"
        ) from error


def _window(value: Any) -> Scored:
    if isinstance(value, str) or len(value) not in (2, 3):
        raise ValueError("a window is [start, end] or [start, end, score]")
    return Span(float(value[0]), float(value[1])), float(value[2]) if len(value) == 3 else None


def duration_of(sample: Sample) -> float:
    """The duration in seconds. Raises UserError unless it is a number above 0."""
    duration = field_of(sample, "duration")
    if not isinstance(duration, Real) or not math.isfinite(duration) or duration <= 0:
        raise UserError(f"sample {field_of(sample, 'qid')!r}: duration must be a number above 0, got {duration!r}")
    return float(duration)
