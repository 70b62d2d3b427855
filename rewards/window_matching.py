"""Several windows, matched by optimal assignment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewards.base import Reward
from rewards.segment_overlap import single_windows
from rewards.span_tensors import span_iou
from utils.spans import Span


class WindowMatching(Reward):
    """`scale * 2 S / (n + m)`, with S the largest sum of IoUs that pairs each of the n answered windows with at most
    one of the m labelled ones: the F1 of a soft match.

    The assignment is that of DETR (Carion et al., ECCV 2020), by `scipy.optimize.linear_sum_assignment`; pairing by
    index, as MUSEG does (arXiv:2505.20715), punishes a window left out for all that follow. Windows too many and too
    few cost alike, and order does not matter. For one window on each side it is the IoU. An absence rightly stated
    earns `scale`.

    >>> answer = "From 20.0 to 30.0 seconds and from 0.0 to 5.0 seconds."
    >>> labels = [[(0, 10), (20, 30)], [(20, 30)]]
    >>> WindowMatching().compute_from_text([answer, answer], labels)  # 2 * 1.5 / 4, 2 * 1 / 3
    tensor([0.7500, 0.6667], dtype=torch.float64)
    """

    name = "window_matching"
    needs = ("pred_windows", "gt_windows")

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
        marks = [_mark(found or (), wanted) for found, wanted in zip(preds, gts, strict=True)]
        return torch.tensor(marks, dtype=torch.float64)


def _mark(pred: Sequence[Span], gt: Sequence[Span]) -> float:
    if not pred or not gt:
        return 0.0
    from scipy.optimize import linear_sum_assignment  # takes most of a second, and no other reward wants it

    left, right = torch.tensor(pred, dtype=torch.float64), torch.tensor(gt, dtype=torch.float64)
    ious = span_iou(left[:, None], right[None]).numpy()  # (n, m)
    rows, columns = linear_sum_assignment(ious, maximize=True)
    return min(1.0, 2 * float(ious[rows, columns].sum()) / sum(ious.shape))
