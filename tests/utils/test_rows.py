"""Rows: what is read, refused, normalised, written, mixed, and the three readings of trimmed rows."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils import rows as rows_module
from utils.common import REPO_ROOT, UserError
from utils.rows import (
    FIELDS,
    Row,
    RowProblem,
    check_record,
    check_trim,
    clip_bounds,
    clip_findings,
    load_annotations,
    misread_rows,
    model_windows,
    read_rows,
    record_to_row,
    resolve_video,
    row_to_record,
    to_file_clock,
    trim_readings,
    write_rows,
)
from utils.spans import Span

ANNOTATIONS = REPO_ROOT.parent / "shared" / "annotations"
GOOD: dict[str, Any] = {"video": "a.mp4", "duration": 30, "timestamp": [1, 4.5], "sentence": "a red square appears"}


def make_row(**fields: Any) -> Row:
    return record_to_row(GOOD | fields, "rows.jsonl", 1)


def trimmed(start: float | None, end: float | None, *window: float, duration: float = 30.0) -> Row:
    return make_row(video_start=start, video_end=end, duration=duration, timestamp=list(window))


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def problems_of(path: Path, data: str | bytes) -> list[tuple[int, str]]:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return [(problem.line, problem.kind) for problem in read_rows(path)[1]]


# ---- reading


def test_read_rows_normalises(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD, GOOD | {"timestamp": [[7, 9], [1, 2]], "kwargs": {"difficulty": 3}})
    rows, problems = read_rows(path)
    assert problems == []
    first = Row("a.mp4", 30.0, (Span(1.0, 4.5),), "a red square appears", None, None, {}, str(path), 1)
    assert rows == [
        first,
        replace(first, timestamp=(Span(1.0, 2.0), Span(7.0, 9.0)), kwargs={"difficulty": 3}, line=2),
    ]


@pytest.mark.parametrize(
    ("timestamp", "windows", "written"),
    [
        (None, None, None),
        ([], (), []),
        ([[1, 2]], (Span(1.0, 2.0),), [1.0, 2.0]),
        ([[5, 6], [1, 2]], (Span(1.0, 2.0), Span(5.0, 6.0)), [[1.0, 2.0], [5.0, 6.0]]),
    ],
)
def test_timestamp_forms(timestamp: Any, windows: Any, written: Any) -> None:
    row = make_row(timestamp=timestamp)
    assert row.timestamp == windows
    assert row_to_record(row)["timestamp"] == written


def test_writer_omits_nothing_and_reader_gives_the_same_back(tmp_path: Path) -> None:
    row = make_row(video_start=2, kwargs={"qid": 7, "nested": {"a": [1, None]}, "name": "été\u2028"})
    assert list(row_to_record(row)) == list(FIELDS)
    write_rows(tmp_path / "out.jsonl", [row, row])
    rows, problems = read_rows(tmp_path / "out.jsonl")
    assert problems == [] and len(rows) == 2
    assert replace(rows[1], file=row.file, line=row.line) == row


TIMES = st.floats(0, 1e6, allow_nan=False)
WINDOWS = st.tuples(TIMES, TIMES).filter(lambda w: w[0] < w[1]).map(list)
RECORDS = st.fixed_dictionaries(
    {
        "video": st.text(min_size=1).filter(lambda text: text.strip() and "\0" not in text),
        "duration": st.floats(1e-3, 1e6) | st.integers(1, 10**6),
        "timestamp": st.none() | WINDOWS | st.lists(WINDOWS, max_size=3),
        "sentence": st.text(min_size=1),
    },
    optional={
        "video_start": st.none() | st.integers(0, 10),
        "video_end": st.none() | TIMES,
        "kwargs": st.none() | st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text()),
    },
)


@settings(max_examples=60, deadline=None)
@given(RECORDS)
def test_round_trip_of_any_record(record: dict[str, Any]) -> None:
    if check_record(record):
        return
    row = record_to_row(record)
    text = json.dumps(row_to_record(row))
    assert record_to_row(json.loads(text)) == row


@settings(max_examples=80, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*FIELDS, "extra"]),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
            max_leaves=5,
        ),
    )
)
def test_check_record_never_raises(record: dict[str, Any]) -> None:
    if not check_record(record):
        assert record_to_row(record).duration > 0


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"sentence": None}, "wrong_type", "`sentence` must be a string, got null"),
        ({"video": 3}, "wrong_type", "`video` must be a string, got 3"),
        ({"duration": "30"}, "wrong_type", '`duration` must be a number of seconds without quotes, got "30"'),
        ({"duration": None}, "wrong_type", "`duration`"),
        ({"duration": True}, "wrong_type", "`duration`"),
        ({"video_start": [1]}, "wrong_type", "`video_start`"),
        ({"kwargs": [1]}, "wrong_type", "`kwargs` must be an object"),
        ({"timestamp": [1]}, "wrong_type", "`timestamp` must be [start, end]"),
        ({"timestamp": [1, 2, 3]}, "wrong_type", "got [1, 2, 3]"),
        ({"timestamp": [[1, 2], 3]}, "wrong_type", "`timestamp`"),
        ({"timestamp": [[]]}, "wrong_type", "`timestamp`"),
        ({"timestamp": ["1", "2"]}, "wrong_type", "`timestamp`"),
        ({"timestamp": [True, 2]}, "wrong_type", "`timestamp`"),
        ({"timestamp": "1-2"}, "wrong_type", "`timestamp`"),
        ({"duration": float("nan")}, "non_finite", "`duration` is nan"),
        ({"timestamp": [1, float("inf")]}, "non_finite", "`timestamp[1]` is inf"),
        ({"kwargs": {"a": [0.0, float("-inf")]}}, "non_finite", "`kwargs.a[1]` is -inf"),
        ({"duration": 10**400}, "non_finite", "`duration`"),
        ({"duration": 0}, "bad_duration", "must be > 0 s, got 0"),
        ({"sentence": " \t\u200b"}, "empty_sentence", "`sentence`"),
        ({"sentence": "half \ud83d"}, "bad_text", "surrogate"),
        ({"video": "a\0.mp4"}, "bad_text", "`video`"),
        ({"video": ""}, "bad_text", "`video`"),
        ({"timestamp": [4, 4]}, "start_ge_end", "got [4, 4]"),
        ({"timestamp": [[1, 2], [9, 5]]}, "start_ge_end", "got [9, 5]"),
        ({"timestamp": [-1, 4]}, "negative_start", "got [-1, 4]"),
        ({"video_start": -1}, "bad_trim", "`video_start` must be >= 0 s, got -1"),
        ({"video_start": 9, "video_end": 9}, "bad_trim", "got 9 and 9"),
        ({"video_end": 0}, "bad_trim", "`video_end`"),
        ({"sentense": "x"}, "extra_field", "`sentense` is not a field of a row; move it into `kwargs`"),
    ],
)
def test_bad_rows_are_named(change: dict[str, Any], kind: str, says: str) -> None:
    findings = check_record(GOOD | change)
    assert [found for found, _ in findings] == [kind]
    assert says in findings[0][1]


def test_misspelt_field_gets_the_nearest_name() -> None:
    record = {key: value for key, value in GOOD.items() if key != "sentence"} | {"sentense": "x"}
    kinds = dict(check_record(record))
    assert kinds["missing_field"] == "`sentence` is missing; it is required"
    assert "did you mean `sentence`?" in kinds["extra_field"]


def test_bad_lines_are_counted_by_line_and_good_ones_kept(tmp_path: Path) -> None:
    good = json.dumps(GOOD)
    lines = [good, '{"video": "a"', "", "[1, 2]", "7", '{"duration": 1, "duration": 2}', "{" + good[1:], "[" * 9999]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    rows, problems = read_rows(path)
    assert [row.line for row in rows] == [1, 7]
    assert [(p.line, p.kind) for p in problems] == [
        (2, "bad_json"),
        (4, "not_an_object"),
        (5, "not_an_object"),
        (6, "duplicate_key"),
        (8, "bad_json"),
    ]
    assert str(problems[3]) == f"{path}:6: `duration` stands twice in the row; keep one [duplicate_key]"


def test_duplicate_key_inside_kwargs_and_json_constants(tmp_path: Path) -> None:
    text = json.dumps(GOOD)[:-1]
    data = f'{text}, "kwargs": {{"a": 1, "a": 2}}}}\n{text}, "video_end": NaN}}\n{text}, "video_end": 1e999}}\n'
    assert problems_of(tmp_path / "r.jsonl", data) == [(1, "duplicate_key"), (2, "non_finite"), (3, "non_finite")]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_byte_order_mark_line_ends_and_blank_lines(tmp_path: Path, newline: str) -> None:
    line = json.dumps(GOOD | {"sentence": "a\u2028b"}, ensure_ascii=False)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + newline.join([line, "", "  ", "\ufeff" + line, ""]).encode())
    rows, problems = read_rows(path)
    assert problems == []
    assert [(row.line, row.sentence) for row in rows] == [(1, "a\u2028b"), (4, "a\u2028b")]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "holds no rows"),
        (b"\xef\xbb\xbf\n \n", "holds no rows"),
        (json.dumps([GOOD]).encode(), "one JSON array, not JSON lines"),
        (json.dumps([GOOD], indent=4).encode(), "one JSON array, not JSON lines"),
        (json.dumps(GOOD, indent=4).encode(), "spread over several lines"),
        (json.dumps(GOOD).encode("utf-16"), ":1: byte 0xff is not UTF-8"),
        (b"{}\n{}\n\xe9", ":3: byte 0xe9 is not UTF-8"),
    ],
)
def test_a_file_that_is_not_jsonl_is_a_user_error(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    with pytest.raises(UserError, match="rows.jsonl") as caught:
        read_rows(path)
    assert says in str(caught.value)


def test_the_remedy_for_an_array_works(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([GOOD, GOOD], indent=2))
    with pytest.raises(UserError) as caught:
        read_rows(tmp_path / "a.json")
    command = str(caught.value).split("for example with: ")[1].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert len(read_rows(tmp_path / "rows.jsonl")[0]) == 2


def test_missing_file_and_folder(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(UserError, match=r"no such annotation file; did you mean .*train\.jsonl\?"):
        read_rows(tmp_path / "trian.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        read_rows(tmp_path)
    with pytest.raises(UserError, match="no such annotation file"):
        read_rows(tmp_path / "nowhere" / "train.jsonl")


# ---- writing


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"duration": float("nan")}, "row 2 cannot be written: `duration` is nan"),
        ({"timestamp": (Span(4.0, 1.0),)}, "start_ge_end"),
        ({"kwargs": {"a": {1}}}, "`kwargs` must hold plain JSON values"),
        ({"video": Path("a.mp4")}, "`video` must be a string"),
    ],
)
def test_writer_refuses_what_the_reader_would(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = write(tmp_path / "out.jsonl", GOOD)
    before = path.read_bytes()
    with pytest.raises(UserError) as caught:
        write_rows(path, [make_row(), replace(make_row(), **change)])
    assert says in str(caught.value)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# ---- mixtures


@dataclass
class Source:
    path: Path
    weight: float = 1.0


def numbered(path: Path, count: int) -> Path:
    return write(path, *[GOOD | {"sentence": f"s{index}"} for index in range(count)])


def test_weights_repeat_and_take_seeded_parts(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.jsonl", 10)

    def load(weight: float, seed: int = 0) -> list[int]:
        return [row.line for row in load_annotations([Source(path, weight)], max_bad_fraction=0, seed=seed)]

    everything = list(range(1, 11))
    assert load(1.0) == everything
    assert load(2.0) == everything * 2
    half = load(0.5)
    assert len(set(half)) == 5 and half == sorted(half) == load(0.5)
    assert {tuple(load(0.5, seed)) for seed in range(5)} != {tuple(half)}
    assert load(1.5)[:10] == everything and len(set(load(1.5)[10:])) == 5
    assert len(load(0.001)) == 1
    two = load_annotations([Source(path, 0.5), Source(path, 0.5)], max_bad_fraction=0)
    assert [row.line for row in two[:5]] != [row.line for row in two[5:]]
    assert load_annotations([], max_bad_fraction=0.01) == []


def test_bad_rows_are_named_and_counted_up_to_the_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.jsonl", *[GOOD] * 90, *[GOOD | {"duration": None, "x": 1}] * 10)
    with caplog.at_level(logging.WARNING, logger="vtg"):
        logging.getLogger("vtg").addHandler(caplog.handler)
        try:
            rows = load_annotations([Source(path)], max_bad_fraction=0.1)
        finally:
            logging.getLogger("vtg").removeHandler(caplog.handler)
    assert len(rows) == 90
    named = list(dict.fromkeys(message for message in caplog.messages if message.startswith("bad annotation row")))
    assert len(named) == 5 and f"{path}:91: " in named[0]
    assert "10 of 100 annotation rows are bad (10 %: 10 extra_field, 10 wrong_type)" in caplog.messages[-1]
    limit = r"more than data\.max_bad_fraction = 0\.09 allows; first: .*a\.jsonl:91"
    with pytest.raises(UserError, match=limit) as caught:
        load_annotations([Source(path)], max_bad_fraction=0.09)
    assert f"python -m utils.data_validation --annotations {path}" in str(caught.value)


def test_all_bad_is_an_error_whatever_the_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"video": 1}, {"video": 2})
    with pytest.raises(UserError, match="2 of 2 annotation rows are bad .* nothing is left"):
        load_annotations([Source(path)], max_bad_fraction=1.0)


def test_windows_outside_the_clip_are_bad_and_past_the_end_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, GOOD | {"timestamp": [29, 31]}, GOOD | {"timestamp": [30, 31]})
    rows = load_annotations([Source(path)], max_bad_fraction=0.5, trim="relative")
    assert [row.line for row in rows] == [1, 2]
    assert rows[1].timestamp == (Span(29.0, 31.0),)
    assert len(load_annotations([Source(path)], max_bad_fraction=0)) == 3  # without a reading nothing can be said


# ---- videos


def test_videos_resolve_beside_the_annotations_then_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, notes, root = (tmp_path / name for name in ("here", "notes", "root"))
    for folder in (here, notes, root):
        folder.mkdir()
    monkeypatch.chdir(here)
    row = replace(make_row(video="v/a.mp4"), file=str(notes / "a.jsonl"))
    assert resolve_video(row) == notes / "v" / "a.mp4"  # none there: the first place is named
    assert resolve_video(row, root) == root / "v" / "a.mp4"
    for folder, expected in ((here, Path("v/a.mp4")), (notes, notes / "v/a.mp4")):
        (folder / "v").mkdir()
        (folder / "v" / "a.mp4").touch()
        assert resolve_video(row) == expected
    assert resolve_video(replace(row, video="/abs/a.mp4")) == Path("/abs/a.mp4")
    assert resolve_video(row, root) == root / "v/a.mp4"  # those beside the annotations and here are outside it
    assert resolve_video(row, tmp_path) == notes / "v/a.mp4"  # and are found where they are not


# ---- trim


def test_clip_bounds_and_windows_in_each_reading() -> None:
    row = trimmed(50, 80, 55, 60)
    assert clip_bounds(row, "relative") == clip_bounds(row, "absolute") == (50.0, 80.0)
    assert clip_bounds(row, "pre_cut") is None
    assert model_windows(row, "absolute") == (Span(5.0, 10.0),)
    assert model_windows(row, "relative") == model_windows(row, "pre_cut") == (Span(55.0, 60.0),)
    assert to_file_clock(Span(5, 10), row, "absolute") == to_file_clock(Span(5, 10), row, "relative") == (55.0, 60.0)
    assert to_file_clock(Span(5, 10), row, "pre_cut") == (5, 10)


def test_half_given_trim_and_no_trim() -> None:
    assert clip_bounds(make_row(), "absolute") is None
    assert model_windows(make_row(), "absolute") == (Span(1.0, 4.5),)
    assert clip_bounds(make_row(video_start=5), "relative") == (5.0, 35.0)
    assert clip_bounds(make_row(video_end=30), "absolute") == (0.0, 30.0)
    assert model_windows(make_row(video_start=5, timestamp=None), "absolute") is None
    assert model_windows(make_row(video_start=5, timestamp=[]), "absolute") == ()


def test_rebasing_leaves_no_negative_zero() -> None:
    row = trimmed(0.1 + 0.2, 30.3, 0.3, 1.3)  # 0.3 - (0.1 + 0.2) = -5.6e-17
    windows = model_windows(row, "absolute")
    assert windows is not None and f"{windows[0].start:.1f}" == "0.0"


def test_unknown_reading_is_refused() -> None:
    with pytest.raises(UserError, match="data.trim must be one of relative, absolute, pre_cut, got 'Relative'"):
        clip_bounds(make_row(), "Relative")  # type: ignore[arg-type]


def test_findings_on_the_clips_clock() -> None:
    def kinds(row: Row, trim: Any) -> list[str]:
        return [kind for kind, _ in clip_findings(row, trim)]

    assert kinds(trimmed(50, 80, 5, 30), "relative") == []
    assert kinds(trimmed(50, 80, 5, 30.2), "relative") == ["end_past_duration"]
    assert kinds(trimmed(50, 80, 55, 60), "relative") == ["window_outside", "end_past_duration"]
    assert kinds(trimmed(50, 80, 55, 60), "absolute") == []
    assert kinds(trimmed(50, 80, 49, 81), "absolute") == ["start_before_clip", "end_past_duration"]
    assert kinds(trimmed(50, 80, 5, 10), "absolute") == ["window_outside"]
    assert kinds(make_row(timestamp=None), "relative") == kinds(make_row(timestamp=[]), "relative") == []


def test_trim_readings_count_what_fits() -> None:
    rows = [
        trimmed(50, 80, 5, 10),  # relative, pre_cut
        trimmed(50, 80, 55, 60),  # absolute
        trimmed(0, 30, 5, 10),  # all
        trimmed(50, 80, 5, 30.4),  # relative and pre_cut within the tolerance
        trimmed(50, 80, 5, 90),  # none
        make_row(),  # no trim fields
        make_row(video_start=3, timestamp=None),  # no window
    ]
    assert trim_readings(rows) == {"trimmed": 5, "relative": 3, "absolute": 2, "pre_cut": 3}
    assert [row for row, _ in misread_rows(rows, "relative")] == [rows[1]]
    assert misread_rows(rows, "absolute") == [
        (rows[0], ["relative", "pre_cut"]),
        (rows[3], ["relative", "pre_cut"]),
    ]


def test_probing_tells_relative_from_pre_cut() -> None:
    rows = [trimmed(50, 80, 5, 10)]
    whole = {"trimmed": 1, "relative": 1, "absolute": 0, "pre_cut": 0}
    assert trim_readings(rows, file_duration=lambda row: 200.0) == whole
    cut = whole | {"relative": 0, "pre_cut": 1}
    assert trim_readings(rows, file_duration=lambda row: 30.2) == cut
    check_trim(rows, "relative")
    with pytest.raises(UserError, match="set data.trim: pre_cut"):
        check_trim(rows, "relative", file_duration=lambda row: 30.2)
    with pytest.raises(UserError, match="set data.trim: relative"):
        check_trim(rows, "pre_cut", file_duration=lambda row: 200.0)


def test_check_trim_names_counts_key_and_remedy() -> None:
    rows = [replace(trimmed(50, 80, 55, 60), line=line) for line in (3, 4)] + [trimmed(0, 30, 5, 10)]
    check_trim(rows, "absolute")
    with pytest.raises(UserError) as caught:
        check_trim(rows, "relative")
    message = str(caught.value)
    assert "data.trim is `relative`, but 2 of the 3 rows with video_start/video_end fit only another reading" in message
    assert "relative 1, absolute 3, pre_cut 1" in message
    assert "first: rows.jsonl:3" in message and "set data.trim: absolute" in message
    # one stray row does not make the other reading the advice
    with pytest.raises(UserError) as caught:
        check_trim([trimmed(50, 80, 5, 10), trimmed(50, 80, 5, 12), trimmed(50, 80, 55, 60)], "relative")
    assert "set data.trim" not in str(caught.value) and "trim_reading=drop" in str(caught.value)


def test_load_annotations_stops_on_the_wrong_reading(tmp_path: Path) -> None:
    record = GOOD | {"timestamp": [55, 60], "video_start": 50, "video_end": 80}
    path = write(tmp_path / "a.jsonl", *[record] * 3)
    with pytest.raises(UserError, match="set data.trim: absolute"):
        load_annotations([Source(path)], max_bad_fraction=1.0, trim="relative")
    rows = load_annotations([Source(path)], max_bad_fraction=0.0, trim="absolute")
    assert [model_windows(row, "absolute") for row in rows] == [(Span(5.0, 10.0),)] * 3


# ---- the real files


def real(*parts: str) -> Path:
    path = ANNOTATIONS.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"the public annotations are not there: {path}")
    return path


def tvgbench_rows(name: str) -> list[Row]:
    rows = []
    for line, item in enumerate(json.loads(real("tvgbench", name).read_text()), start=1):
        if "path" in item:
            start, end = map(float, item["answer"].split("-"))
            item |= {"video": item["path"], "timestamp": [start, end], "sentence": item["question"]}
            item |= {"video_start": item["start"], "video_end": item["end"]}
        record = {key: item[key] for key in FIELDS[:-1]}
        if not check_record(record):
            rows.append(record_to_row(record, name, line))
    return rows


def test_time_r1_training_rows_are_relative() -> None:
    rows = tvgbench_rows("train_2k5.json")
    assert len(rows) == 2500
    # without the videos `relative` and a file that is already cut are the same; `absolute` is ruled out
    assert trim_readings(rows) == {"trimmed": 665, "relative": 665, "absolute": 351, "pre_cut": 665}
    check_trim(rows, "relative")
    with pytest.raises(UserError, match="314 of the 665 rows .* set data.trim: relative"):
        check_trim(rows, "absolute")


def test_tvgbench_rows_are_relative() -> None:
    rows = tvgbench_rows("tvgbench.json")
    assert len(rows) == 789  # 11 start where they end
    assert trim_readings(rows) == {"trimmed": 241, "relative": 239, "absolute": 77, "pre_cut": 239}
    check_trim(rows, "relative")


def test_qvhighlights_windows_round_trip() -> None:
    path = real("qvhighlights", "highlight_val_release.jsonl")
    rows = []
    for line, text in enumerate(path.read_text().splitlines(), start=1):
        item = json.loads(text)
        record = {"video": item["vid"], "duration": item["duration"], "timestamp": item["relevant_windows"]}
        record |= {"sentence": item["query"], "kwargs": {"qid": item["qid"]}}
        assert check_record(record) == []
        rows.append(record_to_row(record, "q", line))
        assert record_to_row(row_to_record(rows[-1]), "q", line) == rows[-1]
    several = sum(len(row.timestamp or ()) > 1 for row in rows)
    assert len(rows) == 1550 and 0.3 < several / len(rows) < 0.45


def test_problem_is_a_value() -> None:
    assert RowProblem("a", 1, "k", "m") == RowProblem("a", 1, "k", "m")
    assert rows_module.REQUIRED_FIELDS == FIELDS[:4]
