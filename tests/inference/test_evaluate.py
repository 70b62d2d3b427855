"""The evaluator: what it asks, what it refuses, what it stores, and that a stop or more processes change nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import inference.evaluate
from inference.eval_answers import answer
from inference.eval_queries import load_queries, plan_rounds
from inference.eval_report import summarise
from inference.evaluate import main
from inference.video_infer import VideoTemporalInference
from tests.tiny import tiny_checkpoint
from trainers.shared_prefix import backbone_of
from utils.common import REPO_ROOT, UserError
from utils.config import DataConfig, DataFile, PromptConfig, load_config, save_config
from utils.rows import read_rows, write_rows

ANSWERS = ("From 1.0 to 3.0 seconds.", "From 4.0 to 8.0 seconds.", "no idea", "The event does not happen in the video.")


@pytest.fixture
def annotations(demo_data: Path, tmp_path: Path) -> Path:
    """Twelve queries on six videos: qids q0, q1, ...; two labelled absent, two (q10, q11) not labelled."""
    rows = read_rows(demo_data / "train.jsonl")[0][:12]
    rows = [
        replace(row, video=str(demo_data / row.video), kwargs={"qid": f"q{i}", "difficulty": i % 2, "tag": "ab"[i % 2]})
        for i, row in enumerate(rows)
    ]
    rows[4], rows[5] = (replace(row, timestamp=()) for row in rows[4:6])
    rows[10], rows[11] = (replace(row, timestamp=None) for row in rows[10:])
    write_rows(tmp_path / "test.jsonl", rows)
    return tmp_path / "test.jsonl"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """In the place of the model: the answer of row i is `ANSWERS[i % 4]`. Gives the places of each batch."""
    calls: list[list[int]] = []

    def answer(_engine: Any, dataset: Any, rounds: Sequence[list[list[int]]], *_: Any) -> Iterator[tuple[Any, Any]]:
        for batch in [batch for batches in rounds for batch in batches]:
            calls.append(batch)
            faults = []
            for place in batch:
                if not Path(dataset.rows[place].video).exists():
                    faults.append((place, f"{dataset.rows[place].video}: gone"))
            unread = dict(faults)
            yield {place: "" if place in unread else ANSWERS[place % 4] for place in batch}, faults

    monkeypatch.setattr(inference.evaluate, "answer", answer)
    monkeypatch.setattr(inference.evaluate, "VideoTemporalInference", lambda *_a, **_k: SimpleNamespace(processor=None))
    return calls


@pytest.fixture
def command(tiny_model: Path, annotations: Path, tmp_path: Path) -> list[str]:
    files = ["--annotations", str(annotations), "--output_dir", str(tmp_path / "eval")]
    return ["--model_path", str(tiny_model), *files, "--batch_size", "3", "--num_workers", "0"]


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def predictions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def write_predictions(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# ---- a run


def test_what_a_run_leaves(
    command: list[str], asked: list[list[int]], annotations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*command, "--by", "tag"])
    rows = read_rows(annotations)[0]
    assert sorted(place for batch in asked for place in batch) == list(range(10))
    assert [len(batch) for batch in asked] == [2, 2, 2, 2, 2]  # a video's queries are never parted for a full batch
    stored = predictions(tmp_path / "eval")
    assert [record["qid"] for record in stored] == [f"q{i}" for i in range(10)]
    assert [record["text"] for record in stored] == [ANSWERS[i % 4] for i in range(10)]
    assert stored[0]["pred"] == stored[0]["segments"] == [[1.0, 3.0]]
    assert stored[2]["pred"] is None and stored[3]["pred"] == [] and stored[2]["segments"] == []
    assert stored[0]["gt"] == [list(window) for window in rows[0].timestamp or ()]
    assert (stored[6]["line"], stored[6]["video"], stored[6]["fault"]) == (7, rows[6].video, None)
    found = metrics(tmp_path / "eval")
    counts = found["counts"]
    assert (counts["num_samples"], counts["num_grounded"], counts["num_absent"]) == (10, 8, 2)
    assert (counts["num_unlabelled"], counts["num_parse_failures"], counts["num_unreadable"]) == (2, 2, 0)
    assert found["averages"]["parse_failure_rate"] == 20.0 and found["averages"]["absent_accuracy"] == 0.0
    low, high = found["intervals"]["mIoU"]
    assert low < found["averages"]["mIoU"] < high
    assert set(found["protocols"]) == {"default", "moment_detr", "timelens", "time_r1"}
    assert found["protocols"]["default"] == found["averages"]
    assert set(found["baselines"]) == {"whole_video", "centre", "best_constant"}
    assert set(found["breakdowns"]) == {"duration", "window_length", "position", "kwargs.difficulty", "kwargs.tag"}
    tags = found["breakdowns"]["kwargs.tag"]
    assert list(tags) == ["a", "b"] and tags["a"]["num_samples"] == tags["b"]["num_samples"] == 5
    assert tags["a"]["parse_failure_rate"] == 40.0 and tags["b"]["parse_failure_rate"] == 0.0
    assert [group["num_samples"] for group in found["breakdowns"]["kwargs.difficulty"].values()] == [5, 5]
    assert sum(group["num_grounded"] for group in found["breakdowns"]["position"].values()) == 8
    out = capsys.readouterr().out
    assert out.startswith("protocol default; 10 samples, 8 grounded, 2 absent")
    assert "by kwargs.tag" in out and "best constant (" in out and f"{found['averages']['mIoU']:.1f}" in out


def test_queries_of_a_video_stand_together(command: list[str], asked: list[list[int]], annotations: Path) -> None:
    rows = read_rows(annotations)[0]
    shuffled = [rows[place] for place in (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)]
    write_rows(annotations, shuffled)
    main([*command, "--batch_size", "2"])
    videos = [[shuffled[place].video for place in batch] for batch in asked]
    together = sum(len(set(batch)) == 1 for batch in videos)
    assert together == len({row.video for row in rows[:10]}) == len(videos)


def test_what_is_asked_together(annotations: Path) -> None:
    """Whole clips up to the size of a batch; a clip of more queries in equal batches of one round; stretches of a file
    are clips of their own; what is done leaves the other batches as they are."""
    rows = read_rows(annotations)[0][:10]
    a, b = rows[0].video, rows[2].video
    videos = [a, b, a, a, b, a, b, a, "c.mp4", "c.mp4"]
    rows = [replace(row, video=video, timestamp=()) for row, video in zip(rows, videos, strict=True)]
    rows[9] = replace(rows[9], video_start=0.0, video_end=4.0, duration=4.0)
    write_rows(annotations, rows)
    queries = load_queries(annotations, DataConfig(), PromptConfig())
    assert plan_rounds(queries, 3) == [
        [["q0", "q2", "q3"], ["q5", "q7"]],
        [["q1", "q4", "q6"]],
        [["q8", "q9"]],
    ]
    assert plan_rounds(queries, 4)[1:] == [[["q1", "q4", "q6", "q8"]], [["q9"]]]
    assert plan_rounds(queries, 100) == [[["q0", "q2", "q3", "q5", "q7", "q1", "q4", "q6", "q8", "q9"]]]
    assert plan_rounds(queries, 3, done={"q0", "q2", "q3", "q4"}) == [[["q5", "q7"]], [["q1", "q6"]], [["q8", "q9"]]]
    assert plan_rounds(queries, 3, done=set(queries.chosen)) == []


@pytest.mark.parametrize(
    ("values", "groups"),
    [
        ([None] * 60, None),  # the key is there, and never filled in
        ([f"word {i}" for i in range(60)], None),  # too many groups
        ([10**400 + i for i in range(60)], None),
        ([i % 3 / 4 if i % 3 else float("nan") for i in range(60)], ["0.25", "0.5", "(none)"]),
        ([i / 60 for i in range(60)], ["0-0.197", "0.197-0.393", "0.393-0.59", "0.59-0.787", "0.787-0.983"]),
        ([i - 9.0 for i in range(11)], ["-9 to -7", "-7 to -5", "-5 to -3", "-3 to -1", "-1 to 1"]),
        ([(-2, -10, 1e-05, 3)[i % 4] for i in range(60)], ["-10", "-2", "1e-05", "3"]),
    ],
)  # fmt: skip
def test_a_breakdown_that_nobody_asked_for_costs_no_result(values: list[Any], groups: list[str] | None) -> None:
    """Rows with a `difficulty` that no breakdown can be made of are scored all the same; asked for, it is refused."""
    windows = {"gt": [[0, 5]], "pred": [[0, 5]], "duration": 60}
    samples = [{"qid": i, **windows, "kwargs": {"difficulty": value}} for i, value in enumerate(values)]
    found = summarise(samples, "default")
    assert found["averages"]["mIoU"] == 100.0
    if groups is None:
        assert "kwargs.difficulty" not in found["breakdowns"]
        with pytest.raises(UserError, match="--by difficulty"):
            summarise(samples, "default", ["difficulty"])
    else:
        assert list(found["breakdowns"]["kwargs.difficulty"]) == groups
        assert found["breakdowns"] == summarise(samples, "default", ["difficulty"])["breakdowns"]


def test_a_protocol_rescores_what_is_stored(command: list[str], asked: list[list[int]], tmp_path: Path) -> None:
    main(command)
    averages = metrics(tmp_path / "eval")["protocols"]["time_r1"]
    asked.clear()
    main([*command, "--protocol", "time_r1"])
    assert asked == []
    found = metrics(tmp_path / "eval")
    assert found["protocol"] == "time_r1" and found["averages"] == averages
    assert averages["mAP"] is None and found["intervals"]["mAP"] == [None, None]


def test_fewer_queries_first_then_all(command: list[str], asked: list[list[int]], tmp_path: Path) -> None:
    main([*command, "--max_samples", "4"])
    assert sorted(place for batch in asked for place in batch) == [0, 3, 6, 9]
    assert metrics(tmp_path / "eval")["counts"]["num_samples"] == 4
    asked.clear()
    main(command)
    assert sorted(place for batch in asked for place in batch) == [1, 2, 4, 5, 7, 8]
    everything = predictions(tmp_path / "eval")
    main([*command, "--max_samples", "4"])
    assert metrics(tmp_path / "eval")["counts"]["num_samples"] == 4
    assert predictions(tmp_path / "eval") == everything and len(everything) == 10  # no answer is lost


def test_half_a_line_is_dropped_and_answered_again(command: list[str], asked: list[list[int]], tmp_path: Path) -> None:
    main(command)
    whole = predictions(tmp_path / "eval"), metrics(tmp_path / "eval")
    log = tmp_path / "eval" / "predictions.rank0.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    for name in ("predictions.jsonl", "metrics.json"):
        (tmp_path / "eval" / name).unlink()
    asked.clear()
    main(command)
    assert [len(batch) for batch in asked] == [1, 2, 2]
    assert log.read_bytes().splitlines(keepends=True)[:5] == lines[:5]
    assert sorted(log.read_bytes().splitlines()) == sorted(line.strip() for line in lines)
    assert (predictions(tmp_path / "eval"), metrics(tmp_path / "eval")) == whole


def test_answers_of_several_processes_are_one_result(
    command: list[str], asked: list[list[int]], tmp_path: Path
) -> None:
    main(command)
    whole = predictions(tmp_path / "eval"), metrics(tmp_path / "eval")
    log = tmp_path / "eval" / "predictions.rank0.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[1::2]))
    (tmp_path / "eval" / "predictions.rank3.jsonl").write_bytes(b"".join(lines[::2][::-1]))
    asked.clear()
    main(command)
    assert asked == []
    assert (predictions(tmp_path / "eval"), metrics(tmp_path / "eval")) == whole


# ---- scoring a file


def test_predictions_are_scored_without_a_model(annotations: Path, tmp_path: Path) -> None:
    rows = read_rows(annotations)[0]
    perfect = [{"qid": f"q{i}", "pred": [list(w) for w in row.timestamp or ()]} for i, row in enumerate(rows)]
    path = write_predictions(tmp_path / "p.jsonl", perfect[::-1])
    flags = ["--predictions", str(path), "--annotations", str(annotations)]
    main(flags)
    main([*flags, "--output_dir", str(tmp_path / "eval")])
    averages = metrics(tmp_path / "eval")["averages"]
    assert {averages[name] for name in ("mIoU", "R1@0.7", "mAP", "set_IoU", "absent_accuracy")} == {100.0}
    assert len(predictions(tmp_path / "eval")) == 10


def test_what_an_evaluation_wrote_can_be_scored_again(annotations: Path, tmp_path: Path) -> None:
    """JSON has no NaN: a time and a score that were none stand there as null."""
    flags = scored(annotations, lambda s, e: [s, e, 0.5], tmp_path / "p.jsonl")
    records = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    records[0]["pred"], records[1]["pred"][0][2] = [[float("nan"), 3.0, float("nan")]], float("nan")
    write_predictions(tmp_path / "p.jsonl", records)
    main([*flags, "--output_dir", str(tmp_path / "first")])
    assert predictions(tmp_path / "first")[0]["pred"] == [[None, 3.0, None]]
    again = ["--predictions", str(tmp_path / "first/predictions.jsonl"), "--annotations", str(annotations)]
    main([*again, "--output_dir", str(tmp_path / "again")])
    assert metrics(tmp_path / "again") == metrics(tmp_path / "first")
    assert metrics(tmp_path / "again")["averages"]["R1@0.7"] == 87.5


def test_predictions_in_other_words(annotations: Path, tmp_path: Path) -> None:
    """QVHighlights' key and plain text, and a query without a line."""
    rows = read_rows(annotations)[0]
    (start, end), *_ = rows[1].timestamp or ()
    records = [
        {"qid": "q0", "text": "between 1 and 3 seconds"},
        {"qid": "q1", "pred_relevant_windows": [[start, end, 0.2], [0.0, 1.0, 0.9]]},
    ]
    path = write_predictions(tmp_path / "p.jsonl", records)
    flags = ["--predictions", str(path), "--annotations", str(annotations), "--output_dir", str(tmp_path / "eval")]
    with pytest.raises(UserError, match="8 of 10 queries have no prediction, .* the first: 'q2'"):
        main(flags)
    main([*flags, "--max_bad_fraction", "1"])
    found = metrics(tmp_path / "eval")
    assert found["counts"]["num_unanswered"] == 8 and found["counts"]["num_parse_failures"] == 8
    stored = predictions(tmp_path / "eval")
    assert stored[0]["pred"] == [[1.0, 3.0]] and stored[1]["segments"] == [[start, end, 0.2], [0.0, 1.0, 0.9]]
    assert found["protocols"]["moment_detr"]["mIoU"] > found["protocols"]["default"]["mIoU"]  # it takes the first


def scored(annotations: Path, windows: Callable[[float, float], Any], path: Path) -> list[str]:
    """Flags to score predictions made from the labels by `windows(start, end)`."""
    records = [
        {"qid": f"q{i}", "pred": [windows(*window) for window in row.timestamp or ()]}
        for i, row in enumerate(read_rows(annotations)[0])
    ]
    return ["--predictions", str(write_predictions(path, records)), "--annotations", str(annotations)]


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (lambda s, e: [1000 * s + 100, 1000 * e], "windows end past 10 times their video: these look like millisec"),
        (lambda s, e: [24 * s + 24, 24 * e + 24], "8 of 8 windows begin after the end of their video: these"),
        (lambda s, e: [12.5 * s, 12.5 * e], "windows begin after the end of their video: .* or per cent"),
        (lambda s, e: [s / 8, e / 8], "all 8 windows lie between 0 and 1, on videos of more than 5 s"),
    ],
)
def test_other_units_are_refused(windows: Any, message: str, annotations: Path, tmp_path: Path) -> None:
    flags = scored(annotations, windows, tmp_path / "p.jsonl")
    with pytest.raises(UserError, match=message):
        main(flags)
    main([*flags, "--trust_units", "--output_dir", str(tmp_path / "eval")])
    assert metrics(tmp_path / "eval")["averages"]["R1@0.7"] == 0.0


def test_other_units_among_the_seconds_are_counted_by_name(annotations: Path, tmp_path: Path) -> None:
    flags = scored(annotations, lambda s, e: [s, e], tmp_path / "p.jsonl")
    records = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    for place in (3, 7):
        records[place]["pred"] = [[1000 * s + 100, 1000 * e] for s, e in records[place]["pred"]]
    write_predictions(tmp_path / "p.jsonl", records)
    main([*flags, "--output_dir", str(tmp_path / "eval")])
    assert metrics(tmp_path / "eval")["counts"]["num_far_outside"] == 2
    assert metrics(tmp_path / "eval")["averages"]["R1@0.7"] == 75.0
    log = (tmp_path / "eval/log.txt").read_text()
    assert "2 predicted windows begin after the end of their video or end past ten times it" in log
    assert "qids: q3, q7\n" in log


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"qid": "q0", "pred": []}, {"qid": "x9", "pred": []}], "1 qids are not in the annotations: 'x9'"),
        ([{"qid": "q0", "pred": []}, {"qid": "q0", "pred": []}], r"p.jsonl:2: qid 'q0' stands in line 1 already"),
        ([{"pred": []}], "p.jsonl:1 has no qid"),
        ([{"qid": "q0"}], "p.jsonl:1 has none of pred, pred_relevant_windows, text"),
        ([{"qid": "q0", "pred": [[1, "b"]]}], "p.jsonl:1: sample 'q0': pred must be a list of"),
        ([{"qid": "q0", "pred": [[1, 2, 0.5], [3, 4]]}], "p.jsonl:1: sample 'q0': some windows of pred have a score"),
        ([[1]], "p.jsonl:1 has no qid"),
        ([], "holds no line"),
    ],
)
def test_bad_predictions_are_named(records: Any, message: str, annotations: Path, tmp_path: Path) -> None:
    path = write_predictions(tmp_path / "p.jsonl", records)
    with pytest.raises(UserError, match=message):
        main(["--predictions", str(path), "--annotations", str(annotations), "--max_bad_fraction", "1"])


# ---- refusals before a model is loaded


def test_a_folder_of_another_evaluation_is_refused(
    command: list[str],
    asked: list[list[int]],
    annotations: Path,
    demo_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    other_model = tiny_checkpoint(tmp_path_factory, seed=1)
    main(command)
    before = (annotations.parent / "eval/metrics.json").read_bytes()
    demo = str(REPO_ROOT / "configs/demo/video_config.yaml")
    others = {
        r"model: .*tiny_model \([0-9a-f]{8}\) there, .*tiny_model \([0-9a-f]{8}\) now": [
            "--model_path",
            str(other_model),
        ],
        "annotations: test.jsonl .* there, val.jsonl": ["--annotations", str(demo_data / "val.jsonl")],
        "max_new_tokens: 64 there, 9 now": ["--max_new_tokens", "9"],
        "dtype: float32 there, bfloat16 now": ["--dtype", "bfloat16"],
        "data.trim: relative there, absolute now": ["--trim", "absolute"],
    }
    for message, flags in others.items():
        with pytest.raises(UserError, match=message):
            main([*command, *flags])
    other_words = annotations.parent / "data.yaml"
    other_words.write_text(Path(demo).read_text().replace('"When {sentence}?"', '"Where is {sentence}?"'))
    with pytest.raises(UserError, match=r"prompt.question: .* there, Where is {sentence}\? now"):
        main([*command, "--data_config", str(other_words)])
    assert (annotations.parent / "eval/metrics.json").read_bytes() == before


def test_a_folder_in_use_is_refused(command: list[str], asked: list[list[int]], tmp_path: Path) -> None:
    with inference.evaluate.claimed(tmp_path / "eval"), pytest.raises(UserError, match="another evaluation is running"):
        main(command)
    main(command)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--by", "tagg"], "--by tagg: no row has it in kwargs; did you mean tag"),
        (["--protocol", "timelense"], "unknown protocol 'timelense'; .*did you mean timelens"),
        (["--batch_size", "0"], "--batch_size must be >= 1, got 0"),
        (["--max_bad_fraction", "2"], "--max_bad_fraction must lie between 0 and 1"),
        (["--predictions", "p.jsonl"], "give either --model_path or --predictions"),
        (["--model_path", "./none"], "model path './none' does not exist"),
        (["--annotations", "none.jsonl"], "none.jsonl: no such annotation file"),
    ],
)
def test_bad_flags_are_refused(flags: list[str], message: str, command: list[str], asked: list[list[int]]) -> None:
    with pytest.raises(UserError, match=message):
        main([*command, *flags])
    assert asked == []


def test_qids_that_two_rows_share_are_refused(command: list[str], asked: list[list[int]], annotations: Path) -> None:
    rows = read_rows(annotations)[0]
    rows[3].kwargs["qid"] = "q1"
    write_rows(annotations, rows)
    with pytest.raises(UserError, match="test.jsonl:4: qid 'q1' belongs to line 2 already"):
        main(command)
    for row in rows:
        del row.kwargs["qid"]
    write_rows(annotations, rows)
    main(command)
    assert [r["qid"] for r in predictions(annotations.parent / "eval")] == [str(line) for line in range(1, 11)]


def test_windows_that_training_refuses_are_scored_as_they_are(
    annotations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in TVGBench (windows of no length) and NExT-GQA (starts before 0): published scores are over all rows."""
    lines = [json.loads(line) for line in annotations.read_text().splitlines()][:4]
    windows = [[2.0, 2.0], [6.0, 4.0], [-2.0, 2.0], [1.0, 3.0]]
    rows = [line | {"timestamp": window} for line, window in zip(lines, windows, strict=True)]
    write_predictions(annotations, rows)
    given = [{"qid": f"q{i}", "pred": [window]} for i, window in enumerate(([2, 2], [4, 6], [0, 2], [1, 3]))]
    path = write_predictions(tmp_path / "given.jsonl", given)
    main(["--predictions", str(path), "--annotations", str(annotations), "--output_dir", str(tmp_path / "eval")])
    found = metrics(tmp_path / "eval")
    assert (found["counts"]["num_samples"], found["counts"]["num_bad_rows"]) == (4, 0)
    assert found["averages"]["mIoU"] == 100 * (0 + 0 + 0.5 + 1) / 4 and found["averages"]["R1@0.5"] == 50.0
    assert [record["gt"] for record in predictions(tmp_path / "eval")] == [[window] for window in windows]
    said = "3 of 4 labelled rows have a window that does not start before it ends or starts before 0"
    assert said in capsys.readouterr().err
    rows[0]["duration"] = -1  # still a bad row
    write_predictions(annotations, rows)
    with pytest.raises(UserError, match="1 of 4 annotation rows are bad .*1 bad_duration"):
        main(["--predictions", str(path), "--annotations", str(annotations)])


def test_a_file_without_labels_is_refused(command: list[str], annotations: Path) -> None:
    write_rows(annotations, [replace(row, timestamp=None) for row in read_rows(annotations)[0]])
    with pytest.raises(UserError, match="no row is labelled"):
        main(command)


def test_missing_videos_are_counted_before_the_model(
    command: list[str], asked: list[list[int]], annotations: Path
) -> None:
    rows = read_rows(annotations)[0]
    write_rows(annotations, [replace(rows[0], video="gone.mp4"), *rows[1:]])
    with pytest.raises(UserError, match="1 videos of 1 of 10 queries do not exist: gone.mp4"):
        main(command)
    assert asked == []
    main([*command, "--max_bad_fraction", "0.1"])
    log = (annotations.parent / "eval/log.txt").read_text()
    assert "1 videos of 1 of 10 queries do not exist: gone.mp4" in log and log.count("left out: gone.mp4") == 1
    found = metrics(annotations.parent / "eval")
    assert found["counts"]["num_unreadable"] == 1 and found["counts"]["num_samples"] == 10
    stored = predictions(annotations.parent / "eval")[0]
    assert stored["pred"] is None and stored["fault"] == "gone.mp4: gone"
    asked.clear()
    main([*command, "--max_bad_fraction", "0.1"])
    assert asked == [[0]]  # it is tried again, and nothing else


def test_videos_deleted_between_runs_are_not_needed(
    command: list[str], asked: list[list[int]], annotations: Path, demo_data: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.mp4"
    rows = read_rows(annotations)[0]
    copy.write_bytes(Path(rows[0].video).read_bytes())
    write_rows(annotations, [replace(rows[0], video=str(copy)), *rows[1:]])
    main(command)
    before = metrics(tmp_path / "eval")
    copy.unlink()
    main(command)
    assert metrics(tmp_path / "eval") == before


# ---- with the model


@pytest.fixture
def launched(tiny_model: Path, annotations: Path) -> Callable[..., list[str]]:
    """`launched(folder, processes)`: a command line that evaluates an untrained model on the CPU."""
    demo = load_config(DataFile, [REPO_ROOT / "configs/demo/video_config.yaml"], ["data.cache_dir=null"])
    save_config(demo, annotations.parent / "demo.yaml")
    flags = ["--model_path", str(tiny_model), "--data_config", str(annotations.parent / "demo.yaml")]
    flags += ["--annotations", str(annotations), "--batch_size", "2", "--num_workers", "1", "--device", "cpu"]

    def make(folder: Path, processes: int = 1) -> list[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        entry = str(REPO_ROOT / "inference/evaluate.py")
        return [sys.executable, *(launcher if processes > 1 else []), entry, *flags, "--output_dir", str(folder)]

    return make


def test_the_model_answers_as_it_does_alone(
    answering_model: Path, annotations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--annotations", str(annotations), "--output_dir", str(tmp_path / "eval"), "--max_samples", "3"]
    main(["--model_path", str(answering_model), *flags, "--num_workers", "0", "--max_new_tokens", "24"])
    engine = inference.evaluate.VideoTemporalInference(answering_model)
    for record in predictions(tmp_path / "eval"):
        alone = engine.predict(record["video"], record["sentence"], max_new_tokens=24)
        assert (record["text"], record["segments"]) == (alone["raw_text"], alone["segments"])
        assert record["pred"]  # it has learnt to answer in windows


@pytest.mark.parametrize("batch_size", [2, 8])
def test_a_clip_is_read_and_seen_once_for_all_its_queries(
    answering_model: Path, annotations: Path, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five queries on one video, two on another and one that cannot be asked: the answers are those of `predict`."""
    rows = read_rows(annotations)[0][:8]
    words = ["the red square appears", "the blue square appears", "it appears", "the square", "red and blue", "blue"]
    sentences = [*words, "see <|video_pad|>", "red"]
    videos = [rows[0].video] * 5 + [rows[2].video] * 3
    rows = [replace(rows[i], video=videos[i], sentence=sentences[i], timestamp=()) for i in range(8)]
    write_rows(annotations, rows)
    engine = VideoTemporalInference(answering_model)
    expected = [engine.predict(row.video, row.sentence)["raw_text"] for row in (*rows[:6], rows[7])]
    reads, passes = [], []
    queries = load_queries(annotations, engine.contract.data, engine.contract.prompt)
    queries.dataset.processor = engine.processor
    decode = queries.dataset.clip
    monkeypatch.setattr(queries.dataset, "clip", lambda row: reads.append(row.video) or decode(row))
    backbone_of(engine.model).visual.register_forward_hook(lambda *_: passes.append(1))
    rounds = [[[queries.places[qid] for qid in batch] for batch in found] for found in plan_rounds(queries, batch_size)]
    texts: dict[int, str] = {}
    faults: dict[int, str] = {}
    for found, unread in answer(engine, queries.dataset, rounds, 64, num_workers=0):
        assert not set(found) & set(texts) and len(found) <= batch_size
        texts |= found
        faults |= dict(unread)
    assert [texts[i] for i in (0, 1, 2, 3, 4, 5, 7)] == expected and len(set(expected)) > 2
    assert list(faults) == [6] and "test.jsonl:7" in faults[6] and "<|video_pad|>" in faults[6] and texts[6] == ""
    readable = [video for video in reads if video == videos[0]]
    assert len(readable) == 1 and len(passes) == 2


@pytest.mark.slow
@pytest.mark.multiprocess
def test_killed_again_and_again_the_result_is_the_same(launched: Callable[..., list[str]], tmp_path: Path) -> None:
    """kill -9 as soon as something new is stored, then another number of processes; one run is left alone."""
    folder, alone = tmp_path / "killed", tmp_path / "alone"
    subprocess.run(launched(alone), check=True, capture_output=True, timeout=600)
    stored = 0
    for _ in range(2):
        process = subprocess.Popen(launched(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 500
        while lines_of(folder) == stored and process.poll() is None and time.monotonic() < until:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() in (0, -signal.SIGKILL)
        assert lines_of(folder) > stored
        stored = lines_of(folder)
    ended = subprocess.run(launched(folder, processes=2), capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert lines_of(folder) == 10  # no answer was made twice
    for name in ("predictions.jsonl", "metrics.json", "run.json"):
        assert (folder / name).read_bytes() == (alone / name).read_bytes(), name


def lines_of(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("predictions.rank*.jsonl"))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_refuse_once(launched: Callable[..., list[str]], tmp_path: Path) -> None:
    command = [*launched(tmp_path / "eval", processes=2), "--by", "nothing"]
    environment = {**os.environ, "TORCHELASTIC_ERROR_FILE": ""}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert ended.returncode != 0
    assert ended.stderr.count("error: --by nothing: no row has it in kwargs") == 1


@pytest.mark.slow
def test_exit_statuses(launched: Callable[..., list[str]], tmp_path: Path) -> None:
    command = [*launched(tmp_path / "eval"), "--batch_size", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 2
    assert ended.stderr.strip().splitlines()[-1] == "error: --batch_size must be >= 1, got 0"
