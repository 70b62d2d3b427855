"""Videos that hang or crash their decoder: an error that names the file in time, and the next one reads as ever.

No file is known that hangs the decoders of today, so the child of most tests runs `CHILD`, which does it by name.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from utils import decode_process
from utils.common import REPO_ROOT, UserError
from utils.decode_process import DecoderStopped, child_pid, close_child, read_clip_apart
from utils.video import FrameBudget, VideoReadError, read_clip, write_mp4
from utils.video_file import decoder_threads

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sockets cannot be handed to a child there")

BUDGET = FrameBudget(4, 1, 64, 1024, 4096, 2**20)

CHILD = """
import ctypes, os, resource, signal, time
import numpy as np
from utils import decode_child, video_backends, video_file

real_read, real_check = decode_child.read_clip, video_file.check_is_file

def swapped(path):
    real_check(path)
    os.unlink(path)
    os.mkfifo(path)

def out_of_memory():
    in_use = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**24,) * 2)

def killed_once(path):
    if not os.path.exists(path + ".killed"):
        open(path + ".killed", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)

def aborted():
    os.write(2, b"Assertion codec->ready failed\\n")
    os.abort()

def hung_decord(*_):
    time.sleep(600)

def read(path, *args, **kwargs):
    match os.path.basename(path).split("-")[0].removesuffix(".mp4"):
        case "sleeping": time.sleep(600)
        case "spinning":
            while True: pass
        case "native": ctypes.PyDLL(None).sleep(600)  # holds the interpreter's lock
        case "segfault": ctypes.string_at(0)
        case "aborting": aborted()
        case "killed": os.kill(os.getpid(), signal.SIGKILL)
        case "unlucky": killed_once(path)
        case "swapped": video_file.check_is_file = swapped
        case "large": out_of_memory()
        case "huge": np.empty(2**60, np.uint8)
        case "talking": os.write(2, b"deprecated pixel format\\n")
        case "chatty":
            while True: ctypes.CDLL(None).write(2, b"moov atom " * 10000, 100000)
        case "buggy": path.no_such_attribute
        case "decord": video_backends.open_decord = hung_decord
        case "threads": raise video_file.VideoReadError(path, f"threads {video_file.decoder_threads(1280 * 720)}")
    return real_read(path, *args, **kwargs)

decode_child.read_clip = read
decode_child.serve()
"""


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("apart") / "good.mp4"
    shades = np.arange(0, 200, 5, dtype=np.uint8)[:, None, None, None]
    write_mp4(path, np.ascontiguousarray(np.broadcast_to(shades, (40, 64, 96, 3))), fps=10)
    return path


@pytest.fixture
def named(video, monkeypatch):
    """`named("sleeping")`: the good video under a name that makes the child misbehave."""
    close_child()
    monkeypatch.setattr(decode_process, "CHILD_CODE", CHILD)

    def link(name):
        path = video.with_name(f"{name}.mp4")
        path.unlink(missing_ok=True)
        os.link(video, path)
        return path

    yield link
    close_child()


def read(path, timeout_s=20.0, backend="pyav", **stretch):
    return read_clip_apart(path, BUDGET, backend=backend, timeout_s=timeout_s, **stretch)


def assert_same(found, wanted):
    np.testing.assert_array_equal(found.frames, wanted.frames)
    np.testing.assert_array_equal(found.times_s, wanted.times_s)
    assert (found.start_s, found.duration_s) == (wanted.start_s, wanted.duration_s)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


def ends_within(pid, seconds):
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_running(pid)


# -- the same as in this process ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "pyav", "decord"])
@pytest.mark.parametrize("stretch", [{}, {"start_s": 1.3, "end_s": 2.8}])
def test_the_same_clip(video, backend, stretch):
    wanted = read_clip(video, BUDGET, backend=backend, **stretch)
    first = read(video, backend=backend, **stretch)
    pid = child_pid()
    again = read(video, backend=backend, **stretch)
    assert_same(first, wanted)
    assert_same(again, wanted)
    assert first.frames.flags.writeable and child_pid() == pid


def test_the_same_errors(video, tmp_path, monkeypatch):
    (tmp_path / "text.mp4").write_text("not a video\n" * 50)
    monkeypatch.chdir(tmp_path)
    read(video)  # the child's working directory is another one
    for path, stretch in ((Path("text.mp4"), {}), ("absent.mp4", {}), (video, {"start_s": 9.0})):
        with pytest.raises(VideoReadError) as wanted:
            read_clip(path, BUDGET, backend="pyav", **stretch)
        with pytest.raises(VideoReadError) as found:
            read(path, **stretch)
        assert str(found.value) == str(wanted.value) and found.value.path == str(path)
        assert type(found.value) is VideoReadError
    with pytest.raises(UserError, match="did you mean 'pyav'"):
        read(video, backend="pyavv")
    with pytest.raises(UserError, match=r"data.decode_timeout_s must be > 0, got 0"):
        read(video, timeout_s=0)


def test_names_and_bounds_of_every_kind(video):
    """A name that is no UTF-8, bounds of NumPy's types, none and infinite."""
    odd = os.path.join(os.fsencode(video.parent), b"odd \xff\n.mp4")
    os.link(video, odd)
    wanted = read_clip(video, BUDGET, backend="pyav", start_s=1.0)
    for start_s, end_s in ((np.float32(1), None), (np.int64(1), np.float64(4))):
        assert_same(read(os.fsdecode(odd), start_s=start_s, end_s=end_s), wanted)
    with pytest.raises(VideoReadError, match="the stretch ends at inf s but the video ends at 4.000 s"):
        read(os.fsdecode(odd), end_s=float("inf"))


def test_a_fault_of_ours_is_no_fault_of_the_file(named):
    with pytest.raises(RuntimeError, match=r"(?s)buggy.mp4 failed in the decoding process.*no_such_attribute"):
        read(named("buggy"))


# -- hangs and crashes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sleeping", "spinning", "native", "swapped", "chatty"])
def test_a_hang_is_ended(named, video, name):
    read(video)
    pid, started = child_pid(), time.monotonic()
    with pytest.raises(DecoderStopped, match=rf"{name}.mp4: did not decode within data.decode_timeout_s=0.3"):
        read(named(name), timeout_s=0.3)
    assert 0.3 <= time.monotonic() - started < 10
    assert not is_running(pid)
    assert_same(read(video), read_clip(video, BUDGET, backend="pyav"))


@pytest.mark.parametrize(
    "name, reason",
    [
        ("segfault", r"its decoder crashed \(SIGSEGV\)"),
        ("aborting", r"its decoder crashed \(SIGABRT\): Assertion codec->ready failed"),
        ("killed", r"its decoder was killed twice \(SIGKILL; is there enough memory\?\)"),
    ],
)
def test_a_crash_is_an_error_that_says_how(named, video, name, reason):
    with pytest.raises(DecoderStopped, match=rf"{name}.mp4: {reason}"):
        read(named(name))
    assert_same(read(video), read_clip(video, BUDGET, backend="pyav"))


@pytest.mark.parametrize("name", ["huge", "large"])
def test_want_of_memory_is_the_files_fault(named, video, name):
    path = named(name)
    if name == "large":
        path.unlink()
        write_mp4(path, np.zeros((2, 4320, 7680, 3), np.uint8), fps=2)
    with pytest.raises(VideoReadError, match=rf"{name}.mp4: there is not enough memory"):
        read(path)
    close_child()  # or the next would read under this limit
    assert_same(read(video), read_clip(video, BUDGET, backend="pyav"))


def test_a_child_killed_from_outside_costs_nothing(named, video):
    wanted = read_clip(video, BUDGET, backend="pyav")
    assert_same(read(named("unlucky")), wanted)  # killed while it read
    os.kill(child_pid(), signal.SIGKILL)
    assert_same(read(video), wanted)


def test_what_a_decoder_says_is_passed_on(named, video, caplog):
    read(named("talking"))
    assert "talking.mp4: deprecated pixel format" in caplog.text
    caplog.clear()
    read(video)
    assert caplog.text == ""


def test_pyav_reads_what_hangs_decord(named, video):
    """In half of the time, and by a process that is then given up with the thread stuck in it."""
    path = named("decord")
    found = read(path, timeout_s=1.0, backend="decord")
    assert_same(found, read_clip(video, BUDGET, backend="pyav"))
    pid = child_pid()
    assert ends_within(pid, 5)
    assert_same(read(video, backend="decord"), read_clip(video, BUDGET, backend="decord"))


def test_a_child_that_nothing_ends_is_left_behind(named, video, monkeypatch, caplog):
    """As one in an uninterruptible wait for a disk: here its kill has no effect."""
    path = named("sleeping")
    read(video)
    left = decode_process._state.child.process
    monkeypatch.setattr(decode_process, "END_LIMIT_S", 0.1)
    monkeypatch.setattr(left, "kill", lambda: None)
    with pytest.raises(DecoderStopped, match="did not decode"):
        read(path, timeout_s=0.2)
    assert f"the decoding process {left.pid} does not end and is left behind" in caplog.text
    monkeypatch.undo()
    assert len(read(video).frames) == 16 and child_pid() != left.pid
    os.kill(left.pid, signal.SIGKILL)
    os.waitpid(left.pid, 0)


def test_a_child_that_cannot_start_is_named(video, monkeypatch):
    close_child()
    monkeypatch.setattr(decode_process, "CHILD_CODE", "import no_such_module")
    with pytest.raises(UserError, match=r"did not start \(.*No module named 'no_such_module'\).*decode_timeout_s=null"):
        read(video)


# -- processes, threads and signals ------------------------------------------------------------------------------------


def test_an_interrupt_gives_the_answer_up(named, video):
    path = named("sleeping")
    wanted = read(video)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            read(path)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert_same(read(video), wanted)


def test_ctrl_c_does_not_reach_the_child(video):
    read(video)
    assert os.getpgid(child_pid()) == child_pid() != os.getpgrp()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(child_pid(), number)
    pid = child_pid()
    read(video)
    assert child_pid() == pid


def test_threads_take_turns(video):
    wanted = read_clip(video, BUDGET, backend="pyav")
    found = []
    threads = [threading.Thread(target=lambda: found.append(read(video))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for clip in found:
        assert_same(clip, wanted)


def _read_in_worker(path, threads_path):
    close_child()
    frames = read(path).frames
    pid = child_pid()
    with pytest.raises(VideoReadError) as error:
        read(threads_path)
    return pid, os.getpid(), frames, error.value.reason


@pytest.mark.parametrize("parent_reads_first", [True, False])
def test_a_forked_worker_has_a_child_of_its_own_with_one_thread(named, video, parent_reads_first):
    threads_path = named("threads")
    if parent_reads_first:
        read(video)
    own = child_pid()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pid, worker, frames, reason = pool.apply_async(_read_in_worker, (video, threads_path)).get(timeout=60)
        assert is_running(pid)
    np.testing.assert_array_equal(frames, read(video).frames)
    assert len({pid, worker, os.getpid(), own}) == 4 and reason == "threads 1"
    assert child_pid() == own or not parent_reads_first
    assert ends_within(pid, 5)  # with its worker, which the pool terminates
    with pytest.raises(VideoReadError, match=f"threads {decoder_threads(1280 * 720)}$"):
        read(threads_path)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a child in native code outlives its parent")
@pytest.mark.parametrize("name", ["good", "native"])
def test_the_child_ends_with_a_parent_that_is_killed(named, video, name):
    """Idle, or in native code that holds the interpreter's lock."""
    path = video if name == "good" else named(name)
    code = f"""
from pathlib import Path
from utils import decode_process as d
from utils.video import FrameBudget
d.CHILD_CODE = {CHILD!r}
budget = FrameBudget(4, 1, 64, 1024, 4096, 2**20)
d.read_clip_apart({str(video)!r}, budget, backend="pyav", timeout_s=60)
print(d.child_pid(), flush=True)
d.read_clip_apart({str(path)!r}, budget, backend="pyav", timeout_s=60)
input()
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=REPO_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.2)
        assert is_running(pid)
        parent.kill()
        assert ends_within(pid, 5)


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_the_child_is_light(video):
    """No torch in it: its start is paid by every data worker of every epoch."""
    read(video)
    maps = Path(f"/proc/{child_pid()}/maps").read_text()
    assert "libav" in maps and "torch" not in maps
    score = Path(f"/proc/{child_pid()}/oom_score_adj").read_text()
    assert score.strip() == "1000"  # where memory ends, it goes before the training run does
