"""Entries and their folder: every damaged byte is noticed, the limit is kept, nobody waits for the dead."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from utils import claims, clip_file, frame_cache
from utils.clip_file import PAGE, DamagedClipError, digest_of_frames, pack_header, read_clip_file
from utils.frame_cache import CacheWriteError, FrameCache, clip_key
from utils.video import FrameBudget, VideoClip

BUDGET = FrameBudget(2.0, 4, 16, 1024, 4096, 65536)
HOUR = 3600.0


def some_clip(seed: int = 0, shape: tuple[int, ...] = (3, 32, 64, 3)) -> VideoClip:
    """Noise at times that no short decimal can hold."""
    rng = np.random.default_rng(seed)
    times_s = np.cumsum(rng.uniform(0.1, 0.9, shape[0]))
    return VideoClip(rng.integers(0, 256, shape, dtype=np.uint8), times_s, 1 / 3, float(times_s[-1] + 0.1))


def assert_same(found: VideoClip | None, wanted: VideoClip) -> None:
    assert found is not None
    assert found.frames.dtype == np.uint8 and np.array_equal(found.frames, wanted.frames)
    assert found.times_s.tobytes() == wanted.times_s.tobytes()
    assert (found.start_s, found.duration_s) == (wanted.start_s, wanted.duration_s)


@pytest.fixture(autouse=True)
def _nothing_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(frame_cache, "_checked", set())


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Stands for a video: the cache never decodes it."""
    path = tmp_path / "video.mp4"
    path.write_bytes(np.random.default_rng(1).bytes(300_000))
    return path


@pytest.fixture
def cache(tmp_path: Path) -> FrameCache:
    return FrameCache(tmp_path / "cache", 10**9)


# ---------------------------------------------------------------------------------------------- one file
@pytest.mark.parametrize("shape", [(3, 32, 64, 3), (1, 5, 7, 3), (768, 1, 1, 3)])
def test_a_clip_survives_to_the_last_bit(tmp_path: Path, shape: tuple[int, ...]) -> None:
    clip = some_clip(shape=shape)
    header = pack_header(clip, {"start_s": 0.1}, {"path": "ä.mp4"})
    assert len(header) % PAGE == 0
    (tmp_path / "a").write_bytes(header + clip.frames.tobytes())
    stored = read_clip_file(tmp_path / "a")
    assert_same(stored.clip, clip)
    assert (stored.key, stored.source) == ({"start_s": 0.1}, {"path": "ä.mp4"})
    assert stored.frames_digest == digest_of_frames(clip.frames)


def test_frames_are_mapped_and_writing_to_them_reaches_no_file(cache: FrameCache, video: Path) -> None:
    clip, key = some_clip(), clip_key(video, BUDGET, None, None, "pyav")
    cache.store(key, clip)
    found = cache.load(key)
    assert found is not None and isinstance(found.frames.base, np.memmap) and found.frames.flags.writeable
    found.frames[:] = 0
    assert_same(cache.load(key, check_frames=True), clip)


def test_every_changed_byte_is_noticed(cache: FrameCache, video: Path) -> None:
    """Each byte of the preamble, and some of everything that follows it, in a process that opens the entry first."""
    clip, key = some_clip(), clip_key(video, BUDGET, 1.5, 3.0, "pyav")
    cache.store(key, clip)
    path = cache.path_of(key)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    places = [*range(32), *range(32, PAGE, 97), PAGE - 1, PAGE, len(whole) - 1, *rng.integers(PAGE, len(whole), 40)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(DamagedClipError):
            cache.load(key)
    for size in (0, 1, 31, 32, PAGE - 1, PAGE, PAGE + 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedClipError):
            cache.load(key)
    for longer in (whole + b"\0", whole + whole):
        path.write_bytes(longer)
        with pytest.raises(DamagedClipError, match="bytes instead of"):
            cache.load(key)
    path.write_bytes(whole)
    assert_same(cache.load(key), clip)


def test_blocks_that_are_lost_or_exchanged_are_noticed() -> None:
    frames = some_clip(shape=(4, 64, 64, 3)).frames
    bytes_ = frames.reshape(-1)
    block = 8 * clip_file._WORDS_PER_SUM
    exchanged = np.concatenate([bytes_[block:], bytes_[:block]])
    zeroed = bytes_.copy()
    zeroed[100:200] = 0
    assert len({digest_of_frames(part) for part in (bytes_, exchanged, zeroed, bytes_[:-1])}) == 4


def test_frames_are_checked_once_in_a_process(cache: FrameCache, video: Path) -> None:
    """Later only when asked: that is what makes a warm read quick. A header that does not fit is noticed always."""
    clip, key = some_clip(), clip_key(video, BUDGET, None, None, "pyav")
    cache.store(key, clip)
    cache.load(key)
    with open(cache.path_of(key), "r+b") as handle:
        handle.seek(PAGE + 10)
        handle.write(b"\xff\x00\xff")
    assert cache.load(key) is not None
    with pytest.raises(DamagedClipError, match="frames are changed"):
        cache.load(key, check_frames=True)


def test_a_header_of_another_kind_is_no_crash(tmp_path: Path) -> None:
    clip = some_clip()
    header = bytearray(pack_header(clip, {}, {}))
    text = json.loads(header[32:].rstrip(b"\0"))
    for change in ({"shape": [3, 32]}, {"shape": "x"}, {"times_s": [3.0, 2.0, 1.0]}, {"frames_digest": None}):
        rest = json.dumps(text | change).encode().ljust(PAGE - 32, b"\0")
        head = clip_file._PREAMBLE.pack(clip_file.MAGIC, clip_file.VERSION, PAGE, clip_file._digest(PAGE, rest))
        (tmp_path / "a").write_bytes(head + rest + clip.frames.tobytes())
        if change == {"frames_digest": None}:
            assert read_clip_file(tmp_path / "a").frames_digest is None  # and never equal to a digest
            continue
        with pytest.raises(DamagedClipError):
            read_clip_file(tmp_path / "a")


# ---------------------------------------------------------------------------------------------- what is the same
def test_every_part_of_the_key_changes_it(video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def name(budget: FrameBudget = BUDGET, start: Any = 1.0, end: Any = 2.0, backend: str = "pyav") -> str:
        return clip_key(video, budget, start, end, backend).name

    changes: dict[str, Any] = {
        "fps": 2.5, "min_frames": 5, "max_frames": 17, "min_pixels_per_frame": 2048, "max_pixels_per_frame": 4097,
        "total_pixels": 65537,
    }  # fmt: skip
    assert set(changes) == set(BUDGET.__dataclass_fields__)
    names = [name(), *(name(replace(BUDGET, **{key: value})) for key, value in changes.items())]
    names += [name(start=None), name(start=1.0000000000000002), name(end=None), name(end=2.5)]
    names += [name(backend="decord"), name(backend="qwen_vl_utils")]
    monkeypatch.setattr(frame_cache, "_version", lambda package: "99.0")
    names.append(name())
    monkeypatch.undo()
    monkeypatch.setattr(frame_cache, "CONTENT_VERSION", 2)
    names.append(name())
    assert len(set(names)) == len(names)
    monkeypatch.undo()
    assert name() == names[0] and name(start=1) == names[0]


def test_a_video_is_known_by_its_content(cache: FrameCache, video: Path, tmp_path: Path) -> None:
    """A copy, a link and a moved file find the clip; another size, head or tail do not."""
    clip = some_clip()
    cache.store(clip_key(video, BUDGET, None, None, "pyav"), clip)

    def found(path: Path) -> VideoClip | None:
        return cache.load(clip_key(path, BUDGET, None, None, "pyav"))

    shutil.copy(video, tmp_path / "copy.mp4")
    os.utime(tmp_path / "copy.mp4", (1, 1))
    (tmp_path / "link.mp4").symlink_to(video)
    for name in ("copy.mp4", "link.mp4"):
        assert_same(found(tmp_path / name), clip)
    whole = video.read_bytes()
    for number, other in enumerate((whole[:-1], b"\0" + whole[1:], whole[:-1] + b"\0", whole + b"\0")):
        (tmp_path / f"{number}.mp4").write_bytes(other)
        assert found(tmp_path / f"{number}.mp4") is None
    video.rename(tmp_path / "moved.mp4")
    assert_same(found(tmp_path / "moved.mp4"), clip)
    with pytest.raises(OSError):
        clip_key(video, BUDGET, None, None, "pyav")


def test_a_video_changed_in_its_middle_is_noticed(
    cache: FrameCache, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a download that was read before it was complete. A large file is known by its modification time alone."""
    key = clip_key(video, BUDGET, None, None, "pyav")
    cache.store(key, some_clip())
    os.utime(video, (5, 5))
    assert cache.load(clip_key(video, BUDGET, None, None, "pyav")) is not None
    with open(video, "r+b") as handle:
        handle.seek(150_000)
        handle.write(b"other bytes")
    changed = clip_key(video, BUDGET, None, None, "pyav")
    assert changed.name == key.name
    with pytest.raises(DamagedClipError, match="its video has changed since"):
        cache.load(changed)
    monkeypatch.setattr(frame_cache, "WHOLE_BYTES", 1000)
    frame_cache.digest_of_file.cache_clear()
    cache.store(changed, some_clip())
    assert cache.load(changed) is not None
    os.utime(video, (7, 7))
    with pytest.raises(DamagedClipError, match="its video has changed since"):
        cache.load(clip_key(video, BUDGET, None, None, "pyav"))


def test_a_clip_of_a_video_that_changed_meanwhile_is_not_kept(cache: FrameCache, video: Path) -> None:
    key = clip_key(video, BUDGET, None, None, "pyav")
    video.write_bytes(b"1" * 300_000)
    cache.store(key, some_clip())
    assert cache.entries() == []


def test_an_entry_under_another_name_is_refused(cache: FrameCache, video: Path) -> None:
    keys = [clip_key(video, BUDGET, start, None, "pyav") for start in (0.0, 1.0)]
    cache.store(keys[0], some_clip())
    cache.path_of(keys[1]).parent.mkdir(exist_ok=True)
    shutil.copy(cache.path_of(keys[0]), cache.path_of(keys[1]))
    with pytest.raises(DamagedClipError, match="another clip"):
        cache.load(keys[1])


def test_a_pipe_is_no_video(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(OSError, match="not a regular file"):
        clip_key(tmp_path / "pipe.mp4", BUDGET, None, None, "pyav")


# ---------------------------------------------------------------------------------------------- room
def filled(cache: FrameCache, video: Path, num: int, age_s: float = HOUR) -> list[Path]:
    """So many entries, of which the first was not used for longest; none used since `age_s`."""
    paths = []
    for number in range(num):
        key = clip_key(video, BUDGET, float(number), None, "pyav")
        cache.store(key, some_clip(number))
        paths.append(cache.path_of(key))
        moment = time.time() - age_s - 100 * (num - number)
        os.utime(paths[-1], (moment, moment))
    return paths


SIZE = PAGE + some_clip().frames.nbytes


def test_the_least_recently_used_goes_first_and_the_limit_holds(tmp_path: Path, video: Path) -> None:
    paths = filled(FrameCache(tmp_path / "cache", 10**9), video, 6)
    cache = FrameCache(tmp_path / "cache", 6 * SIZE + 10)
    os.utime(paths[0])
    for start in range(10, 14):
        cache.store(clip_key(video, BUDGET, float(start), None, "pyav"), some_clip(start))
        entries = cache.entries()
        assert sum(entry.size for entry in entries) <= cache.max_bytes and all(e.size == SIZE for e in entries)
    assert [path.exists() for path in paths] == [True, False, False, False, False, True]


def test_what_is_in_use_is_never_removed(tmp_path: Path, video: Path) -> None:
    """Neither what this run has read, however long ago, nor what anyone has read in the last minutes."""
    folder = tmp_path / "cache"
    paths = filled(FrameCache(folder, 10**9), video, 3)
    cache = FrameCache(folder, 3 * SIZE)
    cache.opened_at = time.time() - 5 * HOUR  # a run of five hours; an hour ago it used all of them
    with pytest.raises(CacheWriteError, match=r"data.cache_max_gb=.* leaves no room .* used in this run") as caught:
        cache.store(clip_key(video, BUDGET, 9.0, None, "pyav"), some_clip())
    assert caught.value.kind == "limit" and all(path.exists() for path in paths)
    other = FrameCache(folder, 3 * SIZE)
    for path in paths:
        os.utime(path, (time.time() - 300, time.time() - 300))
    with pytest.raises(CacheWriteError):
        other.store(clip_key(video, BUDGET, 9.0, None, "pyav"), some_clip())
    assert all(path.exists() for path in paths)


def test_reading_marks_an_entry_as_used(tmp_path: Path, video: Path) -> None:
    paths = filled(FrameCache(tmp_path / "cache", 10**9), video, 3)
    cache = FrameCache(tmp_path / "cache", 3 * SIZE)
    mapped = cache.load(clip_key(video, BUDGET, 0.0, None, "pyav"))
    cache.store(clip_key(video, BUDGET, 9.0, None, "pyav"), some_clip(9))
    assert [path.exists() for path in paths] == [True, False, True]
    paths[0].unlink()  # as another run may, an hour later
    assert_same(mapped, some_clip(0))


def test_a_disk_without_room_says_so_and_is_not_asked_again_at_once(
    cache: FrameCache, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []

    def nearly_full(_folder: Any) -> Any:
        looked.append(1)
        return SimpleNamespace(total=10**12, free=5 * 10**9 + 1000)

    monkeypatch.setattr(frame_cache.shutil, "disk_usage", nearly_full)
    key = clip_key(video, BUDGET, None, None, "pyav")
    for _ in range(3):
        with pytest.raises(CacheWriteError) as caught:
            cache.store(key, some_clip())
    assert caught.value.kind == "full" and len(looked) == 1 and cache.entries() == []
    words = (str(cache.folder), f"{SIZE / 1024:.1f} KiB for a clip", "4.7 GiB that stay free", "data.cache_max_gb")
    assert all(word in caught.value.text for word in words)
    cache._pause_until = 0.0
    monkeypatch.undo()
    cache.store(key, some_clip())
    assert_same(cache.load(key), some_clip())


def test_room_on_the_disk_is_made_by_old_entries(tmp_path: Path, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = filled(FrameCache(tmp_path / "cache", 10**9), video, 3)
    cache = FrameCache(tmp_path / "cache", 10**9)
    usage = SimpleNamespace(total=10**12, free=5 * 10**9)
    monkeypatch.setattr(frame_cache.shutil, "disk_usage", lambda _folder: usage)
    cache.store(clip_key(video, BUDGET, 9.0, None, "pyav"), some_clip())
    assert [path.exists() for path in paths] == [False, True, True]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_write_that_finds_the_disk_full_leaves_nothing(
    cache: FrameCache, video: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(_source: Any, _target: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CacheWriteError, match="is full: .* is needed") as caught:
        cache.store(clip_key(video, BUDGET, None, None, "pyav"), some_clip())
    assert caught.value.kind == "full"
    assert [path for path in cache.folder.rglob("*") if path.is_file()] == []


def test_a_folder_that_is_a_file_is_said_to_be(tmp_path: Path, video: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = FrameCache(tmp_path / "file" / "cache", 10**9)
    key = clip_key(video, BUDGET, None, None, "pyav")
    with pytest.raises(CacheWriteError, match=r"data.cache_dir .*cannot be written \(Not a directory\)") as caught:
        cache.store(key, some_clip())
    assert caught.value.kind == "unwritable"
    with cache.turn(key):
        pass


def test_what_killed_processes_left_goes_in_time(cache: FrameCache, video: Path) -> None:
    (path,) = filled(cache, video, 1)
    young, old, claim = (path.parent / name for name in (".a.clip.1.abc.tmp", ".b.clip.1.abc.tmp", "c.claim"))
    for leftover in (young, old, claim):
        leftover.write_bytes(b"half")
    for leftover in (old, claim):
        os.utime(leftover, (time.time() - 2 * HOUR,) * 2)
    assert [entry.path for entry in cache.entries()] == [str(path)]
    assert (young.exists(), old.exists(), claim.exists()) == (True, False, False)


# ---------------------------------------------------------------------------------------------- turns
def hold(cache: FrameCache, key: Any, begun: Any, seconds: float) -> None:
    with cache.turn(key):
        begun.set()
        time.sleep(seconds)


def started_holder(cache: FrameCache, key: Any, seconds: float) -> Any:
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    process = context.Process(target=hold, args=(cache, key, begun, seconds))
    process.start()
    assert begun.wait(20)
    return process


def test_a_turn_waits_for_a_living_process_and_not_for_a_killed_one(cache: FrameCache, video: Path) -> None:
    key = clip_key(video, BUDGET, None, None, "pyav")
    claim = cache.path_of(key).with_suffix(".claim")
    holder = started_holder(cache, key, 0.5)
    with cache.turn(key):
        assert not holder.is_alive() or claim.read_text().split()[1] == str(os.getpid())
        holder.join()
    assert not claim.exists()
    holder = started_holder(cache, key, 100)
    os.kill(holder.pid, signal.SIGKILL)  # not waited for: a zombie has a number still
    since = time.monotonic()
    with cache.turn(key):
        assert time.monotonic() - since < claims.WAIT_S / 4
    holder.join()
    assert not claim.exists()


def test_a_claim_of_another_machine_is_waited_for_in_vain_only_so_long(
    cache: FrameCache, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = clip_key(video, BUDGET, None, None, "pyav")
    claim = cache.path_of(key).with_suffix(".claim")
    claim.parent.mkdir(parents=True)
    monkeypatch.setattr(claims, "WAIT_S", 0.2)
    for text in ("elsewhere 1 1", ""):
        claim.write_text(text)
        with cache.turn(key):
            assert claim.read_text() == claims._holder()
        assert not claim.exists()


def test_a_claim_that_may_not_be_removed_stops_nobody(
    cache: FrameCache, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = clip_key(video, BUDGET, None, None, "pyav")
    claim = cache.path_of(key).with_suffix(".claim")
    claim.mkdir(parents=True)  # no file to unlink, even for root
    monkeypatch.setattr(claims, "WAIT_S", 0.1)
    with cache.turn(key):
        assert claim.is_dir()


def test_a_process_number_that_was_given_again_is_no_holder(cache: FrameCache, video: Path) -> None:
    key = clip_key(video, BUDGET, None, None, "pyav")
    claim = cache.path_of(key).with_suffix(".claim")
    claim.parent.mkdir(parents=True)
    host, pid, started = claims._holder().split()
    claim.write_text(f"{host} {pid} {int(started) - 1}")
    since = time.monotonic()
    with cache.turn(key):
        assert time.monotonic() - since < claims.WAIT_S / 4


def test_nobody_waits_while_nothing_can_be_kept(cache: FrameCache, video: Path) -> None:
    key = clip_key(video, BUDGET, None, None, "pyav")
    cache._pause("full", "no room")
    with cache.turn(key):
        assert not cache.folder.exists()
