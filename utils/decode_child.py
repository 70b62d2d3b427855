"""The process that decodes for another one: it answers requests over a socket until its parent is gone.

`utils.decode_process` starts it, waits for it and kills it; what both must agree on, the messages, is here. No torch:
it must start in a fraction of a second, once for every data worker of every epoch.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from utils import video_backends, video_file
from utils.common import UserError
from utils.video import FrameBudget, VideoReadError, read_clip

CHATTER_BYTES = 16 * 2**20
"""What decoders may write to standard error before anybody reads it; a hanging one must not fill the disk."""

_PREFIX = struct.Struct("<QQ")
"""Bytes of the message, and of the raw pixels after it."""


@dataclass(frozen=True)
class Request:
    """What `utils.video.read_clip` takes, and how long the answer is waited for."""

    path: str
    """Absolute: the two processes need not share a working directory."""
    budget: FrameBudget
    start_s: float | None
    end_s: float | None
    backend: str
    timeout_s: float


@dataclass(frozen=True)
class Answer:
    """What became of a request; the pixels of a clip follow raw."""

    kind: Literal["ready", "clip", "unreadable", "hung", "user_error", "bug"]
    text: str = ""
    """The reason, the message or the traceback."""
    shape: tuple[int, ...] = ()
    """(T, H, W, 3) of the uint8 pixels that follow; empty for none."""
    times_s: tuple[float, ...] = ()
    start_s: float = 0.0
    duration_s: float = 0.0


def serve() -> None:
    """Answer requests until the parent ends. Arguments: number of the socket, backend, threads of a decoder at most."""
    number, backend, max_threads = sys.argv[1:]
    _settle()
    channel = socket.socket(fileno=int(number))
    video_file.MAX_THREADS = int(max_threads)
    _import_decoders(backend)
    with suppress(ConnectionError):  # the parent is gone
        send(channel, Answer("ready"))
        while (request := receive_request(channel)) is not None:
            answer, frames = answer_to(request)
            send(channel, answer, frames)
            del answer, frames  # or the pixels would stay until the next clip is there
            if video_backends.decord_hung():
                os._exit(0)  # its thread spins on; the parent starts another process when it next needs one


def _settle() -> None:
    """Live and die with the parent alone, and be the first to go where memory ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to everyone on the machine or in the job: the parent decides
        signal.signal(number, signal.SIG_IGN)
    _end_with_parent()
    with suppress(ImportError, ValueError, OSError):  # Windows; a lower limit is set
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (CHATTER_BYTES, CHATTER_BYTES))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as handle:
        handle.write("1000")


def _end_with_parent() -> None:
    """Have the kernel kill this process once the other end of standard input closes, which is when the parent ends.

    Elsewhere than on Linux it only ends with its next answer. A thread that waits for it would not do: native code may
    hold the interpreter's lock for good. Nor would PR_SET_PDEATHSIG: it goes by the thread that started this process.
    """
    if sys.platform == "linux":
        import fcntl

        fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(0, 10, signal.SIGKILL)  # F_SETSIG, which typeshed does not know
        fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)


def _import_decoders(backend: str) -> None:
    """So that no clip's time goes into it. A package that is missing is the affair of the request that needs it."""
    names = {"qwen_vl_utils": ("av", "qwen_vl_utils"), "pyav": ("av",)}.get(backend, ("av", "decord"))
    for name in names:
        with suppress(UserError):
            video_backends.import_backend(name)


def answer_to(request: Request) -> tuple[Answer, np.ndarray | None]:
    """Do what is asked: the answer, and the clip's pixels (T, H, W, 3) if there are any."""
    video_backends.LONGEST_WAIT_S = request.timeout_s / 2  # leaves time to read by PyAV what hangs decord
    try:
        clip = read_clip(
            request.path, request.budget, start_s=request.start_s, end_s=request.end_s, backend=request.backend
        )
    except VideoReadError as error:
        return Answer("hung" if video_backends.decord_hung() else "unreadable", error.reason), None
    except UserError as error:
        return Answer("user_error", str(error)), None
    except MemoryError as error:
        return Answer("unreadable", f"there is not enough memory for it ({error or 'none left'})"), None
    except Exception:  # goes to the parent, which raises it
        return Answer("bug", traceback.format_exc()), None
    frames = np.ascontiguousarray(clip.frames)
    return Answer("clip", "", frames.shape, tuple(clip.times_s.tolist()), clip.start_s, clip.duration_s), frames


# ---------------------------------------------------------------------------------------------- messages
# JSON, which keeps every float to the last bit. No pickle: a video that takes over the decoder could send one.
def send(channel: socket.socket, message: Request | Answer, frames: np.ndarray | None = None) -> None:
    """Send a message, and pixels raw: uint8, contiguous. Raises OSError when the other end is gone."""
    text = json.dumps(asdict(message), default=float).encode()  # the bounds may be NumPy's
    pixels = memoryview(b"") if frames is None else frames.reshape(-1).data
    channel.sendall(_PREFIX.pack(len(text), len(pixels)) + text)
    if len(pixels):
        channel.sendall(pixels)


def receive_request(channel: socket.socket) -> Request | None:
    """The next request, or None when the parent closed."""
    found = _receive(channel, None)
    return None if found is None else Request(**{**found[0], "budget": FrameBudget(**found[0]["budget"])})


def receive_answer(channel: socket.socket, deadline: float) -> tuple[Answer, np.ndarray | None] | None:
    """The next answer with its pixels, or None when the child closed.

    Raises TimeoutError past `deadline`, a time of `time.monotonic()`, and EOFError for half an answer.
    """
    found = _receive(channel, deadline)
    if found is None:
        return None
    answer, pixels = Answer(**found[0]), found[1]
    return answer, None if pixels is None else pixels.reshape(answer.shape)


def _receive(channel: socket.socket, deadline: float | None) -> tuple[dict[str, Any], np.ndarray | None] | None:
    prefix = bytearray(_PREFIX.size)
    if not _fill(channel, memoryview(prefix), deadline, may_end=True):
        return None
    num_bytes, num_pixels = _PREFIX.unpack(prefix)
    text = bytearray(num_bytes)
    _fill(channel, memoryview(text), deadline)
    pixels = np.empty(num_pixels, dtype=np.uint8) if num_pixels else None
    if pixels is not None:
        _fill(channel, pixels.data, deadline)
    return json.loads(text), pixels


def _fill(channel: socket.socket, view: memoryview, deadline: float | None, may_end: bool = False) -> bool:
    """Fill `view`; False when the other end closed before the first byte and that `may_end` the conversation."""
    done = 0
    while done < len(view):
        if deadline is not None:
            channel.settimeout(max(deadline - time.monotonic(), 1e-3))
        count = channel.recv_into(view[done:])
        if count == 0:
            if may_end and done == 0:
                return False
            raise EOFError("the other process closed in the middle of a message")
        done += count
    return True
