"""The folder of clips that were decoded before: one file each (`utils.clip_file`), for many processes and machines.

Owns what makes two clips the same, the limit on the folder's size, and who decodes a clip that several want at once.
Decoding, counting and what becomes of a full disk is `utils.clip_reader`'s.

Nothing here locks. An entry appears whole, by a rename, or not at all; whoever finds it missing or damaged makes it
again. A claim (`utils.claims`) only asks others to wait for a decode that is under way: two decodes of one clip cost
time and nothing else. What a killed process leaves behind (a claim, a `.tmp`) is removed an hour later.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from utils.claims import CLAIM_SUFFIX, claimed
from utils.clip_file import DamagedClipError, StoredClip, digest_of_frames, pack_header, read_clip_file
from utils.common import UserError, atomic_open
from utils.logging_utils import human_bytes
from utils.video import FrameBudget, VideoClip

CONTENT_VERSION = 1
"""Raised when `utils.video.read_clip` begins to give other frames or times for the same key."""

DECODERS = {"pyav": ("av",), "decord": ("av", "decord"), "qwen_vl_utils": ("av", "decord", "qwen-vl-utils")}
"""Packages whose release may change a backend's pixels; PyAV stands in where decord cannot read a file."""

SUFFIX = ".clip"
EDGE_BYTES = 65536
"""Read at both ends of a video to tell it from others of its size."""
WHOLE_BYTES = 256 * 2**20
"""A video up to this size is read whole, once, to know it again when its modification time is another one."""

RECENT_S = 600.0
"""An entry used within it, or since this cache was opened, is in use: it is never removed to make room."""
TOUCH_S = 60.0
"""The time of an entry's last use is its modification time, and is written down no more often than this."""
LEFTOVER_S = 3600.0
"""Temporary files and claims this old belong to nobody."""
PAUSE_S = 60.0
"""After the folder had no room, it is not looked through for room again so long."""
FREE_BYTES, FREE_SHARE = 5 * 10**9, 0.05
"""Room that the cache leaves on its disk, for checkpoints: the lesser of the two."""


class CacheWriteError(Exception):
    """A clip cannot be kept. `kind` is "full" (the disk), "limit" (`data.cache_max_gb`) or "unwritable"."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(kind, text)
        self.kind, self.text = kind, text


@dataclass(frozen=True)
class ClipKey:
    """One way of decoding one stretch of one video file."""

    name: str
    """File name of the entry, without its suffix."""
    fields: dict[str, Any]
    """All that decides the frames; the name is their hash."""
    path: str
    size: int
    mtime_ns: int
    inode: int
    """The video file as it was found."""

    def source(self) -> dict[str, Any]:
        """What an entry records of its file: enough to tell whether it is still the same."""
        return {
            "path": self.path,
            "mtime_ns": self.mtime_ns,
            "digest": digest_of_file(self.path, self.size, self.mtime_ns, self.inode),
        }

    def is_made_from(self, source: dict[str, Any]) -> bool:
        """Whether an entry's file is this one: unchanged since, or a copy of the same content."""
        if source["mtime_ns"] == self.mtime_ns:
            return True
        return source["digest"] is not None and source["digest"] == self.source()["digest"]

    def is_still_there(self) -> bool:
        """Whether the video is as it was when this key was made."""
        status = os.stat(self.path)
        return (status.st_size, status.st_mtime_ns, status.st_ino) == (self.size, self.mtime_ns, self.inode)


def clip_key(
    path: str | os.PathLike[str], budget: FrameBudget, start_s: float | None, end_s: float | None, backend: str
) -> ClipKey:
    """The key under which the clip that `read_clip` would give for these arguments is kept.

    A file is known by its size and its first and last 64 KiB, so a copied, moved or linked video finds its clips. Where
    its modification time is not the one recorded, the whole file is compared too, up to 256 MiB; a larger one counts as
    changed. So only a change that keeps size, both ends and modification time goes unseen.

    Raises OSError when the file cannot be read.
    """
    name = os.path.abspath(path)
    status = os.stat(name)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", name)
    fields = {
        "content": CONTENT_VERSION,
        "size": status.st_size,
        "ends": digest_of_ends(name, status.st_size, status.st_mtime_ns, status.st_ino),
        "start_s": None if start_s is None else float(start_s),
        "end_s": None if end_s is None else float(end_s),
        "budget": {key: float(value) if key == "fps" else value for key, value in asdict(budget).items()},
        "backend": backend,
        "decoders": {package: _version(package) for package in DECODERS.get(backend, DECODERS["qwen_vl_utils"])},
    }
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:40]
    return ClipKey(digest, fields, name, status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=65536)  # the last three are there to forget a file that changed
def digest_of_ends(path: str, size: int, mtime_ns: int, inode: int) -> str:
    """Of the first and last 64 KiB of a file."""
    digest = hashlib.sha256()
    # A pipe put in the file's place would never answer.
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as handle:
        digest.update(handle.read(EDGE_BYTES))
        handle.seek(max(EDGE_BYTES, size - EDGE_BYTES))
        digest.update(handle.read(EDGE_BYTES))
    return digest.hexdigest()[:32]


@lru_cache(maxsize=65536)
def digest_of_file(path: str, size: int, mtime_ns: int, inode: int) -> str | None:
    """Of a whole file; None for one that is too large to be read for this."""
    if size > WHOLE_BYTES:
        return None
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@lru_cache
def _version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


@dataclass(frozen=True)
class _Entry:
    used_at: float
    size: int
    path: str


class FrameCache:
    """Clips under `folder`, `max_bytes` of them at most.

    May be pickled and carried over a fork: it holds no open file. Processes that fill one folder see each other's
    entries with a delay, so together they may pass `max_bytes` by about a sixteenth of what was free.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.opened_at = time.time()
        self._total: int | None = None
        self._unseen = 0  # bytes written since the folder was last looked through
        self._pause_until = 0.0
        self._reason: CacheWriteError | None = None

    def path_of(self, key: ClipKey) -> Path:
        """Where the entry lies, or would."""
        return self.folder / key.name[:2] / f"{key.name}{SUFFIX}"

    # ------------------------------------------------------------------ reading
    def load(self, key: ClipKey, *, check_frames: bool | None = None) -> VideoClip | None:
        """The clip, its frames mapped into memory; None when it is not there.

        Size and header are checked each time, the frames the first time a process opens the entry: that costs as much
        as reading them (`check_frames` says always or never).

        Raises DamagedClipError, also for an entry whose video changed.
        """
        path = self.path_of(key)
        try:
            stored = read_clip_file(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DamagedClipError(f"it cannot be read ({error.strerror})") from error
        if stored.key != key.fields:
            raise DamagedClipError("it holds another clip than its name says")
        if not key.is_made_from(stored.source):
            raise DamagedClipError("its video has changed since")
        if check_frames or (check_frames is None and stored.identity not in _checked):
            _check_frames(stored)
        self._touch(path, stored.used_at)
        return stored.clip

    def _touch(self, path: Path, used_at: float) -> None:
        now = time.time()
        if used_at < max(self.opened_at, now - TOUCH_S):
            with suppress(OSError):  # removed meanwhile, or a folder that may only be read
                os.utime(path)

    def discard(self, key: ClipKey) -> None:
        """Remove the entry, where that is allowed."""
        with suppress(OSError):
            self.path_of(key).unlink()

    # ------------------------------------------------------------------ writing
    @property
    def is_paused(self) -> bool:
        """Whether nothing can be kept for the time being."""
        return time.monotonic() < self._pause_until

    def store(self, key: ClipKey, clip: VideoClip) -> None:
        """Keep `clip`, unless its video changed while it was decoded.

        Raises CacheWriteError when it cannot be kept.
        """
        if self.is_paused and self._reason is not None:
            raise self._reason
        try:
            if not key.is_still_there():
                return
            header = pack_header(clip, key.fields, key.source())
        except OSError:  # the video is gone
            return
        size = len(header) + clip.frames.nbytes
        try:
            self._make_room(size)
            # Not synced: an entry that a power cut tore is told by its checksum.
            with atomic_open(self.path_of(key), "wb", sync=False) as handle:
                handle.write(header)
                handle.write(clip.frames.reshape(-1).data)
        except (OSError, UserError) as error:  # the latter stands for an OSError of the folder
            reason = error if isinstance(error, OSError) else error.__cause__
            assert isinstance(reason, OSError)
            raise self._pause(*self._words(reason, size)) from error
        self._unseen += size

    def _words(self, error: OSError, size: int) -> tuple[str, str]:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return "full", self._full(f"{human_bytes(size)} for a clip", error.strerror or "no space left")
        text = f"data.cache_dir {self.folder} cannot be written ({error.strerror or error})"
        return "unwritable", f"{text}; change its permissions, choose another folder, or set data.cache_dir=null"

    def _full(self, needed: str, found: str) -> str:
        return (
            f"the disk that holds data.cache_dir {self.folder} is full: {needed} is needed ({found}). Free some space, "
            "lower data.cache_max_gb, put data.cache_dir on another disk, or set it to null"
        )

    def _pause(self, kind: str, text: str) -> CacheWriteError:
        self._pause_until, self._reason = time.monotonic() + PAUSE_S, CacheWriteError(kind, text)
        return self._reason

    def _make_room(self, size: int) -> None:
        """Remove what was not used for longest, until `size` more bytes fit under the limit and on the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        disk = shutil.disk_usage(self.folder)
        kept_free = int(min(FREE_BYTES, FREE_SHARE * disk.total))
        over_disk = size + kept_free - disk.free
        over_limit = self._known_total(size) + size - self.max_bytes
        if max(over_disk, over_limit) <= 0:
            return
        entries = self.entries()
        self._total, self._unseen = sum(entry.size for entry in entries), 0
        over_limit = self._total + size - self.max_bytes
        wanted = max(over_disk, over_limit)
        if wanted <= 0:
            return
        in_use_since = min(self.opened_at, time.time() - RECENT_S)
        unused = sorted((entry for entry in entries if entry.used_at < in_use_since), key=lambda entry: entry.used_at)
        if sum(entry.size for entry in unused) < wanted:
            if over_disk > over_limit:
                need = f"{human_bytes(size)} for a clip beside {human_bytes(kept_free)} that stay free for checkpoints"
                raise self._pause("full", self._full(need, f"{human_bytes(disk.free)} are free"))
            raise self._pause("limit", self._over_limit(size))
        self._total -= _remove(unused, wanted, spare=min(self.max_bytes, self._total) // 50)

    def _over_limit(self, size: int) -> str:
        return (
            f"the frame cache {self.folder} is full: data.cache_max_gb={self.max_bytes / 1e9:g} leaves no room for "
            f"{human_bytes(size)} more, and all its clips were used in this run or in the last "
            f"{RECENT_S / 60:.0f} minutes. Raise data.cache_max_gb, or lower data.fps or data.total_pixels"
        )

    def _known_total(self, size: int) -> int:
        """Bytes in the folder, looked up anew once this process has written a sixteenth of the room there was."""
        if self._total is None or 16 * (self._unseen + size) > self.max_bytes - self._total:
            self._total, self._unseen = sum(entry.size for entry in self.entries()), 0
        return self._total + self._unseen

    def entries(self) -> list[_Entry]:
        """What the folder holds; what killed processes left in it long ago is removed on the way."""
        found, now = [], time.time()
        with suppress(FileNotFoundError):
            for folder in os.scandir(self.folder):
                if len(folder.name) != 2 or not folder.is_dir():
                    continue
                for file in os.scandir(folder.path):
                    with suppress(FileNotFoundError):  # removed by another process
                        status = file.stat()
                        if file.name.endswith(SUFFIX):
                            found.append(_Entry(status.st_mtime, status.st_size, file.path))
                        elif now - status.st_mtime > LEFTOVER_S and file.name.endswith((".tmp", CLAIM_SUFFIX)):
                            with suppress(OSError):
                                os.unlink(file.path)
        return found

    # ------------------------------------------------------------------ taking turns
    @contextmanager
    def turn(self, key: ClipKey) -> Iterator[None]:
        """Entered by one process at a time, as far as possible: the others wait for it, and then find its entry."""
        if self.is_paused:
            yield
        else:
            with claimed(self.path_of(key).with_suffix(CLAIM_SUFFIX)):
                yield


_checked: set[tuple[int, int, str]] = set()
"""Entries whose frames this process, or the one it was forked from, has checked."""


def forget_checked() -> None:
    """Check the frames of every entry when it is next read, as if this process had not done so."""
    _checked.clear()


def _check_frames(stored: StoredClip) -> None:
    if digest_of_frames(stored.clip.frames) != stored.frames_digest:
        raise DamagedClipError("its frames are changed")
    _checked.add(stored.identity)


def _remove(entries: list[_Entry], wanted: int, spare: int) -> int:
    """Remove entries in this order until `wanted` bytes are freed, and up to `spare` more, so that not every clip that
    follows has to look for room; returns how many were."""
    freed = 0
    for entry in entries:
        if freed >= wanted and freed + entry.size > wanted + spare:
            break
        with suppress(OSError):  # another process made room too
            if os.stat(entry.path).st_mtime == entry.used_at:  # else someone uses it since
                os.unlink(entry.path)
                freed += entry.size
    return freed
