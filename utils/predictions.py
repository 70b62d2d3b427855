"""A file of predictions that is to be scored: reading it, fitting it to the queries, and the unit of its times.

One JSON object a line with `qid` and one of

- `pred`: `[[start, end], ...]` or `[[start, end, score], ...]` in seconds on the clip's clock (0 at `video_start`);
  `[]` = said to be absent, `null` = the answer could not be read; `null` in the place of a number is NaN, as an
  evaluation writes it in its own `predictions.jsonl`;
- `pred_relevant_windows`: the same, as QVHighlights submissions call it;
- `text`: the answer itself, read by `utils.spans`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.common import UserError, nearest, or_nan
from utils.samples import Sample, scored_windows
from utils.spans import Span, parse_spans

WINDOW_KEYS = ("pred", "pred_relevant_windows")
FAR_PAST = 10.0
"""A window that ends past this many times the duration cannot be meant in seconds."""
NEARLY_ALL, HALF = 0.9, 0.5
SHORTEST_S = 5.0
"""Windows in [0, 1] on videos longer than this are fractions, not seconds."""
NUM_NAMED = 5


def read_predictions(path: Path, durations: Mapping[str, float], ignored: Collection[str] = ()) -> dict[str, Any]:
    """The `pred` of every qid in the file, as `utils.metrics` takes it. `durations` holds seconds by known qid.

    Raises UserError for a file that cannot be read, a line that is no prediction, a qid that comes twice and one that
    is neither in `durations` nor `ignored`.
    """
    found: dict[str, Any] = {}
    lines: dict[str, int] = {}
    unknown: list[str] = []
    for number, record in _records(path):
        qid = str(record["qid"])
        if qid in lines:
            raise UserError(f"{path}:{number}: qid {qid!r} stands in line {lines[qid]} already; keep one of them")
        lines[qid] = number
        if qid in durations:
            found[qid] = _prediction(record, durations[qid], f"{path}:{number}")
            _check(qid, found[qid], f"{path}:{number}")
        elif qid not in ignored:
            unknown.append(qid)
    if unknown:
        raise UserError(_unknown(path, unknown, durations))
    return found


def _records(path: Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--predictions {path} cannot be read: {error}; give a JSONL file in UTF-8") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError(f"--predictions {path} holds no line; expected one JSON object per query with qid and pred")
    for number, line in numbered:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number} is not JSON ({error}); expected one object a line") from error
        if not isinstance(record, dict) or not isinstance(record.get("qid"), str | int):
            raise UserError(f"{path}:{number} has no qid; each line is an object with qid and pred (or text)")
        yield number, record


def _prediction(record: Mapping[str, Any], duration: float, where: str) -> Any:
    for key in WINDOW_KEYS:
        if key in record:
            return _with_nan(record[key])
    if isinstance(record.get("text"), str):
        spans = parse_spans(record["text"], duration=duration)
        return None if spans is None else [list(span) for span in spans]
    raise UserError(f"{where} has none of {', '.join((*WINDOW_KEYS, 'text'))}; name the windows `pred`")


def _check(qid: str, windows: Any, where: str) -> None:
    try:
        scored_windows({"qid": qid, "pred": windows})
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _with_nan(windows: Any) -> Any:
    """`windows` with NaN for null among their numbers; anything that is no list of lists stays as it is."""
    if not isinstance(windows, list):
        return windows
    return [[or_nan(value) for value in window] if isinstance(window, list) else window for window in windows]


def _unknown(path: Path, unknown: Sequence[str], known: Mapping[str, float]) -> str:
    named = ", ".join(map(repr, unknown[:NUM_NAMED])) + (", ..." if len(unknown) > NUM_NAMED else "")
    match = nearest(unknown[0], known)
    hint = f" (the nearest to the first is {match!r})" if match else ""
    return (
        f"{path}: {len(unknown)} qids are not in the annotations: {named}{hint}. Give the annotation file that these "
        "predictions were made for; the qid of a row is its kwargs.qid, or else its line number in the file"
    )


def check_units(samples: Iterable[Sample], where: str) -> None:
    """Raise UserError when the predicted times are plainly not in seconds; `where` says whose they are."""
    found = list(_windows(samples))
    ends = len(found)
    far = sum(_is_far(window, duration) for window, duration in found)
    after = sum(_is_after(window, duration) for window, duration in found)
    shares = sum(0 <= window.start <= window.end <= 1 and duration > SHORTEST_S for window, duration in found)
    remedy = "Write them in seconds, or pass --trust_units if they are"
    if ends and far >= NEARLY_ALL * ends:
        raise UserError(
            f"{where}: {far} of {ends} windows end past {FAR_PAST:g} times their video: these look like milliseconds "
            f"or frame numbers, not seconds. {remedy}"
        )
    if ends and after >= HALF * ends:
        raise UserError(
            f"{where}: {after} of {ends} windows begin after the end of their video: these look like frame numbers or "
            "per cent, or count from the start of the file in place of video_start; they must be seconds on the clip's "
            f"clock. {remedy}"
        )
    if ends and shares == ends:
        raise UserError(
            f"{where}: all {ends} windows lie between 0 and 1, on videos of more than {SHORTEST_S:g} s: these look "
            f"like fractions of the video, not seconds. {remedy}"
        )


def far_outside(samples: Iterable[Sample]) -> list[Any]:
    """The qid of every window that begins after the end of its video or ends past ten times it: other units among the
    seconds, or a model that is far off."""
    return [
        sample["qid"]
        for sample in samples
        for window, duration in _windows([sample])
        if _is_far(window, duration) or _is_after(window, duration)
    ]


def _windows(samples: Iterable[Sample]) -> Iterator[tuple[Span, float]]:
    """Predicted windows of finite times, with the duration of their video."""
    for sample in samples:
        for window, _ in scored_windows(sample) or []:
            if all(map(math.isfinite, window)):
                yield window, sample["duration"]


def _is_far(window: Span, duration: float) -> bool:
    return window.end > FAR_PAST * duration


def _is_after(window: Span, duration: float) -> bool:
    return window.start >= duration
