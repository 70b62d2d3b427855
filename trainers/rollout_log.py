"""The record of what GRPO sampled, one JSON line per group in `rollouts.jsonl`; what to say when groups are flat.

A run that goes on from a checkpoint samples the steps after it again. What it had recorded of them moves to
`rollouts.superseded.jsonl` first: no group stands twice, and nothing is lost.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.common import UserError
from utils.logging_utils import get_logger

ROLLOUTS_FILE, SUPERSEDED_FILE = "rollouts.jsonl", "rollouts.superseded.jsonl"


def group_record(
    step: int,
    row: Mapping[str, Any],
    texts: Sequence[str],
    spans: Sequence[Sequence[Sequence[float]] | None],
    rewards: Sequence[Mapping[str, float]],
    totals: Sequence[float],
    advantages: Sequence[float],
    lengths: Sequence[int],
) -> dict[str, Any]:
    """One group as it is written. Times are seconds on the clip's clock; `spans` is null where nothing can be read.

    `row` is a row of `RolloutDataset`; the sequences hold one entry per completion.
    """
    columns = zip(texts, spans, rewards, totals, advantages, lengths, strict=True)
    completions = [
        {
            "text": text,
            "spans": None if windows is None else [list(window) for window in windows],
            "rewards": dict(parts),
            "reward": total,
            "advantage": advantage,
            "num_tokens": length,
        }
        for text, windows, parts, total, advantage, length in columns
    ]
    about = {
        "row": row["row"],
        "video": row["video"],
        "sentence": row["prompt"],
        "timestamp": [list(window) for window in row["timestamp"]],
        "duration": row["duration"],
    }
    return {"step": step, **about, "completions": completions}


def append_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append one line per record. Raises UserError when the disk does not take them."""
    try:
        with open(path, "a", encoding="utf-8") as handle:
            handle.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; training.log_rollouts=false skips it") from error


def supersede(path: Path, step: int) -> None:
    """Before a run goes on after `step`: move the records from there on, and half a line that a kill left, to
    `SUPERSEDED_FILE` beside `path`. A file that is not there yet is none."""
    if not path.is_file():
        return
    kept = 0
    with open(path, "r+b") as handle:
        for line in handle:
            if not line.endswith(b"\n") or _step(line) >= step:
                break
            kept += len(line)
        handle.seek(kept)
        if rest := handle.read():
            with open(path.with_name(SUPERSEDED_FILE), "ab") as other:
                other.write(rest if rest.endswith(b"\n") else rest + b"\n")
            handle.truncate(kept)


def _step(line: bytes) -> int:
    """Of a record; -1 for what is none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def read_records(path: Path) -> list[dict[str, Any]]:
    """The groups of a run, in order. Of two records of one (step, row) the later counts. Half a line, as a killed run
    leaves it, is left out; with a warning, if it is not the last.

    Raises UserError for a missing file and for a line that is no record.
    """
    try:
        lines = path.read_bytes().splitlines()  # of bytes: a sampled text may hold other line ends
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; a GRPO run writes it (train_rl.py)") from error
    records: dict[tuple[int, int], dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records[record["step"], record["row"]] = record
        except ValueError:
            if number < len(lines):
                get_logger().warning("%s:%d is half a record; left out", path, number)
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}:{number} is no rollout record ({error})") from error
    return list(records.values())


def flat_cause(rewards: Tensor, full_mark: float) -> str:
    """The likely cause of groups whose completions all earn the same, from their total rewards (N,), in words."""
    if float(rewards.max()) <= 1e-8:
        return (
            "every completion earns 0. Either no answer can be read (train/parse_failure_rate), or the model is too "
            "far off for this reward: fine-tune with train_sft.py first"
        )
    if float(rewards.min()) >= 0.95 * full_mark:
        return "every completion earns nearly the full mark: the rows are too easy; choose harder ones with data.select"
    return (
        "the completions of a prompt hardly differ: raise training.temperature or training.num_generations, or choose "
        "rows of medium difficulty with data.select"
    )
