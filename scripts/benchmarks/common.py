"""How every command measures and reports: turns and medians, gradients, peaks of memory, ceilings, the table's parts.

A way of doing the work is an object with a name among the ways; what it does is the command's own.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.common import UserError, write_json

PACKAGES = ("torch", "transformers", "trl", "peft")
SLOWER = 1.1
"""An unshared way slower than stock by more than this is no fair baseline; ratios are then given against stock."""

Times = dict[str, float]
"""Seconds, or MiB, by phase."""


# ---------------------------------------------------------------------------------------------- command line
def check_options(options: Any, least: Mapping[str, int]) -> None:
    """Raises UserError for a number under its `least` and for a device that is not there. A number that is None was not
    given."""
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise UserError(f"--{name} must be >= {smallest}, got {value}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu, or install torch for CUDA")


def tell(record: Mapping[str, Any], table: str, path: Path | None) -> None:
    """Print table and JSON line; the record also goes to `path`, indented."""
    if path:
        write_json(path, record)
    print(table)
    print(json.dumps(record))


# ---------------------------------------------------------------------------------------------- time
def seconds(device: str, call: Callable[[], Any]) -> float:
    """Wall clock of one call, the device's queue drained before and after."""
    drain(device)
    start = time.perf_counter()
    call()
    drain(device)
    return time.perf_counter() - start


def drain(device: str) -> None:
    """Wait until the device has done what was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()


def take_turns(
    ways: Mapping[str, Any], passes: Sequence[str], repeats: int, timed: Callable[[Any, str], Times]
) -> dict[str, Times]:
    """Median seconds of every way and phase, and their sum as "step". Warm the ways up first.

    The ways take turns within each pass of each repeat. `timed(way, name of the pass)` gives its seconds by phase.
    """
    taken: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in ways}
    for name_of_pass in [*passes] * repeats:
        for name, way in ways.items():
            for phase, elapsed in timed(way, name_of_pass).items():
                taken[name][phase].append(elapsed)
    medians = {name: {key: statistics.median(values) for key, values in found.items()} for name, found in taken.items()}
    return {name: found | {"step": sum(found.values())} for name, found in medians.items()}


def baseline(times: Mapping[str, Mapping[str, float]], stock: str, phases: Sequence[str]) -> str:
    """ "unshared", or `stock` where the unshared way would flatter the comparison in one of `phases`.

    >>> baseline({"unshared": {"update": 1.2, "step": 2.0}, "stock": {"update": 1.0, "step": 2.0}}, "stock", ["update"])
    'stock'
    """
    if stock not in times:
        return "unshared"
    slower = max(times["unshared"][phase] / times[stock][phase] for phase in phases)
    return stock if slower > SLOWER else "unshared"


# ---------------------------------------------------------------------------------------------- gradients
def gradient(model: Any) -> list[Tensor]:
    """Of everything that has one, copied."""
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def relative_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm of `wanted`, over all parameters together."""
    pairs = list(zip(found, wanted, strict=True))
    difference = sum(float((one.double() - other.double()).square().sum()) for one, other in pairs)
    return (difference / sum(float(other.double().square().sum()) for other in wanted)) ** 0.5


# ---------------------------------------------------------------------------------------------- memory
def peaks_in_fresh_processes(names: Sequence[str], measure: Callable[[str], Times]) -> dict[str, Times] | None:
    """`measure(name)` for each name in a process of its own, made of `peak_mib`; None where memory cannot be read.

    The process runs nothing else and hands freed memory back at once; freed memory that the allocator keeps would hide
    a peak. It is forked, so call this before torch has computed anything. `measure` must be picklable.
    """
    if sys.platform != "linux":
        return None
    found = {}
    for name in names:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
            found[name] = pool.submit(_hand_back_and, measure, name).result()
    return found


def _hand_back_and(measure: Callable[[str], Times], name: str) -> Times:
    hand_freed_memory_back()
    return measure(name)


def hand_freed_memory_back() -> None:
    """From now on memory goes back to the system when it is freed, not when the allocator sees fit."""
    library = ctypes.CDLL(None)
    for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        library.mallopt(option, 1 << 16)


def peak_mib(device: str, call: Callable[[], Any]) -> float:
    """Peak MiB during a call, above what was in use before it (weights, pixels)."""
    restart_peak(device)
    before = bytes_in_use(device)
    call()
    return (peak_bytes(device) - before) / 2**20


def bytes_in_use(device: str) -> int:
    """CUDA: torch's own count. Else the resident memory of this process, as Linux counts it."""
    return torch.cuda.memory_allocated() if device == "cuda" else _resident_bytes("VmRSS")


def peak_bytes(device: str) -> int:
    """The most that `bytes_in_use` has been since `restart_peak`, moments between two looks included."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _resident_bytes("VmHWM")


def restart_peak(device: str) -> None:
    """Forget the peak so far. Source of the "5": Linux, Documentation/filesystems/proc.rst."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _resident_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise UserError(f"/proc/self/status has no {name}: this system does not count resident memory")
    return int(found[1]) * 1024


# ---------------------------------------------------------------------------------------------- machine
def ceilings() -> dict[str, float]:
    """What the GPU gives at best: bf16 matrix product in TFLOP/s, copy within its memory in TB/s (read and written)."""
    n, size = 8192, 2**32
    left, right = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    product = _best(lambda: left @ right)
    copied = _best(lambda: target.copy_(source))
    return {"matmul_tflops": 2 * n**3 / product / 1e12, "memory_tb_per_s": 2 * size / copied / 1e12}


def _best(call: Callable[[], Any]) -> float:
    """Seconds of a call, best of 5 times 10 in a row."""
    seconds("cuda", call)
    return min(seconds("cuda", lambda: [call() for _ in range(10)]) for _ in range(5)) / 10


def circumstances(model: Any, device: str, **more: Any) -> dict[str, Any]:
    """Model, machine and versions."""
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        **more,
        **surroundings(device, PACKAGES),
    }


def surroundings(device: str, packages: Sequence[str]) -> dict[str, Any]:
    """Machine, the versions of those `packages` that are installed, and the day."""
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} cores ({platform.machine()})"
    return {
        "machine": machine,
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name)},
        "date": time.strftime("%Y-%m-%d"),
    }


# ---------------------------------------------------------------------------------------------- table
def heading(record: Mapping[str, Any]) -> str:
    """One line from what `circumstances` gave."""
    return (
        f"{record['size']}: {record['parameters'] / 1e6:,.2f} M parameters, {record['trained'] / 1e6:,.2f} M train, "
        f"{record['dtype']}, {record['machine']}, {record['threads']} thread(s)"
    )


def table_head(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """The names of the ways, and of the ratios to the shared one; a rule under them."""
    head = _row("", names, [f"{name}/shared" for name in others])
    return [head, "-" * len(head)]


def compared(
    label: str, values: Mapping[str, float], others: Sequence[str], form: str, unit: str = "", *, least: float = 0.0
) -> str:
    """A row of the table: what each way got, and how many times the shared one's the `others` got.

    `form` is a format specification. The shared one's counts as `least` if it is less, where it may be 0.
    """
    ratios = [f"{values[name] / max(values['shared'], least):.2f}x" for name in others]
    return _row(label, [f"{value:{form}} {unit}".rstrip() for value in values.values()], ratios)


def memory_row(record: Mapping[str, Any], phase: str, others: Sequence[str]) -> str:
    """The row of a phase's peaks."""
    values = {name: found[phase] for name, found in record["peak_mib"].items()}
    return compared(phase, values, others, ".0f", "MiB", least=0.1)


def _row(label: str, cells: Sequence[str], ratios: Sequence[str]) -> str:
    return f"{label:<12}" + "".join(f"{cell:>12}" for cell in cells) + "".join(f"{ratio:>18}" for ratio in ratios)


def ceilings_line(record: Mapping[str, Any]) -> list[str]:
    """A note on what `ceilings` gave, if the work was done on a GPU."""
    limits = record["ceilings"]
    if not limits:
        return []
    return [
        f"this GPU at best: bf16 matrix product {limits['matmul_tflops']:.0f} TFLOP/s, memory "
        f"{limits['memory_tb_per_s']:.2f} TB/s"
    ]
