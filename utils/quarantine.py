"""Videos on which a decoder hung or crashed, remembered so that no later read pays for it again.

The list is a file of JSON lines, one a video, that several processes and machines append to; without a file each
process remembers its own. Only `DecoderStopped` puts a video there. Ordinary faults (missing, not a video, cut short)
are found again in milliseconds, and a file that was mended in between is then simply read.

A line counts only as long as it speaks of what would be read now: the same size and time of change, the same backend,
and for a file that ran out of time, no higher limit than then. Deleting a line, or the list, lifts it as well.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from utils.decode_process import DecoderStopped, read_clip_apart
from utils.logging_utils import get_logger
from utils.video import FrameBudget, VideoClip, VideoReadError, read_clip

if TYPE_CHECKING:
    from utils.config import DataConfig


def decode(
    path: str | os.PathLike[str],
    budget: FrameBudget,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    backend: str,
    timeout_s: float | None,
    quarantine: str | os.PathLike[str] | None,
) -> VideoClip:
    """`utils.video.read_clip` for a video that nobody has looked at: it can neither stall nor end this process.

    Args:
        path: a video file, with `budget`, `start_s`, `end_s` and `backend` as `read_clip` takes them.
        timeout_s: seconds until it is given up (`data.decode_timeout_s`); None decodes in this process, unprotected.
        quarantine: the list (`data.quarantine`); None is one in memory.

    Raises:
        VideoReadError: as `read_clip`, and for a video that hung or crashed the decoder, now or before.
        UserError: as `read_clip`.
    """
    known = quarantine_at(None if quarantine is None else Path(quarantine).absolute())
    known.require_free(path, backend, timeout_s)
    if timeout_s is None:
        return read_clip(path, budget, start_s=start_s, end_s=end_s, backend=backend)
    try:
        return read_clip_apart(path, budget, start_s=start_s, end_s=end_s, backend=backend, timeout_s=timeout_s)
    except DecoderStopped as error:
        known.add(error, backend, timeout_s, start_s=start_s, end_s=end_s)
        raise


def decode_clip(
    path: str | os.PathLike[str], data: DataConfig, start_s: float | None = None, end_s: float | None = None
) -> VideoClip:
    """`decode` as the configuration says. Raises what `decode` does."""
    return decode(
        path, data.budget, start_s=start_s, end_s=end_s,
        backend=data.backend, timeout_s=data.decode_timeout_s, quarantine=data.quarantine,
    )  # fmt: skip


@dataclass(frozen=True)
class Inmate:
    """One line of the list."""

    path: str
    """Absolute, symbolic links resolved."""
    size: int
    """Bytes."""
    mtime_ns: int
    """Time of the last change."""
    start_s: float | None
    """With `end_s` the stretch in which it happened, seconds on the file's clock. The whole file is shut out."""
    end_s: float | None
    backend: str
    timeout_s: float
    """The limit it was read under."""
    reason: str
    time: str
    """When it was put here, UTC, ISO 8601."""

    def speaks_of(self, status: os.stat_result, backend: str, timeout_s: float | None) -> bool:
        """Whether the file is still the one that was read, and would be read the same way."""
        same_file = (self.size, self.mtime_ns) == (status.st_size, status.st_mtime_ns)
        more_time = "data.decode_timeout_s" in self.reason and (timeout_s is None or timeout_s > self.timeout_s)
        return same_file and self.backend == backend and not more_time


class Quarantine:
    """The list as it stands: what the file holds now, and what this process could not write there.

    Args:
        path: of the file; None keeps the list in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._own: list[Inmate] = []
        self._listed: dict[str, list[Inmate]] = {}
        self._seen: tuple[int, int] | None = None
        self._warned: set[str] = set()

    def require_free(self, video: str | os.PathLike[str], backend: str, timeout_s: float | None) -> None:
        """Raise the VideoReadError of the earlier read if `video` is on the list; costs microseconds if it is not."""
        self._refresh()
        if not self._listed and not self._own:
            return
        key = os.path.realpath(video)
        inmates = [*self._listed.get(key, ()), *(own for own in self._own if own.path == key)]
        if not inmates:
            return
        with suppress(OSError):
            status = os.stat(key)
            for inmate in inmates:
                if inmate.speaks_of(status, backend, timeout_s):
                    raise VideoReadError(video, f"in quarantine since {inmate.time}: {inmate.reason} ({self._where()})")

    def add(
        self,
        error: VideoReadError,
        backend: str,
        timeout_s: float,
        *,
        start_s: float | None = None,
        end_s: float | None = None,
    ) -> None:
        """Put the video of `error` on the list. A list that cannot be written is said once, and kept in memory."""
        path = os.path.realpath(error.path)
        try:
            status = os.stat(path)
        except OSError:
            return  # it is gone, and will be missed as such
        time = datetime.now(UTC).isoformat(timespec="seconds")
        size, changed = status.st_size, status.st_mtime_ns
        inmate = Inmate(path, size, changed, start_s, end_s, backend, timeout_s, error.reason, time)
        if self.path is not None:
            try:
                return append_line(self.path, json.dumps(asdict(inmate)))
            except OSError as problem:
                self._warn(f"data.quarantine={self.path} cannot be written ({problem}); this process alone remembers")
        self._own.append(inmate)

    def _refresh(self) -> None:
        """Read the list again if it is not the one read last."""
        if self.path is None:
            return
        try:
            status = os.stat(self.path)
        except OSError:
            self._listed, self._seen = {}, None
            return
        if self._seen != (status.st_size, status.st_mtime_ns):
            self._seen = (status.st_size, status.st_mtime_ns)
            self._listed = {}
            for inmate in self._read():
                self._listed.setdefault(inmate.path, []).append(inmate)

    def _read(self) -> Iterator[Inmate]:
        assert self.path is not None
        try:
            lines = self.path.read_bytes().split(b"\n")[:-1]  # whoever writes the last one may not be done
        except OSError as problem:
            self._warn(f"data.quarantine={self.path} cannot be read ({problem})")
            return
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield Inmate(**json.loads(line))
                except (ValueError, TypeError):
                    self._warn(f"{self.path}:{number} is no line of a quarantine list and is ignored; delete it")

    def _where(self) -> str:
        if self.path is None:
            return "this process tries it no more"
        return f"its line in {self.path} keeps it there; delete that to try again"

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            get_logger().warning("%s", message)


def append_line(path: Path, line: str) -> None:
    """Append one line, whole, whoever else appends: one write, at the end, after whatever half line lies there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(number).st_size
        starts_anew = size == 0 or os.pread(number, 1, size - 1) == b"\n"
        data = (("" if starts_anew else "\n") + line + "\n").encode()
        if os.write(number, data) != len(data):
            raise OSError("only a part could be written; is the disk full?")
    finally:
        os.close(number)


@functools.cache
def quarantine_at(path: Path | None) -> Quarantine:
    """This process's one `Quarantine` for the list at `path`."""
    return Quarantine(path)
