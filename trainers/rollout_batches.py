"""A generation batch of GRPO apart from the trainer: its shape, whole groups, rewards of its rows. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from datasets.encoding import Sample
from rewards.base import Reward
from utils.common import UserError

if TYPE_CHECKING:
    from trl import GRPOConfig


@dataclass(frozen=True)
class Scored:
    """What the last generation batch said and earned."""

    texts: list[str]
    """Of this process."""
    lengths: list[int]
    """Tokens of each, of this process."""
    rewards: Tensor
    """(rows of all processes, components); NaN where the video could not be read."""


class ScoredRows:
    """A reward as TRL calls it, on the rows whose video could be read; the others get None."""

    def __init__(self, name: str, reward: Reward) -> None:
        self.__name__ = name
        self.reward = reward

    def __call__(self, *, completions: list[str], faulty: list[bool], **columns: Any) -> list[float | None]:
        good = [row for row, bad in enumerate(faulty) if not bad]
        values: list[float | None] = [None] * len(faulty)
        lists = {key: [column[row] for row in good] for key, column in columns.items() if isinstance(column, list)}
        if good:
            for row, value in zip(good, self.reward([completions[row] for row in good], **lists), strict=True):
                values[row] = value
        return values


def regroup(batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Micro-batches of rows in any order -> as many with the rows as they were sampled, and so of whole groups.

    Each batch holds tensors with one row per completion, among them `row_id`, and scalars alike in all. A micro-batch
    is then the same sequence in every pass, so that in bf16 too the KL begins at exactly 0, the policy's ratio at 1.
    """
    whole = {
        key: torch.cat([batch[key] for batch in batches]) if value.ndim else value for key, value in batches[0].items()
    }
    order = whole["row_id"].argsort()
    size = len(order) // len(batches)
    return [
        {key: value[order[i * size : (i + 1) * size]] if value.ndim else value for key, value in whole.items()}
        for i in range(len(batches))
    ]


def check_batch_shape(args: GRPOConfig, num_rows: int) -> None:
    """Raise UserError unless every micro-batch holds whole groups and the rows fill a generation batch."""
    size, group = args.per_device_train_batch_size, args.num_generations
    if size % group:
        near = sorted({max(group, size // group * group), (size // group + 1) * group})
        raise UserError(
            f"training.per_device_train_batch_size={size} is no multiple of training.num_generations={group}, so a "
            f"group would be split over micro-batches and its video computed again. Set it to "
            f"{' or '.join(map(str, near))}, or num_generations to a divisor of {size}"
        )
    num_prompts = args.generation_batch_size // group
    if num_rows < num_prompts:
        raise UserError(
            f"data.train has {num_rows} usable rows, fewer than the {num_prompts} prompts of one generation batch "
            "(per_device_train_batch_size x steps_per_generation x GPUs / num_generations). Lower "
            "training.gradient_accumulation_steps or give more rows"
        )


def batches_per_epoch(args: GRPOConfig, num_rows: int) -> int:
    """Forward passes of one process in an epoch: rows fill generation batches, each of which feeds so many passes.

    Rows that do not fill one are left out of the epoch (`datasets.rollouts.GroupSampler`).
    """
    num_prompts = args.generation_batch_size // args.num_generations
    return num_rows // num_prompts * args.steps_per_generation * args.num_iterations


def is_fault(sample: Sample) -> bool:
    """Whether the row's video could not be read."""
    return "fault" in sample


def until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """The completion up to and with its first end token; all of it when it was cut off.

    >>> until_end([5, 6, 2, 0, 0], ends=[2])
    [5, 6, 2]
    """
    return next((ids[: place + 1] for place, token in enumerate(ids) if token in ends), ids)


def widen(values: Tensor, width: int) -> Tensor:
    """(rows, n) -> (rows, width), zeros on the right."""
    return functional.pad(values, (0, width - values.shape[1]))
