"""How far the two boundaries are off, in seconds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewards.base import Reward, positive
from rewards.span_tensors import is_window


class BoundaryDistance(Reward):
    """`scale / (1 + d / tolerance_s)` with `d = (|ds| + |de|) / 2`, the mean error of start and end in seconds.

    The L1 distance is the span term of Moment-DETR's loss (Lei et al., NeurIPS 2021); the bounded form is ours: half
    the mark at `tolerance_s`, and a slope everywhere, so that it leads towards the window before there is any overlap.
    Unlike the IoU it asks for the same precision of long and short events. It is a function of the mean, not the mean
    of a function of each error, which would prefer one exact boundary to two near ones. An absence rightly stated
    earns `scale`.

    >>> BoundaryDistance(tolerance_s=2.0).compute_from_text(["From 3.0 to 9.0 seconds."], [(2, 6)])
    tensor([0.5000], dtype=torch.float64)
    """

    name = "boundary_distance"

    def __init__(self, tolerance_s: float = 2.0, scale: float = 1.0) -> None:
        super().__init__(scale)
        self.tolerance_s = positive(f"{self.name}.tolerance_s", tolerance_s)

    def marks(self, pred: Tensor, gt: Tensor, **needed: Any) -> Tensor:
        distance = ((pred - gt).abs() / 2).sum(-1)  # halves first: their sum stays in range
        return torch.where(is_window(pred) & is_window(gt), 1 / (1 + distance / self.tolerance_s), 0.0)
