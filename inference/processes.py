"""The processes that torchrun started, as an evaluation needs them: who am I, check once, wait for all."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from utils.common import UserError

Result = TypeVar("Result")

_PATIENCE = timedelta(days=7)
"""A process may be done hours before another; torchrun ends all of them when one dies."""


@dataclass(frozen=True)
class World:
    """One of `size` processes; a single one without torchrun."""

    rank: int = 0
    size: int = 1

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            distributed.barrier()

    def first_on_rank_zero(self, check: Callable[[], Result]) -> Result:
        """`check()` on rank 0, and when that went well on the others. Its UserError ends all, said once."""
        error: UserError | None = None
        result: Result | None = None
        if self.rank == 0:
            try:
                result = check()
            except UserError as raised:
                error = raised
        if self.size > 1:
            told = [error is not None]
            distributed.broadcast_object_list(told, src=0)
            if told[0] and self.rank:
                sys.exit(2)
        if error is not None:
            raise error
        return check() if result is None else result

    def device(self, asked: str | None) -> str | None:
        """The device of this process: with several processes a GPU each. Raises UserError when there are too few."""
        if self.size == 1 or not torch.cuda.is_available() or (asked or "cuda") != "cuda":
            return asked
        local, available = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= available:
            raise UserError(f"torchrun started more processes than the {available} GPUs here; lower --nproc_per_node")
        return f"cuda:{local}"


@contextmanager
def joined() -> Iterator[World]:
    """This process among those that torchrun started. They only meet on the CPU, so gloo is enough on GPUs too."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield World(distributed.get_rank(), size)
    finally:
        distributed.destroy_process_group()
