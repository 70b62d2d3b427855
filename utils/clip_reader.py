"""A stretch of a video -> its clip: from the frame cache where it was decoded before, else decoded and kept.

The one place that datasets and inference get clips from, and the one that decides how a clip is decoded. Counts what it
does, so that the logs can show that nothing is decoded twice. Entries and their folder are `utils.frame_cache`'s.
"""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from utils.clip_file import DamagedClipError
from utils.config import DataConfig
from utils.frame_cache import CacheWriteError, ClipKey, FrameCache, clip_key
from utils.logging_utils import get_logger
from utils.quarantine import decode
from utils.video import VideoClip


@dataclass
class Reads:
    """What was read, and from where; adds up over workers and processes."""

    decoded: int = 0
    """Clips decoded, or tried in vain."""
    cache_hits: int = 0
    """Clips that came from the cache."""
    cache_rebuilt: int = 0
    """Entries found damaged, or older than their video; each was decoded anew."""
    not_cached: int = 0
    """Clips decoded that could not be kept."""
    problems: dict[str, str] = field(default_factory=dict)
    """Why they could not: kind -> sentence, of each kind the first."""

    def add(self, other: Reads) -> None:
        """Count `other` too."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.problems = other.problems | self.problems

    @property
    def counts(self) -> dict[str, int]:
        """The numbers by name."""
        return {name: getattr(self, name) for name in COUNTS}


COUNTS = tuple(item.name for item in fields(Reads) if item.name != "problems")


def warn_once(problems: dict[str, str]) -> None:
    """Log each kind of problem once in the life of this process."""
    for kind, text in problems.items():
        if kind not in _warned:
            _warned.add(kind)
            get_logger().warning("%s. The run goes on and decodes such clips each time", text)


_warned: set[str] = set()


class ClipReader:
    """Reads clips as the `data` section says. May be pickled and carried over a fork into workers.

    A clip is bit for bit what `decode` gives, wherever it comes from. A cache that cannot be written costs its use and
    one warning, which a worker leaves to whoever gets its `take()`.
    """

    def __init__(self, data: DataConfig) -> None:
        self.data = data
        self.cache: FrameCache | None = None
        if data.cache_dir is not None:
            self.cache = FrameCache(data.cache_dir, int(data.cache_max_gb * 1e9))
        self._reads = Reads()
        self._process = os.getpid()

    @property
    def reads(self) -> Reads:
        """What this process has read since the last `take`; a worker begins at zero."""
        if self._process != os.getpid():
            self._reads, self._process = Reads(), os.getpid()
        return self._reads

    def take(self) -> Reads:
        """`reads`, which begin anew: they travel with the sample that was made of them."""
        taken, self._reads = self.reads, Reads()
        return taken

    def read(self, path: str | os.PathLike[str], start_s: float | None = None, end_s: float | None = None) -> VideoClip:
        """The clip of [start_s, end_s), seconds on the file's clock; None is the file's own bound.

        Raises VideoReadError.
        """
        return self._find_or_decode(Path(path), start_s, end_s, check_frames=None)

    def fill(
        self, path: str | os.PathLike[str], start_s: float | None = None, end_s: float | None = None, *, verify: bool
    ) -> None:
        """See that the cache has the clip; with `verify`, every byte of what it has is checked, else only the header.

        Raises VideoReadError.
        """
        self._find_or_decode(Path(path), start_s, end_s, check_frames=verify)

    def _find_or_decode(
        self, path: Path, start_s: float | None, end_s: float | None, *, check_frames: bool | None
    ) -> VideoClip:
        key = self._key(path, start_s, end_s)
        if self.cache is None or key is None:
            return self._decode(path, start_s, end_s)
        num_damaged = self.reads.cache_rebuilt
        found = self._look_up(key, check_frames=check_frames)
        if found is not None:
            return found
        is_damaged = self.reads.cache_rebuilt > num_damaged
        with self.cache.turn(key):
            # Another process may have stored it before this one's turn came.
            found = None if is_damaged else self._look_up(key, check_frames=check_frames)
            return found if found is not None else self._keep(key, self._decode(path, start_s, end_s))

    def _key(self, path: Path, start_s: float | None, end_s: float | None) -> ClipKey | None:
        if self.cache is None:
            return None
        try:
            return clip_key(path, self.data.budget, start_s, end_s, self.data.backend)
        except OSError:  # decoding says what is wrong with it
            return None

    def _look_up(self, key: ClipKey, *, check_frames: bool | None) -> VideoClip | None:
        assert self.cache is not None
        try:
            clip = self.cache.load(key, check_frames=check_frames)
        except DamagedClipError as error:
            self.reads.cache_rebuilt += 1
            get_logger().warning("%s: %s; decoded anew", self.cache.path_of(key), error.reason)
            self.cache.discard(key)
            return None
        except OSError:  # the video went away between two looks
            return None
        if clip is not None:
            self.reads.cache_hits += 1
        return clip

    def _decode(self, path: Path, start_s: float | None, end_s: float | None) -> VideoClip:
        self.reads.decoded += 1
        data = self.data
        return decode(
            path, data.budget, start_s=start_s, end_s=end_s,
            backend=data.backend, timeout_s=data.decode_timeout_s, quarantine=data.quarantine,
        )  # fmt: skip

    def _keep(self, key: ClipKey, clip: VideoClip) -> VideoClip:
        assert self.cache is not None
        try:
            self.cache.store(key, clip)
        except CacheWriteError as error:
            self.reads.not_cached += 1
            self.reads.problems.setdefault(error.kind, error.text)
            if multiprocessing.parent_process() is None:
                warn_once(self.reads.problems)
        return clip

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reads": Reads()}
