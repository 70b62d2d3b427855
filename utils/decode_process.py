"""Decoding in a child process, which can be killed: a file that hangs or crashes its decoder is one `VideoReadError`.

`read_clip_apart` is `utils.video.read_clip` for everyone who must not stand still: data workers, and whoever reads
hundreds of files that nobody has looked at. A thread would not do. One that is stuck in native code cannot be stopped,
and a crash there ends the process. Each process has one child, started when first needed; `utils.decode_child` is the
other side.
"""

from __future__ import annotations

import multiprocessing.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

from utils.common import REPO_ROOT, UserError
from utils.decode_child import Answer, Request, receive_answer, send
from utils.logging_utils import get_logger
from utils.video import FrameBudget, VideoClip, require_backend
from utils.video_file import MAX_THREADS, VideoReadError, in_worker

CHILD_CODE = "from utils.decode_child import serve; serve()"

START_LIMIT_S = 120.0
"""How long the child may take to start: it imports NumPy and a decoder, perhaps from a slow disk."""

END_LIMIT_S = 10.0
"""How long the end of a child is waited for that was killed."""

CHATTER_SHOWN = 500
"""Of what decoders write to standard error, the last bytes are shown."""

_OUTSIDE_ENDS = (0, -signal.SIGKILL, -signal.SIGTERM)
"""Ends that are no fault of the file at hand: its own, after an earlier file; the system in want of memory; a user."""


class DecoderStopped(VideoReadError):
    """A video on which the decoder hung or crashed. Finding it out again would cost as much as the first time."""


def read_clip_apart(
    path: str | os.PathLike[str],
    budget: FrameBudget,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    backend: str = "auto",
    timeout_s: float,
) -> VideoClip:
    """`utils.video.read_clip`, in a child process that is killed after `timeout_s` seconds (> 0).

    The clip and every error are the same. Threads of one process take turns; a forked process gets a child of its own.
    A child that was killed from outside is replaced, and the file tried once more. It ends with this process, however
    that ends.

    Raises:
        DecoderStopped: the decoder hung or crashed on the file; the next read is not affected.
        VideoReadError: the file cannot be read, or not in that stretch.
        UserError: unknown backend, or one whose package is missing; the child cannot be started.
    """
    require_backend(backend)
    if not timeout_s > 0:
        raise UserError(f"data.decode_timeout_s must be > 0, got {timeout_s}; null sets no limit")
    request = Request(os.path.abspath(path), budget, start_s, end_s, backend, timeout_s)
    with _state.lock:
        answer, frames = _ask(os.fspath(path), request)
    if answer.kind == "clip" and frames is not None:
        return VideoClip(frames, np.array(answer.times_s, dtype=np.float64), answer.start_s, answer.duration_s)
    if answer.kind == "user_error":
        raise UserError(answer.text)
    if answer.kind == "bug":
        raise RuntimeError(f"reading {os.fspath(path)} failed in the decoding process:\n{answer.text}")
    raise (DecoderStopped if answer.kind == "hung" else VideoReadError)(path, answer.text)


def child_pid() -> int | None:
    """The process id of this process's child, None when there is none."""
    return None if _state.child is None else _state.child.process.pid


def close_child() -> None:
    """End this process's child, if there is one; the next read starts another."""
    if _state.child is not None:
        _state.child.kill()
        _state.child = None


def _ask(path: str, request: Request) -> tuple[Answer, np.ndarray | None]:
    """The answer and its pixels. The child is started if need be, and given up whenever it does not answer."""
    for is_last in (False, True):
        child = _running_child(request.backend)
        try:
            found = child.ask(request, time.monotonic() + request.timeout_s)
        except TimeoutError:
            close_child()
            what = f"did not decode within data.decode_timeout_s={request.timeout_s:g}"
            raise DecoderStopped(path, f"{what}; raise that for very long videos and slow disks") from None
        except BaseException:  # Ctrl-C: the answer to this request must not be taken for that to the next
            close_child()
            raise
        chatter = child.chatter()
        if found is not None:
            if chatter:
                get_logger().warning("%s: %s", path, chatter)
            return found
        status = child.process.wait(END_LIMIT_S)  # the socket closed because it ends
        close_child()
        if is_last or status not in _OUTSIDE_ENDS:
            raise DecoderStopped(path, _last_words(status, chatter))
    raise AssertionError("unreachable")


def _running_child(backend: str) -> _Child:
    if _state.child is None or _state.child.process.poll() is not None:
        close_child()
        _state.child = _Child(backend)
        if not _state.is_cleared_up:  # at this process's own end, so that no dead child is left to whoever adopts it
            multiprocessing.util.Finalize(None, close_child, exitpriority=10)
            _state.is_cleared_up = True
    return _state.child


def _last_words(status: int, chatter: str) -> str:
    name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    what = f"its decoder crashed ({name})"
    if status in _OUTSIDE_ENDS:
        what = f"its decoder was killed twice ({name}; is there enough memory?)"
    return f"{what}: {chatter}" if chatter else what


class _Child:
    """The running child, the socket to it, and the file it writes its standard error to.

    A file and no pipe: one that nobody reads would fill, and stop the child. Its last lines outlive it.
    """

    def __init__(self, backend: str) -> None:
        self.errors = tempfile.TemporaryFile()
        self.channel, theirs = socket.socketpair()
        number = theirs.fileno()
        command = [sys.executable, "-c", CHILD_CODE, str(number), backend, str(1 if in_worker() else MAX_THREADS)]
        with theirs:
            try:
                self.process = subprocess.Popen(
                    command, cwd=REPO_ROOT, env=_environment(), pass_fds=(number,), process_group=0,
                    stdin=subprocess.PIPE, stdout=self.errors, stderr=self.errors,
                )  # fmt: skip
            except OSError as error:
                raise _not_started(error) from error
        try:
            ready = receive_answer(self.channel, time.monotonic() + START_LIMIT_S)
        except (EOFError, OSError) as error:
            self.kill()
            raise _not_started(error) from error
        if ready is None:
            text = self.chatter()
            self.kill()
            raise _not_started(text)

    def ask(self, request: Request, deadline: float) -> tuple[Answer, np.ndarray | None] | None:
        """The answer and its pixels, None when the child died. Raises TimeoutError past `deadline`."""
        try:
            send(self.channel, request)
            return receive_answer(self.channel, deadline)
        except (ConnectionError, EOFError):
            return None

    def chatter(self) -> str:
        """What was written to standard error since the last call: its end, one line."""
        size = os.fstat(self.errors.fileno()).st_size
        if size == 0:
            return ""
        text = os.pread(self.errors.fileno(), CHATTER_SHOWN, max(0, size - CHATTER_SHOWN))
        os.ftruncate(self.errors.fileno(), 0)
        os.lseek(self.errors.fileno(), 0, os.SEEK_SET)  # the child writes at the same place
        return " | ".join(text.decode(errors="replace").split("\n")).strip(" |")

    def kill(self) -> None:
        """End it at once, wherever it is."""
        self.process.kill()
        try:
            self.process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:  # nothing ends a process that waits for a dead disk; nor will we wait for it
            get_logger().warning("the decoding process %d does not end and is left behind", self.process.pid)
        self.forget()

    def forget(self) -> None:
        """Close this process's ends; a forked process does no more with the child of its parent."""
        self.process.returncode = self.process.returncode or 0  # it is not this process's to wait for
        self.channel.close()
        self.errors.close()
        if self.process.stdin is not None:
            self.process.stdin.close()


def _environment() -> dict[str, str]:
    """This process's own; nothing in the child needs BLAS, whose threads would cost it memory on large machines."""
    paths = [str(REPO_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    one_thread = {"OPENBLAS_NUM_THREADS": "1"} | ({"OMP_NUM_THREADS": "1"} if in_worker() else {})
    return {**os.environ, **one_thread, "PYTHONPATH": os.pathsep.join(paths)}


def _not_started(why: object) -> UserError:
    return UserError(
        f"the decoding process did not start ({why or 'no message'}). Set data.decode_timeout_s=null to decode without "
        "one, and without protection from files that hang"
    )


class _State:
    """This process's child, and the lock under which its threads use it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.child: _Child | None = None
        self.is_cleared_up = False


_state = _State()


def _leave_parents_child() -> None:
    global _state
    if _state.child is not None:
        _state.child.forget()
    _state = _State()  # a thread of the parent may have held the lock


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_parents_child)
