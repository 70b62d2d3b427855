"""Who does a piece of work that several processes, on several machines, may want done at the same time.

A claim is a small file that asks the others to wait. It is no lock: whoever cannot make one, or has waited long
enough, goes on without. What a killed process leaves behind is passed over at once on its own machine, after `WAIT_S`
on others.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CLAIM_SUFFIX = ".claim"
WAIT_S = 120.0
"""How long work that another process has begun is waited for, unless that process is seen to be dead."""
POLL_S = 0.02


@contextmanager
def claimed(claim: Path) -> Iterator[None]:
    """Entered by one process at a time, as far as possible: the others wait here until it is done."""
    is_mine = _take(claim)
    try:
        yield
    finally:
        if is_mine:
            with suppress(OSError):
                if claim.read_text(encoding="utf-8") == _holder():
                    claim.unlink()


def _take(claim: Path) -> bool:
    """Take `claim`, waiting for a living holder to give it back; False where that is not possible."""
    patience = time.monotonic() + WAIT_S
    while True:
        try:
            claim.parent.mkdir(parents=True, exist_ok=True)
            with open(claim, "x", encoding="utf-8") as handle:
                handle.write(_holder())
            return True
        except FileExistsError:
            if time.monotonic() <= patience and _is_held(claim):
                time.sleep(POLL_S)
            elif not _give_up(claim):
                return False
        except OSError:  # a folder that may only be read, a full disk: nothing will be stored either
            return False


def _give_up(claim: Path) -> bool:
    """Remove a claim that nobody holds; False where it may not be removed."""
    try:
        claim.unlink(missing_ok=True)
        return True
    except OSError:
        return False


def _holder() -> str:
    """This process, not to be mistaken for a later one of its number."""
    return f"{socket.gethostname()} {os.getpid()} {_started(os.getpid())}"


def _is_held(claim: Path) -> bool:
    """Whether the holder may still be at work."""
    try:
        host, pid, started = claim.read_text(encoding="utf-8").split()
        if time.time() - claim.stat().st_mtime > 2 * WAIT_S:
            return False
    except FileNotFoundError:
        return True  # just given back: the next try gets it
    except (OSError, ValueError):
        return True  # being written
    return host != socket.gethostname() or started == "None" or str(_started(int(pid))) == started


def _started(pid: int) -> int | None:
    """When a process of this machine began, in the kernel's ticks; None when it is dead, or where there is no /proc."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])
