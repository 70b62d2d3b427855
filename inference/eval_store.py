"""The results folder of an evaluation: what it is of, every answer as it comes, and no answer lost or made twice.

    run.json                    what decides the answers; another evaluation is refused
    predictions.rank<N>.jsonl   answers of process N, one line each, appended a batch at a time
    predictions.jsonl           all of them in the order of the annotations, at the end

A killed run leaves at most half a line, which is dropped. The answers of all processes of all earlier starts count, so
a run may go on with another number of processes. Nothing here knows models or metrics.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from utils.common import UserError, atomic_open, finite_or_null, write_json

RUN_FILE, PREDICTIONS_FILE, METRICS_FILE = "run.json", "predictions.jsonl", "metrics.json"
_LOCK_FILE = ".lock"


@dataclass(frozen=True)
class Answer:
    """What the model said to one query, or why its video could not be read."""

    qid: str
    text: str
    fault: str | None = None

    def line(self) -> bytes:
        """As it is stored."""
        return (json.dumps(self.__dict__, ensure_ascii=False) + "\n").encode()


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make the folder, and keep a second evaluation out of it for as long as this one runs.

    Processes forked meanwhile (those that read videos) do not hold it: they may outlive a kill by seconds.
    Raises UserError when it cannot be made, or another process has claimed it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / _LOCK_FILE, "w")
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written: {error.strerror}. Choose another") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"--output_dir {folder}: another evaluation is running in it; wait for it or choose another folder"
            ) from error
        except OSError:  # a file system without locks
            pass
        _locks.add(handle)
        try:
            yield
        finally:
            _locks.discard(handle)


_locks: set[IO[str]] = set()
"""Lock files of this process that are held."""


def _close_locks() -> None:
    while _locks:
        _locks.pop().close()


os.register_at_fork(after_in_child=_close_locks)


def begin(folder: Path, made_of: Mapping[str, Any]) -> None:
    """Note in a new folder what decides its answers; in one with answers, make sure that it is the same.

    `made_of` maps words for a person ("annotations", "model", "data.fps", ...) to plain JSON values. Of a mapping with
    a `name` the rest is compared: a file may move.
    Raises UserError for a folder of another evaluation, naming what differs, and for one that holds other answers.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        if stray := sorted(file.name for file in folder.glob("predictions*.jsonl")):
            raise UserError(f"--output_dir {folder} holds {stray[0]} but no {RUN_FILE}: choose another folder")
        write_json(path, dict(made_of))
        return
    try:
        earlier = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); choose another --output_dir") from error
    changed = [key for key in {**earlier, **made_of} if _identity(earlier.get(key)) != _identity(made_of.get(key))]
    if changed:
        differs = "; ".join(
            f"{key}: {_short(earlier.get(key))} there, {_short(made_of.get(key))} now" for key in changed
        )
        raise UserError(
            f"--output_dir {folder} holds the results of another evaluation ({differs}). Choose another folder, or "
            "remove it if its answers are no longer needed"
        )


def _identity(value: Any) -> Any:
    return {key: item for key, item in value.items() if key != "name"} if isinstance(value, dict) else value


def _short(value: Any) -> str:
    """A value for an error message; of a file its name and the first digits of its hash."""
    if isinstance(value, dict) and "name" in value:
        return f"{value['name']} ({str(value.get('sha256'))[:8]})"
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_answers(folder: Path) -> dict[str, Answer]:
    """Every stored answer by its qid; of a row whose video could not be read, the last reason.

    Half a last line, as a kill leaves it, is cut off its file. Raises UserError for any other line that is no answer.
    """
    found: dict[str, Answer] = {}
    for path in sorted(folder.glob("predictions.rank*.jsonl")):
        for number, line in enumerate(_whole_lines(path), start=1):
            answer = _read(line, f"{path}:{number}")
            if answer.qid not in found or found[answer.qid].fault is not None:
                found[answer.qid] = answer
    return found


def _read(line: bytes, where: str) -> Answer:
    try:
        record = json.loads(line)
        return Answer(record["qid"], record["text"], record["fault"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} is no stored answer ({error}); remove that line, and it is answered again") from error


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of a file; a last one without its end is removed from it."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(path, end)
    return data[:end].splitlines()


class AnswerLog:
    """Appends answers to the file of one process; what `add` was given survives a kill."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"predictions.rank{rank}.jsonl"

    def add(self, answers: Iterable[Answer]) -> None:
        """Append in one write, so that a batch is there whole or, after a kill in between, is made again."""
        lines = b"".join(answer.line() for answer in answers)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            while lines:
                lines = lines[os.write(descriptor, lines) :]
        finally:
            os.close(descriptor)


def write_predictions(folder: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Write `predictions.jsonl` anew, whole or not at all. Times that are not finite become null: JSON has no NaN."""
    path = folder / PREDICTIONS_FILE
    with atomic_open(path) as handle:
        handle.writelines(json.dumps(finite_or_null(record), ensure_ascii=False) + "\n" for record in records)
    return path
