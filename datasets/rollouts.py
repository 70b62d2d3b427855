"""Rows for GRPO: paths and labels in the order that groups need, and each prompt read once however many share it.

Owns which row is drawn when and what a drawn row carries. The prompt itself is `VideoTemporalDataset`'s; completions
and losses are `trainers.rl_trainer`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from datasets.encoding import Sample
from datasets.video_dataset import VideoTemporalDataset
from utils.rows import model_windows

RolloutRow = dict[str, Any]


class RolloutDataset(Dataset[RolloutRow]):
    """Rows of a `VideoTemporalDataset` as TRL wants them: a mapping with `prompt` and the columns rewards read.

    `timestamp` and `duration` are on the clip's clock, in seconds; `kwargs` are columns of their own (null where a row
    has none). Indices from `len(self)` on give the same rows again marked as not `fresh`: their completions are reused,
    so nobody reads their video (see `GroupSampler`).
    """

    def __init__(self, prompts: VideoTemporalDataset) -> None:
        self.prompts = prompts
        self.columns = sorted({key for row in prompts.rows for key in row.kwargs})

    def __len__(self) -> int:
        return len(self.prompts.rows)

    def __getitem__(self, index: int) -> RolloutRow:
        fresh, index = index < len(self), index % len(self)
        row = self.prompts.rows[index]
        windows = model_windows(row, self.prompts.data.trim) or ()
        return {column: row.kwargs.get(column) for column in self.columns} | {
            "prompt": row.sentence,
            "video": row.video,
            "timestamp": [tuple(window) for window in windows],
            "duration": row.duration,
            "row": index,
            "fresh": fresh,
        }


class RolloutCollator:
    """Reads each prompt's video once for the rows of its group, in the data worker.

    The first row of a group carries `sample` (what `VideoTemporalDataset[i]` gives, or a fault); the others refer to
    it by their `row`. Rows that are not fresh stay as they are.
    """

    def __init__(self, prompts: VideoTemporalDataset) -> None:
        self.prompts = prompts

    def __call__(self, rows: Sequence[RolloutRow]) -> list[RolloutRow]:
        seen: set[int] = set()
        batch = []
        for row in rows:
            if row["fresh"] and row["row"] not in seen:
                row = row | {"sample": self._read(row["row"])}
            seen.add(row["row"])
            batch.append(row)
        return batch

    def _read(self, index: int) -> Sample:
        return self.prompts[index]


class GroupSampler(Sampler[int]):
    """Order of rows for GRPO: every prompt `num_generations` times in a row, a whole generation batch at a time.

    One generation batch feeds several optimizer passes, for each of which the data loader is asked again; those
    repetitions come as indices >= `num_rows` (not fresh). The order is a function of (seed, epoch), so a resumed run
    draws what the uninterrupted one would. Prompts that do not fill a generation batch are left out of the epoch.

    Args:
        num_rows: rows of the data set.
        num_generations: completions per prompt (G).
        num_prompts: prompts in a generation batch, over all processes.
        repeats: passes over a generation batch, the first included.
        epoch: asked at the start of each iteration. Not `set_epoch`: a data loader that skips batches after a resume
            would call it with its own count, which starts at 0.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        num_generations: int,
        num_prompts: int,
        repeats: int,
        shuffle: bool,
        seed: int,
        epoch: Callable[[], int],
    ) -> None:
        self.num_rows, self.num_generations, self.num_prompts = num_rows, num_generations, num_prompts
        self.repeats, self.shuffle, self.seed, self.epoch = repeats, shuffle, seed, epoch

    def __len__(self) -> int:
        num_batches = self.num_rows // self.num_prompts
        return num_batches * self.num_prompts * self.num_generations * self.repeats

    def __iter__(self) -> Iterator[int]:
        order = np.arange(self.num_rows)
        if self.shuffle:
            np.random.default_rng((self.seed, self.epoch())).shuffle(order)
        for first in range(0, self.num_rows - self.num_prompts + 1, self.num_prompts):
            batch = order[first : first + self.num_prompts].repeat(self.num_generations).tolist()
            yield from batch
            for _ in range(self.repeats - 1):
                yield from (index + self.num_rows for index in batch)
