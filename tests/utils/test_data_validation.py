"""The validator: every kind of problem, the videos, train against test, repairs, and the command line."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from utils.common import REPO_ROOT, UserError
from utils.data_validation import KINDS, Options, main, parse_policies, validate
from utils.rows import FIELDS, read_rows, write_rows

SKIP = Options(skip_videos=True)
ANNOTATIONS = REPO_ROOT.parent / "shared" / "annotations"
GOOD: dict[str, Any] = {"video": "a.mp4", "duration": 30, "timestamp": [1, 4.5], "sentence": "a red square appears"}
NORMAL = {**GOOD, "duration": 30.0, "timestamp": [1.0, 4.5], "video_start": None, "video_end": None, "kwargs": {}}


def write(path: Path, records: Iterable[Any]) -> Path:
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def kinds_of(path: Path, **options: Any) -> list[tuple[int, str]]:
    """Without a word on videos: of the rows alone."""
    given = options if options.keys() & {"probe_videos", "skip_videos"} else options | {"skip_videos": True}
    return [(problem.line, problem.kind) for problem in validate([path], options=Options(**given)).problems]


def trimmed(start: float, end: float, window: list[float], **fields: Any) -> dict[str, Any]:
    return GOOD | {"video_start": start, "video_end": end, "duration": end - start, "timestamp": window} | fields


# ---- kinds


BAD = {
    "bad_json": '{"video": ',
    "not_an_object": "[1]",
    "duplicate_key": '{"video": "a", "video": "b"}',
    "missing_field": {"video": "a.mp4", "duration": 1, "sentence": "x"},
    "extra_field": GOOD | {"qid": 3},
    "wrong_type": GOOD | {"duration": "30"},
    "non_finite": GOOD | {"duration": float("nan")},
    "bad_text": GOOD | {"sentence": "\ud83d"},
    "empty_sentence": GOOD | {"sentence": " "},
    "outer_space": GOOD | {"sentence": "person sits \n"},
    "special_token": GOOD | {"sentence": "<|video_pad|> person sits"},
    "bad_duration": GOOD | {"duration": -1},
    "start_ge_end": GOOD | {"timestamp": [5, 5]},
    "negative_start": GOOD | {"timestamp": [-2, 5]},
    "end_past_duration": GOOD | {"timestamp": [5, 30.01]},
    "window_outside": GOOD | {"timestamp": [[1, 2], [30, 31]]},
    "bad_trim": GOOD | {"video_start": 9, "video_end": 8},
    "trim_length": trimmed(50, 80, [1, 2], duration=40),
    "trim_reading": trimmed(50, 80, [55, 60]),
    "duplicate_row": GOOD | {"kwargs": {"qid": 1}},
}


def test_each_kind_is_found_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD, "", *BAD.values()])
    report = validate([path], options=SKIP)
    expected = [(line, kind) for line, kind in enumerate(BAD, start=3)]
    found = [(problem.line, problem.kind) for problem in report.problems]
    outside = expected[[kind for _, kind in expected].index("window_outside")][0]
    assert sorted(found) == sorted([*expected, (outside, "end_past_duration")])
    assert report.num_rows == len(BAD) + 1 and report.num_videos == 1
    assert report.counts == dict.fromkeys(BAD, 1) | {"end_past_duration": 2}
    assert report.num_errors == len(BAD) - 1  # outer_space is a warning


def test_one_fault_does_not_hide_another(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD | {"timestamp": [38, 31]}, GOOD | {"timestamp": [20, 12]}])
    assert kinds_of(path) == [(1, "start_ge_end"), (1, "end_past_duration"), (2, "start_ge_end")]


def test_absolute_reading(tmp_path: Path) -> None:
    rows = [trimmed(50, 80, [55, 60]), trimmed(50, 80, [49.8, 60]), trimmed(50, 80, [5, 10]), trimmed(50, 80, [90, 95])]
    path = write(tmp_path / "rows.jsonl", rows)
    found = kinds_of(path, trim="absolute")
    assert found == [(2, "start_before_clip"), (3, "trim_reading"), (4, "window_outside"), (4, "end_past_duration")]
    assert [line for line, kind in kinds_of(path) if kind == "trim_reading"] == [1, 2]


def test_duplicates_count_from_the_first_over_all_files(tmp_path: Path) -> None:
    other = GOOD | {"timestamp": [2, 3]}
    one = write(tmp_path / "one.jsonl", [GOOD, other, GOOD])
    two = write(tmp_path / "two.jsonl", [other, GOOD | {"sentence": "b"}])
    report = validate([one, two], options=SKIP)
    assert [(p.file, p.line, p.kind) for p in report.problems] == [
        (str(one), 3, "duplicate_row"),
        (str(two), 1, "duplicate_row"),
    ]
    assert report.problems[1].message.endswith(f"{one}:2")


def test_train_against_test(tmp_path: Path) -> None:
    test = write(tmp_path / "test.jsonl", [GOOD, GOOD | {"video": "./b.mp4"}])
    rows = [
        GOOD | {"sentence": "A red  square appears.", "timestamp": [7, 8]},
        GOOD | {"sentence": "something else", "video": "b.mp4"},
        GOOD | {"video": "c.mp4"},
    ]
    report = validate([write(tmp_path / "train.jsonl", rows)], against=[test], options=SKIP)
    assert [(p.line, p.kind, p.message.rsplit(":")[-1]) for p in report.problems] == [
        (1, "shared_pair", "1"),
        (1, "shared_video", "1"),
        (2, "shared_video", "2"),
    ]
    assert report.num_errors == 1  # a shared video is a warning


def test_the_same_file_under_two_names_is_one_video(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "a.mp4").touch()
    os.symlink(tmp_path / "a.mp4", tmp_path / "test" / "z.mp4")
    test = write(tmp_path / "test" / "test.jsonl", [GOOD | {"video": "z.mp4"}])
    report = validate([write(tmp_path / "train.jsonl", [GOOD])], against=[test])
    assert report.counts == {"shared_pair": 1, "shared_video": 1}


# ---- videos


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a.mp4 of 4 s, a broken file and an empty one."""
    from utils.video import write_mp4

    folder = tmp_path_factory.mktemp("videos")
    frames = np.zeros((20, 32, 32, 3), np.uint8)
    frames[:, :, :, 0] = np.arange(0, 200, 10, dtype=np.uint8)[:, None, None]
    write_mp4(folder / "a.mp4", frames, fps=5)
    (folder / "broken.mp4").write_bytes(b"not a video" * 99)
    (folder / "empty.mp4").touch()
    return folder


def row_on(video: str, duration: float, **fields: Any) -> dict[str, Any]:
    return {
        "video": video,
        "duration": duration,
        "timestamp": [0, 1],
        "sentence": f"{video} {duration} {fields}",
    } | fields


def test_probing_finds_missing_unreadable_and_wrong_length(videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        row_on("a.mp4", 4.0),
        row_on("a.mp4", 4.4),
        row_on("a.mp4", 4.6),
        row_on("a.mp4", 3.0),
        row_on("nowhere.mp4", 4.0),
        row_on("broken.mp4", 4.0),
        row_on("empty.mp4", 4.0),
        row_on("a.mp4", 2.0, video_start=1, video_end=3),
        row_on("a.mp4", 2.0, video_start=3, video_end=5),
        row_on("a.mp4", 2.0, video_start=2.4, video_end=4.4),
    ]
    path = write(videos / "rows.jsonl", rows)
    assert kinds_of(path, skip_videos=True) == []
    assert kinds_of(path, probe_videos=False) == [(5, "missing_video")]
    found = kinds_of(path, probe_videos=True)
    assert found == [
        (3, "duration_mismatch"),
        (4, "duration_mismatch"),
        (5, "missing_video"),
        (6, "unreadable_video"),
        (7, "unreadable_video"),
        (9, "trim_outside_file"),
    ]
    assert "3/3" in capsys.readouterr().err  # each video that is there once, with a progress bar
    assert [line for line, _ in kinds_of(path, probe_videos=True, tolerance=1.0)] == [5, 6, 7]
    assert (2, "duration_mismatch") in kinds_of(path, probe_videos=True, tolerance=0.1)


def test_every_path_is_looked_up_once(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = str(tmp_path / "gone.mp4")
    there = str(videos / "a.mp4")
    rows = [row_on(name, 4.0, timestamp=[0, end]) for name in (there, gone) for end in (1, 2, 3)]
    path = write(tmp_path / "rows.jsonl", rows)
    asked: list[str] = []
    exists = os.path.exists
    monkeypatch.setattr("utils.data_validation.os.path.exists", lambda name: asked.append(str(name)) or exists(name))
    assert kinds_of(path, probe_videos=False) == [(4, "missing_video"), (5, "missing_video"), (6, "missing_video")]
    assert asked == [there, gone]


def test_probing_tells_cut_files_from_whole_ones(videos: Path) -> None:
    path = write(videos / "cut.jsonl", [row_on("a.mp4", 4.0, video_start=50, video_end=54)])
    assert kinds_of(path) == []
    found = validate([path], options=Options(probe_videos=True))
    assert found.readings == {"trimmed": 1, "relative": 0, "absolute": 0, "pre_cut": 1}
    assert found.counts == {"trim_reading": 1}  # not trim_outside_file as well
    assert kinds_of(path, probe_videos=True, trim="pre_cut") == []


def test_names_no_file_can_have_are_missing_videos(tmp_path: Path) -> None:
    names = ["x" * 300, "~nobody-here/a.mp4", "a\0.mp4", "\ud83d.mp4"]
    path = write(tmp_path / "rows.jsonl", [row_on(name, 4.0) | {"sentence": "x"} for name in names])
    for probe in (False, True):
        found = kinds_of(path, probe_videos=probe)
        assert found == [(1, "missing_video"), (2, "missing_video"), (3, "bad_text"), (4, "bad_text")]


def test_videos_root(videos: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [row_on("a.mp4", 4.0)])
    assert kinds_of(path, probe_videos=True) == [(1, "missing_video")]
    assert kinds_of(path, probe_videos=True, videos_root=videos) == []


# ---- repairs


def run_fix(tmp_path: Path, records: Iterable[Any], *policies: str, extra: Iterable[str] = ()) -> tuple[int, list[str]]:
    path, out = write(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl"
    before = path.read_bytes()
    command = ["--annotations", str(path), "--fix", str(out), "--skip_videos", "--policy", *policies, *extra]
    status = main(command)
    assert path.read_bytes() == before
    return status, out.read_text().splitlines()


def stamps(lines: list[str]) -> list[Any]:
    return [json.loads(line)["timestamp"] for line in lines]


def test_fix_clips_swaps_and_drops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        GOOD,
        GOOD | {"timestamp": [[-1, 2], [28, 40]]},
        GOOD | {"timestamp": [9, 5]},
        "{broken",
        GOOD | {"timestamp": [40, 20]},
        GOOD | {"sentence": " a dog "},
    ]
    report = tmp_path / "report.json"
    policies = [
        "negative_start=clip",
        "end_past_duration=clip",
        "start_ge_end=swap",
        "bad_json=drop",
        "outer_space=clip",
    ]
    status, lines = run_fix(tmp_path, records, *policies, extra=["--report", str(report)])
    assert status == 0
    assert stamps(lines) == [[1, 4.5], [[0.0, 2.0], [28.0, 30.0]], [5.0, 9.0], [20.0, 30.0], [1.0, 4.5]]
    assert lines[0] == json.dumps(NORMAL)  # an untouched row too is written in the normal form
    assert json.loads(lines[-1])["sentence"] == "a dog"
    assert read_rows(tmp_path / "out.jsonl")[1] == []
    value = json.loads(report.read_text())
    assert value["rows"] == 6 and value["counts"]["start_ge_end"] == 2
    assert value["fix"]["changed"] == {
        "negative_start": 1,
        "end_past_duration": 2,
        "start_ge_end": 2,
        "outer_space": 1,
    }
    assert value["fix"]["dropped"] == {"bad_json": 1} and value["fix"]["left"] == {}
    assert [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  start_ge_end")] == [
        ["start_ge_end", "swap", "2", "0", "0"]
    ]


def test_fix_writes_every_row_with_the_same_fields(tmp_path: Path) -> None:
    records = [
        GOOD,
        trimmed(5, 35, [2, 1], kwargs=None),
        GOOD | {"timestamp": [[9, 12], [2, 5]], "kwargs": {"qid": 1}},
        {"sentence": "turned round", "timestamp": [], "duration": 30, "video": "b.mp4"},
        GOOD | {"timestamp": [7, 7]},  # left as it is: no policy mends it
        GOOD | {"sentence": " a dog", "video_end": 31},
    ]
    status, lines = run_fix(tmp_path, records, "outer_space=clip", "start_ge_end=swap")
    assert status == 1 and [list(json.loads(line)) for line in lines] == [list(FIELDS)] * 6
    assert stamps(lines) == [[1.0, 4.5], [1.0, 2.0], [[2.0, 5.0], [9.0, 12.0]], [], [7.0, 7.0], [1.0, 4.5]]
    (tmp_path / "left.jsonl").write_text("\n".join(lines[:4] + lines[5:]))
    write_rows(tmp_path / "again.jsonl", read_rows(tmp_path / "left.jsonl")[0])
    assert (tmp_path / "again.jsonl").read_text().splitlines() == lines[:4] + lines[5:]


def test_fix_leaves_what_no_policy_names_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = ["{broken", GOOD | {"timestamp": [5, 5]}, GOOD | {"timestamp": [31, 40]}, GOOD | {"timestamp": [29, 40]}]
    status, lines = run_fix(tmp_path, records, "start_ge_end=swap", "end_past_duration=clip")
    assert status == 1
    assert lines[0] == "{broken" and stamps(lines[1:]) == [[5, 5], [31, 40], [29.0, 30.0]]
    table = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert ["bad_json", "-", "0", "0", "1"] in table
    assert ["start_ge_end", "swap", "0", "0", "1"] in table
    assert ["end_past_duration", "clip", "1", "0", "1"] in table
    assert ["window_outside", "-", "0", "0", "1"] in table


def test_fix_drops_what_a_repair_brings_out(tmp_path: Path) -> None:
    records = [GOOD | {"timestamp": [20, 30]}, GOOD | {"timestamp": [20, 40]}, GOOD | {"timestamp": [33, 31]}]
    policies = ["end_past_duration=clip", "start_ge_end=swap", "window_outside=drop", "duplicate_row=drop"]
    status, lines = run_fix(tmp_path, records, *policies)
    assert status == 0 and stamps(lines) == [[20, 30]]


def test_fix_keeps_one_of_two_twins(tmp_path: Path) -> None:
    records = [GOOD | {"sentence": " a dog"}, GOOD | {"sentence": "a dog"}]
    for policy, kept in (("outer_space=drop", ["a dog"]), ("outer_space=clip", ["a dog"])):
        status, lines = run_fix(tmp_path, records, policy, "duplicate_row=drop")
        assert status == 0 and [json.loads(line)["sentence"] for line in lines] == kept


def test_fix_on_the_files_clock(tmp_path: Path) -> None:
    records = [trimmed(50, 80, [49.8, 60]), trimmed(50, 80, [70, 80.3]), trimmed(50, 80, [5, 10])]
    policies = ["start_before_clip=clip", "end_past_duration=clip", "trim_reading=drop"]
    status, lines = run_fix(tmp_path, records, *policies, extra=["--trim", "absolute"])
    assert status == 0 and stamps(lines) == [[50.0, 60.0], [70.0, 80.0]]


def test_fix_keeps_the_users_fields(tmp_path: Path) -> None:
    kwargs = {"difficulty": 3, "b": [1, {"c": None}]}
    _, lines = run_fix(tmp_path, [GOOD | {"timestamp": [9, 5], "kwargs": kwargs}], "start_ge_end=swap")
    assert json.loads(lines[0])["kwargs"] == kwargs


def test_fix_never_touches_an_input(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [GOOD | {"timestamp": [9, 5]}])
    os.link(path, tmp_path / "again.jsonl")
    for out in (path, tmp_path / "." / "in.jsonl", tmp_path / "again.jsonl"):
        with pytest.raises(UserError, match="this is an input"):
            main(["--annotations", str(path), "--fix", str(out), "--policy", "start_ge_end=swap"])
    with pytest.raises(UserError, match="--report .*this is an input"):
        main(["--annotations", str(path), "--report", str(path)])
    with pytest.raises(UserError, match="the policies drop every row; nothing is written"):
        main(["--annotations", str(path), "--fix", str(tmp_path / "o.jsonl"), "--policy", "start_ge_end=drop"])
    assert not (tmp_path / "o.jsonl").exists()


def test_fix_into_another_folder_says_that_paths_move(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.mp4").touch()
    path = write(tmp_path / "in.jsonl", [GOOD | {"timestamp": [9, 5]}])
    command = ["--annotations", str(path), "--policy", "start_ge_end=swap", "--fix"]
    main([*command, str(tmp_path / "out.jsonl")])
    assert "note:" not in capsys.readouterr().out
    main([*command, str(tmp_path / "sub" / "out.jsonl")])
    assert f"note: 1 relative video paths count from {tmp_path}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("bad_json=clip", "bad_json can be mended by drop only, got 'clip'"),
        ("start_ge_end=clip", "by drop or swap only, got 'clip'"),
        ("start_ge_end", "by drop or swap only, got ''"),
        ("start_ge_ende=swap", "did you mean start_ge_end?"),
        ("negative_start=swap", "Every kind can be dropped; the others are: outer_space=clip, start_ge_end=swap"),
    ],
)
def test_policies_that_make_no_sense_are_refused(policy: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_policies([policy])
    assert says in str(caught.value)


def test_every_kind_can_be_dropped() -> None:
    assert parse_policies([f"{kind}=drop" for kind in KINDS]) == dict.fromkeys(KINDS, "drop")
    with pytest.raises(UserError, match="already has the policy drop"):
        parse_policies(["start_ge_end=drop", "start_ge_end=swap"])


# ---- command line


def run_command_line(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "utils.data_validation", *args]
    return subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=60)


def test_exit_status_and_no_traceback(tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good.jsonl", [GOOD]), write(tmp_path / "bad.jsonl", [GOOD | {"x": 1}])
    missing = run_command_line("--annotations", str(good))
    assert missing.returncode == 1
    assert f"{good}:1: no such video: {tmp_path / 'a.mp4'}" in missing.stdout and "--skip_videos" in missing.stdout
    skipped = run_command_line("--annotations", str(good), "--skip_videos")
    assert skipped.returncode == 0, skipped.stderr
    assert skipped.stdout.splitlines()[-1] == "clean (the videos were not looked for)"
    (tmp_path / "a.mp4").touch()
    clean = run_command_line("--annotations", str(good), "--report", str(tmp_path / "r.json"))
    assert clean.returncode == 0, clean.stderr
    assert clean.stdout.splitlines()[0] == "1 rows, 1 videos"
    assert clean.stdout.splitlines()[-1] == "clean (the videos were not opened; --probe_videos does)"
    assert json.loads((tmp_path / "r.json").read_text())["problems"] == []
    faulty = run_command_line("--annotations", str(good), "--annotations", str(bad))
    assert faulty.returncode == 1
    assert f"{bad}:1: `x` is not a field of a row" in faulty.stdout
    missing = run_command_line("--annotations", str(tmp_path / "god.jsonl"))
    assert missing.returncode == 2
    assert (
        missing.stderr.startswith("error: ") and "did you mean" in missing.stderr and "Traceback" not in missing.stderr
    )


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--fix", "o.jsonl"], "needs at least one --policy"),
        (["--policy", "bad_json=drop"], "give --fix"),
        (["--annotations", "b", "--fix", "o", "--policy", "bad_json=drop"], "one file at a time, got 2"),
        (["--tolerance", "-1"], "--tolerance must be >= 0 s, got -1.0"),
        (["--tolerance", "nan"], "--tolerance must be >= 0 s, got nan"),
        (["--report", "."], "--report .: cannot be written"),
        (["--report", f"{__file__}/r.json"], "cannot be written"),
        (["--fix", "o", "--report", "./o", "--policy", "bad_json=drop"], "are both o"),
    ],
)
def test_usage_errors(args: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        main(["--annotations", "a", *args])
    assert says in str(caught.value)


def test_videos_cannot_be_both_opened_and_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--annotations", "a", "--probe_videos", "--skip_videos"])
    assert ended.value.code == 2
    assert "argument --skip_videos: not allowed with argument --probe_videos" in capsys.readouterr().err


def test_report_lists_every_problem_and_the_screen_only_examples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD | {"duration": None}] * 9 + [GOOD])
    command = ["--annotations", str(path), "--report", str(tmp_path / "r.json"), "--max_examples", "2"]
    status = main([*command, "--skip_videos"])
    shown = capsys.readouterr().out
    assert status == 1 and shown.count("`duration` must be") == 2 and "      9  wrong_type" in shown
    value = json.loads((tmp_path / "r.json").read_text())
    assert (value["rows"], value["videos"], value["counts"], len(value["problems"])) == (10, 1, {"wrong_type": 9}, 9)
    assert value["problems"][0] == {
        "file": str(path),
        "line": 1,
        "kind": "wrong_type",
        "level": "error",
        "message": "`duration` must be a number of seconds without quotes, got null",
    }


# ---- the real files


def charades(split: str) -> list[dict[str, Any]]:
    folder = ANNOTATIONS / "charades_sta"
    if not folder.exists():
        pytest.skip(f"the public annotations are not there: {folder}")
    with open(folder / f"Charades_v1_{split}.csv", newline="") as handle:
        duration = {row["id"]: float(row["length"]) for row in csv.DictReader(handle)}
    rows = []
    for line in (folder / f"charades_sta_{split}.txt").read_text().splitlines():
        head, sentence = line.split("##")
        video, start, end = head.split()
        row = {"video": f"{video}.mp4", "duration": duration[video], "timestamp": [float(start), float(end)]}
        rows.append(row | {"sentence": sentence})
    return rows


@pytest.mark.parametrize(
    ("split", "rows", "counts"),
    [
        ("test", 3720, {"end_past_duration": 562}),
        ("train", 12408, {"start_ge_end": 4, "end_past_duration": 1805}),
    ],
)
def test_charades_sta_counts(tmp_path: Path, split: str, rows: int, counts: dict[str, int]) -> None:
    report = validate([write(tmp_path / f"{split}.jsonl", charades(split))], options=SKIP)
    assert (report.num_rows, report.counts) == (rows, counts)


def test_tacos_duplicates(tmp_path: Path) -> None:
    path = ANNOTATIONS / "tacos" / "val.json"
    if not path.exists():
        pytest.skip(f"the public annotations are not there: {path}")
    rows = []
    for video, item in json.loads(path.read_text()).items():
        for frames, sentence in zip(item["timestamps"], item["sentences"], strict=True):
            stamp = [frame / item["fps"] for frame in frames]
            rows.append({"video": video, "duration": item["num_frames"] / item["fps"], "timestamp": stamp})
            rows[-1]["sentence"] = sentence
    report = validate([write(tmp_path / "val.jsonl", rows)], options=SKIP)
    distinct = {(row["video"], tuple(row["timestamp"]), row["sentence"]) for row in rows}
    assert report.num_rows == 4436 and report.counts["duplicate_row"] == 4436 - len(distinct) == 516
