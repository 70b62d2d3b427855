"""TempSamp-R1's curve over the IoU: steep where answers are poor, flat where they are good."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rewards.base import Reward, positive
from rewards.span_tensors import span_iou
from utils.common import UserError


class ShapedIoU(Reward):
    """`scale * (f(IoU) - f(0)) / (f(1) - f(0))` with the curve of TempSamp-R1's reward shaping (Li et al., NeurIPS
    2025, arXiv:2509.18056; constants as in `transform_rewards` of the public implementation ZhangZikun6666/TempSamp-R1,
    `scripts/timelens/timelens_reward.py`):

        f(x) = t + a ln(1 + x - t)                       for x >= t
        f(x) = t - (exp(b (t - x)) - 1) / (exp(b) - 1)   for x < t

    with `threshold` t = 0.8, `gain` a = 0.01 and `steepness` b = 1. There f runs from 0.087 to 0.802; mapped as above
    no overlap earns 0 and an exact answer the full mark, and since the map is affine a group's normalised advantages
    stay the same. An absence rightly stated earns `scale`.

    >>> ShapedIoU().compute_from_text(["From 0.0 to 5.0 seconds.", "From 0.0 to 9.0 seconds."], [(0, 10), (0, 10)])
    tensor([0.7127, 0.9988], dtype=torch.float64)
    """

    name = "shaped_iou"

    def __init__(self, threshold: float = 0.8, gain: float = 0.01, steepness: float = 1.0, scale: float = 1.0) -> None:
        super().__init__(scale)
        self.threshold = positive(f"{self.name}.threshold", threshold)
        if self.threshold >= 1:
            raise UserError(f"{self.name}.threshold must lie between 0 and 1, got {threshold}")
        self.gain = positive(f"{self.name}.gain", gain)
        self.steepness = positive(f"{self.name}.steepness", steepness)

    def marks(self, pred: Tensor, gt: Tensor, **needed: Any) -> Tensor:
        low, high = self._curve(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
        return ((self._curve(span_iou(pred, gt)) - low) / (high - low)).clamp(0, 1)

    def _curve(self, iou: Tensor) -> Tensor:
        above = self.threshold + self.gain * torch.log1p((iou - self.threshold).clamp_min(0))
        below = self.threshold - torch.expm1(self.steepness * (self.threshold - iou)) / math.expm1(self.steepness)
        return torch.where(iou >= self.threshold, above, below)
