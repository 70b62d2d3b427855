"""How published evaluations score, where it differs from ours, so that a paper's number can be compared with like.

All of them score the same stored predictions. What an answer's text says is read by `utils.spans` in every protocol:
the parsers of other projects (TimeLens pairs any two numbers, Time-R1 wants `a to b`) are not copied, so answers in
unusual words may count here and not there, or the other way round.

Rows labelled absent (`gt` is []) are in none of the other benchmarks; they stay apart, in `absent_accuracy`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from utils.common import UserError, nearest
from utils.samples import Scored
from utils.spans import Span

MAX_RANKED = 10
"""Predictions of a query that average precision looks at."""


@dataclass(frozen=True)
class Protocol:
    """One way to score. The defaults are ours (contract 7 of the design)."""

    name: str
    differs: str
    """What is not as in `default`, in words; shown by `--help`."""
    source: str = ""
    """Where it was read."""
    is_hit_above: bool = False
    """R1@m wants `IoU > m` in place of `IoU >= m`."""
    counted: Literal["best", "first", "last"] = "best"
    """The window that R1 and mIoU look at: the one with the highest score (the first where there are no scores), the
    first as written, or the last as written."""
    unit_s: float | None = None
    """Predicted times are rounded to multiples of it, halves to the even one."""
    has_sets: bool = True
    """Whether it says anything of several windows: mAP and set-IoU."""
    ap_needs_windows: bool = False
    """Queries without a predicted window are left out of mAP, in place of counting 0."""
    decimals: int | None = None
    """Averages in percent are rounded to so many decimals."""


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("default", "the definitions in utils/metrics.py"),
        Protocol(
            "moment_detr",
            "windows rank as they are written: the first counts for R1 and mIoU, the first ten are sorted by score for "
            "mAP; queries without any predicted window are left out of mAP (R1 and mIoU, where the original stops "
            "with an error, count them 0); percentages are rounded to two decimals",
            source="github.com/jayleicn/moment_detr, standalone_eval/eval.py: compute_mr_ap, compute_mr_r1",
            counted="first",
            ap_needs_windows=True,
            decimals=2,
        ),
        Protocol(
            "timelens",
            "predicted times are rounded to whole seconds (halves to even), labels are not; the first window as "
            "written counts; no mAP and no set-IoU",
            source="github.com/TencentARC/TimeLens, evaluation/eval_dataloader.py and compute_metrics.py",
            counted="first",
            unit_s=1.0,
            has_sets=False,
        ),
        Protocol(
            "time_r1",
            "a hit needs IoU > m, so that a threshold just met is a miss; the last window as written counts (the best, "
            "where windows have scores); no mAP and no set-IoU",
            source="github.com/xiaomi-research/time-r1, src/vllm_inference/eval_all.py and evaluate.py",
            is_hit_above=True,
            counted="last",
            has_sets=False,
        ),
    )
}
"""By the name that `--protocol` takes."""


def get_protocol(name: str) -> Protocol:
    """The protocol called `name`. Raises UserError for an unknown one."""
    if name not in PROTOCOLS:
        match = nearest(name, PROTOCOLS)
        hint = f"; did you mean {match}?" if match else ""
        raise UserError(f"unknown protocol {name!r}; choose from {', '.join(PROTOCOLS)}{hint}")
    return PROTOCOLS[name]


def counted_window(windows: Sequence[Scored], protocol: Protocol) -> Span | None:
    """The predicted window that R1 and mIoU look at, rounded as `protocol` wants; None without a window."""
    if not windows:
        return None
    has_scores = windows[0][1] is not None
    if protocol.counted == "first" or (protocol.counted == "last" and not has_scores):
        window = windows[-1 if protocol.counted == "last" else 0][0]
    else:
        window = by_score(windows)[0]
    return window if protocol.unit_s is None else Span(*(_rounded(time_s, protocol.unit_s) for time_s in window))


def ranked_windows(windows: Sequence[Scored], protocol: Protocol) -> list[Span]:
    """The windows that average precision looks at, best first, at most ten."""
    if protocol.counted == "first":
        return by_score(windows[:MAX_RANKED])
    return by_score(windows)[:MAX_RANKED]


def by_score(windows: Sequence[Scored]) -> list[Span]:
    """The windows from the highest score to the lowest; equal scores, and windows without any, stay as written.

    >>> by_score([(Span(0, 1), 0.3), (Span(2, 3), 0.9), (Span(4, 5), 0.9)])
    [Span(start=2, end=3), Span(start=4, end=5), Span(start=0, end=1)]
    """
    return [window for window, score in sorted(windows, key=lambda pair: -_score(pair[1]))]


def _score(score: float | None) -> float:
    return -math.inf if score is None or math.isnan(score) else score


def _rounded(time_s: float, unit_s: float) -> float:
    return round(time_s / unit_s) * unit_s if math.isfinite(time_s) else time_s
