"""What is the same for every benchmark: policies, round trips, videos and durations, files that are not as expected."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datasets.converters import CONVERTERS, find_converter
from scripts.convert_dataset import main
from tests.datasets.converters.helpers import known_to_validator, quirks, read, run, save, validated
from utils.common import REPO_ROOT, UserError
from utils.rows import load_annotations
from utils.video import write_mp4


def activitynet(path: Path, *rows: tuple[list[float], str], duration: float = 60.5) -> Path:
    stamps, sentences = [stamp for stamp, _ in rows], [sentence for _, sentence in rows]
    return save(path, {"v_abc": {"duration": duration, "timestamps": stamps, "sentences": sentences}})


FAULTY = (
    ([0, 20], "Fine."),
    ([40, 61], " Past the end."),
    ([30, 10], "Turned round. "),
    ([0, 20], "Fine."),
    ([5, 5], "No length."),
    ([-1, 5], "Before the start."),
    ([70, 65], "Turned round past the end."),
    ([30, 10], "Turned round. "),
)
COUNTS = {
    "end_past_duration": 2,
    "start_ge_end": 4,
    "empty_window": 1,
    "negative_start": 1,
    "duplicate_row": 2,
    "outer_space": 3,
}


def video(path: Path, seconds: int) -> Path:
    """A video of one grey frame a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(path, np.full((seconds, 32, 32, 3), 128, np.uint8), fps=1)
    return path


def test_every_row_is_kept_and_every_quirk_counted(tmp_path: Path) -> None:
    source = activitynet(tmp_path / "val_1.json", *FAULTY)
    rows, report = run("activitynet_captions", source, tmp_path / "out.jsonl", "--skip_videos")
    assert [(row["timestamp"], row["sentence"]) for row in rows] == [
        ([float(a), float(b)], text) for (a, b), text in FAULTY
    ]
    assert report["quirks"] == report["kept"] == COUNTS and (report["rows"], report["source_rows"]) == (8, 8)
    assert report["policies"] == dict.fromkeys(COUNTS, "keep")
    assert quirks(rows) == [
        [],
        ["outer_space", "end_past_duration"],
        ["outer_space", "start_ge_end"],
        ["duplicate_row"],
        ["start_ge_end", "empty_window"],
        ["negative_start"],
        ["start_ge_end", "end_past_duration"],
        ["outer_space", "start_ge_end", "duplicate_row"],
    ]


@pytest.mark.parametrize(
    "policies",
    [
        [],
        ["end_past_duration=clip"],
        ["start_ge_end=swap", "outer_space=clip"],
        ["duplicate_row=drop", "negative_start=clip"],
        ["start_ge_end=swap", "end_past_duration=clip", "empty_window=drop", "outer_space=clip", "negative_start=clip"],
        ["missing_video=keep", "start_ge_end=drop"],
    ],
)
def test_validation_reports_exactly_what_was_kept(tmp_path: Path, policies: list[str]) -> None:
    source = activitynet(tmp_path / "val_1.json", *FAULTY)
    options = ["--policy", *policies] if policies else []
    rows, report = run("activitynet_captions", source, tmp_path / "out.jsonl", *options)
    assert validated(tmp_path / "out.jsonl") == known_to_validator(report["kept"])
    for kind, count in report["kept"].items():
        assert sum(kind in listed for listed in quirks(rows)) == count
    assert report["rows"] == len(rows) == 8 - sum(report["dropped"].values())


def test_policies_repair_and_say_so(tmp_path: Path) -> None:
    source = activitynet(tmp_path / "val_1.json", *FAULTY)
    policies = [
        "end_past_duration=clip",
        "start_ge_end=swap",
        "outer_space=clip",
        "empty_window=drop",
        "duplicate_row=drop",
    ]
    rows, report = run("activitynet_captions", source, tmp_path / "out.jsonl", "--skip_videos", "--policy", *policies)
    assert [row["timestamp"] for row in rows] == [[0, 20], [40, 60.5], [10, 30], [-1, 5], [65, 70]]
    assert rows[1]["sentence"] == "Past the end."
    assert rows[1]["kwargs"]["repaired"] == {"timestamp": [40.0, 61.0], "sentence": " Past the end."}
    assert "repaired" not in rows[0]["kwargs"]
    assert report["quirks"] == COUNTS | {"window_outside": 0}
    assert report["kept"] == {kind: 0 for kind in COUNTS} | {
        "end_past_duration": 1,
        "negative_start": 1,
        "window_outside": 1,  # [65, 70] lies outside the video, which only its turning round brought out
    }
    assert report["dropped"] == {"duplicate_row": 2, "empty_window": 1}
    assert report["changed"]["outer_space"] == 2 and report["changed"]["end_past_duration"] == 1


def test_converted_rows_are_what_training_reads(tmp_path: Path) -> None:
    class Source:
        path = tmp_path / "out.jsonl"
        weight = 1.0

    video(tmp_path / "videos/v_abc.mp4", 4)
    source = activitynet(tmp_path / "val_1.json", ([0, 2], "One."), ([1, 4.01], " Two."), duration=4.0)
    run("activitynet_captions", source, Source.path)
    rows = load_annotations([Source()], max_bad_fraction=0, trim="relative", videos_root=tmp_path / "videos")
    assert [(row.timestamp, row.sentence) for row in rows] == [(((0, 2),), "One."), (((1, 4.01),), " Two.")]


# ---- videos and durations


def test_missing_videos_are_counted(tmp_path: Path) -> None:
    save(tmp_path / "videos/v_a.webm", "not opened")
    item = {"duration": 9, "timestamps": [[0, 2]], "sentences": ["One."]}
    source = save(tmp_path / "train.json", {"v_a": item, "v_b": item})
    rows, report = run("activitynet_captions", source, tmp_path / "out.jsonl")
    assert [Path(row["video"]).name for row in rows] == ["v_a.webm", "v_b.mp4"]
    assert quirks(rows) == [[], ["missing_video"]] and report["quirks"]["missing_video"] == 1
    assert validated(tmp_path / "out.jsonl") == {"missing_video": 1}
    rows, report = run("activitynet_captions", source, tmp_path / "less.jsonl", "--policy", "missing_video=drop")
    assert len(rows) == report["rows"] == 1 and report["dropped"] == {"missing_video": 1}


def test_a_relative_folder_gives_paths_relative_to_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "media/v_abc.mp4", "not opened")
    activitynet(tmp_path / "val_1.json", ([0, 2], "One."))
    out = Path("rows/deep/out.jsonl")
    rows, report = run("activitynet_captions", Path("val_1.json"), out, "--videos_dir", "media")
    assert rows[0]["video"] == "../../media/v_abc.mp4" and report["quirks"]["missing_video"] == 0
    assert validated(tmp_path / out) == {}


def test_durations_come_from_the_videos_where_the_source_has_none(tmp_path: Path) -> None:
    video(tmp_path / "videos/AB1CD.mp4", 7)
    source = save(tmp_path / "charades_sta_train.txt", "AB1CD 1.0 8.0##sits.\nAB1CD 1.0 5.0##stands.\n")
    rows, report = run("charades_sta", source, tmp_path / "out.jsonl")
    assert [row["duration"] for row in rows] == [7.0, 7.0] and quirks(rows) == [["end_past_duration"], []]
    save(tmp_path / "Charades_v1_train.csv", "id,length\nAB1CD,9.5\n")  # the annotation counts where there is one
    assert [row["duration"] for row in run("charades_sta", source, tmp_path / "out.jsonl")[0]] == [9.5, 9.5]


def test_no_duration_anywhere_is_refused_with_the_remedy(tmp_path: Path) -> None:
    save(tmp_path / "videos/ZZ9YX.mp4", "no video")
    source = save(tmp_path / "charades_sta_test.txt", "AB1CD 1.0 8.0##sits.\nZZ9YX 1.0 8.0##sits.\n")
    with pytest.raises(UserError, match="2 of 2 rows have no duration.*Charades_v1_<split>.csv beside the annotations"):
        run("charades_sta", source, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(UserError, match="1 of 2 rows have no duration.*--policy unreadable_video=drop"):
        run("charades_sta", source, tmp_path / "out.jsonl", "--policy", "missing_video=drop")
    with pytest.raises(UserError, match="drop every row"):
        policies = ["--policy", "missing_video=drop", "unreadable_video=drop"]
        run("charades_sta", source, tmp_path / "out.jsonl", *policies)
    with pytest.raises(UserError, match="--skip_videos keeps it shut"):
        run("charades_sta", source, tmp_path / "out.jsonl", "--skip_videos")


def test_didemo_asks_the_files(tmp_path: Path) -> None:
    record = {"num_segments": 6, "description": "the dog jumps", "times": [[5, 5]] * 4}
    names = ["long.mov", "short.mp4", "gone.avi"]
    video(tmp_path / "videos/long.mp4", 40)  # converted from .mov
    video(tmp_path / "videos/short.mp4", 28)
    records = [record | {"video": name, "annotation_id": index} for index, name in enumerate(names)]
    rows, _ = run("didemo", save(tmp_path / "test_data.json", records), tmp_path / "out.jsonl")
    about = [(row["duration"], row["video_start"], row["video_end"]) for row in rows]
    assert about == [(30.0, 0.0, 30.0), (28.0, None, None), (30.0, None, None)]  # annotators saw the first 30 s
    assert quirks(rows) == [[], ["end_past_duration"], ["missing_video", "nominal_duration"]]


def test_the_file_settles_whether_it_is_cut(tmp_path: Path) -> None:
    row = {"timestamp": [2.0, 4.5], "sentence": "a statue", "qid": "q", "video_start": 20.0, "video_end": 30.0}
    names = ["cut.mp4", "whole.mp4", "neither.mp4", "named_00:00:20:000_00:00:30:000.mp4"]
    for name, seconds in zip(names, (10, 60, 15, 45), strict=True):
        video(tmp_path / "videos" / name, seconds)
    records = [row | {"video": f"x/{name}", "duration": 10.0} for name in names]
    source = save(tmp_path / "train_2k5.json", records)
    rows, _ = run("timer1_train", source, tmp_path / "out.jsonl")
    assert quirks(rows) == [["already_cut"], [], ["doubtful_trim"], []]
    assert [row["video_start"] for row in rows] == [None, 20.0, 20.0, 20.0]
    rows, report = run("timer1_train", source, tmp_path / "out.jsonl", "--probe_videos")
    assert quirks(rows) == [["already_cut"], [], ["trim_outside_file", "doubtful_trim"], []]
    assert validated(tmp_path / "out.jsonl", probe_videos=True) == known_to_validator(report["kept"])


# ---- what is refused


@pytest.mark.parametrize(
    ("dataset", "name", "text", "message"),
    [
        (
            "charades_sta",
            "charades_sta_test.txt",
            "not a row\n",
            "after 0 rows, a record is not as charades_sta has them",
        ),
        ("charades_sta", "charades_sta_test.txt", "\n\n", "holds no row of charades_sta"),
        ("charades_sta", "charades_sta_test.txt", "AB nan 3.0##sits.", "expected a finite number"),
        ("activitynet_captions", "val_1.json", "{", "val_1.json:1: not JSON"),
        ("activitynet_captions", "val_1.json", '{"v": {"duration": 3}}', "no 'timestamps'"),
        ("activitynet_captions", "val_1.json", "[]", "--dataset right?"),
        (
            "activitynet_captions",
            "val_1.json",
            '{"v": {"duration": 3, "timestamps": [[0, 1]], "sentences": []}}',
            "after 0 rows",
        ),
        ("qvhighlights", "highlight_val_release.jsonl", '{"qid": 1}\n{', "no 'vid'"),
        ("tvgbench", "tvgbench.json", '[{"answer": "about five"}]', "--dataset right?"),
        ("tacos", "somefile.json", "{}", "does not tell the split; give --split train|val|test"),
        ("charadessta", "a.txt", "", "did you mean charades_sta?"),
        ("no.such.module:Name", "a.txt", "", "cannot be imported: No module named 'no'. It must read"),
        (":Name", "a.txt", "", "PYTHONPATH=FOLDER adds the folder of yours"),
        (".relative:Name", "a.txt", "", "cannot be imported: '.relative' is no module's full name"),
        ("json:JSONDecoder", "a.txt", "", "must be a subclass of datasets.converters.Converter"),
    ],
)
def test_refusals(tmp_path: Path, dataset: str, name: str, text: str, message: str) -> None:
    source = save(tmp_path / name, text)
    with pytest.raises(UserError) as caught:
        run(dataset, source, tmp_path / "out.jsonl", "--skip_videos")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_row_that_no_file_can_hold_is_refused_or_dropped(tmp_path: Path) -> None:
    item = {"duration": 9, "timestamps": [[0, 2], [1, 2]], "sentences": [None, "Fine."]}
    source = save(tmp_path / "train.json", {"v_a": item})
    with pytest.raises(UserError, match="row 1 of the source cannot be written.*--policy wrong_type=drop"):
        run("activitynet_captions", source, tmp_path / "out.jsonl", "--skip_videos")
    policies = ["--skip_videos", "--policy", "wrong_type=drop"]
    rows, report = run("activitynet_captions", source, tmp_path / "out.jsonl", *policies)
    assert [row["sentence"] for row in rows] == ["Fine."] and report["dropped"] == {"wrong_type": 1}


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        (["end_past_duration=swap"], "by drop or clip only"),
        (["end_past=clip"], "did you mean end_past_duration?"),
        (["already_cut=clip"], "can be kept or dropped only"),
        (["outer_space=keep", "outer_space=clip"], "already has the policy keep"),
    ],
)
def test_policies_that_make_no_sense(tmp_path: Path, policies: list[str], message: str) -> None:
    source = activitynet(tmp_path / "val_1.json", *FAULTY)
    with pytest.raises(UserError) as caught:
        run("activitynet_captions", source, tmp_path / "out.jsonl", "--policy", *policies)
    assert message in str(caught.value)


def test_the_input_is_never_the_output(tmp_path: Path) -> None:
    source = save(tmp_path / "rows.jsonl", [{"video": "a.mp4"}])
    with pytest.raises(UserError, match="this is the input"):
        run("rows", source, source)
    assert read(source) == [{"video": "a.mp4"}]
    source = activitynet(tmp_path / "released/val_1.json", ([0, 2], "One."))
    before = source.read_text()
    for options in ([source], [tmp_path / "out.jsonl", "--report", str(source)]):
        with pytest.raises(UserError, match="this is the input"):
            run("activitynet_captions", source.parent, *options, "--skip_videos")
    assert source.read_text() == before


def test_a_folder_is_searched_for_the_released_files(tmp_path: Path) -> None:
    item = {"duration": 9, "timestamps": [[0, 2]], "sentences": ["One."]}
    save(tmp_path / "src/val_1.json", {"v_a": item})
    rows, report = run("activitynet_captions", tmp_path / "src", tmp_path / "out.jsonl", "--skip_videos")
    assert report["split"] == "val_1" and len(rows) == 1
    save(tmp_path / "src/val_2.json", {"v_b": item, "v_c": item})
    with pytest.raises(UserError, match=r"holds val_1, val_2; give --split val_1\|val_2"):
        run("activitynet_captions", tmp_path / "src", tmp_path / "out.jsonl", "--skip_videos")
    rows, _ = run("activitynet_captions", tmp_path / "src", tmp_path / "out.jsonl", "--skip_videos", "--split", "val_2")
    assert len(rows) == 2
    with pytest.raises(UserError, match="no file of split train of activitynet_captions"):
        run("activitynet_captions", tmp_path / "src", tmp_path / "out.jsonl", "--skip_videos", "--split", "train")


# ---- the registry and the command


OWN = '''
from datasets.converters import Converter, SourceRow

class Mine(Converter):
    """My data."""
    name = "mine"
    policies = {"end_past_duration": "clip"}
    published = "Mine are clipped."

    def read(self, path, split):
        for line in path.read_text().splitlines():
            video, end = line.split()
            yield SourceRow((video,), "it happens", [(0, float(end))], split, line, duration=5.0)
'''


def test_a_converter_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    save(tmp_path / "my_converter.py", OWN)
    monkeypatch.syspath_prepend(tmp_path)
    source = save(tmp_path / "data.txt", "a.mp4 3\nb.mp4 6\n")
    options = ["--skip_videos", "--split", "dev"]
    rows, report = run("my_converter:Mine", source, tmp_path / "out.jsonl", *options)
    assert [row["timestamp"] for row in rows] == [[0.0, 3.0], [0.0, 5.0]]
    about = {"dataset": "mine", "split": "dev", "qid": "b.mp4 6", "quirks": [], "repaired": {"timestamp": [0.0, 6.0]}}
    assert rows[1]["kwargs"] == about
    assert report["policies"]["end_past_duration"] == "clip" and "Mine are clipped." in capsys.readouterr().out
    kept, _ = run("my_converter:Mine", source, tmp_path / "out.jsonl", *options, "--policy", "end_past_duration=keep")
    assert kept[1]["timestamp"] == [0.0, 6.0]


def test_the_registry_names_what_the_docs_name() -> None:
    benchmarks = ["charades_sta", "activitynet_captions", "qvhighlights", "tacos", "didemo", "nextgqa", "tvgbench"]
    assert list(CONVERTERS) == [*benchmarks, "timer1_train", "timelens", "conversations", "rows"]
    for name, kind in CONVERTERS.items():
        assert type(find_converter(name)) is kind and kind.name == name
        module = sys.modules[kind.__module__].__doc__
        assert module is not None
        records = [line for line in module.splitlines() if line.lstrip().startswith(("{", "AB1CD ", "1234567890,"))]
        assert records, name


def test_the_command_from_another_folder(tmp_path: Path) -> None:
    source = activitynet(tmp_path / "val_1.json", *FAULTY)
    command = [sys.executable, str(REPO_ROOT / "scripts/convert_dataset.py"), "--dataset", "activitynet_captions"]
    command += ["--annotations", str(source), "--videos_dir", "media", "--output", "out.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "activitynet_captions, split val_1: 8 rows in" in done.stdout and "8 written, 1 videos" in done.stdout
    table = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.startswith("  ")}
    assert table["start_ge_end"] == ["4", "keep", "0", "0", "4"]
    assert "note: --videos_dir media is no folder" in done.stdout
    failed = subprocess.run([*command, "--policy", "x=y"], cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.startswith("error: --policy x=y: no quirk is called 'x'")
    assert failed.stderr.count("\n") == 1


def test_help_lists_quirks_and_policies(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "end_past_duration  keep|drop|clip" in shown and "already_cut        keep|drop" in shown


def test_rows_of_ones_own_keep_their_kwargs(tmp_path: Path) -> None:
    row = {"video": "videos/a.mp4", "duration": 9.0, "timestamp": [3.0, 1.0], "sentence": "it happens"}
    row |= {"video_start": 5.0, "video_end": 14.0, "kwargs": {"qid": "mine", "difficulty": 3}}
    source = save(tmp_path / "my_train.jsonl", [row])
    rows, _ = run("rows", source, tmp_path / "out.jsonl", "--skip_videos", "--videos_dir", str(tmp_path))
    assert rows[0]["kwargs"] == {
        "qid": "mine",
        "dataset": "rows",
        "split": "train",
        "difficulty": 3,
        "quirks": ["start_ge_end"],
    }
    same = {key: value for key, value in row.items() if key not in ("kwargs", "video")}
    assert {key: rows[0][key] for key in same} == same and rows[0]["video"] == str(tmp_path / "videos/a.mp4")
