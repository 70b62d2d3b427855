"""What a reward is: how it is called from tensors, from texts and by TRL, and what it earns where nothing is to judge.

The rule for every reward, built in or a user's own, is kept here and nowhere else:

| the row is labelled | the answer is | it earns |
|---|---|---|
| with windows | windows | what `forward` says |
| with windows | "the event is absent" | 0 |
| absent (`[]`) | "the event is absent" | the full mark, `scale` |
| absent (`[]`) | windows | 0 |
| any | unreadable | 0 |

A reward that judges the text itself (`judges_absence`: format, length) gives its own mark instead of the full one to an
absence that is rightly stated.

Rewards are no `nn.Module`: TRL takes those for reward models with a tokenizer and a config. A user's plain `nn.Module`
is wrapped (`ModuleReward`, by `register_reward`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rewards.reading import Batch, read_batch
from utils.common import UserError

TIMESTAMP_COLUMN = "timestamp"
DURATION_COLUMN = "duration"


class Reward:
    """Base of all rewards. A subclass gives `marks`, in [0, 1]; the reward is `scale` times that."""

    name: str = "reward"
    """Its name in the registry and in logs."""
    needs: ClassVar[tuple[str, ...]] = ()
    """What `forward` is given by name beside `pred` and `gt`, as lists of N: `texts`, `pred_windows` and `gt_windows`
    (all of them; `pred` and `gt` hold one each), `durations` (seconds), or any column of the data set."""
    judges_absence: ClassVar[bool] = False
    """Whether an absence rightly stated earns what `forward` says instead of the full mark."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = positive(f"{self.name}.scale", scale)

    @property
    def __name__(self) -> str:
        """What TRL logs the reward under."""
        return self.name

    def marks(self, pred: Tensor, gt: Tensor, **needed: Any) -> Tensor:
        """The reward before `scale`: `(N,)` in [0, 1] for windows `(N, 2)`; 0 for a window that is none."""
        raise NotImplementedError

    def forward(self, pred: Tensor, gt: Tensor, **needed: Any) -> Tensor:
        """The reward of N windows, in seconds.

        `pred`, `gt`: (N, 2), float64; NaN rows where there is no window. `needed`: what `needs` names.
        Returns (N,) in [0, scale]. Raises UserError for other shapes.
        """
        if pred.ndim != 2 or pred.shape[-1] != 2 or pred.shape != gt.shape:
            shapes = f"{tuple(pred.shape)} and {tuple(gt.shape)}"
            raise UserError(f"reward `{self.name}` takes pred and gt of one shape (N, 2), got {shapes}")
        return self.scale * self.marks(pred, gt, **needed)

    def score(self, batch: Batch) -> Tensor:
        """The rewards of a batch, (N,) float64 on the CPU, by the table at the top of `rewards.base`.

        Raises UserError naming the reward when `forward` gives None, NaN, or not one number a row.
        """
        with torch.no_grad():
            values = self.forward(batch.pred, batch.gt, **{name: self._take(batch, name) for name in self.needs})
        rewards = as_values(values, len(batch), self.name)
        judged = batch.grounded | batch.absence_agreed if self.judges_absence else batch.grounded
        _require_finite(rewards, judged, batch, self.name)
        rewards = torch.where(judged, rewards, 0.0)
        return rewards if self.judges_absence else torch.where(batch.absence_agreed, self.scale, rewards)

    def compute_from_text(
        self,
        predictions: Sequence[Any],
        ground_truths: Sequence[Any],
        durations: Sequence[float] | None = None,
        **columns: Any,
    ) -> Tensor:
        """The rewards of N answers: (N,) float64.

        `predictions`: texts, or lists of messages. `ground_truths`: `(start, end)` in seconds, a list of windows, or []
        for an event labelled absent. `durations`: seconds, needed by some rewards and by answers in percent.
        `columns`: further lists of N that `needs` names. Raises UserError as `read_batch` and `score` do.
        """
        return self.score(read_batch(predictions, ground_truths, durations, columns))

    def __call__(self, completions: Any, *args: Any, **columns: Any) -> Any:
        """As TRL calls it: N completions and the columns of the data set, of which `timestamp` holds the labels and
        `duration` the lengths; returns a list of N floats. With two tensors it is `forward`."""
        if isinstance(completions, Tensor):
            return self.forward(completions, *args, **columns)
        if TIMESTAMP_COLUMN not in columns:
            raise UserError(
                f"reward `{self.name}` finds no data set column `{TIMESTAMP_COLUMN}`; it holds the labelled windows"
            )
        return self.score(
            read_batch(completions, columns[TIMESTAMP_COLUMN], columns.get(DURATION_COLUMN), columns)
        ).tolist()

    def _take(self, batch: Batch, name: str) -> Any:
        if name in ("texts", "pred_windows", "gt_windows"):
            return vars(batch)[name]
        if name == "durations":
            if None in batch.durations:
                raise UserError(
                    f"reward `{self.name}` needs the duration of every row; give durations=[...], or a data set column "
                    f"`{DURATION_COLUMN}` without gaps"
                )
            return batch.durations
        if name not in batch.columns:
            raise UserError(f"reward `{self.name}` needs {name!r}, which is no column of the data set")
        return batch.columns[name]


class ModuleReward(Reward):
    """A plain `nn.Module` with `forward(pred, gt)` as a reward. It declares `needs` and `judges_absence` as
    attributes of its class, if at all; its `scale`, if it has one, is its full mark (else 1)."""

    module_class: ClassVar[type[nn.Module]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.module = self.module_class(*args, **kwargs)
        scale = vars(self.module).get("scale", 1.0)  # not getattr: a module may call a submodule so
        super().__init__(scale)

    def forward(self, pred: Tensor, gt: Tensor, **needed: Any) -> Tensor:
        return self.module(pred, gt, **needed)


def as_values(values: Any, num_rows: int, name: str) -> Tensor:
    """What a reward returned, as float64 `(num_rows,)` on the CPU. Raises UserError naming it for anything else."""
    wanted = f"it must return one number for each of the {num_rows} rows"
    if values is None:
        raise UserError(f"reward `{name}` returned None; {wanted}")
    try:
        tensor = torch.as_tensor(values).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"reward `{name}` returned {values!r:.120}, which is not numeric ({error}); {wanted}") from None
    if tensor.shape != (num_rows,):
        raise UserError(f"reward `{name}` returned values of shape {tuple(tensor.shape)}; {wanted}")
    return tensor


def positive(key: str, value: Any) -> float:
    """`value` as a float, when it is a finite number above 0; else UserError naming `key`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise UserError(f"{key} must be a number above 0, got {value!r}")
    return float(value)


def _require_finite(rewards: Tensor, judged: Tensor, batch: Batch, name: str) -> None:
    bad = (judged & ~torch.isfinite(rewards)).nonzero().flatten().tolist()
    if bad:
        row = bad[0]
        raise UserError(
            f"reward `{name}` returned {rewards[row].item()} for {len(bad)} of {len(batch)} rows; first: row {row}, "
            f"label {[tuple(span) for span in batch.gt_windows[row]]}, answer {batch.texts[row]!r:.120}. "
            "A reward must be a finite number wherever the answer can be read"
        )
