"""How much of the labelled time is found, and how much of the answered time is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rewards.base import Reward
from utils.common import UserError
from utils.spans import Span

Mode = Literal["recall", "precision", "f1"]
_MODES = ("recall", "precision", "f1")


class SegmentOverlap(Reward):
    """Overlap of the time that the answer's windows P cover with the time that the labelled ones G cover, in seconds.

    `recall = |P ∩ G| / |G|`, `precision = |P ∩ G| / |P|`, `f1 = 2 |P ∩ G| / (|P| + |G|)` (Dice, Ecology 1945), each
    over the union of all windows, so their order and overlaps do not matter. Recall alone is full for an answer that
    covers the whole video: give it less weight than a reward that minds the excess. An absence rightly stated earns
    `scale`.

    >>> SegmentOverlap(mode="recall").compute_from_text(["From 2.0 to 6.0 seconds."], [(4, 12)])
    tensor([0.2500], dtype=torch.float64)
    >>> SegmentOverlap(mode="precision").compute_from_text(["From 2.0 to 6.0 seconds."], [(4, 12)])
    tensor([0.5000], dtype=torch.float64)
    """

    name = "segment_overlap"
    needs = ("pred_windows", "gt_windows")

    def __init__(self, mode: Mode = "f1", scale: float = 1.0) -> None:
        super().__init__(scale)
        if mode not in _MODES:
            raise UserError(f"{self.name}.mode must be one of {', '.join(_MODES)}, got {mode!r}")
        self.mode = mode

    def marks(
        self,
        pred: Tensor,
        gt: Tensor,
        pred_windows: Sequence[Sequence[Span] | None] | None = None,
        gt_windows: Sequence[Sequence[Span]] | None = None,
        **needed: Any,
    ) -> Tensor:
        """Without the lists of windows, each row of `pred` and `gt` is the only one."""
        preds = single_windows(pred) if pred_windows is None else pred_windows
        gts = single_windows(gt) if gt_windows is None else gt_windows
        marks = [self._mark(union(found or ()), union(wanted)) for found, wanted in zip(preds, gts, strict=True)]
        return torch.tensor(marks, dtype=torch.float64)

    def _mark(self, pred: list[Span], gt: list[Span]) -> float:
        shared = sum(max(0.0, min(p.end, g.end) - max(p.start, g.start)) for p in pred for g in gt)
        if shared == 0:
            return 0.0
        total = {"recall": _length(gt), "precision": _length(pred), "f1": (_length(pred) + _length(gt)) / 2}
        return min(1.0, shared / total[self.mode])  # sums of pieces may round above their whole


def single_windows(spans: Tensor) -> list[list[Span]]:
    """Windows (N, 2) in seconds as N lists of one."""
    return [[Span(start, end)] for start, end in spans.tolist()]


def union(windows: Sequence[Span]) -> list[Span]:
    """The stretches that the windows cover, sorted and apart; windows that do not end after they start are left out.

    On a quarter of the scale, so that no length is beyond the largest float: only ratios of them are used.

    >>> union([Span(8, 12), Span(0, 4), Span(2, 6), Span(9, 3)])
    [Span(start=0.0, end=1.5), Span(start=2.0, end=3.0)]
    """
    merged: list[Span] = []
    for start, end in sorted(Span(start / 4, end / 4) for start, end in windows if start < end):
        if merged and start <= merged[-1].end:
            merged[-1] = Span(merged[-1].start, max(merged[-1].end, end))
        else:
            merged.append(Span(start, end))
    return merged


def _length(windows: list[Span]) -> float:
    return sum(window.end - window.start for window in windows)
