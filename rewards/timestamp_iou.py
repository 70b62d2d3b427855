"""Time-R1's IoU, which also asks each boundary to be near, relative to the video's length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewards.base import Reward
from rewards.span_tensors import span_iou
from utils.common import UserError


class TimestampIoU(Reward):
    """`scale * IoU * (1 - |ds| / D) * (1 - |de| / D)`, with `ds`, `de` the errors of start and end and `D` the
    duration, all in seconds: the timestamp-aware IoU of Time-R1 (Wang et al., arXiv:2503.13377; `main.py`,
    `iou_timestamp_reward_v2`).

    There a factor turns negative beyond the video's length, and two negative ones make a wrong answer look right; here
    each is clamped to [0, 1]. An absence rightly stated earns `scale`.

    >>> TimestampIoU().compute_from_text(["From 0.0 to 4.0 seconds."], [(2, 6)], durations=[20])  # 1/3 * 0.9 * 0.9
    tensor([0.2700], dtype=torch.float64)
    """

    name = "timestamp_iou"
    needs = ("durations",)

    def marks(self, pred: Tensor, gt: Tensor, durations: Sequence[float] = (), **needed: Any) -> Tensor:
        if len(durations) != len(pred) or None in durations:
            raise UserError(f"reward `{self.name}` needs `durations`, one for each row, in seconds")
        lengths = torch.as_tensor(durations, dtype=torch.float64, device=pred.device).unsqueeze(-1)  # (N, 1)
        near = (1 - (pred - gt).abs() / lengths).clamp(0, 1)  # (N, 2)
        return torch.nan_to_num(span_iou(pred, gt) * near.prod(-1), nan=0.0)
