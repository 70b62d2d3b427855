"""torchrun, without its traceback where a training process has said itself why it ended.

    python scripts/torchrun.py --nproc_per_node 2 train_sft.py ...     # scripts/launch.sh does

A mistake of the user's (status 2) and a stop by a signal (130, 143) are told in a line by the process; torchrun puts
its own stack and a table of processes below, where one looks first. Any other end keeps both. The status is torchrun's.
"""

from __future__ import annotations

import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

SAID = (2, 130, 143)
"""Statuses of a process that has printed the reason (`utils.common.run_command`)."""


def main() -> int:
    """Run torchrun on the command line; returns the exit status."""
    try:
        run.main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode not in SAID:
            raise
        print(f"process {rank} ended with status {failure.exitcode}; the reason stands above", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
