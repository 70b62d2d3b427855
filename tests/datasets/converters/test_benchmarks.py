"""Each benchmark's form, on a few records written by hand: what becomes of every field."""

from __future__ import annotations

from pathlib import Path

import pytest

from datasets.converters.didemo import consensus
from tests.datasets.converters.helpers import quirks, run, save


def test_charades_sta(tmp_path: Path) -> None:
    lines = ["AB1CD 24.3 30.4##a person turns on the light.", "AB1CD 30.0 33.5## it's ## odd", "ZZ9YX 9.0 4.0##sits."]
    source = save(tmp_path / "src/charades_sta_test.txt", "\r\n".join(lines) + "\n")
    save(tmp_path / "src/Charades_v1_test.csv", 'id,script,length\nAB1CD,"a, b",31.25\nZZ9YX,c,20.5\n')
    rows, report = run("charades_sta", source, tmp_path / "out.jsonl", "--skip_videos")
    assert rows[0] == {
        "video": str(tmp_path / "videos/AB1CD.mp4"),
        "duration": 31.25,
        "timestamp": [24.3, 30.4],
        "sentence": "a person turns on the light.",
        "video_start": None,
        "video_end": None,
        "kwargs": {
            "qid": "charades_sta-test-1",
            "dataset": "charades_sta",
            "split": "test",
            "vid": "AB1CD",
            "quirks": [],
        },
    }
    assert [row["sentence"] for row in rows[1:]] == [" it's ## odd", "sits."]
    assert [row["timestamp"] for row in rows[1:]] == [[30.0, 33.5], [9.0, 4.0]]
    assert quirks(rows) == [[], ["outer_space", "end_past_duration"], ["start_ge_end"]]
    assert (report["rows"], report["videos"]) == (3, 2)
    assert {kind: count for kind, count in report["quirks"].items() if count} == {
        "end_past_duration": 1,
        "start_ge_end": 1,
        "outer_space": 1,
    }


def test_activitynet_captions(tmp_path: Path) -> None:
    video = {
        "duration": 60.5,
        "timestamps": [[0, 20.25], [40, 60.51], [3, 3]],
        "sentences": ["One.", " Two. ", "Three."],
    }
    source = save(tmp_path / "val_2.json", {"v_abc": video})
    rows, report = run("activitynet_captions", source, tmp_path / "out.jsonl", "--skip_videos")
    assert [row["timestamp"] for row in rows] == [[0.0, 20.25], [40.0, 60.51], [3.0, 3.0]]
    assert [row["sentence"] for row in rows] == ["One.", " Two. ", "Three."]
    assert {row["video"] for row in rows} == {str(tmp_path / "videos/v_abc.mp4")}
    assert [row["kwargs"]["qid"] for row in rows] == [f"activitynet_captions-val_2-v_abc-{index}" for index in range(3)]
    assert rows[0]["kwargs"]["split"] == "val_2"
    assert quirks(rows) == [[], ["outer_space", "end_past_duration"], ["start_ge_end", "empty_window"]]
    assert (report["quirks"]["start_ge_end"], report["quirks"]["empty_window"]) == (1, 1)


def test_qvhighlights(tmp_path: Path) -> None:
    records = [
        {"qid": 5, "query": "A cat", "duration": 150, "vid": "abc_0.0_150.0", "relevant_windows": [[90, 96], [10, 14]]},
        {"qid": 6, "query": "A dog", "duration": 142, "vid": "abd_0.0_150.0", "relevant_windows": [[2, 4]]},
        {"qid": 7, "query": "A cow", "duration": 150, "vid": "abe_0.0_150.0", "relevant_windows": []},
        {"qid": 8, "query": "A hen", "duration": 150, "vid": "abf_0.0_150.0"},
    ]
    records[0] |= {"relevant_clip_ids": [45, 46, 47], "saliency_scores": [[4, 3, 2], [4, 1, 3], [0, 0, 1]]}
    source = save(tmp_path / "highlight_val_release.jsonl", records)
    rows, report = run("qvhighlights", source, tmp_path / "out.jsonl", "--skip_videos")
    assert [row["timestamp"] for row in rows] == [[[10.0, 14.0], [90.0, 96.0]], [2.0, 4.0], None, None]
    assert [row["kwargs"]["qid"] for row in rows] == [5, 6, 7, 8]  # numbers, as the authors' server takes them
    assert rows[0]["kwargs"]["saliency_scores"] == [[4, 3, 2], [4, 1, 3], [0, 0, 1]]
    assert rows[0]["kwargs"]["relevant_clip_ids"] == [45, 46, 47]
    assert (rows[1]["duration"], rows[1]["video_start"]) == (142.0, None)  # the file is the clip
    assert quirks(rows) == [[], [], ["unlabelled"], ["unlabelled"]] and report["quirks"]["unlabelled"] == 2


def test_tacos_frames_become_seconds(tmp_path: Path) -> None:
    item = {"timestamps": [[147, 294], [147, 294], [441, 1176]], "sentences": ["She cuts"] * 2 + ["She eats "]}
    source = save(tmp_path / "train.json", {"s00-d01.avi": item | {"fps": 29.4, "num_frames": 1029}})
    rows, report = run("tacos", source, tmp_path / "out.jsonl", "--skip_videos")
    assert rows[0]["timestamp"] == pytest.approx([5.0, 10.0]) and rows[0]["duration"] == pytest.approx(35.0)
    assert rows[2]["timestamp"] == pytest.approx([15.0, 40.0])
    assert rows[0]["kwargs"] | {"quirks": []} == {
        "qid": "tacos-train-s00-d01-0",
        "dataset": "tacos",
        "split": "train",
        "vid": "s00-d01",
        "frames": [147, 294],
        "fps": 29.4,
        "quirks": [],
    }
    assert rows[0]["video"].endswith("videos/s00-d01.avi")
    assert quirks(rows) == [[], ["duplicate_row"], ["outer_space", "end_past_duration"]]
    assert report["quirks"]["duplicate_row"] == 1


def test_tacos_finds_the_camera_file(tmp_path: Path) -> None:
    item = {"timestamps": [[0, 10]], "sentences": ["She cuts"], "fps": 29.4, "num_frames": 1029}
    save(tmp_path / "videos/s00-d01-cam-002.mp4", "not opened")
    source = save(tmp_path / "val.json", {"s00-d01.avi": item})
    rows, report = run("tacos", source, tmp_path / "out.jsonl")
    assert rows[0]["video"] == str(tmp_path / "videos/s00-d01-cam-002.mp4")
    assert report["quirks"]["missing_video"] == 0


def test_didemo_annotators_are_alternatives(tmp_path: Path) -> None:
    record = {"num_segments": 6, "description": "the dog jumps", "dl_link": "https://x", "video": "1@N_2_3.mov"}
    records = [
        record | {"times": [[4, 4], [0, 0], [4, 4], [4, 5]], "annotation_id": 31},
        record | {"times": [[1, 2], [1, 1], [5, 5], [0, 0]], "annotation_id": 32, "num_segments": 5},
    ]
    source = save(tmp_path / "val_data.json", records)
    rows, report = run("didemo", source, tmp_path / "out.jsonl", "--skip_videos")
    assert [row["timestamp"] for row in rows] == [[20.0, 25.0], [5.0, 10.0]]  # one window each, never four
    assert rows[0]["kwargs"]["alternatives"] == [[20.0, 25.0], [0.0, 5.0], [20.0, 25.0], [20.0, 30.0]]
    assert rows[0]["kwargs"]["times"] == [[4, 4], [0, 0], [4, 4], [4, 5]]
    assert [row["kwargs"]["qid"] for row in rows] == [31, 32] and [row["duration"] for row in rows] == [30.0, 25.0]
    assert quirks(rows) == [["nominal_duration"]] * 2 and report["quirks"]["nominal_duration"] == 2


@pytest.mark.parametrize(
    ("alternatives", "expected"),
    [
        ([(0, 5), (20, 25), (20, 25), (20, 30)], (20, 25)),  # 1 + 1 + 1/2 against 1 + 1/2 + 1/2
        ([(5, 10), (0, 30), (5, 10), (5, 10)], (5, 10)),
        ([(0, 5), (5, 10), (10, 15), (15, 20)], (0, 5)),  # nobody agrees: the earliest
        ([(10, 15), (5, 10), (10, 15), (5, 10)], (5, 10)),  # two against two
        ([(0, 15), (0, 5), (10, 15), (5, 10)], (0, 15)),  # the one that overlaps with all: 1 + 1/3 + 1/3
    ],
)
def test_consensus(alternatives: list[tuple[float, float]], expected: tuple[float, float]) -> None:
    assert consensus(alternatives) == expected


def test_nextgqa(tmp_path: Path) -> None:
    header = "video_id,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4"
    questions = [
        '11,719,320,240,"what, then",stand up,8,TN,run,stand up,cry,sit,wave',
        "11,719,320,240,why,x,2,CW,x,a,b,c,d",
    ]
    source = save(tmp_path / "test.csv", "\n".join([header, *questions, "12,300,320,240,how,y,0,CH,y,a,b,c,d"]) + "\n")
    places = {"11": {"duration": 30, "location": {"8": [[20.5, 25], [-0.4, 5.2]], "2": [[1, 31]]}, "fps": 23.976}}
    save(tmp_path / "gsub_test.json", places | {"12": {"duration": 10, "location": {}, "fps": 30}})
    save(tmp_path / "map_vid_vidorID.json", {"11": "0101/11", "12": "0102/12"})
    save(tmp_path / "videos/0101/11.mp4", "not opened")
    rows, report = run("nextgqa", source, tmp_path / "out.jsonl")
    assert [row["timestamp"] for row in rows] == [[[-0.4, 5.2], [20.5, 25.0]], [1.0, 31.0], None]
    assert [row["video"] for row in rows] == [
        str(tmp_path / "videos" / name) for name in ("0101/11.mp4",) * 2 + ("12.mp4",)
    ]
    assert [row["sentence"] for row in rows] == ["what, then", "why", "how"]
    assert rows[0]["kwargs"]["answer"] == "stand up" and rows[0]["kwargs"]["a4"] == "wave"
    assert [row["kwargs"]["qid"] for row in rows] == [f"nextgqa-test-{name}" for name in ("11-8", "11-2", "12-0")]
    assert quirks(rows) == [["negative_start"], ["end_past_duration"], ["missing_video", "unlabelled"]]
    assert report["quirks"]["missing_video"] == 1 and report["quirks"]["negative_start"] == 1
    again, _ = run("nextgqa", tmp_path / "gsub_test.json", tmp_path / "again.jsonl")  # the other file of the pair
    assert again == rows


def tvg_row(name: str, answer: str, duration: float, start: float | None = None, end: float | None = None) -> dict:
    about = {"question": "a person sits.", "question_type": "video temporal grounding", "qsemtype": "Human Pose"}
    source = {"source": "./raw_data/Charades-sta.test.json", "bins": {"dataset": "charades", "qsemtype": "HP"}}
    path = f"./dataset/timer1/videos/tvgbench_data/{name}"
    return {"path": path, "answer": answer, "start": start, "end": end, "duration": duration, **about, **source}


def test_tvgbench(tmp_path: Path) -> None:
    records = [
        tvg_row("a.mp4", "13.4-28.1", 30.12),
        tvg_row("one.mp4", "2.0-4.5", 20.0, 50.0, 70.0),  # one stretch of a file: it may be cut already
        tvg_row("zero.mp4", "2.0-4.5", 20.0, 0.0, 20.0),  # decodes alike, cut or not
        tvg_row("two.mp4", "2.0-4.5", 20.0, 10.0, 30.0),  # two stretches: not cut
        tvg_row("two.mp4", "5.5-5.5", 20.0, 40.0, 60.0),
        tvg_row("odd.mp4", "2.0-4.5", 60.0, 10.0, 70.0),  # past the end that the other row of the file tells
        tvg_row("odd.mp4", "2.0-60.5", 60.0),
    ]
    source = save(tmp_path / "tvgbench.json", records)
    rows, report = run("tvgbench", source, tmp_path / "out.jsonl", "--skip_videos")
    assert [row["timestamp"] for row in rows[:2]] == [[13.4, 28.1], [2.0, 4.5]]
    assert (rows[1]["video_start"], rows[1]["video_end"], rows[1]["duration"]) == (50.0, 70.0, 20.0)
    assert rows[0]["video"] == str(tmp_path / "videos/a.mp4")
    assert [row["kwargs"]["qid"] for row in rows] == [f"Charades_sta_test_{index}" for index in range(7)]
    assert rows[0]["kwargs"]["dataset"] == "tvgbench" and rows[0]["kwargs"]["dataset_name"] == "charades"
    assert quirks(rows) == [
        [],
        ["doubtful_trim"],
        [],
        [],
        ["start_ge_end", "empty_window"],
        ["doubtful_trim"],
        ["end_past_duration"],
    ]
    assert report["quirks"]["doubtful_trim"] == 2


CUT = "abc_00:00:39:000_00:01:24:700.mp4"


def timer1_row(name: str, duration: float, start: float | None, end: float | None) -> dict:
    about = {"timestamp": [2.0, 4.5], "sentence": "a statue", "qid": f"my|x|{name}|a statue", "difficulty": 50.0}
    return {"video": f"./d/timerft_data/{name}", "duration": duration, "video_start": start, "video_end": end} | about


def test_timer1_train(tmp_path: Path) -> None:
    records = [
        timer1_row(CUT, 45.7, 39.0, 84.7),  # the name says that the file is this stretch
        timer1_row("abd_00:00:10:000_00:01:00:000.mp4", 40.0, 5.0, 45.0),  # another stretch than its name's
        timer1_row("abe.mp4", 93.25, None, None),
        timer1_row("abf.mp4", 80.0, 0, 80.0),
        timer1_row("abg.mp4", 10.8, 120.6, 131.4),
    ]
    source = save(tmp_path / "train_2k5.json", records)
    rows, _ = run("timer1_train", source, tmp_path / "out.jsonl", "--skip_videos")
    stretches = [(row["video_start"], row["video_end"]) for row in rows]
    assert stretches == [(None, None), (5.0, 45.0), (None, None), (0.0, 80.0), (120.6, 131.4)]
    assert quirks(rows) == [["already_cut"], ["doubtful_trim"], [], [], ["doubtful_trim"]]
    assert rows[0]["kwargs"]["cut_from"] == [39.0, 84.7] and rows[0]["duration"] == 45.7
    assert rows[0]["kwargs"]["difficulty"] == 50.0 and rows[0]["kwargs"]["qid"] == f"my|x|{CUT}|a statue"
    assert {row["kwargs"]["split"] for row in rows} == {"train"}


def test_timelens_bench(tmp_path: Path) -> None:
    item = {"duration": 30.5, "spans": [[4.3, 12.5], [20, 31]], "queries": ["He sits.", "He stands"]}
    source = save(tmp_path / "charades-timelens.json", {"AB1CD": item})
    rows, _ = run("timelens", source, tmp_path / "out.jsonl", "--skip_videos")
    assert [row["timestamp"] for row in rows] == [[4.3, 12.5], [20.0, 31.0]]
    assert [row["kwargs"]["qid"] for row in rows] == ["timelens-charades-AB1CD-0", "timelens-charades-AB1CD-1"]
    assert {row["kwargs"]["split"] for row in rows} == {"test"} and quirks(rows) == [[], ["end_past_duration"]]


def test_timelens_100k(tmp_path: Path) -> None:
    events = [
        {"query": "a dog jumps", "span": [[5.0, 9.0], [20.0, 21.0]], "score": 3},
        {"query": "it sits", "span": [1, 2]},
    ]
    record = {"source": "didemo", "video_path": "didemo/abc.mp4", "duration": 30.0, "events": events}
    save(tmp_path / "videos/didemo/abc.mp4", "not opened")
    rows, report = run("timelens", save(tmp_path / "timelens-100k.jsonl", [record]), tmp_path / "out.jsonl")
    assert [row["timestamp"] for row in rows] == [[[5.0, 9.0], [20.0, 21.0]], [1.0, 2.0]]
    assert rows[0]["video"] == str(tmp_path / "videos/didemo/abc.mp4") and report["quirks"]["missing_video"] == 0
    assert (rows[0]["kwargs"]["source"], rows[0]["kwargs"]["score"], rows[0]["kwargs"]["split"]) == (
        "didemo",
        3,
        "train",
    )
