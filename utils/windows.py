"""Sets of windows against sets of windows: average precision, and IoU of their unions. Pure functions on seconds.

One window against one is `utils.spans.temporal_iou`; means over queries are `utils.metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from utils.spans import Span, temporal_iou

AP_THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
"""IoU thresholds that mAP averages over: 0.5, 0.55, ..., 0.95."""


def average_precisions(ranked: Sequence[Span], labelled: Sequence[Span]) -> list[float]:
    """Average precision in [0, 1] at each of `AP_THRESHOLDS`, of predictions ranked best first. 0 without predictions.

    Each prediction in turn takes the labelled window it fits best among those that are free and whose IoU is at least
    the threshold; one that finds none is a false positive, so a window found twice counts once. Precision is made to
    fall with recall (each value is the highest at this recall or a higher one), and the area under all its steps is the
    result: the VOC 2010 rule, not the 11 points of earlier years. As `standalone_eval` of moment_detr (Lei et al.,
    NeurIPS 2021), which has it from ActivityNet's evaluation.

    >>> average_precisions([Span(0, 10), Span(20, 30)], [Span(0, 10), Span(20, 26)])
    [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    """
    ious = [[temporal_iou(window, truth) for truth in labelled] for window in ranked]
    return [_average_precision(_hits(ious, threshold), len(labelled)) for threshold in AP_THRESHOLDS]


def _hits(ious: Sequence[Sequence[float]], threshold: float) -> list[bool]:
    """Whether each prediction, best first, finds a labelled window of its own. `ious[prediction][labelled]`."""
    free = set(range(len(ious[0]))) if ious else set()
    hits: list[bool] = []
    for row in ious:
        # of two equal fits the later one, as moment_detr's reversed sort takes it
        best = max(free, key=lambda place: (row[place], place), default=None)
        found = best is not None and row[best] >= threshold
        if found:
            free.discard(best)
        hits.append(found)
    return hits


def _average_precision(hits: Sequence[bool], num_labelled: int) -> float:
    """Area under the falling envelope of precision over recall."""
    precisions = [sum(hits[: rank + 1]) / (rank + 1) for rank, hit in enumerate(hits) if hit]
    for place in range(len(precisions) - 2, -1, -1):
        precisions[place] = max(precisions[place], precisions[place + 1])
    return math.fsum(precisions) / num_labelled if precisions else 0.0


def set_iou(predicted: Iterable[Span], labelled: Iterable[Span]) -> float:
    """Length of what both sets of windows cover, over the length of what either covers, in [0, 1].

    Overlapping windows of one set count once. A window that is empty, reversed or not finite covers nothing; two sets
    that cover nothing have 0.

    >>> set_iou([Span(0, 4), Span(2, 6)], [Span(4, 8)])
    0.25
    """
    ours, theirs = merged(predicted), merged(labelled)
    if any(abs(bound) > 1e300 for span in ours + theirs for bound in span):  # sums of them would not be finite
        return set_iou(_scaled(ours), _scaled(theirs))
    both = math.fsum(
        min(a.end, b.end) - max(a.start, b.start) for a in ours for b in theirs if a.start < b.end and b.start < a.end
    )
    either = covered_s(ours + theirs)
    return both / either if either > 0 else 0.0


def merged(windows: Iterable[Span]) -> list[Span]:
    """The same stretch of time as windows that do not touch, in order of time; windows without length are dropped."""
    result: list[Span] = []
    for window in sorted(window for window in windows if all(map(math.isfinite, window)) and window[1] > window[0]):
        if result and window[0] <= result[-1].end:
            result[-1] = Span(result[-1].start, max(result[-1].end, window[1]))
        else:
            result.append(Span(*window))
    return result


def covered_s(windows: Iterable[Span]) -> float:
    """Seconds that at least one of the windows covers."""
    return math.fsum(window.end - window.start for window in merged(windows))


def _scaled(windows: Iterable[Span]) -> list[Span]:
    return [Span(window.start / 2**20, window.end / 2**20) for window in windows]
