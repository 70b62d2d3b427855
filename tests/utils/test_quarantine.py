"""A video that hung or crashed its decoder is not tried again, until something that matters has changed."""

import json
import multiprocessing
import os
import shutil

import numpy as np
import pytest

from utils import quarantine
from utils.config import DataConfig
from utils.decode_process import DecoderStopped
from utils.quarantine import Quarantine, append_line, decode, decode_clip
from utils.video import FrameBudget, VideoReadError, read_clip, write_mp4

BUDGET = FrameBudget(4, 1, 64, 1024, 4096, 2**20)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("quarantine") / "good.mp4"
    write_mp4(path, np.full((8, 32, 32, 3), 100, np.uint8), fps=4)
    return path


@pytest.fixture
def hanging(good, tmp_path):
    shutil.copy(good, tmp_path / "hanging.mp4")
    return tmp_path / "hanging.mp4"


@pytest.fixture
def attempts(monkeypatch):
    """The files that were given to the decoder; "hanging" in a name makes it hang."""
    tried = []

    def read(path, budget, *, start_s, end_s, backend, timeout_s):
        tried.append(os.path.basename(path))
        if "hanging" in os.path.basename(path):
            raise DecoderStopped(path, f"did not decode within data.decode_timeout_s={timeout_s:g}")
        if "crashing" in os.path.basename(path):
            raise DecoderStopped(path, "its decoder crashed (SIGSEGV)")
        return read_clip(path, budget, start_s=start_s, end_s=end_s, backend=backend)

    monkeypatch.setattr(quarantine, "read_clip_apart", read)
    quarantine.quarantine_at.cache_clear()
    return tried


def fault(path, list_path, backend="pyav", timeout_s=5.0, **stretch):
    with pytest.raises(VideoReadError) as error:
        decode(path, BUDGET, backend=backend, timeout_s=timeout_s, quarantine=list_path, **stretch)
    assert error.value.path == str(path)
    return error.value.reason


def test_a_video_that_hung_is_listed_and_not_tried_again(hanging, good, tmp_path, attempts):
    listed = tmp_path / "cache" / "list.jsonl"
    assert fault(hanging, listed, start_s=0.5, end_s=1.5) == "did not decode within data.decode_timeout_s=5"
    record = json.loads(listed.read_text())
    status = hanging.stat()
    wanted = {
        "path": str(hanging), "size": status.st_size, "mtime_ns": status.st_mtime_ns, "start_s": 0.5, "end_s": 1.5,
        "backend": "pyav", "timeout_s": 5.0, "reason": "did not decode within data.decode_timeout_s=5",
    }  # fmt: skip
    assert {key: record[key] for key in wanted} == wanted
    quarantine.quarantine_at.cache_clear()  # as in another process
    assert fault(hanging, listed) == (
        f"in quarantine since {record['time']}: did not decode within data.decode_timeout_s=5 "
        f"(its line in {listed} keeps it there; delete that to try again)"
    )
    (tmp_path / "link.mp4").symlink_to(hanging)
    assert "in quarantine" in fault(tmp_path / "link.mp4", listed)
    assert decode(good, BUDGET, backend="pyav", timeout_s=5.0, quarantine=listed).frames.shape == (8, 32, 32, 3)
    assert attempts == ["hanging.mp4", "good.mp4"]


def test_without_a_list_the_process_remembers(hanging, attempts):
    fault(hanging, None)
    assert fault(hanging, None).endswith("(this process tries it no more)")
    assert attempts == ["hanging.mp4"]


@pytest.mark.parametrize(
    "name, change, tried_again",
    [
        ("hanging", {}, False),
        ("hanging", {"timeout_s": 4.0}, False),
        ("hanging", {"timeout_s": 6.0}, True),
        ("hanging", {"backend": "decord"}, True),
        ("hanging", {"start_s": 0.5}, False),  # the whole file is shut out
        ("crashing", {"timeout_s": 6.0}, False),  # more time does not mend a crash
        ("hanging", "touch", True),
        ("hanging", "grow", True),
        ("hanging", "unlist", True),
        ("hanging", "no list", True),
    ],
)
def test_what_lifts_the_quarantine(hanging, tmp_path, attempts, name, change, tried_again):
    path, listed = hanging.with_name(f"{name}.mp4"), tmp_path / "list.jsonl"
    if path != hanging:
        hanging.rename(path)
    fault(path, listed)
    match change:
        case "touch":
            os.utime(path, ns=(1, 1))
        case "grow":
            with path.open("ab") as handle:
                handle.write(b"\0" * 8)
        case "unlist":
            listed.write_text("\n")
        case "no list":
            listed.unlink()
    reason = fault(path, listed, **(change if isinstance(change, dict) else {}))
    assert len(attempts) == (2 if tried_again else 1) and ("in quarantine" in reason) is not tried_again


def test_a_list_counts_without_a_limit_too(hanging, tmp_path, attempts):
    """A crash would end the process that decodes by itself; a hang may do better with all the time in the world."""
    listed = tmp_path / "list.jsonl"
    crashing = shutil.copy(hanging, tmp_path / "crashing.mp4")
    fault(crashing, listed)
    fault(hanging, listed)
    assert "in quarantine" in fault(crashing, listed, timeout_s=None)
    assert len(decode(hanging, BUDGET, backend="pyav", timeout_s=None, quarantine=listed).frames) == 8


def test_ordinary_faults_are_not_listed(tmp_path, attempts):
    (tmp_path / "text.mp4").write_text("not a video\n" * 50)
    for _ in range(2):
        assert "not a video" in fault(tmp_path / "text.mp4", tmp_path / "list.jsonl")
    assert len(attempts) == 2 and not (tmp_path / "list.jsonl").exists()


def test_a_line_of_another_process_is_seen_at_once(hanging, tmp_path):
    ours, theirs = Quarantine(tmp_path / "list.jsonl"), Quarantine(tmp_path / "list.jsonl")
    ours.require_free(hanging, "pyav", 5.0)
    theirs.add(DecoderStopped(hanging, "its decoder crashed (SIGSEGV)"), "pyav", 5.0)
    with pytest.raises(VideoReadError, match="in quarantine since .*SIGSEGV"):
        ours.require_free(hanging, "pyav", 5.0)


def test_broken_lines_are_named_once_and_the_others_hold(hanging, tmp_path, caplog):
    listed = tmp_path / "list.jsonl"
    listed.write_bytes(b'{"path": "x"}\n\xff\xfe\n[1]\n{"path": "/half a li')  # written by a process that was killed
    known = Quarantine(listed)
    known.add(DecoderStopped(hanging, "its decoder crashed (SIGSEGV)"), "pyav", 5.0)
    for _ in range(2):
        with pytest.raises(VideoReadError, match="SIGSEGV"):
            known.require_free(hanging, "pyav", 5.0)
    append_line(listed, '{"path": "still being writ')
    listed.write_bytes(listed.read_bytes()[:-1])
    with pytest.raises(VideoReadError, match="SIGSEGV"):
        known.require_free(hanging, "pyav", 5.0)
    assert "list.jsonl:6" not in caplog.text
    for number in (1, 2, 3, 4):
        assert caplog.text.count(f"list.jsonl:{number} is no line of a quarantine list") == 1


def test_a_list_that_cannot_be_written_is_said_and_kept_in_memory(hanging, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    known = Quarantine(tmp_path / "file" / "list.jsonl")
    for _ in range(2):
        known.add(DecoderStopped(hanging, "its decoder crashed (SIGSEGV)"), "pyav", 5.0)
    assert caplog.text.count("cannot be written") == 1
    with pytest.raises(VideoReadError, match="in quarantine"):
        known.require_free(hanging, "pyav", 5.0)


def _append(job):
    path, number = job
    append_line(path, json.dumps({"number": number, "filler": "x" * 500}))


def test_lines_of_many_processes_stay_whole(tmp_path):
    path = tmp_path / "list.jsonl"
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.map(_append, [(path, number) for number in range(400)], chunksize=1)
    lines = [line for line in path.read_text().splitlines() if line]  # who sees another's half line skips one
    assert sorted(json.loads(line)["number"] for line in lines) == list(range(400))


def test_the_configuration_decides(good, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(quarantine, "decode", lambda *args, **kwargs: seen.update(kwargs) or args)
    data = DataConfig(backend="pyav", decode_timeout_s=7.0, quarantine=tmp_path / "list.jsonl")
    assert decode_clip(good, data, 1.0, 2.0) == (good, data.budget)
    assert seen == {
        "start_s": 1.0, "end_s": 2.0, "backend": "pyav", "timeout_s": 7.0, "quarantine": tmp_path / "list.jsonl"
    }  # fmt: skip
