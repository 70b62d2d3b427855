"""Clips through the cache are bit for bit those of a live decode, and no clip is decoded twice."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import pickle
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from utils import claims, clip_reader, frame_cache
from utils.clip_reader import ClipReader, Reads
from utils.config import DataConfig
from utils.frame_cache import SUFFIX
from utils.video import VideoClip, VideoReadError, read_clip, write_mp4

SMALL: dict[str, Any] = {
    "fps": 3.0, "min_frames": 2, "max_frames": 16, "min_pixels_per_frame": 1024, "max_pixels_per_frame": 4096,
    "total_pixels": 65536,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_cache, "_checked", set())
    monkeypatch.setattr(clip_reader, "_warned", set())


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Six seconds at a constant rate, and the same frames at irregular times."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (60, 8, 12, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    write_mp4(folder / "constant.mp4", frames, fps=10, gop_size=12)
    gaps = rng.uniform(0.02, 0.2, 59)
    write_mp4(folder / "variable.mp4", frames, times_s=0.3 + np.concatenate([[0.0], np.cumsum(gaps)]), gop_size=12)
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture
def data_with(tmp_path: Path) -> Callable[..., DataConfig]:
    """`data_with(fps=1)`: with a cache in the test's folder."""
    return lambda **keys: DataConfig(**(SMALL | {"backend": "pyav", "cache_dir": tmp_path / "cache"} | keys))


def assert_same(found: VideoClip, wanted: VideoClip) -> None:
    assert found.frames.dtype == np.uint8 and np.array_equal(found.frames, wanted.frames)
    assert found.times_s.tobytes() == wanted.times_s.tobytes()
    assert (found.start_s, found.duration_s) == (wanted.start_s, wanted.duration_s)
    assert found.metadata() == wanted.metadata()


def entries(data: DataConfig) -> list[Path]:
    assert data.cache_dir is not None
    return sorted(data.cache_dir.rglob(f"*{SUFFIX}"))


def leftovers(data: DataConfig) -> list[Path]:
    assert data.cache_dir is not None
    return [path for path in data.cache_dir.rglob("*") if path.is_file() and path.suffix != SUFFIX]


# ---------------------------------------------------------------------------------------------- the same clip
BOUNDS = [(None, None), (1.0, 4.3), (2.37, None)]
CASES = [
    (backend, rate, bounds)
    for backend in ("pyav", "decord", "qwen_vl_utils")
    for rate in ("constant", "variable")
    # qwen_vl_utils refuses a stretch of a variable-rate file (tests/utils/test_video.py)
    for bounds in (BOUNDS[:1] if (backend, rate) == ("qwen_vl_utils", "variable") else BOUNDS)
]


@pytest.mark.parametrize(("backend", "rate", "bounds"), CASES)
def test_equal_to_a_live_decode(
    videos: dict[str, Path], data_with: Callable[..., DataConfig], backend: str, rate: str, bounds: Any
) -> None:
    """Filled, from the cache in the same reader, and in another one."""
    data = data_with(backend=backend)
    live = read_clip(videos[rate], data.budget, start_s=bounds[0], end_s=bounds[1], backend=backend)
    readers = [ClipReader(data), ClipReader(data)]
    for reader in (readers[0], *readers):
        assert_same(reader.read(videos[rate], *bounds), live)
    assert [reader.reads.counts for reader in readers] == [
        {"decoded": 1, "cache_hits": 1, "cache_rebuilt": 0, "not_cached": 0},
        {"decoded": 0, "cache_hits": 1, "cache_rebuilt": 0, "not_cached": 0},
    ]
    assert len(entries(data)) == 1 and leftovers(data) == []


def test_without_a_folder_every_read_decodes(videos: dict[str, Path]) -> None:
    reader = ClipReader(DataConfig(**SMALL, backend="pyav"))
    for _ in range(2):
        reader.read(str(videos["constant"]))
    assert reader.reads.counts == {"decoded": 2, "cache_hits": 0, "cache_rebuilt": 0, "not_cached": 0}


def test_cached_frames_go_to_torch_without_a_warning(
    videos: dict[str, Path], data_with: Callable[..., DataConfig]
) -> None:
    """And what is written to the tensor does not reach the file."""
    data = data_with()
    live = ClipReader(data).read(videos["constant"])
    clip = ClipReader(data).read(videos["constant"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.from_numpy(clip.frames).zero_()
        torch.from_numpy(clip.subsample(2).frames)
    assert_same(ClipReader(data).read(videos["constant"]), live)


def test_a_video_that_cannot_be_read_is_said_as_ever(
    videos: dict[str, Path], data_with: Callable[..., DataConfig], tmp_path: Path
) -> None:
    """And leaves neither an entry nor a claim; one that was cached and is gone is gone."""
    data = data_with()
    (tmp_path / "text.mp4").write_text("not a video")
    os.mkfifo(tmp_path / "pipe.mp4")
    reader = ClipReader(data)
    for name in ("text.mp4", "pipe.mp4", "gone.mp4"):
        for _ in range(2):
            with pytest.raises(VideoReadError, match=name):
                reader.read(tmp_path / name)
    assert entries(data) == [] and leftovers(data) == []
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(videos["constant"].read_bytes())
    reader.read(copy)
    copy.unlink()
    with pytest.raises(VideoReadError, match="no such file"):
        reader.read(copy)


# ---------------------------------------------------------------------------------------------- damage
@pytest.mark.parametrize("place", ["magic", "header", "frames", "cut", "empty"])
def test_a_damaged_entry_is_decoded_anew_and_counted(
    videos: dict[str, Path], data_with: Callable[..., DataConfig], place: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = data_with()
    live = ClipReader(data).read(videos["constant"])
    (path,) = entries(data)
    whole = path.read_bytes()
    if place in ("cut", "empty"):
        path.write_bytes(whole[: len(whole) // 2 if place == "cut" else 0])
    else:
        where = {"magic": 0, "header": 100, "frames": len(whole) - 1}[place]
        path.write_bytes(whole[:where] + bytes([whole[where] ^ 1]) + whole[where + 1 :])
    reader = ClipReader(data)
    for _ in range(2):
        assert_same(reader.read(videos["constant"]), live)
    assert reader.reads.counts == {"decoded": 1, "cache_hits": 1, "cache_rebuilt": 1, "not_cached": 0}
    assert str(path) in caplog.text and "decoded anew" in caplog.text
    assert path.read_bytes() == whole


def test_a_changed_video_is_decoded_anew(
    videos: dict[str, Path], data_with: Callable[..., DataConfig], tmp_path: Path
) -> None:
    """By another size, and by a change in its middle that keeps the size."""
    data, path = data_with(), tmp_path / "video.mp4"
    path.write_bytes(videos["constant"].read_bytes())
    reader = ClipReader(data)
    reader.read(path)
    path.write_bytes(videos["variable"].read_bytes())
    changed = read_clip(path, data.budget, backend="pyav")
    assert_same(reader.read(path), changed)
    assert reader.reads.counts == {"decoded": 2, "cache_hits": 0, "cache_rebuilt": 0, "not_cached": 0}
    middle = bytearray(path.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frame_cache, "EDGE_BYTES", 64)
        frame_cache.digest_of_ends.cache_clear()
        reader.read(path)
        place = len(middle) // 2
        middle[place : place + 200] = bytes(200)
        path.write_bytes(middle)
        damaged = read_clip(path, data.budget, backend="pyav")
        assert_same(reader.read(path), damaged)
    frame_cache.digest_of_ends.cache_clear()
    assert reader.reads.cache_rebuilt == 1 and not np.array_equal(damaged.frames, changed.frames)


def test_a_check_of_all_bytes_finds_what_a_quick_one_does_not(
    videos: dict[str, Path], data_with: Callable[..., DataConfig]
) -> None:
    data = data_with()
    ClipReader(data).fill(videos["constant"], verify=False)
    (path,) = entries(data)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 255]))
    for verify, counts in ((False, (0, 1, 0)), (True, (1, 0, 1)), (True, (0, 1, 0))):
        reader = ClipReader(data)
        reader.fill(videos["constant"], verify=verify)
        assert (reader.reads.decoded, reader.reads.cache_hits, reader.reads.cache_rebuilt) == counts
    assert path.read_bytes() == whole


# ---------------------------------------------------------------------------------------------- what cannot be kept
def test_a_full_disk_is_said_once_and_the_run_goes_on(
    videos: dict[str, Path], data_with: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    data = data_with()
    live = read_clip(videos["constant"], data.budget, backend="pyav")

    def full(*_args: Any, **_more: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(frame_cache, "atomic_open", full)
    readers = [ClipReader(data), ClipReader(data)]
    for reader in readers:
        for _ in range(3):
            assert_same(reader.read(videos["constant"]), live)
        assert reader.reads.counts == {"decoded": 3, "cache_hits": 0, "cache_rebuilt": 0, "not_cached": 3}
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    for words in (f"data.cache_dir {data.cache_dir} is full", "is needed", "Free some space", "The run goes on"):
        assert words in record.getMessage()
    assert list(readers[0].take().problems) == ["full"] and readers[0].take() == Reads()


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing below a folder may be made, removed or touched: tests may run as root, whom no permission stops."""

    def refuse(*_args: Any, **_more: Any) -> Any:
        raise PermissionError(errno.EROFS, "Read-only file system")

    real = open

    def only_reading(path: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        return refuse() if set(mode) & set("wax+") else real(path, mode, *args, **more)

    monkeypatch.setattr("builtins.open", only_reading)
    for name in ("utime", "unlink", "replace", "mkdir"):
        monkeypatch.setattr(os, name, refuse)


def test_a_folder_that_may_only_be_read_is_read(
    videos: dict[str, Path], data_with: Callable[..., DataConfig], request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """What is there is used; what is damaged or missing is decoded, and one warning says that it is not kept."""
    data = data_with()
    live = [read_clip(videos["constant"], data.budget, start_s=start, backend="pyav") for start in (0.0, 1.0, 2.0)]
    for start in (0.0, 1.0):
        ClipReader(data).read(videos["constant"], start)
    for path in entries(data):
        os.utime(path, (1, 1))
    damaged = ClipReader(data).cache
    assert damaged is not None
    key = frame_cache.clip_key(videos["constant"], data.budget, 1.0, None, "pyav")
    damaged.path_of(key).write_bytes(b"damaged")
    request.getfixturevalue("read_only")
    reader = ClipReader(data)
    for start, wanted in zip((0.0, 1.0, 2.0), live, strict=True):
        assert_same(reader.read(videos["constant"], start), wanted)
    assert reader.reads.counts == {"decoded": 2, "cache_hits": 1, "cache_rebuilt": 1, "not_cached": 2}
    said = [record.getMessage() for record in caplog.records if "cannot be written" in record.getMessage()]
    assert len(said) == 1 and "Read-only file system" in said[0] and "data.cache_dir=null" in said[0]


# ---------------------------------------------------------------------------------------------- processes
class Clips(Dataset[Any]):
    """Item i is the first frame of a stretch, and what was read for it; every stretch comes twice."""

    def __init__(self, reader: ClipReader, path: Path, num: int) -> None:
        self.reader, self.path, self.num = reader, path, num

    def __len__(self) -> int:
        return 2 * self.num

    def __getitem__(self, index: int) -> Any:
        clip = self.reader.read(self.path, 0.5 * (index % self.num))
        return int(clip.frames.sum(dtype=np.int64)), self.reader.take()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_share_the_cache_and_count_for_themselves(
    videos: dict[str, Path], data_with: Callable[..., DataConfig], method: str
) -> None:
    """Two workers that want the same clips at the same time decode each once; a reader's own count stays its own."""
    data = data_with()
    reader = ClipReader(data)
    reader.read(videos["constant"], 0.5)
    clips = Clips(reader, videos["constant"], 8)
    starts = [0.5 * number for number in range(8)]
    live = [int(read_clip(videos["constant"], data.budget, start_s=s, backend="pyav").frames.sum()) for s in starts]
    loader: Any = DataLoader(clips, batch_size=None, num_workers=2, multiprocessing_context=method)
    total = Reads()
    sums = []
    for value, reads in loader:
        sums.append(value)
        total.add(reads)
    assert sums == live * 2
    assert total.counts == {"decoded": 7, "cache_hits": 9, "cache_rebuilt": 0, "not_cached": 0}
    assert reader.reads.counts == {"decoded": 1, "cache_hits": 0, "cache_rebuilt": 0, "not_cached": 0}
    assert len(entries(data)) == 8 and leftovers(data) == []


def test_a_pickled_reader_begins_to_count_at_zero(
    videos: dict[str, Path], data_with: Callable[..., DataConfig]
) -> None:
    reader = ClipReader(data_with())
    reader.read(videos["constant"])
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.reads == Reads() and reader.reads.decoded == 1
    copy.read(videos["constant"])
    assert copy.take().cache_hits == 1


def read_all(data: DataConfig, path: Path, results: Any) -> None:
    reader = ClipReader(data)
    for number in range(12):
        reader.read(path, 0.3 * number)
    results.put(reader.reads)


def test_processes_that_fill_one_folder_decode_each_clip_once(
    videos: dict[str, Path], data_with: Callable[..., DataConfig]
) -> None:
    """Three at once, all in the same order: the worst that can meet."""
    data = data_with()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=read_all, args=(data, videos["variable"], results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    total = Reads()
    for _ in workers:
        total.add(results.get(timeout=60))
    for worker in workers:
        worker.join()
    assert total.counts == {"decoded": 12, "cache_hits": 24, "cache_rebuilt": 0, "not_cached": 0}
    assert len(entries(data)) == 12 and leftovers(data) == []


def hang_in(stage: str, data: DataConfig, path: Path, reached: Any) -> None:
    """Fill one clip, then stop for good while the next is decoded or half written."""
    ClipReader(data).read(path, 0.0)

    def stop(*_args: Any, **_more: Any) -> Any:
        reached.set()
        time.sleep(1000)

    if stage == "decoding":
        clip_reader.decode = stop
    else:
        os.replace = stop
    ClipReader(data).read(path, 1.0)


@pytest.mark.parametrize("stage", ["decoding", "writing"])
def test_after_a_killed_process_another_goes_on_at_once(
    videos: dict[str, Path], data_with: Callable[..., DataConfig], stage: str
) -> None:
    data = data_with()
    context = multiprocessing.get_context("fork")
    reached = context.Event()
    process = context.Process(target=hang_in, args=(stage, data, videos["constant"], reached))
    process.start()
    assert reached.wait(60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(leftovers(data)) == (1 if stage == "decoding" else 2)
    live = [read_clip(videos["constant"], data.budget, start_s=start, backend="pyav") for start in (0.0, 1.0)]
    reader, since = ClipReader(data), time.monotonic()
    for start, wanted in zip((0.0, 1.0), live, strict=True):
        assert_same(reader.read(videos["constant"], start), wanted)
    assert reader.reads.counts == {"decoded": 1, "cache_hits": 1, "cache_rebuilt": 0, "not_cached": 0}
    assert time.monotonic() - since < claims.WAIT_S / 4
    assert [path.suffix for path in leftovers(data)] == ([] if stage == "decoding" else [".tmp"])
