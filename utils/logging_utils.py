"""One logger, one metrics file, and the facts a run writes down about the machine it ran on.

Rank zero is found from the launcher's environment variables, so nothing here imports torch. Plots of the metrics file
belong to `utils.curves`.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from utils.common import UserError, nearest

_LEVEL_NAMES = {"DEBUG": "debug", "INFO": "info", "WARNING": "warn", "ERROR": "error", "CRITICAL": "fatal"}
_COLOURS = {"debug": "\033[2m", "warn": "\033[33m", "error": "\033[31m", "fatal": "\033[31;1m"}
_RESET = "\033[0m"

RECORDED_PACKAGES = (
    "torch", "torchvision", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "tokenizers",
    "qwen-vl-utils", "decord", "av", "numpy", "flash-attn",
)  # fmt: skip
"""Packages whose versions a run records."""


def get_logger() -> logging.Logger:
    """The project's one logger, `vtg`. `setup_logging` gives it its handlers; without them only warnings show."""
    return logging.getLogger("vtg")


def process_rank() -> int:
    """Global rank of this process: RANK, else LOCAL_RANK, else 0."""
    for name in ("RANK", "LOCAL_RANK"):
        value = os.environ.get(name, "")
        if value:
            if not value.isdecimal():
                raise UserError(f"environment variable {name} must be a whole number, got {value!r}; unset it")
            return int(value)
    return 0


def is_rank_zero() -> bool:
    """Whether this process is the one that speaks and writes files."""
    return process_rank() == 0


def setup_logging(output_dir: str | os.PathLike[str] | None = None, level: str | int = "info") -> logging.Logger:
    """Give the logger its console and, with `output_dir`, the file `output_dir/log.txt`; returns the logger.

    Calling again changes the level, and the file when another folder is given, and never doubles a line. The file is
    appended to. Lines look like `12:03:04 info  message`, with the date before them in the file. Ranks other than zero
    show errors only; their warnings go to `output_dir/log.rank<N>.txt`, made when there is one.
    Raises `UserError` for an unknown level.
    """
    logger = get_logger()
    logger.setLevel(_level_number(level))
    # PEFT and TRL ask transformers by a name that it renamed; nothing here or in a user's hands would change that.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    logger.propagate = False  # a library that configures the root logger would otherwise print every line twice
    if not any(isinstance(handler, _ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(_ConsoleHandler())
    if output_dir is not None:
        _attach_file(logger, Path(output_dir))
    return logger


class _Formatter(logging.Formatter):
    """`12:03:04 info  message`; ranks other than zero name themselves."""

    def __init__(self, date_format: str) -> None:
        super().__init__("%(asctime)s %(level)-5s %(rank)s%(message)s", datefmt=date_format)

    def format(self, record: logging.LogRecord) -> str:
        record.level = _LEVEL_NAMES.get(record.levelname, record.levelname.lower())
        rank = process_rank()
        record.rank = f"[rank {rank}] " if rank else ""
        return super().format(record)


class _ConsoleHandler(logging.Handler):
    """Writes to the current `sys.stderr`, above a progress bar if one is up, in colour on a terminal."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_Formatter("%H:%M:%S"))
        self.addFilter(lambda record: is_rank_zero() or record.levelno >= logging.ERROR)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            colour = _COLOURS.get(_LEVEL_NAMES.get(record.levelname, ""), "")
            if colour and sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
                line = f"{colour}{line}{_RESET}"
            progress = sys.modules.get("tqdm")  # a plain write would tear a bar; nobody pays for tqdm without one
            if progress is not None:
                progress.tqdm.write(line, file=sys.stderr)
            else:
                sys.stderr.write(line + "\n")
            sys.stderr.flush()
        except (OSError, ValueError):  # a closed terminal or stream: what logging does with every failed emit
            self.handleError(record)


class _RunFileHandler(logging.FileHandler):
    """The log file of a run; opened at the first line."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, mode="a", encoding="utf-8", delay=True)
        self.setFormatter(_Formatter("%Y-%m-%d %H:%M:%S"))
        self.addFilter(lambda record: is_rank_zero() or record.levelno >= logging.WARNING)


def _attach_file(logger: logging.Logger, folder: Path) -> None:
    rank = process_rank()
    path = folder / (f"log.rank{rank}.txt" if rank else "log.txt")
    for handler in [handler for handler in logger.handlers if isinstance(handler, _RunFileHandler)]:
        if Path(handler.baseFilename) == path.absolute():
            return
        logger.removeHandler(handler)
        handler.close()
    folder.mkdir(parents=True, exist_ok=True)
    logger.addHandler(_RunFileHandler(path))


def _level_number(level: str | int) -> int:
    if isinstance(level, int):
        return level
    names = {"debug": 10, "info": 20, "warning": 30, "error": 40}
    if level.lower() not in names:
        close = nearest(level.lower(), names)
        hint = f"; did you mean {close!r}?" if close else ""
        raise UserError(f"log level must be one of {', '.join(names)}, got {level!r}{hint}")
    return names[level.lower()]


class MetricsWriter:
    """Appends records to a metrics file, one JSON object per line: `run`, `step`, `time` (Unix seconds) and the values.

    Every line reaches the operating system before `write` returns. Nothing is ever removed: `resume` marks what came
    after a step as superseded, and `read_metrics` leaves it out. On ranks other than zero every method does nothing.
    """

    def __init__(self, path: str | os.PathLike[str], run: str) -> None:
        """`run` names the run; it stays the same when the run is resumed."""
        self.path = Path(path)
        self.run = run
        self._handle: IO[bytes] | None = None
        if is_rank_zero():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = open(self.path, "ab")
            if _lacks_final_newline(self.path):
                self._handle.write(b"\n")  # a killed run left half a line; the next record must not be glued to it

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append `metrics` (slash names -> numbers or strings) of `step`. Numbers that are not finite become null."""
        reserved = sorted({"run", "step", "time", "event"} & set(metrics))
        if reserved:
            raise ValueError(f"metric names {reserved} are taken by the record itself")
        self._append(step, {name: _plain(value) for name, value in metrics.items()})

    def resume(self, step: int) -> None:
        """Mark that the run goes on from `step`: records after it are superseded. A fresh start is `resume(0)`."""
        self._append(step, {"event": "resume"})

    def close(self) -> None:
        """Close the file; further writes are errors."""
        if self._handle is not None:
            self._handle.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, step: int, values: dict[str, Any]) -> None:
        if self._handle is None:
            return
        record = {"run": self.run, "step": int(step), "time": round(time.time(), 3), **values}
        self._handle.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._handle.flush()


def read_metrics(path: str | os.PathLike[str], run: str | None = None) -> list[dict[str, Any]]:
    """The records of one run that stand, in step order, one per step: `{"run", "step", "time", ...}`.

    `run` is by default the one written last. Records of the same step are merged, the later value winning; records that
    a `resume` superseded are left out. Half a line, as a killed run leaves it, is left out with a warning.
    Raises `UserError` if the file is missing.
    """
    records = _read_records(Path(path))
    if run is None and records:
        run = records[-1]["run"]
    steps: dict[int, dict[str, Any]] = {}
    for record in records:
        if record["run"] != run:
            continue
        if record.get("event") == "resume":
            steps = {step: kept for step, kept in steps.items() if step <= record["step"]}
        else:
            steps.setdefault(record["step"], {}).update(record)
    return [steps[step] for step in sorted(steps)]


def _read_records(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"metrics file {path} does not exist; a run writes it while it trains")
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError:  # not JSON, or bytes that are not UTF-8
            record = None
        if isinstance(record, dict) and {"run", "step"} <= record.keys():
            records.append(record)
        elif line.strip():
            get_logger().warning("%s:%d is not a metrics record; left out", path, number)
    return records


def _lacks_final_newline(path: Path) -> bool:
    with open(path, "rb") as handle:
        size = handle.seek(0, os.SEEK_END)
        if size == 0:
            return False
        handle.seek(size - 1)
        return handle.read(1) != b"\n"


def _plain(value: Any) -> Any:
    """A value JSON can hold: NumPy and torch scalars become Python numbers, NaN and infinity null."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment_versions() -> dict[str, str | None]:
    """Versions of Python, the platform, `RECORDED_PACKAGES` (None = not installed) and the NVIDIA driver (None = none).

    Read from the installed metadata: nothing is imported.
    """
    versions: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions | {"nvidia_driver": _nvidia_driver()}


def _nvidia_driver() -> str | None:
    """From the kernel module's own file: `nvidia-smi` takes seconds on a machine with several cards."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return match.group(1) if match else None


def git_revision(root: str | os.PathLike[str]) -> dict[str, Any] | None:
    """`{"revision": full hash, "dirty": bool}` of the checkout at `root`; `dirty` = tracked files differ.

    None where there is no git, no commit, or `root` is not the top of a checkout (a copy unpacked inside some other
    repository has no revision of its own).
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    revision = _git(root, "rev-parse", "--verify", "HEAD")
    status = _git(root, "status", "--porcelain", "--untracked-files=no")
    if top is None or revision is None or status is None or Path(top).resolve() != Path(root).resolve():
        return None
    return {"revision": revision, "dirty": bool(status)}


def _git(root: str | os.PathLike[str], *arguments: str) -> str | None:
    # inside a git hook these variables name another repository than `root`
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", os.fspath(root), *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def peak_memory_bytes() -> int:
    """Peak memory of this process in bytes: CUDA allocations if torch has started CUDA, else resident memory.

    The CUDA figure is that of the current device since the last `torch.cuda.reset_peak_memory_stats`.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    return _peak_resident_bytes()


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status")
    # ru_maxrss of a process begins at what its parent held when it started it; VmHWM does not
    match = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE) if status.is_file() else None
    if match:
        return int(match.group(1)) * 1024
    import resource  # POSIX only, and wanted here alone

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, kibibytes elsewhere


def human_bytes(num_bytes: float) -> str:
    """A size for people, in binary units.

    >>> human_bytes(1536), human_bytes(17_179_869_184)
    ('1.5 KiB', '16.0 GiB')
    """
    return _scaled(num_bytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def human_count(count: float) -> str:
    """A count for people, in thousands.

    >>> human_count(950), human_count(1_234_567)
    ('950', '1.2 M')
    """
    return _scaled(count, 1000, ("", "k", "M", "B", "T")).rstrip()


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    index = 0
    # rounding first: 1023.96 must not be shown as "1024.0 B"
    while index < len(units) - 1 and round(abs(value), 1) >= base:
        value, index = value / base, index + 1
    return f"{value:.1f} {units[index]}" if index else f"{value:g} {units[0]}"
