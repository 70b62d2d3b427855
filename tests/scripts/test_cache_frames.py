"""The folder filled beforehand: every clip of the rows once, whatever ends it, and what stands in its closing lines."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripts import cache_frames
from scripts.cache_frames import clips_of, main
from utils import claims, frame_cache
from utils.clip_reader import ClipReader
from utils.common import REPO_ROOT, UserError
from utils.config import DataFile, load_config
from utils.frame_cache import SUFFIX
from utils.rows import read_rows, write_rows
from utils.video import read_clip

DATA_CONFIG = REPO_ROOT / "configs/demo/video_config.yaml"
NUM_CLIPS = 12


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_cache, "_checked", set())


@pytest.fixture
def overrides(demo_data: Path, tmp_path: Path) -> list[str]:
    """Twelve clips for training: six videos, of each the whole and a stretch, with two queries on either."""
    rows = [replace(row, video=str(demo_data / row.video)) for row in read_rows(demo_data / "train.jsonl")[0][:12]]
    stretches = [replace(row, video_start=1.0, video_end=7.0, duration=6.0, timestamp=()) for row in rows]
    write_rows(tmp_path / "train.jsonl", [*rows, *stretches, replace(rows[0], timestamp=None)])
    return [f"data.train={tmp_path / 'train.jsonl'}", "data.val=null", f"data.cache_dir={tmp_path / 'cache'}"]


@pytest.fixture
def fill(overrides: list[str]) -> Callable[..., int]:
    """`fill("--verify", ...)`: the command in this process; returns its status."""

    def run(*more: str, num_workers: int = 0) -> int:
        return main(["--data_config", str(DATA_CONFIG), "--num_workers", str(num_workers), *more, *overrides])

    return run


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob(f"*{SUFFIX}"))


def counts(out: str) -> tuple[int, ...]:
    """Gone through, of all, found, decoded, of them anew, unreadable."""
    (line,) = [line for line in out.splitlines() if line.startswith("clips:")]
    return tuple(map(int, re.findall(r"\d+", line)))


def test_every_clip_is_decoded_once_and_found_again(
    fill: Callable[..., int], overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fill(num_workers=2) == 0
    out = capsys.readouterr()
    assert counts(out.out) == (NUM_CLIPS, NUM_CLIPS, 0, NUM_CLIPS, 0, 0)
    size = sum(path.stat().st_size for path in entries(tmp_path))
    assert f"{tmp_path / 'cache'}: 12 clips, {size / 1e9:.3f} GB of data.cache_max_gb=1\n" in out.out
    assert "caching" in out.err and "clip/s" in out.err  # the bar has its rate and its end
    assert fill() == 0
    assert counts(capsys.readouterr().out) == (NUM_CLIPS, NUM_CLIPS, NUM_CLIPS, 0, 0, 0)
    # What training then asks for is there, and is what it would have decoded.
    data = load_config(DataFile, [DATA_CONFIG], overrides).data
    reader = ClipReader(data)
    for clip in clips_of(data, ["train"])[::5]:
        start, end = clip.bounds or (None, None)
        live = read_clip(clip.path, data.budget, start_s=start, end_s=end, backend=data.backend)
        assert (reader.read(clip.path, start, end).frames == live.frames).all()
    assert reader.reads.decoded == 0


def test_damaged_entries_are_found_by_verify(
    fill: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A header by any run, a changed frame by --verify."""
    fill()
    header, frames = entries(tmp_path)[:2]
    whole = [path.read_bytes() for path in (header, frames)]
    header.write_bytes(whole[0][:-7])
    frames.write_bytes(whole[1][:-1] + bytes([whole[1][-1] ^ 1]))
    capsys.readouterr()
    for flags, expected in (((), (11, 1, 1)), (("--verify",), (11, 1, 1)), (("--verify",), (12, 0, 0))):
        assert fill(*flags) == 0
        assert counts(capsys.readouterr().out)[2:5] == expected
    assert [path.read_bytes() for path in (header, frames)] == whole


def test_videos_that_cannot_be_read_are_named(
    fill: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read_rows(tmp_path / "train.jsonl")[0][:4]
    rows[2:] = [replace(row, video=str(tmp_path / "gone.mp4")) for row in rows[2:]]
    write_rows(tmp_path / "train.jsonl", rows)
    assert fill() == 1
    out = capsys.readouterr().out
    assert counts(out) == (2, 2, 0, 1, 0, 1)
    row, gone = f"{tmp_path / 'train.jsonl'}:3", tmp_path / "gone.mp4"
    assert f"unreadable: {row}: cannot read the video {gone}: no such file" in out
    assert fill("data.max_bad_fraction=0.5") == 0


def test_any_config_will_do_and_only_its_data_are_read(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A training configuration beside the data's, and the record of a run alone."""
    files = ["--config", str(REPO_ROOT / "configs/demo/rl_config.yaml"), "--data_config", str(DATA_CONFIG)]
    more = ["--num_workers", "0", "training.learning_rate=1e-3", "data.max_frames=16"]
    assert main([*files, *more, *overrides]) == 0
    assert counts(capsys.readouterr().out) == (NUM_CLIPS, NUM_CLIPS, 0, NUM_CLIPS, 0, 0)
    (tmp_path / "config.yaml").write_text("model: {name_or_path: x}\n" + DATA_CONFIG.read_text())
    assert main(["--config", str(tmp_path / "config.yaml"), "--num_workers", "0", *overrides]) == 0
    assert counts(capsys.readouterr().out) == (NUM_CLIPS, NUM_CLIPS, NUM_CLIPS, 0, 0, 0)
    with pytest.raises(UserError, match="data.fsp is not a key"):
        main(["--data_config", str(DATA_CONFIG), "data.fsp=1", *overrides])
    with pytest.raises(SystemExit):
        main([])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data.cache_dir=null"], "data.cache_dir is null, so there is nothing to fill"),
        (["--num_workers", "-1"], "--num_workers must be >= 0, got -1"),
        (["--splits", "val"], "data.val: no row to read a video for"),
    ],
)
def test_mistakes_are_said(fill: Callable[..., int], overrides: list[str], more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(["--data_config", str(DATA_CONFIG), *overrides, *more])


def test_a_limit_that_the_clips_do_not_fit_into_ends_it(
    fill: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a full disk does: with the words of the training run, and what has been stored stays."""
    with pytest.raises(UserError, match=r"data.cache_max_gb=0.0005 leaves no room .* Raise data.cache_max_gb"):
        fill("data.cache_max_gb=0.0005")
    stored = len(entries(tmp_path))
    assert 0 < stored < NUM_CLIPS and counts(capsys.readouterr().out)[3] == stored + 1
    assert fill() == 0


def test_a_full_disk_is_status_2(overrides: list[str], tmp_path: Path) -> None:
    """A file system of 300 KB is not to be had without rights: the write fails as on one."""
    program = (
        "import errno, sys; from scripts import cache_frames; from utils import frame_cache\n"
        "from utils.common import run_command\n"
        "def full(*a, **k): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "frame_cache.atomic_open = full\n"
        "run_command(lambda: cache_frames.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", program, "--data_config", str(DATA_CONFIG), "--num_workers", "2", *overrides]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=REPO_ROOT, timeout=100)
    last = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode == 2 and last.startswith("error: the disk that holds data.cache_dir"), ended.stderr
    assert "Traceback" not in ended.stderr and entries(tmp_path) == []


SLOWLY = (
    "import sys, time; from scripts import cache_frames; from utils import clip_reader\n"
    "from utils.common import run_command\n"
    "real = clip_reader.decode\n"
    "def slow(*a, **k): time.sleep(0.3); return real(*a, **k)\n"
    "clip_reader.decode = slow\n"
    "run_command(lambda: cache_frames.main(sys.argv[1:]))\n"
)


@pytest.mark.multiprocess
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_after_an_interruption_the_folder_is_usable(
    fill: Callable[..., int], overrides: list[str], tmp_path: Path, sent: signal.Signals,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Ctrl-C reaches the whole group; kill -9 of the command takes its workers along. The next one goes on at once."""
    command = [sys.executable, "-c", SLOWLY, "--data_config", str(DATA_CONFIG), "--num_workers", "2", *overrides]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=REPO_ROOT, start_new_session=True, **pipes)
    until = time.monotonic() + 60
    while len(entries(tmp_path)) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)
    else:
        process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    stored = len(entries(tmp_path))
    assert 3 <= stored < NUM_CLIPS
    if sent == signal.SIGINT:
        assert process.returncode == 130 and "Traceback" not in err and err.strip().endswith("interrupted"), err
        assert counts(out)[1] == NUM_CLIPS
    else:
        with pytest.raises(ProcessLookupError):  # its workers notice within seconds
            for _ in range(200):
                os.killpg(process.pid, 0)
                time.sleep(0.1)
    since = time.monotonic()
    assert fill("--verify") == 0
    assert time.monotonic() - since < claims.WAIT_S / 4  # what they had begun is not waited for
    found = counts(capsys.readouterr().out)
    assert found[2] >= stored and found[2] + found[3] == NUM_CLIPS and found[4] == 0


@pytest.mark.multiprocess
def test_several_at_once_share_the_work(overrides: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOWLY, "--data_config", str(DATA_CONFIG), "--num_workers", "1", *overrides]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    together = [subprocess.Popen(command, cwd=REPO_ROOT, **pipes) for _ in range(2)]
    ended = [process.communicate(timeout=100) for process in together]
    assert [process.returncode for process in together] == [0, 0], ended
    found = [counts(out) for out, _ in ended]
    assert sum(numbers[3] for numbers in found) == NUM_CLIPS == len(entries(tmp_path))
    assert all(numbers[:2] == (NUM_CLIPS, NUM_CLIPS) for numbers in found)


def test_rows_outside_the_root_are_not_opened(
    fill: Callable[..., int], demo_data: Path, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A link that leaves data.videos_root is a fault by name; its target is never read."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root/link.mp4").symlink_to(demo_data / "videos/train/000000.mp4")
    rows = [replace(row, video="link.mp4") for row in read_rows(tmp_path / "train.jsonl")[0][:1]]
    write_rows(tmp_path / "train.jsonl", rows)
    data = load_config(DataFile, [DATA_CONFIG], [*overrides, f"data.videos_root={tmp_path / 'root'}"]).data
    monkeypatch.setattr("utils.clip_reader.decode", lambda *_args, **_more: pytest.fail("was opened"))
    (clip,) = clips_of(data, ["train"])
    outcome = cache_frames.ClipsToFill([clip], ClipReader(data), verify=False)[0]
    assert outcome.fault is not None and "lies outside data.videos_root" in outcome.fault
    assert fill(f"data.videos_root={tmp_path / 'root'}") == 1
    assert counts(capsys.readouterr().out) == (1, 1, 0, 0, 0, 1)  # none decoded: it was not tried
