"""The order of rows in SFT, a function of seed and epoch alone, so that a resumed run draws what the uninterrupted one
would, on every process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class EpochSampler(Sampler[int]):
    """Every row once an epoch, in an order drawn anew for each.

    Args:
        num_rows: rows of the data set.
        seed: of the first epoch; the next takes the next number.
        epoch: asked at the start of each iteration. Not `set_epoch`: a data loader that skips batches after a resume
            does not hand it on.
        lengths: of the rows, to put rows of like length side by side; None shuffles freely.
        batch_size: rows that are to be alike, with `lengths`.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        seed: int,
        epoch: Callable[[], int],
        lengths: Sequence[int] | None = None,
        batch_size: int = 1,
    ) -> None:
        self.num_rows, self.seed, self.epoch = num_rows, seed, epoch
        self.lengths, self.batch_size = lengths, batch_size

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        if self.lengths is None:
            return iter(torch.randperm(self.num_rows, generator=generator).tolist())
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
