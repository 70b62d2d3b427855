"""How many groups teach nothing, because all their completions earn the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from utils.common import UserError

TOLERANCE = 1e-8
"""Rewards closer than this are the same: TRL's threshold for a standard deviation of zero."""


def zero_spread_share(values: Sequence[float] | Tensor, group_size: int) -> float:
    """The share, in [0, 1], of groups whose rewards are all the same: in GRPO they have no advantage and no gradient.

    `values`: rewards of whole groups one after the other, `group_size` (G) completions each. NaN for no values.
    Raises UserError when the groups are not whole or a value is not finite.

    >>> zero_spread_share([0.5, 0.5, 0.1, 0.7], group_size=2)
    0.5
    """
    rewards = torch.as_tensor(values, dtype=torch.float64)
    if group_size < 1 or rewards.ndim != 1 or rewards.numel() % group_size:
        shape = tuple(rewards.shape)
        raise UserError(
            f"zero_spread_share takes whole groups, got values of shape {shape} and group_size {group_size}"
        )
    if not torch.isfinite(rewards).all():
        raise UserError("zero_spread_share takes finite rewards; a reward that is NaN has to be found where it is made")
    groups = rewards.view(-1, group_size)  # (num_groups, G)
    return float((groups.amax(1) - groups.amin(1) <= TOLERANCE).double().mean()) if groups.numel() else float("nan")
