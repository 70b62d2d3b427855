"""Decoding alone: decoders against each other, and memory over many decodes in one worker.

`make_clip` writes a moving, textured picture: x264 with B-frames and a key frame every 250 frames, as most files of the
public datasets have. The decoders take turns within every repeat, medians are given, and every read sums all pixels it
claims to have. Both decoders are measured as `utils.video.read_clip` uses them, which looks a file's frames up by PyAV
before either decodes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from utils import video_file
from utils.common import UserError, write_json
from utils.decode_process import child_pid
from utils.quarantine import decode
from utils.video import FrameBudget, VideoClip, read_clip
from utils.video_writer import write_mp4_stream

HEIGHTS = {"32p": (32, 32), "360p": (360, 640), "720p": (720, 1280)}
FPS = 30
BUDGET = FrameBudget(2.0, 4, 768, 16384, 262144, 16777216)
"""The shipped configuration's."""


def make_clip(path: Path, size: str, seconds: float, *, gop_size: int | None = None) -> Path:
    """Write a clip of `size` ("32p", "360p", "720p") unless it is there; two seconds of CPU for ten of 720p."""
    if not path.is_file():
        height, width = HEIGHTS[size]
        count = round(seconds * FPS)
        frames = _moving_frames(count, height, width)
        write_mp4_stream(path, frames, size=(height, width), num_frames=count, fps=FPS, crf=23, gop_size=gop_size)
    return path


def _moving_frames(count: int, height: int, width: int) -> Iterator[np.ndarray]:
    """uint8 (H, W, 3): a window that glides over a landscape of smooth noise, with a bright patch of its own motion."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (2 * height // 8 + 2, 2 * width // 8 + 2, 3), dtype=np.uint8)
    fine = rng.integers(0, 24, (2 * height, 2 * width, 1), dtype=np.uint8)
    ground = np.repeat(np.repeat(coarse, 8, axis=0), 8, axis=1)[: 2 * height, : 2 * width] // 2 + 40
    ground = np.ascontiguousarray(ground + fine)
    side = height // 4
    for i in range(count):
        y = round((np.sin(i / 90) + 1) / 2 * height)
        x = round((np.cos(i / 140) + 1) / 2 * width)
        frame = ground[y : y + height, x : x + width].copy()
        top, left = (i * 3) % (height - side), (i * 5) % (width - side)
        frame[top : top + side, left : left + side] = 235
        yield frame


def checksum(clip: VideoClip) -> int:
    """Sum of all pixels: every byte is touched."""
    return int(clip.frames.sum(dtype=np.int64))


def measure_backends(
    path: Path, ways: Sequence[str], repeats: int, *, num_threads: int, start_s: float | None = None,
    end_s: float | None = None, budget: FrameBudget = BUDGET,
) -> dict[str, float]:  # fmt: skip
    """Median seconds of one read by each backend, after a read to warm up; decoders use up to `num_threads`."""
    before, video_file.MAX_THREADS = video_file.MAX_THREADS, num_threads
    taken: dict[str, list[float]] = {way: [] for way in ways}
    try:
        for turn in range(repeats + 1):
            for way in ways:
                started = time.perf_counter()
                checksum(read_clip(path, budget, start_s=start_s, end_s=end_s, backend=way))
                if turn:
                    taken[way].append(time.perf_counter() - started)
    finally:
        video_file.MAX_THREADS = before
    return {way: statistics.median(found) for way, found in taken.items()}


def measure_overhead(path: Path, repeats: int, budget: FrameBudget = BUDGET) -> dict[str, float]:
    """Median seconds of one read in this process and in its child (`utils.decode_process`), by PyAV."""
    taken: dict[str, list[float]] = {"here": [], "apart": []}
    for turn in range(repeats + 1):
        for way, timeout_s in (("here", None), ("apart", 600.0)):
            started = time.perf_counter()
            checksum(decode(path, budget, backend="pyav", timeout_s=timeout_s, quarantine=None))
            if turn:
                taken[way].append(time.perf_counter() - started)
    return {way: statistics.median(found) for way, found in taken.items()}


# ---------------------------------------------------------------------------------------------- memory
def measure_memory(
    paths: Sequence[Path], *, num_decodes: int = 2000, every: int = 200, backend: str = "auto",
    timeout_s: float | None = 300.0, budget: FrameBudget = BUDGET,
) -> list[dict[str, float]]:  # fmt: skip
    """Resident MiB of one forked worker and of its decoding child, while the worker reads `paths` in turn.

    Returns:
        `{"decodes": n, "worker_mib": m, "child_mib": m}` every `every` decodes (and after the first); no `child_mib`
        for `timeout_s=None`, where the worker decodes by itself.

    Raises:
        UserError: this system has no /proc.
    """
    if not Path("/proc/self/statm").exists():
        raise UserError("resident memory is read from /proc, which this system has not")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(_read_in_turn, paths, num_decodes, every, backend, timeout_s, budget).result()


def _read_in_turn(
    paths: Sequence[Path], num_decodes: int, every: int, backend: str, timeout_s: float | None, budget: FrameBudget
) -> list[dict[str, float]]:
    readings = []
    for done in range(1, num_decodes + 1):
        path = paths[done % len(paths)]
        checksum(decode(path, budget, backend=backend, timeout_s=timeout_s, quarantine=None))
        if done == 1 or done % every == 0:
            child = child_pid()
            sizes = {"worker_mib": resident_mib(os.getpid())} | ({"child_mib": resident_mib(child)} if child else {})
            readings.append({"decodes": done} | sizes)
    return readings


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def growth_mib(readings: Sequence[dict[str, float]]) -> dict[str, float]:
    """What each process gained from the second reading, when everything has been in use once, to the last.

    >>> growth_mib([{"decodes": n, "worker_mib": mib} for n, mib in ((1, 90), (2, 95), (4, 96))])
    {'worker_mib': 1}
    """
    first, last = readings[1], readings[-1]
    return {name: last[name] - first[name] for name in last if name != "decodes"}


# ---------------------------------------------------------------------------------------------- command line
def run(args: argparse.Namespace) -> None:
    """Measure, print the tables, and one line of JSON."""
    with tempfile.TemporaryDirectory() as folder:
        where = Path(args.folder or folder)
        where.mkdir(parents=True, exist_ok=True)
        record = _measure_speed(where, args.repeats) if args.what == "speed" else _measure_growth(where, args)
    if args.json:
        write_json(args.json, record)
    print(json.dumps(record))


def _measure_speed(folder: Path, repeats: int) -> dict[str, Any]:
    rows: dict[str, dict[str, float]] = {}
    for size in ("360p", "720p"):
        for seconds in (30, 150):
            path = make_clip(folder / f"{size}-{seconds}.mp4", size, seconds)
            for num_threads in (1, 2):
                name = f"{size}, {seconds} s, {num_threads} thread(s)"
                rows[name] = measure_backends(path, ("decord", "pyav"), repeats, num_threads=num_threads)
                print(f"{name:<28}" + "".join(f"{way:>10} {s:7.3f} s" for way, s in rows[name].items()), flush=True)
    return {"seconds": rows, "repeats": repeats}


def _measure_growth(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    small, large = make_clip(folder / "32p-8.mp4", "32p", 8), make_clip(folder / "360p-4.mp4", "360p", 4)
    found: dict[str, Any] = {}
    for name, timeout_s in (("apart", 300.0), ("here", None)):
        readings = measure_memory([small, large], num_decodes=args.decodes, every=args.every, timeout_s=timeout_s)
        for reading in readings:
            print(f"{name:<8}" + "".join(f"{key:>14} {value:8.1f}" for key, value in reading.items()), flush=True)
        found[name] = {"readings": readings, "growth_mib": growth_mib(readings)}
    return {"decodes": args.decodes} | found
