"""Temporal grounding metrics: one definition for validation during training and for the evaluator.

A sample is a mapping with

- `qid`: anything hashable, once per evaluation;
- `gt`: the labelled windows `[[start, end], ...]` in seconds; empty = labelled absent (the event is not in the video);
- `pred`: the predicted windows, best first, `[[start, end], ...]` or `[[start, end, score], ...]`; `[]` = the answer
  says that the event is absent; `None` = the answer could not be parsed;
- `duration`: length of the labelled stretch in seconds, on the same clock as the windows (0 at its start).

Definitions, with their source:

- R1@m and mIoU follow Gao et al., "TALL", ICCV 2017: the first prediction counts, `IoU >= m` is a hit. With several
  labelled windows the best of them counts, as for QVHighlights (Lei et al., NeurIPS 2021).
- A window that is empty, reversed or not finite has IoU 0 with everything, as a prediction and as a label.
- Unparsable answers, and a stated absence where the event is there, score 0 and stay in the denominator.
- Rows labelled absent count in `absent_accuracy` alone: 1 for a stated absence, 0 for anything else.
- An average over no rows is NaN, never 0: nothing was measured. The counts beside it say so.
- Sums are exact (`math.fsum`), so the order of the samples never matters.

Per-row scores are made in one place, `sample_scores`; every metric is their mean. A further metric (average precision,
set-IoU) is a further key there. Parsing of answers belongs to `utils.spans`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal

import numpy as np

from utils.common import UserError
from utils.spans import Span, temporal_iou

Sample = Mapping[str, Any]

IOU_THRESHOLDS = (0.3, 0.5, 0.7)
"""The `m` of R1@m."""

GROUNDED_METRICS = ("mIoU", *(f"R1@{threshold}" for threshold in IOU_THRESHOLDS))
"""Averaged over the rows that have a labelled window."""

METRICS = (*GROUNDED_METRICS, "absent_accuracy", "parse_failure_rate")
"""Every average of `evaluate`: the grounded ones, one over the rows labelled absent, one over all rows."""


def evaluate(samples: Iterable[Sample]) -> dict[str, float]:
    """Score `samples`: the averages named in `METRICS`, in percent, and counts.

    The counts are `num_samples`, `num_grounded` (rows with a labelled window), `num_absent` (rows labelled absent),
    `num_parse_failures`, and `num_answered_absent` (answers that state an absence, rightly or not).
    The keys are always the same; an average over no rows is NaN.

    Raises `UserError` for a malformed sample, an unlabelled one (`gt` is None) and a `qid` that occurs twice.

    >>> samples = [{"qid": 1, "gt": [[10, 20]], "pred": [[10, 15]], "duration": 60},
    ...            {"qid": 2, "gt": [[0, 10]], "pred": None, "duration": 60}]
    >>> {name: value for name, value in evaluate(samples).items() if name in ("mIoU", "R1@0.5", "parse_failure_rate")}
    {'mIoU': 25.0, 'R1@0.5': 50.0, 'parse_failure_rate': 50.0}
    """
    rows = list(samples)
    columns = _score_columns(rows)
    averages = {name: _mean_percent(columns[name]) for name in METRICS}
    counts = {
        "num_samples": len(rows),
        "num_grounded": len(columns["mIoU"]),
        "num_absent": len(columns["absent_accuracy"]),
        "num_parse_failures": sum(row["pred"] is None for row in rows),
        "num_answered_absent": sum(_windows(row, "pred") == [] for row in rows),
    }
    return averages | counts


def evaluate_intervals(
    samples: Iterable[Sample], *, num_resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Bootstrap intervals (low, high), in percent, of the averages named in `METRICS`."""
    columns = _score_columns(list(samples))
    return {
        name: bootstrap_interval(
            [100 * value for value in columns[name]], num_resamples=num_resamples, confidence=confidence, seed=seed
        )
        for name in METRICS
    }


def sample_scores(sample: Sample) -> dict[str, float]:
    """What one sample adds to each metric it counts in, in [0, 1]; metrics that leave it out are missing.

    >>> sample_scores({"qid": 3, "gt": [], "pred": [], "duration": 60})
    {'parse_failure_rate': 0.0, 'absent_accuracy': 1.0}
    """
    labelled, predicted = _windows(sample, "gt"), _windows(sample, "pred")
    if labelled is None:
        raise UserError(
            f"sample {sample['qid']!r}: gt is null, so the row is not labelled and cannot be scored; "
            "leave such rows out (an event labelled absent is an empty list)"
        )
    scores = {"parse_failure_rate": float(predicted is None)}
    if not labelled:
        return scores | {"absent_accuracy": float(predicted == [])}
    iou = _best_iou(predicted, labelled)
    recalls = {f"R1@{threshold}": float(iou >= threshold) for threshold in IOU_THRESHOLDS}
    return scores | {"mIoU": iou} | recalls


def sample_iou(sample: Sample) -> float:
    """IoU in [0, 1] of the first predicted window with the labelled window it fits best.

    0 where there is no predicted window (absence answered, unparsable) or no labelled one.

    >>> sample_iou({"qid": 4, "gt": [[0, 4], [10, 20]], "pred": [[12, 20], [0, 4]], "duration": 60})
    0.8
    """
    return _best_iou(_windows(sample, "pred"), _windows(sample, "gt"))


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, *, num_resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of the mean of `values` (Efron, 1979), in the unit of `values`.

    The values are sorted first, so the interval depends on the seed but not on their order. One value gives an interval
    of length 0, no values give (NaN, NaN). Raises `UserError` for values that are not finite and for a confidence
    outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise UserError(f"confidence must lie between 0 and 1, got {confidence}; for a 95 % interval write 0.95")
    if num_resamples < 1:
        raise UserError(f"num_resamples must be at least 1, got {num_resamples}")
    ordered = np.sort(np.asarray(values, dtype=np.float64).ravel())
    if not np.isfinite(ordered).all():
        raise UserError("bootstrap_interval takes finite values only; leave out or score the rows that have none")
    if ordered.size == 0:
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    # one resample at a time: all at once would be num_resamples x n indices, gigabytes for a large test set
    means = [ordered[generator.integers(0, ordered.size, ordered.size)].mean() for _ in range(num_resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def baseline_predictions(samples: Iterable[Sample], kind: Literal["whole_video", "centre"]) -> list[dict[str, Any]]:
    """The same samples with a constant answer that needs no video, to be printed beside a model's.

    `whole_video` answers `[0, duration]`, `centre` the middle half `[duration / 4, 3 * duration / 4]`.
    Raises `UserError` for another kind and for a duration that is missing or not a number above 0.
    """
    fractions = {"whole_video": (0.0, 1.0), "centre": (0.25, 0.75)}
    if kind not in fractions:
        raise UserError(f"unknown baseline {kind!r}; choose from {', '.join(fractions)}")
    start, end = fractions[kind]
    durations = [(sample, _duration(sample)) for sample in samples]
    return [{**sample, "pred": [[start * duration, end * duration]]} for sample, duration in durations]


def _score_columns(samples: list[Sample]) -> dict[str, list[float]]:
    """Per metric of `METRICS` the scores of the samples that count in it."""
    _refuse_duplicates(samples)
    columns: dict[str, list[float]] = {name: [] for name in METRICS}
    for sample in samples:
        for name, value in sample_scores(sample).items():
            columns[name].append(value)
    return columns


def _best_iou(predicted: list[Span] | None, labelled: list[Span] | None) -> float:
    if not predicted or not labelled:
        return 0.0
    return max(temporal_iou(predicted[0], window) for window in labelled)


def _mean_percent(values: list[float]) -> float:
    return 100 * math.fsum(values) / len(values) if values else math.nan


def _refuse_duplicates(samples: list[Sample]) -> None:
    """A sample scored twice (a sampler that pads its last batch, a file given twice) would shift every average."""
    seen: set[Any] = set()
    for sample in samples:
        qid = _field(sample, "qid")
        if qid in seen:
            raise UserError(f"qid {qid!r} occurs more than once; score every query once")
        seen.add(qid)


def _field(sample: Sample, key: str) -> Any:
    if key not in sample:
        name = sample.get("qid", "(no qid)")
        raise UserError(f"sample {name!r} has no {key!r}; a sample has qid, gt, pred and duration")
    return sample[key]


def _windows(sample: Sample, key: str) -> list[Span] | None:
    """The windows under `key` without their scores; None where the sample has None."""
    windows = _field(sample, key)
    if windows is None:
        return None
    try:
        return [_window(window) for window in windows]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"sample {_field(sample, 'qid')!r}: {key} must be a list of [start, end] in seconds, got {windows!r}"
        ) from error


def _window(value: Any) -> Span:
    if isinstance(value, str) or len(value) not in (2, 3):
        raise ValueError("a window is [start, end] or [start, end, score]")
    return Span(float(value[0]), float(value[1]))


def _duration(sample: Sample) -> float:
    duration = _field(sample, "duration")
    if not isinstance(duration, Real) or not math.isfinite(duration) or duration <= 0:
        raise UserError(f"sample {_field(sample, 'qid')!r}: duration must be a number above 0, got {duration!r}")
    return float(duration)
