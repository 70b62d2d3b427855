"""Rows as other trainers have them: read, written, and back without loss either way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.datasets.converters.helpers import JsonObject, quirks, read, run, save
from utils.common import UserError

OWN: list[JsonObject] = [
    {
        "video": "videos/a.mp4",
        "duration": 93.3217,
        "timestamp": [1.2345678, 4.0],
        "sentence": " hangs up 'a' sweater ",
        "video_start": None,
        "video_end": None,
        "kwargs": {"qid": "a-1", "dataset": "mine", "split": "train", "difficulty": 3, "quirks": ["outer_space"]},
    },
    {
        "video": "videos/b.mp4",
        "duration": 20.0,
        "timestamp": [[1.0, 2.0], [5.0, 6.5]],
        "sentence": "a dog jumps",
        "video_start": 30.0,
        "video_end": 50.0,
        "kwargs": {"qid": "b-1", "dataset": "mine", "split": "train", "quirks": []},
    },
    {
        "video": "videos/c.mp4",
        "duration": 20.0,
        "timestamp": [],
        "sentence": "a dog jumps",
        "video_start": None,
        "video_end": None,
        "kwargs": {"qid": 7, "dataset": "mine", "split": "train", "quirks": []},
    },
    {
        "video": "videos/c.mp4",
        "duration": 20.0,
        "timestamp": None,
        "sentence": "a cat sits",
        "video_start": None,
        "video_end": None,
        "kwargs": {"qid": 8, "dataset": "mine", "split": "train", "quirks": ["unlabelled", "already_cut"]},
    },
    {
        "video": "videos/c.mp4",
        "duration": 20.0,
        "timestamp": [9.0, 4.0],
        "sentence": "a cat runs",
        "video_start": None,
        "video_end": None,
        "kwargs": {"qid": 9, "dataset": "mine", "split": "train", "quirks": ["start_ge_end"]},
    },
]


def convert(dataset: str, source: Path, out: Path, *options: str) -> list[JsonObject]:
    """With paths relative to the folder of the files, so that a round trip can be compared."""
    return run(dataset, source, out, "--skip_videos", "--videos_dir", ".", *options)[0]


@pytest.mark.parametrize(
    ("style", "name"), [("ms_swift", "c.jsonl"), ("llama_factory", "c.jsonl"), ("llama_factory", "c.json")]
)
def test_rows_there_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, style: str, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    source = save(Path("rows_train.jsonl"), OWN)
    if name.endswith(".json"):
        from scripts.convert_dataset import main

        main(["--dataset", "rows", "--annotations", str(source), "--videos_dir", ".", "--skip_videos"]
             + ["--output", name, "--to", style])  # fmt: skip
        assert isinstance(json.loads(Path(name).read_text()), list)
    else:
        convert("rows", source, Path(name), "--to", style)
    assert convert("conversations", Path(name), Path("back.jsonl")) == OWN


def test_what_ms_swift_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    items = convert("rows", save(Path("rows.jsonl"), OWN), Path("swift.jsonl"), "--to", "ms_swift")
    said = [[(message["role"], message["content"]) for message in item["messages"]] for item in items]
    assert [[role for role, _ in turns] for turns in said] == [["user", "assistant"]] * 3 + [
        ["user"],
        ["user", "assistant"],
    ]
    assert all(turns[0][1].startswith("<video>") and turns[0][1].count("<video>") == 1 for turns in said)
    assert "hangs up 'a' sweater" in said[0][0][1]
    assert said[0][1][1] == "From 1.2 to 4.0 seconds."
    assert said[1][1][1] == "From 31.0 to 32.0 seconds and from 35.0 to 36.5 seconds."  # the whole file is shown
    assert said[2][1][1] == "The event does not happen in the video."
    assert [item["videos"] for item in items] == [[row["video"]] for row in OWN]


def test_what_llama_factory_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    items = convert("rows", save(Path("rows.jsonl"), OWN[:1]), Path("llama.jsonl"), "--to", "llama_factory")
    turns = items[0]["conversations"]
    assert [turn["from"] for turn in turns] == ["human", "gpt"] and turns[1]["value"] == "From 1.2 to 4.0 seconds."
    assert set(items[0]) == {"conversations", "videos", "vtg_rows"} and items[0]["videos"] == ["videos/a.mp4"]


def swift(question: str, answer: str | None, **extra: Any) -> JsonObject:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"<video>{question}"}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages, "videos": ["a.mp4"], "duration": 60.0} | extra


FOREIGN: list[JsonObject] = [
    swift("Find 'the dog's jump' in the video.", "The event happens in 3.2 - 7.9 seconds.", id="x-1", weight=0.5),
    swift("When does a man sit?", "<think>At 2 to 3?</think><answer>0:05 to 0:12</answer>"),
    swift('When does "a cow fly" happen?', "The event does not happen in the video."),
    swift('When does "a cow sing" happen?', "I cannot tell."),
    swift('When does "a cow sleep" happen?', None, solution="[4, 8]"),
    swift('When does "a cow eat" happen?', None),
]
LLAMA: JsonObject = {
    "conversations": [
        {"from": "human", "value": "<video>\nWhen does 'a dog jump' happen?"},
        {"from": "gpt", "value": "From 3.2 to 7.9 seconds."},
        {"from": "human", "value": "And 'a dog sleeps'?"},
        {"from": "gpt", "value": "From 10 to 20 seconds and from 30 to 40 seconds."},
    ],
    "videos": ["a.mp4"],
    "duration": 60,
}


def test_conversations_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = convert("conversations", save(Path("sft_train.jsonl"), FOREIGN), Path("out.jsonl"))
    assert [(row["sentence"], row["timestamp"]) for row in rows] == [
        ("the dog's jump", [3.2, 7.9]),
        ("When does a man sit?", [5.0, 12.0]),
        ("a cow fly", []),
        ("a cow sing", None),
        ("a cow sleep", [4.0, 8.0]),
        ("a cow eat", None),
    ]
    assert quirks(rows) == [[], ["whole_question"], [], ["unlabelled", "unread_answer"], [], ["unlabelled"]]
    assert [row["kwargs"]["qid"] for row in rows] == ["x-1", *(f"sft_train-{index}" for index in range(2, 7))]
    assert [row["kwargs"]["conversation"] for row in rows] == FOREIGN
    assert {(row["video"], row["duration"], row["kwargs"]["split"]) for row in rows} == {("a.mp4", 60.0, "train")}


def test_every_turn_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = convert("conversations", save(Path("data.json"), [LLAMA, LLAMA]), Path("out.jsonl"), "--split", "train")
    assert [row["timestamp"] for row in rows] == [[3.2, 7.9], [[10.0, 20.0], [30.0, 40.0]]] * 2
    assert [row["sentence"] for row in rows] == ["a dog jump", "a dog sleeps"] * 2
    assert [row["kwargs"]["qid"] for row in rows] == ["data-1-0", "data-1-1", "data-2-0", "data-2-1"]


@pytest.mark.parametrize(("style", "source"), [("ms_swift", FOREIGN), ("llama_factory", [LLAMA, LLAMA])])
def test_conversations_there_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, style: str, source: list[JsonObject]
) -> None:
    """Every key and text of the source comes out, and a second time in gives the same rows."""
    monkeypatch.chdir(tmp_path)
    rows = convert("conversations", save(Path("sft.jsonl"), source), Path("rows.jsonl"))
    items = convert("rows", Path("rows.jsonl"), Path("again.jsonl"), "--to", style)
    assert [{key: value for key, value in item.items() if key != "vtg_rows"} for item in items] == source
    assert convert("conversations", Path("again.jsonl"), Path("rows2.jsonl")) == rows


def test_a_row_that_was_changed_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = convert("conversations", save(Path("sft.jsonl"), [FOREIGN[0], LLAMA]), Path("rows.jsonl"))
    rows[0]["timestamp"] = [5.0, 6.0]
    save(Path("rows.jsonl"), rows[:2])  # and of the other conversation only the first turn is left
    items = convert("rows", Path("rows.jsonl"), Path("again.jsonl"), "--to", "ms_swift")
    assert [item["messages"][-1]["content"] for item in items] == [
        "From 5.0 to 6.0 seconds.",
        "From 3.2 to 7.9 seconds.",
    ]
    assert convert("conversations", Path("again.jsonl"), Path("rows2.jsonl")) == rows[:2]


def test_an_export_that_another_program_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    items = convert("rows", save(Path("rows.jsonl"), OWN[:1]), Path("swift.jsonl"), "--to", "ms_swift")
    items[0]["messages"][1]["content"] = "From 50 to 60 seconds."
    rows = convert("conversations", save(Path("swift.jsonl"), items), Path("back.jsonl"))
    assert rows[0]["timestamp"] == OWN[0]["timestamp"] and quirks(rows) == [["outer_space", "differing_rows"]]
    assert rows[0]["kwargs"]["conversation"]["messages"][1]["content"] == "From 50 to 60 seconds."


@pytest.mark.parametrize(("style", "source"), [("ms_swift", FOREIGN[0]), ("llama_factory", LLAMA)])
def test_a_conversation_of_others_that_was_changed_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, style: str, source: JsonObject
) -> None:
    """Its rows stay those that were written, and say that it tells another story now."""
    monkeypatch.chdir(tmp_path)
    before = convert("conversations", save(Path("sft.jsonl"), [source]), Path("rows.jsonl"))
    convert("rows", Path("rows.jsonl"), Path("again.jsonl"), "--to", style)
    text = Path("again.jsonl").read_text()
    assert text.count(" 3.2 ") == 1
    save(Path("again.jsonl"), text.replace(" 3.2 ", " 1.0 "))
    rows = convert("conversations", Path("again.jsonl"), Path("rows2.jsonl"))
    assert [row["timestamp"] for row in rows] == [row["timestamp"] for row in before]
    assert quirks(rows) == [["differing_rows"]] * len(before)
    assert " 1.0 " in json.dumps(rows[0]["kwargs"]["conversation"])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"videos": ["a.mp4"]}, "neither `messages` (ms-swift) nor `conversations` (LLaMA-Factory)"),
        (swift("x", "y", videos=["a.mp4", "b.mp4"]), "a row has one video"),
        (swift("x", "y", videos=[]), "a row has one video"),
        ({"messages": [{"role": "assistant", "content": "hi"}], "videos": ["a.mp4"]}, "without a question"),
        ({key: value for key, value in FOREIGN[0].items() if key != "duration"}, "1 of 1 rows have no duration"),
    ],
)
def test_conversations_that_are_no_rows(tmp_path: Path, record: JsonObject, message: str) -> None:
    with pytest.raises(UserError) as caught:
        run("conversations", save(tmp_path / "c.jsonl", [record]), tmp_path / "out.jsonl", "--skip_videos")
    assert message in str(caught.value)


def test_parts_and_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The OpenAI form of a message, and ms-swift's query and response."""
    monkeypatch.chdir(tmp_path)
    parts = [{"type": "video", "video": "b.mp4"}, {"type": "text", "text": "When does 'a dog jump' happen?"}]
    records: list[JsonObject] = [
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "3 to 4 s"}], "duration": 9},
        {"query": "<video>When does 'a cat sit' happen?", "response": "5 to 6 s", "videos": ["c.mp4"], "duration": 9},
    ]
    rows = convert("conversations", save(Path("c.jsonl"), records), Path("out.jsonl"))
    about = [(row["video"], row["sentence"], row["timestamp"]) for row in rows]
    assert about == [("b.mp4", "a dog jump", [3.0, 4.0]), ("c.mp4", "a cat sit", [5.0, 6.0])]
    assert len(read(Path("out.jsonl"))) == 2
