"""The demo set: what is drawn, what is written, and that nothing but the pixels gives an answer away."""

from __future__ import annotations

import hashlib
import random
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from scripts.make_demo_data import (
    COLOURS,
    LEVELS,
    MANIFEST,
    SPLITS,
    Scene,
    Shape,
    all_sentences,
    best_constant_iou,
    draw_scene,
    imprecise,
    make_demo_data,
    render,
    scene_rows,
)
from utils.common import REPO_ROOT, UserError
from utils.rows import Row, read_rows, resolve_video
from utils.spans import Span, temporal_iou

COUNTS: dict[str, Any] = {"num_train": 5, "num_val": 2, "num_test": 3}


def decode(path: Path) -> tuple[np.ndarray, list[float]]:
    """All frames of a file, uint8 (T, H, W, 3), and their times in seconds."""
    with av.open(path) as container:
        frames = list(container.decode(video=0))
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), [float(frame.time) for frame in frames]


def digests(folder: Path) -> dict[str, str]:
    """Content of every file below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def row(timestamp: tuple[Span, ...] | None, duration: float = 10) -> Row:
    return Row("v.mp4", duration, timestamp, "the red square appears", None, None, {}, "f.jsonl", 1)


def scenes(level: str, count: int = 150) -> list[Scene]:
    return [draw_scene(LEVELS[level], 3, "train", index) for index in range(count)]


# --- on disk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_rows_and_videos_agree(level: str, tmp_path: Path) -> None:
    data = make_demo_data(tmp_path, level=level, num_train=2, num_val=1, num_test=1)
    for split, path in data.annotations.items():
        rows, problems = read_rows(path)
        assert problems == []
        assert [(row.sentence, row.timestamp, row.kwargs) for row in rows] == [
            (row.sentence, row.timestamp, row.kwargs) for row in data.rows[split]
        ]
        assert [row.kwargs["qid"][: len(split)] for row in rows] == [split] * len(rows)
        assert {row.kwargs["level"] for row in rows} == {level}
        for video in {row.video for row in rows}:
            frames, times = decode(path.parent / video)
            duration = next(row.duration for row in rows if row.video == video)
            assert len(frames) == round(duration * LEVELS[level].fps)
            assert times == pytest.approx(np.arange(len(frames)) / LEVELS[level].fps)
    qids = [row.kwargs["qid"] for rows in data.rows.values() for row in rows]
    assert len(set(qids)) == len(qids)


def test_the_window_is_where_the_colour_is(tmp_path: Path) -> None:
    """In the decoded file, not in the scene: compression keeps the colours apart."""
    data = make_demo_data(tmp_path, num_train=6, num_val=1, num_test=1)
    for row in data.rows["train"]:
        frames, times = decode(resolve_video(row))
        colour = np.array(COLOURS[row.sentence.split()[1]])
        area = (np.abs(frames.astype(int) - colour).sum(-1) < 90).sum((1, 2))  # pixels of about that colour
        assert row.timestamp is not None
        ((start, end),) = row.timestamp
        assert (area > 60).tolist() == [start <= time < end for time in times]
        assert area[area <= 60].max(initial=0) == 0


def test_same_seed_same_bytes_and_a_larger_set_begins_with_the_smaller(tmp_path: Path) -> None:
    make_demo_data(tmp_path / "a", **COUNTS, seed=7)
    make_demo_data(tmp_path / "b", **COUNTS, seed=7, workers=2)
    make_demo_data(tmp_path / "larger", num_train=7, num_val=3, num_test=3, seed=7)
    make_demo_data(tmp_path / "other", **COUNTS, seed=8)
    first = digests(tmp_path / "a")
    assert digests(tmp_path / "b") == first
    videos = {name: digest for name, digest in first.items() if name.endswith(".mp4")}
    assert len(videos) == 10
    assert videos.items() <= digests(tmp_path / "larger").items()
    assert not set(videos.values()) & set(digests(tmp_path / "other").values())


def test_many_videos_are_written_by_processes(tmp_path: Path) -> None:
    make_demo_data(tmp_path / "one", num_train=62, num_val=1, num_test=1, workers=1)
    make_demo_data(tmp_path / "two", num_train=62, num_val=1, num_test=1, workers=2)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_a_whole_set_is_reused_and_half_a_set_completed(tmp_path: Path) -> None:
    assert make_demo_data(tmp_path, **COUNTS).num_written == 10
    whole = digests(tmp_path)
    inode = (tmp_path / "videos/train/000001.mp4").stat().st_ino
    assert make_demo_data(tmp_path, **COUNTS).num_written == 0
    (tmp_path / "videos/train/000000.mp4").unlink()
    (tmp_path / "videos/test/000002.mp4").write_bytes(b"")
    (tmp_path / "val.jsonl").unlink()
    assert make_demo_data(tmp_path, **COUNTS).num_written == 2
    assert digests(tmp_path) == whole
    assert (tmp_path / "videos/train/000001.mp4").stat().st_ino == inode  # not written again


def test_splits_share_no_video(tmp_path: Path) -> None:
    make_demo_data(tmp_path, **COUNTS)
    videos = [digest for name, digest in digests(tmp_path).items() if name.endswith(".mp4")]
    assert len(set(videos)) == len(videos) == 10


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"level": "tough"}, "level must be one of easy, medium, hard, imprecise, got 'tough'"),
        ({"num_test": 0}, "number of test videos must be between 1 and 999999, got 0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"workers": 0}, "workers must be >= 1, got 0"),
    ],
)
def test_wrong_arguments(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        make_demo_data(tmp_path, **{**COUNTS, **changed})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_another_set_is_left_alone(tmp_path: Path) -> None:
    make_demo_data(tmp_path, **COUNTS, seed=1)
    before = digests(tmp_path)
    with pytest.raises(UserError, match=f"{MANIFEST} records .*'seed': 1.*choose another --output_dir"):
        make_demo_data(tmp_path, **COUNTS, seed=2)
    manifest = (tmp_path / MANIFEST).read_text()
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        make_demo_data(tmp_path, **COUNTS, seed=1)
    (tmp_path / MANIFEST).write_text(manifest)
    assert digests(tmp_path) == before


# --- what is drawn ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_scenes_keep_to_their_level(level: str) -> None:
    spec = LEVELS[level]
    for scene in scenes(level):
        assert spec.duration_s[0] <= scene.num_frames / spec.fps <= spec.duration_s[1]
        kinds = [(shape.colour, shape.form) for shape in scene.shapes]
        assert len(set(kinds)) == len(kinds)
        absent = [sentence for sentence, windows in scene.asked if not windows]
        assert not set(absent) & {shape.sentence for shape in scene.shapes}
        moving = [shape for shape in scene.shapes if shape.windows != ((0, scene.num_frames),)]
        assert len(moving) == len(scene.asked) - len(absent) == len(scene.shapes) - spec.num_static
        for shape in moving:
            ends = [edge for window in shape.windows for edge in window]
            assert ends == sorted(ends) and 0 <= ends[0] and ends[-1] <= scene.num_frames
            assert all(spec.window_s[0] <= (b - a) / spec.fps <= spec.window_s[1] for a, b in shape.windows)
    asked = [windows for scene in scenes(level) for _, windows in scene.asked]
    assert {len(windows) for windows in asked} == ({0, 1, 2} if level == "hard" else {1})


def test_levels_get_harder() -> None:
    levels = [LEVELS[name] for name in ("easy", "medium", "hard")]
    sides = [(spec.side_px, spec.duration_s[1], spec.num_shapes[1], spec.num_static) for spec in levels]
    assert sides == sorted(sides) and len(set(sides)) == 3


@pytest.mark.parametrize("level", LEVELS)
def test_windows_tell_nothing_of_the_colour(level: str) -> None:
    """Mean start and length per colour, over 1000 scenes, differ by less than chance allows (4 standard errors)."""
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for scene in scenes(level, 1000):
        for sentence, windows in scene.asked:
            spans[sentence.split()[1]] += [(a / scene.num_frames, (b - a) / scene.num_frames) for a, b in windows]
    everything = np.concatenate([np.array(values) for values in spans.values()])  # (N, 2)
    for values in spans.values():
        error = everything.std(0) / np.sqrt(len(values))
        assert (np.abs(np.mean(values, axis=0) - everything.mean(0)) < 4 * error).all()


def test_every_sentence_is_asked() -> None:
    asked = {sentence for scene in scenes("hard") for sentence, _ in scene.asked}
    assert asked == set(all_sentences())


@pytest.mark.parametrize(("form", "share"), [("square", 1.0), ("circle", np.pi / 4), ("triangle", 0.5)])
def test_forms_cover_their_share(form: str, share: float) -> None:
    shape = Shape("red", form, 20, (16, 16), (0, 0), ((2, 4),))
    scene = Scene(LEVELS["easy"], 6, 100, (shape,), (), 0)
    red = (render(scene) == COLOURS["red"]).all(-1)  # (T, H, W)
    assert red.any((1, 2)).tolist() == [False, False, True, True, False, False]
    assert red[2].sum() == pytest.approx(400 * share, rel=0.06)


def test_moving_shapes_stay_inside() -> None:
    shape = Shape("blue", "square", 10, (8, 20), (-9, 13), ((0, 16),))
    frames = render(Scene(LEVELS["easy"], 16, 100, (shape,), (), 0))
    blue = (frames == COLOURS["blue"]).all(-1)
    assert (blue.sum((1, 2)) == 100).all()
    assert len({frame.tobytes() for frame in blue}) > 8


def test_rows_of_a_scene() -> None:
    scene = Scene(LEVELS["hard"], 160, 0, (), (("a", ((8, 20), (40, 44))), ("b", ())), 0)
    first, second = scene_rows(scene, "v.mp4", "test-7", "hard", Path("t.jsonl"))
    assert first == Row("v.mp4", 20, (Span(1, 2.5), Span(5, 5.5)), "a", None, None, first.kwargs, "t.jsonl", 0)
    assert first.kwargs == {"qid": "test-7-0", "level": "hard"}
    assert (second.timestamp, second.kwargs["qid"]) == ((), "test-7-1")


def test_an_imprecise_annotator_errs_in_training_labels_alone(tmp_path: Path) -> None:
    """The videos of the easy level; both ends of every training label within half a second of the truth, uniformly."""
    counts = {"num_train": 40, "num_val": 2, "num_test": 3}
    exact = make_demo_data(tmp_path / "easy", level="easy", **counts, workers=1)
    found = make_demo_data(tmp_path / "imprecise", level="imprecise", **counts, workers=1)
    videos = [digests(folder / "videos") for folder in (tmp_path / "easy", tmp_path / "imprecise")]
    assert videos[0] == videos[1]
    for split in ("val", "test"):
        assert [r.timestamp for r in found.rows[split]] == [r.timestamp for r in exact.rows[split]]
    shifts = []
    for noisy, true in zip(found.rows["train"], exact.rows["train"], strict=True):
        assert noisy.timestamp and true.timestamp
        (start, end), (true_start, true_end) = noisy.timestamp[0], true.timestamp[0]
        assert 0 <= start and end <= 8 and end - start > 0.5 - 1e-9
        shifts += [start - true_start, end - true_end]
    assert max(map(abs, shifts)) <= 0.5 + 1e-9
    assert np.std(shifts) == pytest.approx(0.5 / np.sqrt(3), abs=0.05)  # of a uniform error
    again = make_demo_data(tmp_path / "imprecise", level="imprecise", **counts, workers=1)
    assert again.rows == found.rows and again.num_written == 0


def test_imprecise_labels_stay_inside_the_video() -> None:
    """A window at an end of the video keeps to it; several windows stay in order; an absent event stays absent."""
    rng = random.Random(0)
    for _ in range(200):
        windows = imprecise(row((Span(0, 1), Span(9, 10))), 2.0, rng).timestamp
        assert windows is not None and list(windows) == sorted(windows)
        assert all(start >= 0 and end <= 10 and end - start > 0.5 - 1e-9 for start, end in windows)
    assert imprecise(row(()), 2.0, rng).timestamp == ()


# --- answers without pixels -------------------------------------------------------------------------------------------


def test_best_constant_answer_by_hand() -> None:
    """Two rows at 0-5 of 10 s and one at 5-10 s: the best single answer is the first half."""
    rows = [row((Span(0, 5),)), row((Span(0, 5),)), row((Span(10, 20),), 20), row(None)]
    constant = best_constant_iou(rows)
    assert constant.best == pytest.approx(2 / 3)
    assert constant.best_window == Span(0, 0.5)
    assert constant.whole_video == pytest.approx(0.5)
    assert constant.centre == pytest.approx(1 / 3)  # 2.5 s of 7.5 s, each time
    assert constant.absent == 0


def test_best_constant_answer_with_absent_rows_and_several_windows() -> None:
    constant = best_constant_iou([row((Span(0, 1), Span(5, 10))), row(())])
    assert (constant.best, constant.best_window, constant.absent) == (0.5, Span(0.5, 1), 0.5)
    assert constant.whole_video == pytest.approx(0.25)


def test_best_constant_answer_needs_a_label() -> None:
    with pytest.raises(UserError, match="at least one labelled row"):
        best_constant_iou([row(None)])


def test_constant_answers_are_poor_on_every_level() -> None:
    for level, spec in LEVELS.items():
        rows = [r for scene in scenes(level, 100) for r in scene_rows(scene, "v", "q", level, Path("f"))]
        constant = best_constant_iou(rows)
        assert constant.best < 0.45, (level, constant)
        assert constant.best >= max(constant.whole_video, constant.centre) - 1e-9
        assert spec.absent_share == 0 or 0.05 < constant.absent < 0.2


# --- the command ------------------------------------------------------------------------------------------------------


def test_command(tmp_path: Path) -> None:
    script = REPO_ROOT / "scripts" / "make_demo_data.py"
    arguments = ["--num_videos", "3", "--num_val", "1", "--num_test", "40", "--seed", "5"]
    command = [sys.executable, str(script), "--output_dir", "set", *arguments]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert re.search(r"set/test.jsonl: 40 videos, \d+ queries", first.stdout)
    assert "44 videos written" in first.stdout
    rows = [r for split in SPLITS for r in read_rows(tmp_path / "set" / f"{split}.jsonl")[0]]
    assert len(rows) == sum(int(count) for count in re.findall(r"(\d+) queries", first.stdout))
    test_rows = read_rows(tmp_path / "set" / "test.jsonl")[0]
    best = best_constant_iou(test_rows)
    mean = np.mean([temporal_iou(Span(0, r.duration), r.timestamp[0]) for r in test_rows if r.timestamp])
    assert f"whole video {mean:.3f}" in first.stdout and f"best constant window {best.best:.3f}" in first.stdout
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "0 videos written" in second.stdout
    other = subprocess.run([*command, "--level", "hard"], cwd=tmp_path, capture_output=True, text=True)
    assert other.returncode == 2
    assert other.stderr.startswith("error: ") and "choose another --output_dir" in other.stderr
