"""The benchmark of decoding: the ways give the same frames, every byte is summed, and the ratios are those of its own
numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import scripts.benchmarks.data as bench
from datasets.pixels import pixel_values
from scripts.bench import parse_args
from scripts.benchmarks.data import PEERS, READERS, make_loader, read_through, summary, table
from scripts.benchmarks.data_ways import PeerSamples, Reader, Work, checksum, entries, make_dataset, make_work
from scripts.benchmarks.decoding import FPS, make_clip
from scripts.benchmarks.models import demo_processor
from utils import clip_reader, frame_cache
from utils.common import REPO_ROOT, UserError
from utils.config import DataConfig
from utils.video import read_clip

SMALL = ["data", "--heights", "32", "--seconds", "4", "--repeats", "1", "--rows", "2", "--workers", "0"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clips")


@pytest.fixture
def work(clips: Path, tmp_path: Path) -> Work:
    return make_work("32p 4 s", make_clip(clips / "32p-4.mp4", "32p", 4), FPS, DataConfig(cache_dir=tmp_path / "cache"))


def test_every_way_gives_the_same_frames(work: Work) -> None:
    """Their number and size, and nearly their pixels: only the resizing differs."""
    found = {name: Reader(name)(work) for name in READERS}
    video = found.pop("qwen_vl_utils")
    assert video.dtype == np.float32 and video.shape == (8, 3, 128, 128)
    found["qwen_vl_utils"] = video.transpose(0, 2, 3, 1).round().clip(0, 255).astype(np.uint8)
    wanted = read_clip(work.path, work.data.budget)
    assert work.size == (128, 128) and np.allclose(np.array(work.numbers) / FPS, wanted.times_s, atol=1e-4)
    assert len(set(work.numbers)) == 8
    for name, frames in found.items():
        assert frames.dtype == np.uint8 and frames.shape == wanted.frames.shape, name
        closest = [
            min(range(8), key=lambda other: np.abs(frame.astype(int) - wanted.frames[other]).mean()) for frame in frames
        ]
        assert closest == list(range(8)), name
    assert np.array_equal(found["cache"], wanted.frames) and work.sum == checksum(wanted.frames)


def test_only_the_cache_way_reads_without_decoding(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """And once its entry is removed, as for the state "cold", it decodes and keeps again."""
    reader = Reader("cache")
    wanted = reader(work)
    decoded = []
    real = clip_reader.decode
    monkeypatch.setattr(clip_reader, "decode", lambda path, *a, **more: decoded.append(path) or real(path, *a, **more))
    assert np.array_equal(reader(work), wanted) and decoded == []
    assert len(entries(work.data)) == 1 and bench._prepare("cold", work) and entries(work.data) == []
    assert np.array_equal(reader(work), wanted)
    assert decoded == [work.path] and len(entries(work.data)) == 1


def test_when_an_entry_is_checked(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every state but "warm", where this process has read it, and "cold", where there is nothing to check."""
    checked, during = [], []
    real = frame_cache._check_frames
    monkeypatch.setattr(frame_cache, "_check_frames", lambda stored: checked.append(1) or real(stored))

    def elapsed(call: Any) -> float:
        before = len(checked)
        call()
        during.append(len(checked) - before)
        return 1.0

    monkeypatch.setattr(bench, "elapsed", elapsed)
    monkeypatch.setattr(bench, "forget_pages", lambda _paths: True)
    bench.measure_reading(work, 2)
    assert during == [*(0, 0, 0, 0), 1, *(0, 0, 0, 1), 0] * 2


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("count", [8, 24, 37])
def test_a_checksum_is_of_all_bytes(dtype: Any, count: int) -> None:
    array = np.random.default_rng(0).integers(0, 200, count).astype(dtype)
    before = checksum(array)
    flat = array.view(np.uint8)
    for place in range(flat.size):
        flat[place] ^= 1
        assert checksum(array) != before, place
        flat[place] ^= 1
    assert checksum(array) == before


def test_a_reader_that_leaves_out_bytes_is_found(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums are of what the reader gave: a cache with other frames is not measured."""
    real = Reader.__call__

    def spoilt(self: Reader, work: Work) -> np.ndarray:
        frames = real(self, work).copy()
        frames[-1, -1, -1, -1] += self.name == "cache"
        return frames

    monkeypatch.setattr(Reader, "__call__", spoilt)
    with pytest.raises(AssertionError, match="the cache differs"):
        bench.measure_reading(work, 1)


def test_both_loaders_give_the_same_tokens_and_amounts(work: Work, tmp_path: Path) -> None:
    queries = make_dataset(tmp_path, work, 2, demo_processor())
    own, peer = queries[0], PeerSamples(queries)[0]
    assert torch.equal(own["input_ids"], peer["input_ids"]) and torch.equal(own["labels"], peer["labels"])
    values = pixel_values([own["pixels"]])
    assert values.shape == pixel_values([peer["pixels"]]).shape
    assert own["video_grid_thw"].tolist() == peer["video_grid_thw"].tolist()
    sizes = [read_through(make_loader(dataset, queries, 0)) for dataset in (queries, PeerSamples(queries))]
    tensors = [own["input_ids"], own["labels"], values]
    assert sizes[0] == sizes[1] and sizes[0][1] == 2
    assert abs(sizes[0][0] / sum(tensor.numpy().nbytes for tensor in tensors) - 2) < 0.01


def record_of(decord: float, pyav: float, qwen: float, cache: float, cold: float) -> dict[str, Any]:
    warm = {"decord": decord, "pyav": pyav, "qwen_vl_utils": qwen, "cache": cache}
    return {"warm": warm, "cold": {"cache": cold}}


def test_ratios_are_of_the_time_for_all_clips() -> None:
    found = summary({
        "seconds": {"a": record_of(2.0, 1.0, 3.0, 0.01, 1.25), "b": record_of(10.0, 7.0, 6.0, 0.02, 8.0)},
        "samples_per_second": {"own": {"0": 12.0, "2": 20.0}, "qwen_vl_utils": {"0": 2.0, "2": 4.0}},
        "parts": {"a": {"read": 0.01, "encode": 0.01, "patches": 0.02, "encode_stock": 0.09}},
    })  # fmt: skip
    assert found["cache_vs_decord"] == pytest.approx(12 / 0.03)
    assert found["cache_vs_decord_worst_clip"] == pytest.approx(200)
    assert found["cold_vs_best_peer"] == pytest.approx(8 / 9.25)  # PyAV is the best over both
    assert found["cold_vs_best_peer_worst_clip"] == pytest.approx(6 / 8)
    assert found["loader_vs_qwen_vl_utils"] == 5.0
    assert found["processor_share"]["a"] == pytest.approx(0.75) and found["encode_vs_stock"]["a"] == pytest.approx(3)


def test_the_last_line_is_json_of_its_own_numbers(clips: Path, tmp_path: Path) -> None:
    """One run as a user starts it."""
    command = [sys.executable, str(REPO_ROOT / "scripts/bench.py"), *SMALL, "--folder", str(clips)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    again = summary(record)
    assert {name: record[name] for name in again} == again
    assert {"cache_vs_decord", "loader_vs_qwen_vl_utils", "cold_vs_best_peer"} <= set(again)
    taken = record["seconds"]["32p 4 s"]
    assert set(taken["warm"]) == set(READERS) and set(taken["cold"]) == set(taken["first_read"]) == {"cache"}
    assert record["frames"] == {"32p 4 s": 8} and record["sizes"] == {"32p 4 s": [128, 128]}
    assert record["rows"] == 2 and set(record["samples_per_second"]["own"]) == {"0"}
    assert table(record) in done.stdout and list(tmp_path.iterdir()) == []
    if sys.platform == "linux":
        assert set(taken["first_touch"]) == {*PEERS, "cache"}


def test_a_checksum_copies_nothing() -> None:
    """Not even of channels-last memory: the copy would count as the reader's time."""
    array = np.random.default_rng(0).random((4, 5, 6, 3), dtype=np.float32).transpose(0, 3, 1, 2)
    assert np.shares_memory(array, array.ravel(order="K")) and not array.flags.c_contiguous
    before = checksum(array)
    array[1, 2, 3, 4] += 1
    assert checksum(array) != before


@pytest.mark.parametrize(("options", "named"), [
    (["--repeats", "0"], "--repeats"), (["--rows", "1"], "--rows"), (["--seconds", "30", "1"], "--seconds"),
    (["--fps", "0"], "--fps"),
])  # fmt: skip
def test_numbers_out_of_their_rule(options: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        bench.run(parse_args(["data", *options]))
