"""The released files: rows and quirks, against counts made here from the files by other means than the converters'.

The numbers stand beside the counting, so that a change of either shows. Skipped where the files are not.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from datasets.converters.conversion import MAIN_KINDS
from tests.datasets.converters.helpers import known_to_validator, released, run, validated


class Seen(NamedTuple):
    """One query as counted here: `windows` in the unit of `limit`, None for no label."""

    video: Any
    limit: float
    windows: list[list[float]] | None
    sentence: str


def charades(split: str) -> Iterator[Seen]:
    with open(released(f"charades_sta/Charades_v1_{split}.csv"), newline="") as handle:
        lengths = {row["id"]: float(row["length"]) for row in csv.DictReader(handle)}
    with open(released(f"charades_sta/charades_sta_{split}.txt")) as handle:
        for line in handle:
            head, _, sentence = line.rstrip("\n").partition("##")
            video, start, end = head.split(" ")
            yield Seen(video, lengths[video], [[float(start), float(end)]], sentence)


def activitynet(split: str) -> Iterator[Seen]:
    for video, item in json.loads(released(f"activitynet_captions/{split}.json").read_text()).items():
        for window, sentence in zip(item["timestamps"], item["sentences"], strict=True):
            yield Seen(video, item["duration"], [window], sentence)


def qvhighlights(split: str) -> Iterator[Seen]:
    with open(released(f"qvhighlights/highlight_{split}_release.jsonl")) as handle:
        for line in handle:
            record = json.loads(line)
            yield Seen(record["vid"], record["duration"], record.get("relevant_windows"), record["query"])


def tacos(split: str) -> Iterator[Seen]:
    for video, item in json.loads(released(f"tacos/{split}.json").read_text()).items():
        for frames, sentence in zip(item["timestamps"], item["sentences"], strict=True):
            yield Seen(video, item["num_frames"], [frames], sentence)  # in frames: seconds change no comparison


def didemo(split: str) -> Iterator[Seen]:
    for record in json.loads(released(f"didemo/{split}_data.json").read_text()):
        chunks = [[first, last + 1] for first, last in record["times"]]
        yield Seen(record["video"], record["num_segments"], chunks, record["description"])


def nextgqa(split: str) -> Iterator[Seen]:
    places = json.loads(released(f"nextgqa/gsub_{split}.json").read_text())
    with open(released(f"nextgqa/{split}.csv"), newline="") as handle:
        for row in csv.DictReader(handle):
            place = places[row["video_id"]]
            yield Seen(row["video_id"], place["duration"], place["location"][row["qid"]], row["question"])


def tvgbench(split: str) -> Iterator[Seen]:
    for record in json.loads(released("tvgbench/tvgbench.json").read_text()):
        window = [float(time) for time in record["answer"].split("-")]
        yield Seen(record["path"], record["duration"], [window], record["question"])


def timer1(split: str) -> Iterator[Seen]:
    for record in json.loads(released("tvgbench/train_2k5.json").read_text()):
        yield Seen(record["video"], record["duration"], [record["timestamp"]], record["sentence"])


def counted(rows: list[Seen]) -> dict[str, int]:
    """Rows, videos and rows with each quirk."""
    counts = Counter(rows=len(rows), videos=len({row.video for row in rows}))
    seen = set()
    for row in rows:
        windows = row.windows or []
        key = (row.video, json.dumps(row.windows), row.sentence)
        counts["duplicate_row"] += key in seen
        seen.add(key)
        counts["unlabelled"] += not windows
        counts["several"] += len(windows) > 1
        counts["end_past_duration"] += any(end - row.limit > 1e-6 for _, end in windows)  # less is float noise
        counts["start_ge_end"] += any(start >= end for start, end in windows)
        counts["empty_window"] += any(start == end for start, end in windows)
        counts["negative_start"] += any(min(start, end) < 0 for start, end in windows)
        counts["outer_space"] += row.sentence != row.sentence.strip()
    return {kind: count for kind, count in counts.items() if count}


CASES: list[tuple[str, str, str, Callable[[str], Iterator[Seen]], dict[str, int]]] = [
    (
        "charades_sta",
        "charades_sta/charades_sta_train.txt",
        "train",
        charades,
        {"rows": 12408, "videos": 5338, "end_past_duration": 1805, "start_ge_end": 4},
    ),
    (
        "charades_sta",
        "charades_sta/charades_sta_test.txt",
        "test",
        charades,
        {"rows": 3720, "videos": 1334, "end_past_duration": 562},
    ),
    (
        "activitynet_captions",
        "activitynet_captions/train.json",
        "train",
        activitynet,
        {
            "rows": 37421,
            "videos": 10009,
            "end_past_duration": 29,
            "start_ge_end": 4,
            "empty_window": 2,
            "outer_space": 25731,
        },
    ),
    (
        "activitynet_captions",
        "activitynet_captions/val_1.json",
        "val_1",
        activitynet,
        {"rows": 17505, "videos": 4917, "end_past_duration": 5, "outer_space": 11639},
    ),
    (
        "activitynet_captions",
        "activitynet_captions/val_2.json",
        "val_2",
        activitynet,
        {"rows": 17031, "videos": 4885, "end_past_duration": 1, "outer_space": 11483},
    ),
    (
        "qvhighlights",
        "qvhighlights/highlight_train_release.jsonl",
        "train",
        qvhighlights,
        {"rows": 7218, "videos": 7100, "several": 2363},
    ),
    (
        "qvhighlights",
        "qvhighlights/highlight_val_release.jsonl",
        "val",
        qvhighlights,
        {"rows": 1550, "videos": 1519, "several": 530},
    ),
    (
        "qvhighlights",
        "qvhighlights/highlight_test_release.jsonl",
        "test",
        qvhighlights,
        {"rows": 1542, "videos": 1529, "unlabelled": 1542},
    ),
    (
        "tacos",
        "tacos/train.json",
        "train",
        tacos,
        {"rows": 9790, "videos": 75, "duplicate_row": 1201, "end_past_duration": 43, "outer_space": 21},
    ),
    (
        "tacos",
        "tacos/val.json",
        "val",
        tacos,
        {"rows": 4436, "videos": 27, "duplicate_row": 516, "outer_space": 12},
    ),
    (
        "tacos",
        "tacos/test.json",
        "test",
        tacos,
        {"rows": 4001, "videos": 25, "duplicate_row": 567, "end_past_duration": 5, "outer_space": 20},
    ),
    (
        "didemo",
        "didemo/val_data.json",
        "val",
        didemo,
        {"rows": 4180, "videos": 1094, "outer_space": 12, "several": 4180},
    ),
    (
        "didemo",
        "didemo/test_data.json",
        "test",
        didemo,
        {"rows": 4021, "videos": 1037, "outer_space": 12, "several": 4021},
    ),
    (
        "nextgqa",
        "nextgqa/val.csv",
        "val",
        nextgqa,
        {"rows": 3358, "videos": 567, "end_past_duration": 3, "several": 339},
    ),
    (
        "nextgqa",
        "nextgqa/test.csv",
        "test",
        nextgqa,
        {"rows": 5553, "videos": 990, "negative_start": 36, "outer_space": 1, "several": 591},
    ),
    (
        "tvgbench",
        "tvgbench/tvgbench.json",
        "test",
        tvgbench,
        {
            "rows": 800,
            "videos": 462,
            "end_past_duration": 27,
            "start_ge_end": 11,
            "empty_window": 11,
            "outer_space": 135,
        },
    ),
    (
        "timer1_train",
        "tvgbench/train_2k5.json",
        "train",
        timer1,
        {"rows": 2500, "videos": 2475, "end_past_duration": 34},
    ),
]


@pytest.mark.parametrize(("dataset", "name", "split", "source", "expected"), CASES, ids=[case[1] for case in CASES])
def test_rows_and_quirks(
    tmp_path: Path,
    dataset: str,
    name: str,
    split: str,
    source: Callable[[str], Iterator[Seen]],
    expected: dict[str, int],
) -> None:
    """Counted here, as written down, as the converter reports them, as the rows list them, and as validation finds
    them again."""
    assert counted(list(source(split))) == expected
    rows, report = run(dataset, released(name), tmp_path / "out.jsonl", "--skip_videos")
    kinds = {kind: expected.get(kind, 0) for kind in (*MAIN_KINDS, "unlabelled") if kind != "missing_video"}
    assert (report["rows"], report["videos"], report["split"]) == (expected["rows"], expected["videos"], split)
    assert {kind: report["quirks"].get(kind, 0) for kind in kinds} == kinds
    assert Counter(kind for row in rows for kind in row["kwargs"]["quirks"]) == {
        k: n for k, n in report["kept"].items() if n
    }
    assert validated(tmp_path / "out.jsonl", skip_videos=True) == known_to_validator(report["kept"])
    assert len({json.dumps(row["kwargs"]["qid"]) for row in rows}) == len(rows)
    assert {(row["kwargs"]["dataset"], row["kwargs"]["split"]) for row in rows} == {(dataset, split)}
    several = sum(row["timestamp"] is not None and isinstance(row["timestamp"][0], list) for row in rows)
    assert several == (0 if dataset == "didemo" else expected.get("several", 0))  # annotators are alternatives


def test_windows_survive(tmp_path: Path) -> None:
    """Every window of a file with several and with negative ones, to the last digit."""
    rows, _ = run("nextgqa", released("nextgqa/test.csv"), tmp_path / "out.jsonl", "--skip_videos")
    stamps = [row["timestamp"] if isinstance(row["timestamp"][0], list) else [row["timestamp"]] for row in rows]
    assert stamps == [sorted(seen.windows or []) for seen in nextgqa("test")]


def test_stretches_of_time_r1(tmp_path: Path) -> None:
    """Of 665 training rows with a stretch 509 have files that are named by it and so are it; 33 of the others start
    after 0 in a file of which nothing else is used. In TVGBench those are 108, and 5 more end after the end that
    another row of the file tells."""
    source = json.loads(released("tvgbench/train_2k5.json").read_text())
    rows, report = run("timer1_train", released("tvgbench/train_2k5.json"), tmp_path / "train.jsonl", "--skip_videos")
    trimmed = [record for record in source if record["video_start"] is not None]
    named = [record for record in trimmed if ":" in record["video"]]
    assert (len(trimmed), len(named)) == (665, 509)
    assert report["quirks"]["already_cut"] == 509 and sum(row["video_start"] is not None for row in rows) == 665 - 509
    after_zero = sum(record["video_start"] > 0 and ":" not in record["video"] for record in trimmed)
    assert report["quirks"]["doubtful_trim"] == after_zero == 33
    kept = [row["kwargs"].get("cut_from", [row["video_start"], row["video_end"]]) for row in rows]
    assert kept == [[record["video_start"], record["video_end"]] for record in source]

    bench = json.loads(released("tvgbench/tvgbench.json").read_text())
    rows, report = run("tvgbench", released("tvgbench/tvgbench.json"), tmp_path / "test.jsonl", "--skip_videos")
    assert sum(row["video_start"] is not None for row in rows) == 252
    starts: dict[str, set[Any]] = {}
    whole: dict[str, float] = {}
    for record in bench:
        starts.setdefault(record["path"], set()).add(record["start"])
        if record["start"] is None:
            whole[record["path"]] = record["duration"]
    trimmed = [record for record in bench if record["start"] is not None]
    alone = [record for record in trimmed if len(starts[record["path"]]) == 1 and record["start"] > 0]
    past = [record for record in trimmed if record["end"] > whole.get(record["path"], 1e9) + 0.5]
    assert (len(alone), len(past)) == (108, 5) and not [record for record in past if record in alone]
    assert report["quirks"]["doubtful_trim"] == 113
