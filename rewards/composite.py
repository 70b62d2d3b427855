"""Several rewards as one: their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rewards.base import Reward, as_values
from rewards.reading import Batch
from rewards.reward_registry import build_reward, find_reward
from utils.common import UserError


class CompositeReward(Reward):
    """The sum of `weight * reward` over its components. The weights are not normalised: GRPO's advantages do not mind
    their common scale, and the sum is that of TRL's `reward_weights`.

    `config` maps each reward's name (or `package.module:Name` of a user's own) to its `weight` (1 when left out) and
    its parameters. A weight of 0 only logs the component; a negative one turns a cost into a reward.
    Answers are read once for all components. `components` keeps what each of them gave, unweighted, in the last call.

    Raises UserError for an unknown name or parameter, naming the nearest, and for a weight that is no number.

    >>> config = {"temporal_iou": {"weight": 1.0}, "segment_overlap": {"weight": 0.5, "mode": "recall"}}
    >>> reward = CompositeReward(config)
    >>> reward(completions=["From 2.0 to 6.0 seconds.", "Hm."], timestamp=[[4, 6], [4, 6]])  # 0.5 + 0.5 * 1
    [1.0, 0.0]
    >>> reward.components
    {'temporal_iou': [0.5, 0.0], 'segment_overlap': [1.0, 0.0]}
    """

    name = "composite"

    def __init__(self, config: Mapping[str, Mapping[str, Any] | None]) -> None:
        if not isinstance(config, Mapping) or not config:
            raise UserError(f"rewards must map names to weights, as in temporal_iou: {{weight: 1.0}}, got {config!r}")
        self.rewards: dict[str, Reward] = {}
        """The components by name, each callable on its own."""
        self.weights: dict[str, float] = {}
        """Their weights."""
        self.components: dict[str, list[float]] = {}
        """What each component gave in the last call, unweighted, one value a row."""
        for name in config:
            find_reward(name)  # an unknown name is named before what it is given: the name decides what that may be
        for name, given in config.items():
            params = _params(name, given)
            self.weights[name] = _weight(name, params.pop("weight", 1.0))
            self.rewards[name] = build_reward(name, params)
        super().__init__(1.0)
        self.scale = sum(self.weights[name] * reward.scale for name, reward in self.rewards.items())

    def forward(self, pred: Tensor, gt: Tensor, **needed: Any) -> Tensor:
        """The weighted sum for windows (N, 2) in seconds; `needed` holds what the components' `needs` name."""
        values = {
            name: as_values(
                reward.forward(pred, gt, **{key: needed[key] for key in reward.needs if key in needed}), len(pred), name
            )
            for name, reward in self.rewards.items()
        }
        return self._sum(values, len(pred))

    def score(self, batch: Batch) -> Tensor:
        """The weighted sum for a batch, (N,) float64. Raises UserError naming the component that fails."""
        return self._sum({name: reward.score(batch) for name, reward in self.rewards.items()}, len(batch))

    def _sum(self, values: Mapping[str, Tensor], num_rows: int) -> Tensor:
        self.components = {name: value.tolist() for name, value in values.items()}
        total = torch.zeros(num_rows, dtype=torch.float64)
        for name, value in values.items():
            total += self.weights[name] * value
        return total


def _params(name: str, given: Any) -> dict[str, Any]:
    if given is None:  # a bare `temporal_iou:` in YAML
        return {}
    if not isinstance(given, Mapping):
        raise UserError(f"rewards.{name} must map keys to values, as in {{weight: 1.0}}, got {given!r}")
    return dict(given)


def _weight(name: str, weight: Any) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise UserError(f"rewards.{name}.weight must be a number, got {weight!r}")
    return float(weight)
