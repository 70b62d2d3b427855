"""One clip in one file: what is in a frame cache's entry, and how it is known to be whole.

    bytes 0 to 31     magic, version, where the frames begin, digest of everything else before them
    then              header, JSON: key, source, shape, times_s, start_s, duration_s, frames_digest; zeros up to a page
    from a page on    the frames, uint8 (T, H, W, 3), to the end of the file

Times are written as the shortest decimals that read back as the same float64, so they survive to the last bit. Frames
begin at a page, so that a reader maps them instead of copying. Which clip belongs where is `utils.frame_cache`'s.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from utils.common import UserError
from utils.video import VideoClip

MAGIC, VERSION = b"VTGCLIP\n", 1
PAGE = 4096
_PREAMBLE = struct.Struct("<8sIQ12s")  # magic, version, offset of the frames, digest of the rest before them
_DIGEST_BYTES = 12
_LONGEST_HEADER = 64 * 2**20
"""An offset beyond it is damage, not a header to be read into memory."""
_WORDS_PER_SUM = 4096


class DamagedClipError(Exception):
    """A file that is no whole clip of this version. Holds the plain `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class StoredClip:
    """A clip read from its file."""

    clip: VideoClip
    """Its frames are a private map of the file: reading them reads the file, writing to them changes a copy."""
    key: dict[str, Any]
    """What the clip was made from and how, as it was given to `pack_header`."""
    source: dict[str, Any]
    """The video file it was made from, as it was given."""
    frames_digest: str
    """What `digest_of_frames(clip.frames)` must be."""
    identity: tuple[int, int, str]
    """The same only for a file that was not replaced meanwhile."""
    used_at: float
    """Modification time of the file."""


def digest_of_frames(frames: np.ndarray) -> str:
    """Checksum of uint8 frames as fast as memory is read, so that checking costs little beside decoding.

    Sums of 32 KiB as 64-bit words, hashed. Every single changed byte changes it, and so do lost, zeroed and exchanged
    blocks; it is no protection against someone who wants to fool it.
    """
    flat = frames.reshape(-1)
    words = flat[: flat.size // 8 * 8].view("<u8")
    sums = np.add.reduceat(words, np.arange(0, words.size, _WORDS_PER_SUM)) if words.size else words
    rest = flat[words.size * 8 :]
    return hashlib.blake2b(sums.tobytes() + rest.tobytes(), digest_size=16).hexdigest()


def pack_header(clip: VideoClip, key: Mapping[str, Any], source: Mapping[str, Any]) -> bytes:
    """Everything before the frames of `clip`: as many bytes as a number of pages. `key` and `source` are plain JSON."""
    values = {
        "key": dict(key),
        "source": dict(source),
        "shape": list(clip.frames.shape),
        "times_s": clip.times_s.tolist(),
        "start_s": float(clip.start_s),
        "duration_s": float(clip.duration_s),
        "frames_digest": digest_of_frames(clip.frames),
    }
    text = json.dumps(values).encode()
    offset = -(-(_PREAMBLE.size + len(text)) // PAGE) * PAGE
    rest = text.ljust(offset - _PREAMBLE.size, b"\0")
    return _PREAMBLE.pack(MAGIC, VERSION, offset, _digest(offset, rest)) + rest


def _digest(offset: int, rest: bytes) -> bytes:
    return hashlib.blake2b(offset.to_bytes(8, "little") + rest, digest_size=_DIGEST_BYTES).digest()


def read_clip_file(path: str | os.PathLike[str]) -> StoredClip:
    """Open a file of `pack_header(clip, ...)` and the frames; checks its size and header, not the frames (compare
    `frames_digest` for that).

    Raises:
        DamagedClipError: cut short, too long, changed in the header, or no such file's format.
        OSError: it cannot be opened or read.
    """
    with open(path, "rb") as handle:
        status = os.fstat(handle.fileno())
        offset, values = _read_header(handle)
        try:
            shape, digest = tuple(values["shape"]), values["frames_digest"]
            size = offset + int(np.prod(shape, dtype=np.int64))
            if status.st_size != size:
                raise DamagedClipError(f"it has {status.st_size} bytes instead of {size}")
            # Copy-on-write: torch asks for memory that may be written, and nothing that is written reaches the file.
            frames = np.asarray(np.memmap(handle, dtype=np.uint8, mode="c", offset=offset, shape=shape))
            times_s = np.array(values["times_s"], dtype=np.float64)
            clip = VideoClip(frames, times_s, values["start_s"], values["duration_s"])
            identity = (status.st_dev, status.st_ino, digest)
            return StoredClip(clip, values["key"], values["source"], digest, identity, status.st_mtime)
        except (KeyError, TypeError, ValueError, UserError) as error:  # a header that was written wrong, but whole
            raise DamagedClipError(f"its header makes no clip ({error})") from error


def _read_header(handle: IO[bytes]) -> tuple[int, dict[str, Any]]:
    """Where the frames begin, and the header."""
    first = handle.read(PAGE)
    if len(first) < PAGE:
        raise DamagedClipError(f"it is cut short ({len(first)} bytes)")
    magic, version, offset, digest = _PREAMBLE.unpack_from(first)
    if magic != MAGIC:
        raise DamagedClipError("it does not begin as a clip does")
    if version != VERSION:
        raise DamagedClipError(f"it has version {version}, this program writes {VERSION}")
    if offset % PAGE or not PAGE <= offset <= _LONGEST_HEADER:
        raise DamagedClipError("its header is changed")
    rest = first[_PREAMBLE.size :] + handle.read(offset - PAGE)
    if _digest(offset, rest) != digest:
        raise DamagedClipError("its header is changed or cut short")
    return offset, json.loads(rest.rstrip(b"\0"))
