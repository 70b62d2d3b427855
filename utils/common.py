"""Small pieces every room uses: the user-facing error, atomic writes, nearest-name hints and the command-line wrapper.

Leaves logging to `utils.logging_utils` and configuration to `utils.config`.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import json
import math
import os
import random
import secrets
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

REPO_ROOT = Path(__file__).resolve().parents[1]
"""The folder that holds `utils/`, `datasets/`, `configs/` and the entry scripts."""


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(ValueError):
    """A mistake the user can mend. The message names the file, line or key, the value, the rule and the remedy.

    Entry scripts print it as one `error: ...` line and exit with status 2, without a traceback.
    """


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice most similar to `name`, or that it is short for, or None when nothing is close.

    >>> nearest("learning_rat", ["learning_rate", "fps"])
    'learning_rate'
    >>> nearest("tiou", ["generalized_iou", "temporal_iou"])
    'temporal_iou'
    """
    options = list(choices)
    matches = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if not matches and len(name) > 2:
        longer = [option for option in options if _is_short_for(name, option)]
        matches = difflib.get_close_matches(name, longer, n=1, cutoff=0.0)
    return matches[0] if matches else None


def _is_short_for(name: str, option: str) -> bool:
    """Whether `option` begins with the same letter and holds the others in the same order."""
    letters = iter(option)
    return name[:1] == option[:1] and all(letter in letters for letter in name)


@contextmanager
def atomic_open(path: str | os.PathLike[str], mode: str = "w", *, sync: bool = True) -> Iterator[IO[Any]]:
    """Open a temporary sibling of `path` for writing; on success sync it and rename it over `path`.

    A reader sees the old file or the whole new one, never half of it. On any error the temporary file is removed; a
    killed process leaves `.NAME.PID.RANDOM.tmp`, whose name no other process takes, on whatever machine.
    `sync=False` is for what can be told when a power cut tore it, and made again.
    Raises UserError for a place that cannot be written to, such as a folder without permission.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        open(temporary, "ab").close()
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise
        raise UserError(
            f"{target} cannot be written: {error.strerror} ({error.filename}). Choose another place, or change its "
            "permissions"
        ) from error
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as handle:
            yield handle
            handle.flush()
            if sync:
                os.fsync(handle.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically. A float that is not finite is written as null: JSON has no NaN."""
    with atomic_open(path) as handle:
        json.dump(finite_or_null(value), handle, indent=2, ensure_ascii=False, allow_nan=False)
        handle.write("\n")


def finite_or_null(value: Any) -> Any:
    """`value` with every NaN and infinity in its mappings and lists as None.

    >>> finite_or_null({"mIoU": 50.0, "absent": [float("nan")]})
    {'mIoU': 50.0, 'absent': [None]}
    """
    if isinstance(value, dict):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def or_nan(value: float | None) -> float:
    """The number that `write_json` was given: one that was not finite comes back as None."""
    return math.nan if value is None else value


def load_named(path: str, key: str) -> Any:
    """Import `package.module:name`, as plug-in keys of the configuration give it. Raises UserError naming `key`."""
    module_name, _, attribute = path.partition(":")
    try:
        if not module_name or module_name.startswith("."):
            raise ImportError(f"{module_name!r} is no module's full name")
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{key}={path!r} cannot be imported: {error}. It must read package.module:name, of a module that Python "
            "finds; PYTHONPATH=FOLDER adds the folder of yours"
        ) from error


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (CPU and CUDA)."""
    import torch  # imported here so that the light rooms stay importable in milliseconds

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def settle_accelerator() -> None:
    """Tell DeepSpeed to use the CPU where torch has no accelerator; call it before anything imports DeepSpeed.

    Left alone it guesses on import, and warns about its guess in every process, whether DeepSpeed is used or not.
    """
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


_TASK_COUNTS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
"""Where mpirun and srun say how many processes they started."""


def settle_world() -> None:
    """Make a process that no launcher started a world of one for DeepSpeed; call it before TrainingArguments are made.

    Left alone DeepSpeed looks for MPI, and needs mpi4py for that. Under torchrun it changes nothing.

    Raises UserError when srun or mpirun started several processes without torchrun: each would train alone, and all
    into one folder.
    """
    if "WORLD_SIZE" in os.environ:
        return
    for variable in _TASK_COUNTS:
        if int(os.environ.get(variable) or 1) > 1:
            raise UserError(
                f"--deepspeed: {os.environ[variable]} processes were started without torchrun ({variable}). Start "
                "scripts/sft.sh (or rl.sh) once on every node: it starts a process for each GPU (see scripts/slurm)"
            )
    with socket.socket() as probe:  # a port of its own, so that two runs can share a machine
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command-line `main` and exit with its status (None means 0).

    A `UserError` becomes one line on standard error and status 2, a full disk names the path, Ctrl-C is status 130.
    Everything else keeps its traceback: it is a fault of the program, and the traceback is what a report needs.
    """
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        where = error.filename or "the output folder"
        print(f"error: no space left on the disk that holds {where}; free some space and run again", file=sys.stderr)  # noqa: T201
        sys.exit(2)
