"""Generalised IoU, which still tells near from far where windows do not meet."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rewards.base import Reward
from rewards.span_tensors import span_giou


class GeneralizedIoU(Reward):
    """`scale * (1 + GIoU) / 2`, GIoU after Rezatofighi et al., CVPR 2019, Algorithm 1, in one dimension:
    `GIoU = IoU - |hull without P ∪ G| / |hull|`, the IoU where the windows overlap, `-gap / |hull|` where they do not.

    Windows that touch earn half, ever more distant ones ever less; a window that is none earns 0. An absence rightly
    stated earns `scale`.

    >>> GeneralizedIoU().compute_from_text(["From 0.0 to 2.0 seconds.", "From 0.0 to 4.0 seconds."], [(3, 5), (2, 6)])
    tensor([0.4000, 0.6667], dtype=torch.float64)
    """

    name = "generalized_iou"

    def marks(self, pred: Tensor, gt: Tensor, **needed: Any) -> Tensor:
        return (1 + span_giou(pred, gt)) / 2
