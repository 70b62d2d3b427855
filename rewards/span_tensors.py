"""Windows as tensors: the one vectorised temporal IoU, and its generalisation to windows that do not meet.

The same definition as `utils.spans.temporal_iou`, to the last bit; a test holds the two together. Windows are
`(start, end)` in seconds in the last dimension; the others broadcast.
"""

from __future__ import annotations

import torch
from torch import Tensor


def span_iou(pred: Tensor, gt: Tensor) -> Tensor:
    """Intersection over union of windows `(..., 2)` in seconds: float64 `(...)` in [0, 1].

    0 for a window that is not finite or does not end after it starts.

    >>> span_iou(torch.tensor([[0.0, 4.0], [9.0, 9.0]]), torch.tensor([[2.0, 6.0], [2.0, 6.0]])).tolist()
    [0.3333333333333333, 0.0]
    """
    return span_giou(pred, gt).clamp_min(0.0)


def span_giou(pred: Tensor, gt: Tensor) -> Tensor:
    """Generalised IoU of windows `(..., 2)` in seconds: float64 `(...)` in [-1, 1].

    Rezatofighi et al., CVPR 2019, Algorithm 1, in one dimension: the IoU where windows overlap, minus the gap between
    them over their hull where they do not. -1 for a window that is not finite or does not end after it starts.

    >>> span_giou(torch.tensor([[0.0, 4.0], [0.0, 2.0]]), torch.tensor([[2.0, 6.0], [3.0, 5.0]])).tolist()
    [0.3333333333333333, -0.2]
    """
    pred, gt = torch.broadcast_tensors(pred.double(), gt.double())
    sane = is_window(pred) & is_window(gt)
    # A hull longer than the largest float: the ratio is the same on a smaller scale.
    factor = torch.where(torch.isinf(_hull(pred, gt)), 0.25, 1.0).unsqueeze(-1)
    pred, gt = pred * factor, gt * factor
    shared = torch.minimum(pred[..., 1], gt[..., 1]) - torch.maximum(pred[..., 0], gt[..., 0])  # negative: their gap
    return torch.where(sane, shared / _hull(pred, gt), -1.0)


def is_window(spans: Tensor) -> Tensor:
    """Which of the windows `(..., 2)` are finite and end after they start: bool `(...)`."""
    return torch.isfinite(spans).all(-1) & (spans[..., 1] > spans[..., 0])


def _hull(pred: Tensor, gt: Tensor) -> Tensor:
    return torch.maximum(pred[..., 1], gt[..., 1]) - torch.minimum(pred[..., 0], gt[..., 0])
