"""Makes a synthetic grounding set: H.264 videos of coloured shapes that come and go, with train, val and test rows.

    python scripts/make_demo_data.py --output_dir data/demo --num_videos 3000 --level easy

Every video is drawn from (seed, split, index) alone: a larger set begins with the smaller one, the same command gives
the same bytes, and an interrupted set is completed. Windows are drawn alike for every shape, whatever its colour and
form, so that only the pixels tell when a shape is on. What an answer without pixels can reach is printed at the end.
Level "imprecise" has the videos of "easy" under training labels whose ends are off.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # Python had put scripts/ there; see utils/attach.py

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from utils.common import UserError, run_command, write_json  # noqa: E402
from utils.rows import Row, write_rows  # noqa: E402
from utils.spans import Span, temporal_iou  # noqa: E402
from utils.video import write_mp4  # noqa: E402

SPLITS = ("train", "val", "test")
MANIFEST = "demo_data.json"
GENERATOR_VERSION = 6
"""Raised when the same seed would give other videos than before, so that an old folder is not taken for a new one."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 25, 25),
    "green": (25, 200, 25),
    "blue": (40, 60, 240),
    "yellow": (240, 230, 30),
    "magenta": (230, 30, 230),
    "cyan": (30, 225, 230),
}
FORMS = ("square", "circle", "triangle")


@dataclass(frozen=True)
class Level:
    """What videos of one difficulty look like. Pairs are inclusive ranges."""

    side_px: int
    """Height of a frame, and width of each of its cells."""
    fps: float
    """Frame rate of the file; windows begin and end on a frame."""
    duration_s: tuple[int, int]
    num_shapes: tuple[int, int]
    """Shapes that come and go; each is asked about."""
    num_static: int
    """Shapes that stay for the whole video; nobody asks about them."""
    forms: tuple[str, ...]
    num_colours: int
    """The first so many of `COLOURS`."""
    shape_px: tuple[int, int]
    """Width and height of a shape."""
    window_s: tuple[float, float]
    grid_s: float
    """Windows begin and end on multiples of this. A whole second at 2 fps is one temporal patch of the model."""
    max_windows: int
    """Times one shape may come and go."""
    cells: int
    """Square cells side by side that make up a frame. With more than one, every shape stands in a cell of its own."""
    min_distance: float
    """Between the centres of two shapes, in widths of the larger: 1 keeps squares apart, less lets them overlap."""
    max_speed_px: float
    """Fastest movement along each axis, in pixels a second."""
    noise: float
    """Standard deviation of the noise on every pixel value, of 255."""
    absent_share: float
    """Chance that a video has one more query, about a shape that is not in it."""
    label_noise_s: float = 0.0
    """Both ends of a training label are off by up to this much, uniformly, as an imprecise annotator's would be.
    Validation and test labels are exact: they tell whether a model found the event or copies its annotator."""


LEVELS: dict[str, Level] = {
    "easy": Level(32, 2, (8, 8), (2, 2), 0, FORMS[:1], 2, (20, 28), (1, 4), 1, 1, 2, 0.0, 0, 0, 0),
    "medium": Level(64, 4, (12, 16), (3, 3), 1, FORMS, 6, (16, 24), (2, 6), 0.25, 1, 1, 0.7, 0, 6, 0),
    "hard": Level(96, 8, (16, 30), (3, 5), 2, FORMS, 6, (16, 32), (2, 7), 0.125, 2, 1, 0.5, 12, 12, 0.5),
}
LEVELS["imprecise"] = replace(LEVELS["easy"], label_noise_s=0.5)
"""Half a second: with more, the window that fits such labels best on average is no longer near the true one (with 1.5 s
its IoU with the truth is 0.73, with 0.5 s 0.94), so that nobody could learn the truth from them."""


@dataclass(frozen=True)
class Shape:
    """One coloured form: where it is at time 0, how it moves, and the frames [first, stop) in which it is on."""

    colour: str
    form: str
    size_px: int
    centre_px: tuple[float, float]
    velocity_px: tuple[float, float]
    """A second."""
    windows: tuple[tuple[int, int], ...]

    @property
    def sentence(self) -> str:
        return event_sentence(self.colour, self.form)


@dataclass(frozen=True)
class Scene:
    """Everything about one video but its pixels. Later shapes are drawn over earlier ones."""

    level: Level
    num_frames: int
    background: int
    """Grey value."""
    shapes: tuple[Shape, ...]
    asked: tuple[tuple[str, tuple[tuple[int, int], ...]], ...]
    """Sentences with their windows in frames; no window = the event is absent."""
    noise_seed: int


def event_sentence(colour: str, form: str) -> str:
    return f"the {colour} {form} appears"


def all_sentences() -> list[str]:
    """Every sentence a level can ask about."""
    return [event_sentence(colour, form) for form in FORMS for colour in COLOURS]


def draw_scene(level: Level, seed: int, split: str, index: int) -> Scene:
    """The scene of video `index` of `split`: a pure function of its arguments."""
    rng = random.Random(f"{seed}/{split}/{index}")
    num_frames = round(rng.randint(*level.duration_s) * level.fps)
    num_shapes = level.num_static + rng.randint(*level.num_shapes)
    kinds = [(colour, form) for colour in list(COLOURS)[: level.num_colours] for form in level.forms]
    kinds = rng.sample(kinds, num_shapes + 1 if level.absent_share else num_shapes)
    sizes = [rng.randint(*level.shape_px) for _ in range(num_shapes)]
    centres = _draw_centres(rng, level, sizes)
    shapes = []
    for place, ((colour, form), size, centre) in enumerate(zip(kinds, sizes, centres, strict=False)):
        static = place < level.num_static  # drawn first, so that they never hide a shape that is asked about
        windows = ((0, num_frames),) if static else _draw_windows(rng, level, num_frames)
        velocity = (rng.uniform(-1, 1) * level.max_speed_px, rng.uniform(-1, 1) * level.max_speed_px)
        shapes.append(Shape(colour, form, size, centre, velocity, windows))
    asked = [(shape.sentence, shape.windows) for shape in shapes[level.num_static :]]
    if rng.random() < level.absent_share:
        asked.append((event_sentence(*kinds[-1]), ()))
    return Scene(level, num_frames, rng.randint(90, 130), tuple(shapes), tuple(asked), rng.getrandbits(32))


def _draw_centres(rng: random.Random, level: Level, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Centres of shapes that lie inside their cell, no two closer than the level allows. Redraws until it fits."""
    side = level.side_px
    while True:
        centres = []
        cells = rng.sample(range(level.cells), len(sizes)) if level.cells > 1 else [0] * len(sizes)
        for size, cell in zip(sizes, cells, strict=True):
            x, y = (rng.randint(math.ceil(size / 2), side - math.ceil(size / 2)) for _ in range(2))
            centres.append((cell * side + x, y))
        pairs = combinations(zip(centres, sizes, strict=True), 2)
        if all(
            max(abs(x - other_x), abs(y - other_y)) >= level.min_distance * max(size, other_size)
            for ((x, y), size), ((other_x, other_y), other_size) in pairs
        ):
            return centres


def _draw_windows(rng: random.Random, level: Level, num_frames: int) -> tuple[tuple[int, int], ...]:
    """One to `max_windows` windows in frames with at least half a second between them, in written order."""
    step = round(level.grid_s * level.fps)
    shortest, longest = (round(seconds / level.grid_s) for seconds in level.window_s)
    while True:
        lengths = [step * rng.randint(shortest, longest) for _ in range(rng.randint(1, level.max_windows))]
        firsts = [step * rng.randint(0, (num_frames - length) // step) for length in lengths]
        windows = sorted((first, first + length) for first, length in zip(firsts, lengths, strict=True))
        if all(after[0] - before[1] >= level.fps / 2 for before, after in zip(windows, windows[1:], strict=False)):
            return tuple(windows)


def render(scene: Scene) -> np.ndarray:
    """The frames of a scene: uint8 RGB, shape (T, height, width, 3)."""
    size = height, width = scene.level.side_px, scene.level.side_px * scene.level.cells
    frames = np.full((scene.num_frames, height, width, 3), scene.background, np.uint8)
    for shape in scene.shapes:
        colour = np.array(COLOURS[shape.colour], np.uint8)
        mask = None if any(shape.velocity_px) else _mask(shape, 0, size)
        for first, stop in shape.windows:
            for frame in range(first, stop):
                frames[frame][_mask(shape, frame / scene.level.fps, size) if mask is None else mask] = colour
    if scene.level.noise:
        grain = np.random.default_rng(scene.noise_seed).normal(0, scene.level.noise, (8, height, width, 3))
        for phase, pattern in enumerate(grain.round().astype(np.int16)):  # 8 patterns in turn: noise for each is slow
            frames[phase::8] = np.clip(frames[phase::8] + pattern, 0, 255)
    return frames


def _mask(shape: Shape, time_s: float, size: tuple[int, int]) -> np.ndarray:
    """Which pixels the shape covers at `time_s`: bool, shape (height, width). It bounces off the picture's edges."""
    height, width = size
    half = shape.size_px / 2
    (x, y), (speed_x, speed_y) = shape.centre_px, shape.velocity_px
    across = np.arange(width) + 0.5 - _bounce(x + speed_x * time_s, half, width - half)
    down = (np.arange(height) + 0.5 - _bounce(y + speed_y * time_s, half, height - half))[:, None]
    if shape.form == "square":
        return (-half <= across) & (across < half) & (-half <= down) & (down < half)
    if shape.form == "circle":
        return across**2 + down**2 < half**2
    return (np.abs(down) < half) & (np.abs(across) < (down + half) / 2)  # triangle, point up


def _bounce(position: float, low: float, high: float) -> float:
    """`position` reflected into [low, high]."""
    if high <= low:
        return (low + high) / 2
    offset = (position - low) % (2 * (high - low))
    return low + min(offset, 2 * (high - low) - offset)


def scene_rows(scene: Scene, video: str, qid: str, level: str, path: Path) -> list[Row]:
    """The annotation rows of one scene; `path` is the annotation file they will stand in."""
    fps = scene.level.fps
    return [
        Row(
            video=video,
            duration=scene.num_frames / fps,
            timestamp=tuple(Span(first / fps, stop / fps) for first, stop in windows),
            sentence=sentence,
            video_start=None,
            video_end=None,
            kwargs={"qid": f"{qid}-{number}", "level": level},
            file=str(path),
            line=0,
        )
        for number, (sentence, windows) in enumerate(scene.asked)
    ]


def imprecise(row: Row, noise_s: float, rng: random.Random) -> Row:
    """The row as an annotator leaves it whose ends are off by up to `noise_s`: tenths of a second, inside the video,
    at least half a second long."""

    def off(window: Span) -> Span:
        while True:
            start, end = (round(edge + rng.uniform(-noise_s, noise_s), 1) for edge in window)
            start, end = max(start, 0.0), min(end, row.duration)
            if end - start >= 0.5:
                return Span(start, end)

    return replace(row, timestamp=tuple(sorted(map(off, row.timestamp or ()))))


@dataclass(frozen=True)
class ConstantBaselines:
    """Mean IoU over all rows of answers that look at no pixel. Windows are shares of the video's duration."""

    whole_video: float
    centre: float
    """The middle half."""
    best: float
    """The best window of a grid, chosen on these very rows: a ceiling for any constant answer."""
    best_window: Span
    absent: float
    """Always answering absence: the share of rows labelled absent."""


def best_constant_iou(rows: Iterable[Row], steps: int = 16) -> ConstantBaselines:
    """How far an answer that is the same for every query gets on `rows`.

    A row scores its best IoU over its windows, 0 when it is labelled absent; unlabelled rows are left out.

    Args:
        rows: labelled rows.
        steps: the searched windows begin and end at multiples of 1/steps of the duration.

    Raises:
        UserError: no row is labelled.
    """
    shares: Counter[tuple[Span, ...]] = Counter()
    for row in rows:
        if row.timestamp is not None:
            shares[tuple(Span(s / row.duration, e / row.duration) for s, e in row.timestamp)] += 1
    if not shares:
        raise UserError("best_constant_iou needs at least one labelled row, got none")
    total = shares.total()

    def mean_iou(window: Span) -> float:
        ious = (max((temporal_iou(window, truth) for truth in truths), default=0.0) * n for truths, n in shares.items())
        return sum(ious) / total

    grid = [Span(a / steps, b / steps) for a in range(steps) for b in range(a + 1, steps + 1)]
    best, window = max((mean_iou(window), window) for window in grid)
    return ConstantBaselines(mean_iou(Span(0, 1)), mean_iou(Span(0.25, 0.75)), best, window, shares[()] / total)


@dataclass(frozen=True)
class DemoData:
    """What `make_demo_data` left on disk."""

    annotations: dict[str, Path]
    rows: dict[str, list[Row]]
    num_written: int
    """Videos written by this call; the others were there already."""
    seconds: float


def make_demo_data(
    output_dir: str | os.PathLike[str],
    *,
    num_train: int = 3000,
    num_val: int = 48,
    num_test: int = 160,
    level: str = "easy",
    seed: int = 0,
    workers: int = 2,
    progress: bool = False,
) -> DemoData:
    """Make `output_dir/{train,val,test}.jsonl` and the videos beside them, or complete or reuse what is there.

    Args:
        output_dir: holds this set alone.
        num_train, num_val, num_test: videos per split; the splits share none.
        level: a key of `LEVELS`.
        seed: every video is a function of (seed, split, its index).
        workers: processes that write videos.
        progress: show a bar on standard error.

    Raises:
        UserError: an argument out of its rule, or a folder that holds a set of another level or seed.
    """
    started = time.perf_counter()
    counts = dict(zip(SPLITS, (num_train, num_val, num_test), strict=True))
    _check_arguments(counts, level, seed, workers)
    folder = Path(output_dir)
    _claim_folder(folder, {"generator_version": GENERATOR_VERSION, "level": level, "seed": seed})
    annotations = {split: folder / f"{split}.jsonl" for split in SPLITS}
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    missing: list[tuple[Path, str, int, str, int]] = []
    for split, index in [(name, index) for name, count in counts.items() for index in range(count)]:
        video = f"videos/{split}/{index:06d}.mp4"
        scene = draw_scene(LEVELS[level], seed, split, index)
        drawn = scene_rows(scene, video, f"{split}-{index:06d}", level, annotations[split])
        if split == "train" and (noise_s := LEVELS[level].label_noise_s):
            rng = random.Random(f"{seed}/{split}/{index}/labels")
            drawn = [imprecise(row, noise_s, rng) for row in drawn]
        rows[split] += drawn
        if not _is_written(folder / video):
            missing.append((folder / video, level, seed, split, index))
    for _ in tqdm(_write_videos(missing, workers), total=len(missing), unit="video", disable=not progress):
        pass
    for split, path in annotations.items():  # after the videos: an annotation file never names one that is not there
        write_rows(path, rows[split])
    return DemoData(annotations, rows, len(missing), time.perf_counter() - started)


def _check_arguments(counts: dict[str, int], level: str, seed: int, workers: int) -> None:
    if level not in LEVELS:
        raise UserError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    for split, count in counts.items():
        if not 1 <= count <= 999_999:
            raise UserError(f"the number of {split} videos must be between 1 and 999999, got {count}")
    if seed < 0:
        raise UserError(f"seed must be >= 0, got {seed}")
    if workers < 1:
        raise UserError(f"workers must be >= 1, got {workers}")


def _claim_folder(folder: Path, settings: dict[str, object]) -> None:
    """Record in `folder` which set it holds, or make sure that it holds this one."""
    path = folder / MANIFEST
    if not path.exists():
        write_json(path, settings)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); choose another --output_dir") from error
    if found != settings:
        raise UserError(f"{path} records {found}, asked for {settings}; choose another --output_dir for the new set")


def _is_written(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0  # written atomically: what has the name is whole


def _write_videos(tasks: Sequence[tuple[Path, str, int, str, int]], workers: int) -> Iterator[None]:
    """Write the videos, yielding once per video."""
    if workers == 1 or len(tasks) < 64:  # starting processes would take longer
        yield from map(_write_video, tasks)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        try:
            yield from pool.map(_write_video, tasks, chunksize=16)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _write_video(task: tuple[Path, str, int, str, int]) -> None:
    path, level, seed, split, index = task
    scene = draw_scene(LEVELS[level], seed, split, index)
    write_mp4(path, render(scene), fps=scene.level.fps)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_videos", type=int, default=3000, help="training videos (default %(default)s)")
    parser.add_argument("--num_val", type=int, default=48, help="validation videos (default %(default)s)")
    parser.add_argument("--num_test", type=int, default=160, help="test videos (default %(default)s)")
    parser.add_argument("--level", choices=LEVELS, default="easy", help="difficulty (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes that write videos (default %(default)s)")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_arguments()
    data = make_demo_data(
        args.output_dir,
        num_train=args.num_videos,
        num_val=args.num_val,
        num_test=args.num_test,
        level=args.level,
        seed=args.seed,
        workers=args.workers,
        progress=True,
    )
    print_summary(data)


def print_summary(data: DemoData) -> None:
    for split, path in data.annotations.items():
        print(f"{path}: {len({row.video for row in data.rows[split]})} videos, {len(data.rows[split])} queries")
    rate = f", {data.num_written / data.seconds:.0f} a second" if data.num_written else ""
    print(f"{data.num_written} videos written in {data.seconds:.1f} s{rate}; the others were there")
    constant = best_constant_iou(data.rows["test"])
    print(
        f"test mIoU of answers that look at no pixel: whole video {constant.whole_video:.3f}, "
        f"middle half {constant.centre:.3f}, always absent {constant.absent:.3f}, best constant window "
        f"{constant.best:.3f} ({constant.best_window.start:.0%} to {constant.best_window.end:.0%} of the duration)"
    )


if __name__ == "__main__":
    run_command(main)
