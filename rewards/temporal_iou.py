"""Temporal IoU, the reward that is the metric."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rewards.base import Reward
from rewards.span_tensors import span_iou


class TemporalIoU(Reward):
    """`scale * |P ∩ G| / |P ∪ G|`: Gao et al., "TALL", ICCV 2017; as a reward e.g. in VideoChat-R1 and TimeLens.

    Of several windows the answer's first counts, against the labelled window nearest to it, as in `utils.metrics`.
    An absence rightly stated earns `scale`.

    >>> TemporalIoU(scale=1.0).compute_from_text(predictions=["0.25 to 0.75"], ground_truths=[(0.3, 0.7)])
    tensor([0.8000], dtype=torch.float64)
    """

    name = "temporal_iou"

    def marks(self, pred: Tensor, gt: Tensor, **needed: Any) -> Tensor:
        return span_iou(pred, gt)
