"""A finished evaluation as it is on disk, every answer judged by the protocol it was scored with.

Reads what `inference.evaluate` wrote and refuses what does not fit together. Comparing two evaluations is
`inference.report_compare`, what a page shows of a row `inference.report_rows`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inference.eval_store import METRICS_FILE, PREDICTIONS_FILE, RUN_FILE
from utils.common import UserError, or_nan
from utils.metrics import METRICS, sample_scores
from utils.protocols import counted_window, get_protocol
from utils.samples import sample_windows, scored_windows
from utils.spans import Span, temporal_iou

REQUIRED_KEYS = ("qid", "gt", "pred", "duration", "kwargs", "video", "sentence", "segments", "gt_segments", "line")
WINDOW_KEYS = ("gt", "pred", "segments", "gt_segments")
ROUNDED = 0.006
"""How far a stored average may be from the recomputed one, in percent: a protocol may round to two decimals."""


@dataclass(frozen=True)
class Judged:
    """One query with its answer and what it scored."""

    record: Mapping[str, Any]
    """The line of `predictions.jsonl`, with NaN where it holds null for a time."""
    scores: Mapping[str, float]
    """As `utils.metrics.sample_scores`, in [0, 1]."""
    counted: int | None
    """Place in `pred` of the window that R1 and mIoU look at; None without a window."""
    offsets_s: tuple[float, float] | None
    """Predicted minus labelled start and end, of the counted window and the labelled one it fits best; None where
    either is missing or not finite."""
    lengths_s: tuple[float, float] | None = None
    """Of the same two windows, predicted and labelled."""

    @property
    def score(self) -> float:
        """IoU in [0, 1]; of a row labelled absent 1 for a stated absence, else 0."""
        return self.scores["mIoU"] if self.record["gt"] else self.scores["absent_accuracy"]


@dataclass(frozen=True)
class Evaluation:
    """The results folder of a finished evaluation."""

    folder: Path
    run: Mapping[str, Any]
    """`run.json`: what decided the answers."""
    metrics: Mapping[str, Any]
    """`metrics.json`."""
    rows: Mapping[str, Judged]
    """By qid, in the order of the annotations."""

    @property
    def protocol(self) -> str:
        """How it was scored."""
        return self.metrics["protocol"]

    @property
    def grounded(self) -> list[Judged]:
        """The rows with a labelled window."""
        return [row for row in self.rows.values() if row.record["gt"]]

    @property
    def name(self) -> str:
        """What a page calls it: the name of its folder."""
        return self.folder.resolve().name


def read_evaluation(folder: Path, flag: str, protocol: str | None = None) -> Evaluation:
    """The evaluation in `folder`, judged by `protocol` (its own if None). `flag` names the folder in errors.

    Raises UserError for a folder that is none or not finished, a line that is no answer, and averages that are not
    those of the answers beside them.
    """
    run = _read_json(_require(folder, flag), RUN_FILE)
    metrics = _read_json(folder, METRICS_FILE)
    if not {"protocol", "averages", "intervals", "counts", "baselines", "breakdowns", "protocols"} <= metrics.keys():
        raise UserError(f"{folder / METRICS_FILE} is not what inference/evaluate.py writes; evaluate again")
    records = list(_read_records(folder / PREDICTIONS_FILE))
    if not records:
        raise UserError(f"{flag} {folder}: {PREDICTIONS_FILE} holds no answer, so there is nothing to show")
    own = {record["qid"]: judge(record, metrics["protocol"]) for record in records}
    _check_averages(own.values(), metrics, folder)
    if protocol not in (None, metrics["protocol"]):
        own = {qid: judge(row.record, str(protocol)) for qid, row in own.items()}
    return Evaluation(folder, run, metrics, own)


def judge(record: Mapping[str, Any], protocol: str) -> Judged:
    """One line of `predictions.jsonl`, scored."""
    rules = get_protocol(protocol)
    predicted = scored_windows(record) or []
    chosen = counted_window(predicted, replace(rules, unit_s=None))
    place = next((place for place, (window, _) in enumerate(predicted) if window is chosen), None)
    answer = counted_window(predicted, rules)
    best = _fitting(answer, sample_windows(record, "gt") or [])
    if answer is None or best is None:
        return Judged(record, sample_scores(record, protocol), place, None)
    offsets = (answer.start - best.start, answer.end - best.end)
    lengths = (answer.end - answer.start, best.end - best.start)
    return Judged(record, sample_scores(record, protocol), place, offsets, lengths)


def _fitting(predicted: Span | None, labelled: Sequence[Span]) -> Span | None:
    """The labelled window that fits best, or is nearest; None where a window is missing or not finite."""
    windows = [window for window in labelled if all(map(math.isfinite, window))]
    if predicted is None or not windows or not all(map(math.isfinite, predicted)):
        return None
    middle = (predicted.start + predicted.end) / 2
    return max(windows, key=lambda w: (temporal_iou(predicted, w), -abs((w.start + w.end) / 2 - middle)))


# ---------------------------------------------------------------------------------------------- reading
def _require(folder: Path, flag: str) -> Path:
    """`folder`, if it holds a finished evaluation."""
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: no such folder; give the --output_dir of inference/evaluate.py")
    if not (folder / RUN_FILE).is_file():
        raise UserError(
            f"{flag} {folder} holds no {RUN_FILE}, so it is no evaluation; give the --output_dir of "
            "inference/evaluate.py"
        )
    missing = [name for name in (PREDICTIONS_FILE, METRICS_FILE) if not (folder / name).is_file()]
    if missing:
        stored = sum(path.read_bytes().count(b"\n") for path in folder.glob("predictions.rank*.jsonl"))
        raise UserError(
            f"{flag} {folder}: it is not finished ({stored} answers stored, no {' and no '.join(missing)}); "
            "give its inference/evaluate.py command again, which goes on where it stopped"
        )
    return folder


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); evaluate again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object; evaluate again")
    return found


def _read_records(path: Path) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); evaluate again") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _record(line, f"{path}:{number}")
        if record["qid"] in seen:
            raise UserError(f"{path}:{number}: qid {record['qid']!r} comes twice; evaluate again")
        seen.add(record["qid"])
        yield record


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); evaluate again") from error
    missing = [key for key in REQUIRED_KEYS if key not in record] if isinstance(record, dict) else REQUIRED_KEYS
    if missing:
        raise UserError(f"{where} has no {missing[0]!r}; it is no line of inference/evaluate.py: evaluate again")
    for key in WINDOW_KEYS:
        if record[key] is not None:
            record[key] = [[or_nan(value) for value in window] for window in record[key]]
    return record


def _check_averages(rows: Iterable[Judged], metrics: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError where `metrics.json` is about other answers than those that are stored."""
    columns: dict[str, list[float]] = {name: [] for name in METRICS}
    for row in rows:
        for name, value in row.scores.items():
            columns[name].append(value)
    for name, values in columns.items():
        found = 100 * math.fsum(values) / len(values) if values else math.nan
        stored = or_nan(metrics["averages"].get(name))
        if math.isnan(found) != math.isnan(stored) or abs(found - stored) > ROUNDED:
            raise UserError(
                f"{folder / METRICS_FILE} is not about the answers in {PREDICTIONS_FILE}: {name} is {stored:.2f} there "
                f"and {found:.2f} of all {len(columns['parse_failure_rate'])} answers. Give the inference/evaluate.py "
                "command again, without --max_samples if all answers are to count; no query is answered twice"
            )
