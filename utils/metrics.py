"""Temporal grounding metrics: one definition for validation during training and for the evaluator.

A sample is a mapping with

- `qid`: anything hashable, once per evaluation;
- `gt`: the labelled windows `[[start, end], ...]` in seconds; empty = labelled absent (the event is not in the video);
- `pred`: the predicted windows, best first, `[[start, end], ...]` or `[[start, end, score], ...]` (all windows of a
  sample have a score or none has; the highest score is the best window); `[]` = the answer says that the event is
  absent; `None` = the answer could not be parsed;
- `duration`: length of the labelled stretch in seconds, on the same clock as the windows (0 at its start).

Definitions, with their source:

- R1@m and mIoU follow Gao et al., "TALL", ICCV 2017: the best prediction counts, `IoU >= m` is a hit. With several
  labelled windows the best of them counts, as for QVHighlights (Lei et al., NeurIPS 2021).
- mAP@m is the mean over queries of the average precision of a query's ten best predictions, a prediction being right
  when its IoU with a labelled window that no better prediction took is at least m; mAP is the mean of mAP@m over
  m = 0.5, 0.55, ..., 0.95 (QVHighlights; `utils.windows.average_precisions` says it in full). Queries are never ranked
  against each other, so scores need not be comparable between them. Equal scores rank as written.
- set_IoU is the IoU of all predicted seconds with all labelled seconds (`utils.windows.set_iou`).
- A window that is empty, reversed or not finite has IoU 0 with everything, as a prediction and as a label. It still
  takes its place in the ranking, and still counts among the windows to be found. A score of NaN ranks last.
- Unparsable answers, and a stated absence where the event is there, score 0 and stay in the denominator.
- Rows labelled absent count in `absent_accuracy` alone: 1 for a stated absence, 0 for anything else.
- An average over no rows is NaN, never 0: nothing was measured. The counts beside it say so.
- Sums are exact (`math.fsum`) in float64, so the order of the samples never matters.

Per-row scores are made in one place, `sample_scores`; every metric is their mean, and its interval is the bootstrap
interval of that mean, mAP included: there the resampled values are the queries' average precisions.
Parsing of answers belongs to `utils.spans`, what other papers do otherwise to `utils.protocols`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from utils.baselines import baseline_predictions, best_constant_predictions
from utils.common import UserError
from utils.protocols import Protocol, counted_window, get_protocol, ranked_windows
from utils.samples import Sample, Scored, refuse_duplicates, sample_windows, scored_windows
from utils.spans import Span, temporal_iou
from utils.windows import AP_THRESHOLDS, average_precisions, set_iou

__all__ = [
    "GROUNDED_METRICS",
    "IOU_THRESHOLDS",
    "METRICS",
    "Sample",
    "baseline_predictions",
    "best_constant_predictions",
    "bootstrap_interval",
    "evaluate",
    "evaluate_intervals",
    "sample_iou",
    "sample_scores",
]

IOU_THRESHOLDS = (0.3, 0.5, 0.7)
"""The `m` of R1@m."""

_BLOCK = 2**18
"""Values that the bootstrap draws at once."""

SHOWN_AP_THRESHOLDS = (0.5, 0.75)
"""The `m` of mAP@m that are reported beside mAP."""

SET_METRICS = (*(f"mAP@{threshold}" for threshold in SHOWN_AP_THRESHOLDS), "mAP", "set_IoU")
"""What looks at more than one window of an answer."""

GROUNDED_METRICS = ("mIoU", *(f"R1@{threshold}" for threshold in IOU_THRESHOLDS), *SET_METRICS)
"""Averaged over the rows that have a labelled window."""

METRICS = (*GROUNDED_METRICS, "absent_accuracy", "parse_failure_rate")
"""Every average of `evaluate`: the grounded ones, one over the rows labelled absent, one over all rows."""


def evaluate(samples: Iterable[Sample], protocol: str = "default") -> dict[str, float]:
    """Score `samples`: the averages named in `METRICS`, in percent, and counts.

    The counts are `num_samples`, `num_grounded` (rows with a labelled window), `num_absent` (rows labelled absent),
    `num_parse_failures`, and `num_answered_absent` (answers that state an absence, rightly or not).
    The keys are always the same; an average over no rows, or one that `protocol` does not know, is NaN.

    Raises `UserError` for a malformed sample, an unlabelled one (`gt` is None), a `qid` that occurs twice and an
    unknown `protocol` (`utils.protocols.PROTOCOLS`).

    >>> samples = [{"qid": 1, "gt": [[10, 20]], "pred": [[10, 15]], "duration": 60},
    ...            {"qid": 2, "gt": [[0, 10]], "pred": None, "duration": 60}]
    >>> {name: value for name, value in evaluate(samples).items() if name in ("mIoU", "R1@0.5", "parse_failure_rate")}
    {'mIoU': 25.0, 'R1@0.5': 50.0, 'parse_failure_rate': 50.0}
    """
    rows = list(samples)
    rules = get_protocol(protocol)
    columns = _score_columns(rows, rules)
    averages = {name: _rounded(_mean_percent(columns[name]), rules.decimals) for name in METRICS}
    counts = {
        "num_samples": len(rows),
        "num_grounded": len(columns["mIoU"]),
        "num_absent": len(columns["absent_accuracy"]),
        "num_parse_failures": sum(row["pred"] is None for row in rows),
        "num_answered_absent": sum(sample_windows(row, "pred") == [] for row in rows),
    }
    return averages | counts


def evaluate_intervals(
    samples: Iterable[Sample],
    *,
    names: Sequence[str] = METRICS,
    protocol: str = "default",
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Bootstrap intervals (low, high), in percent, of the averages in `names` (by default all of `METRICS`)."""
    columns = _score_columns(list(samples), get_protocol(protocol))
    return {
        name: bootstrap_interval(
            [100 * value for value in columns[name]], num_resamples=num_resamples, confidence=confidence, seed=seed
        )
        for name in names
    }


def sample_scores(sample: Sample, protocol: str = "default") -> dict[str, float]:
    """What one sample adds to each metric it counts in, in [0, 1]; metrics that leave it out are missing.

    >>> sample_scores({"qid": 3, "gt": [], "pred": [], "duration": 60})
    {'parse_failure_rate': 0.0, 'absent_accuracy': 1.0}
    """
    return _scores(sample, get_protocol(protocol))


def _scores(sample: Sample, rules: Protocol) -> dict[str, float]:
    labelled, predicted = sample_windows(sample, "gt"), scored_windows(sample)
    if labelled is None:
        raise UserError(
            f"sample {sample['qid']!r}: gt is null, so the row is not labelled and cannot be scored; "
            "leave such rows out (an event labelled absent is an empty list)"
        )
    scores = {"parse_failure_rate": float(predicted is None)}
    if not labelled:
        return scores | {"absent_accuracy": float(predicted == [])}
    iou = _best_iou(counted_window(predicted or [], rules), labelled)
    recalls = {f"R1@{m}": float(iou > m if rules.is_hit_above else iou >= m) for m in IOU_THRESHOLDS}
    return scores | {"mIoU": iou} | recalls | _set_scores(predicted or [], labelled, rules)


def _set_scores(predicted: list[Scored], labelled: list[Span], rules: Protocol) -> dict[str, float]:
    """The scores that look at all windows; none where the protocol has no such metric."""
    if not rules.has_sets:
        return {}
    scores = {"set_IoU": set_iou((window for window, _ in predicted), labelled)}
    if rules.ap_needs_windows and not predicted:
        return scores
    precisions = average_precisions(ranked_windows(predicted, rules), labelled)
    shown = {f"mAP@{m}": precisions[AP_THRESHOLDS.index(m)] for m in SHOWN_AP_THRESHOLDS}
    return scores | shown | {"mAP": math.fsum(precisions) / len(precisions)}


def sample_iou(sample: Sample) -> float:
    """IoU in [0, 1] of the best predicted window with the labelled window it fits best.

    0 where there is no predicted window (absence answered, unparsable) or no labelled one.

    >>> sample_iou({"qid": 4, "gt": [[0, 4], [10, 20]], "pred": [[12, 20], [0, 4]], "duration": 60})
    0.8
    """
    return _best_iou(
        counted_window(scored_windows(sample) or [], get_protocol("default")), sample_windows(sample, "gt")
    )


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
    # in blocks: all at once would be num_resamples x n indices, gigabytes for a large test set
    block = max(1, _BLOCK // ordered.size)
    sizes = [min(block, num_resamples - start) for start in range(0, num_resamples, block)]
    means = [ordered[generator.integers(0, ordered.size, (size, ordered.size))].mean(axis=1) for size in sizes]
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _score_columns(samples: list[Sample], rules: Protocol) -> dict[str, list[float]]:
    """Per metric of `METRICS` the scores of the samples that count in it."""
    refuse_duplicates(samples)
    columns: dict[str, list[float]] = {name: [] for name in METRICS}
    for sample in samples:
        for name, value in _scores(sample, rules).items():
            columns[name].append(value)
    return columns


def _best_iou(predicted: Span | None, labelled: list[Span] | None) -> float:
    if predicted is None or not labelled:
        return 0.0
    return max(temporal_iou(predicted, window) for window in labelled)


def _mean_percent(values: list[float]) -> float:
    return 100 * math.fsum(values) / len(values) if values else math.nan


def _rounded(value: float, decimals: int | None) -> float:
    return value if decimals is None else round(value, decimals)
