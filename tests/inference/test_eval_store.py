"""The results folder: what a kill leaves, and whose folder it is."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe, get_context
from pathlib import Path

import pytest

from inference.eval_store import Answer, AnswerLog, begin, claimed, read_answers, write_predictions
from utils.common import REPO_ROOT, UserError

WRITER = """
import sys
from itertools import count
from pathlib import Path
from inference.eval_store import Answer, AnswerLog, read_answers

folder = Path(sys.argv[1])
first = len(read_answers(folder))
log = AnswerLog(folder, 0)
for batch in count():
    log.add(Answer(f"q{first + 3 * batch + i}", "said \\u2028 " * 200, None) for i in range(3))
"""


def test_killed_while_it_writes_nothing_is_lost_or_written_twice(tmp_path: Path) -> None:
    """Three writers one after the other, each killed (-9) in the middle of its work."""
    log = tmp_path / "predictions.rank0.jsonl"
    size = 0
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], cwd=REPO_ROOT)
        until = time.monotonic() + 120
        while (not log.exists() or log.stat().st_size <= size) and time.monotonic() < until:
            time.sleep(0.001)
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        assert log.stat().st_size > size
        size = log.stat().st_size
    answers = read_answers(tmp_path)
    lines = log.read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert [json.loads(line)["qid"] for line in lines] == list(answers) == [f"q{i}" for i in range(len(lines))]
    assert {answer.text for answer in answers.values()} == {"said \u2028 " * 200}


def test_half_a_line_is_cut_off(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path, 2)
    log.add([Answer("a", "1"), Answer("b", "2")])
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + b'{"qid": "c", "te')
    assert list(read_answers(tmp_path)) == ["a", "b"] and log.path.read_bytes() == whole
    log.add([Answer("c", "3")])
    assert read_answers(tmp_path)["c"] == Answer("c", "3")


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "predictions.rank0.jsonl").write_bytes(b'{"qid": "a", "text": "", "fault": null}\n{"qid": \n')
    with pytest.raises(UserError, match="predictions.rank0.jsonl:2 is no stored answer"):
        read_answers(tmp_path)


def test_an_answer_counts_more_than_a_fault_and_the_first_more_than_the_second(tmp_path: Path) -> None:
    AnswerLog(tmp_path, 0).add([Answer("a", "", "gone"), Answer("b", "first"), Answer("c", "", "gone")])
    AnswerLog(tmp_path, 1).add([Answer("a", "found"), Answer("b", "", "gone"), Answer("c", "", "still gone")])
    answers = read_answers(tmp_path)
    assert (answers["a"].text, answers["b"].text, answers["c"].fault) == ("found", "first", "still gone")


def test_whose_folder_it_is(tmp_path: Path) -> None:
    made_of = {"annotations": {"name": "test.jsonl", "sha256": "12345678aa"}, "data.fps": 2.0}
    begin(tmp_path, made_of)
    begin(tmp_path, {**made_of, "annotations": {"name": "moved.jsonl", "sha256": "12345678aa"}})
    with pytest.raises(UserError, match=r"\(data.fps: 2.0 there, 1.0 now\)"):
        begin(tmp_path, {**made_of, "data.fps": 1.0})
    with pytest.raises(UserError, match=r"annotations: test.jsonl \(12345678\) there, val.jsonl \(99999999\) now"):
        begin(tmp_path, {**made_of, "annotations": {"name": "val.jsonl", "sha256": "99999999bb"}})
    with pytest.raises(UserError, match="data.fps: 2.0 there, none now"):  # what only the earlier one has
        begin(tmp_path, {"annotations": made_of["annotations"]})
    (tmp_path / "run.json").write_text("[")
    with pytest.raises(UserError, match="run.json cannot be read"):
        begin(tmp_path, made_of)


def test_answers_without_a_record_are_not_taken_over(tmp_path: Path) -> None:
    AnswerLog(tmp_path, 0).add([Answer("a", "1")])
    with pytest.raises(UserError, match="holds predictions.rank0.jsonl but no run.json"):
        begin(tmp_path, {})


def test_one_evaluation_at_a_time(tmp_path: Path) -> None:
    with claimed(tmp_path / "new"), pytest.raises(UserError, match="another evaluation is running in it"):
        with claimed(tmp_path / "new"):
            raise AssertionError
    with claimed(tmp_path / "new"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be written"), claimed(tmp_path / "file"):
        raise AssertionError


def test_a_reader_that_outlives_a_kill_does_not_hold_the_folder(tmp_path: Path) -> None:
    """A data loader's processes notice seconds later that theirs was killed; the same command works at once."""
    with claimed(tmp_path):
        here, there = Pipe()
        reader = get_context("fork").Process(target=lambda: (there.send("started"), time.sleep(60)))
        reader.start()
        assert here.recv() == "started"
        with pytest.raises(UserError, match="another evaluation is running in it"), claimed(tmp_path):
            raise AssertionError
    try:
        with claimed(tmp_path):
            assert reader.is_alive()
    finally:
        reader.kill()


def test_predictions_are_plain_json(tmp_path: Path) -> None:
    path = write_predictions(tmp_path, [{"pred": [[float("nan"), 2.0]], "text": "ü"}])
    assert path.read_text() == '{"pred": [[null, 2.0]], "text": "ü"}\n'
