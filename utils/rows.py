"""Annotation rows: the JSONL format, its one normaliser for reading and writing, and the readings of trimmed rows.

A row is `{"video", "duration", "timestamp", "sentence", "video_start", "video_end", "kwargs"}`; the first four are
required. Times are seconds. `duration` is the length of the labelled stretch. `timestamp` is `[start, end]`,
`[[start, end], ...]` for several windows (kept sorted), `null` for a row without a label and `[]` for "labelled: the
event does not happen". `kwargs` is the user's own and passes through untouched.

Owns what one row means on its own. Checks that need other rows or the videos are in `utils.data_validation`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

from utils.common import UserError, atomic_open, nearest
from utils.spans import Span

log = logging.getLogger("vtg")

REQUIRED_FIELDS = ("video", "duration", "timestamp", "sentence")
FIELDS = (*REQUIRED_FIELDS, "video_start", "video_end", "kwargs")

Trim = Literal["relative", "absolute", "pre_cut"]
"""What the times of a row with `video_start`/`video_end` count from: the clip's start, the file's start, or a file
that is already the clip (both fields are ignored)."""
TRIM_READINGS: tuple[str, ...] = get_args(Trim)

TRIM_TOLERANCE_S = 0.5
"""How far a window may stick out of the clip and still fit a reading: labels and containers are rounded."""
ROUNDING_S = 1e-6
"""Differences below this are float noise, not times."""
NUM_NAMED = 5
"""Bad rows named in the log or an error; the validator lists all of them."""

Finding = tuple[str, str]
"""(kind, message) before it is tied to a file and a line."""


@dataclass(frozen=True)
class Row:
    """One normalised annotation: times in seconds, windows sorted. `file` and `line` say where it was read."""

    video: str
    duration: float
    timestamp: tuple[Span, ...] | None
    sentence: str
    video_start: float | None
    video_end: float | None
    kwargs: dict[str, Any] = field(hash=False)
    file: str
    line: int


@dataclass(frozen=True)
class RowProblem:
    """One fault of one row. `kind` is a stable slug (the list is `utils.data_validation.KINDS`); `line` counts from
    1."""

    file: str
    line: int
    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message} [{self.kind}]"


class RawRow(NamedTuple):
    """One non-blank line: its text, the object it holds (None when it holds none) and what is wrong with it."""

    line: int
    text: str
    record: dict[str, Any] | None
    findings: list[Finding]


class Source(Protocol):
    """An annotation file and its weight in the mixture, as `utils.config.AnnotationSource`."""

    @property
    def path(self) -> Path: ...
    @property
    def weight(self) -> float: ...


# ---- reading


LABEL_FAULTS = frozenset({"start_ge_end", "negative_start", "start_before_clip"})
"""Faults of released labels that training cannot use, and that published scores count as they are."""


def read_rows(
    path: str | os.PathLike[str], *, kept_faults: Collection[str] = ()
) -> tuple[list[Row], list[RowProblem]]:
    """The good rows of a JSONL file and the problems of the others, both in file order. A bad row never raises. Rows
    with no other problems than `kept_faults` (kinds) count as good.

    Raises UserError when the file is missing, empty, not UTF-8, or one JSON document instead of JSON lines.
    """
    file = os.fspath(path)
    rows: list[Row] = []
    problems: list[RowProblem] = []
    for raw in read_raw_rows(file):
        if raw.record is not None and {kind for kind, _ in raw.findings} <= set(kept_faults):
            rows.append(record_to_row(raw.record, file, raw.line))
        else:
            problems += [RowProblem(file, raw.line, kind, message) for kind, message in raw.findings]
    return rows, problems


def read_raw_rows(path: str | os.PathLike[str]) -> list[RawRow]:
    """Every non-blank line of a JSONL file, parsed and checked. Raises UserError as `read_rows` does."""
    text = _read_text(Path(path))
    # not str.splitlines(): U+2028 and its like are legal inside a JSON string
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    stripped = (line.strip().lstrip("\ufeff") for line in lines)  # joined files keep their byte order marks inside
    numbered = [(number, line) for number, line in enumerate(stripped, start=1) if line]
    if not numbered:
        raise UserError(f"{path}: the file holds no rows; expected one JSON object per line with {', '.join(FIELDS)}")
    _refuse_one_document(path, numbered[0][1])
    return [RawRow(number, line, *_parse_line(line)) for number, line in numbered]


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        hint = _similar_file(path)
        raise UserError(
            f"{path}: no such annotation file; {hint}check data.train, data.val, data.test or --annotations"
        ) from None
    except OSError as error:
        raise UserError(
            f"{path}: the annotation file cannot be read ({error.strerror}); give a readable .jsonl file"
        ) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8 text "
            f"(for example `iconv -f UTF-16 -t UTF-8`, with its own encoding after -f)"
        ) from None


def _similar_file(path: Path) -> str:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    match = nearest(path.name, siblings)
    return f"did you mean {path.with_name(match)}? Else " if match else ""


def _refuse_one_document(path: str | os.PathLike[str], first_line: str) -> None:
    """A JSON array or an indented object would otherwise be thousands of `bad_json` lines."""
    if re.match(r"\[\s*(\{|$)", first_line):
        raise UserError(
            f"{path}: this is one JSON array, not JSON lines; write one object per line, for example with: "
            f"python -c \"import json; [print(json.dumps(r)) for r in json.load(open('{path}'))]\" > rows.jsonl"
        )
    if first_line == "{":
        raise UserError(
            f"{path}: one JSON object spread over several lines; JSON lines need each object on a line of its own"
        )


def _parse_line(text: str) -> tuple[dict[str, Any] | None, list[Finding]]:
    twice: list[str] = []

    def note_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=note_duplicates)
    except json.JSONDecodeError as error:
        return None, [("bad_json", f"not JSON: {error.msg} at column {error.colno}: {_show(text)}")]
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        return None, [("bad_json", f"JSON that cannot be read: {str(error).split(';')[0]}")]
    if not isinstance(value, dict):
        return None, [("not_an_object", f"a row must be a JSON object {{...}}, got {_show(value)}")]
    if twice:
        return None, [("duplicate_key", f"`{key}` stands twice in the row; keep one") for key in twice]
    return value, check_record(value)


# ---- checking


def check_record(record: Mapping[str, Any]) -> list[Finding]:
    """All that is wrong with one row taken by itself, as (kind, message); [] for a row that can be normalised."""
    findings = [*_field_findings(record), *_value_findings(record)]
    if findings:
        return findings  # what follows needs every field present and of its type
    return [*_text_findings(record), *_trim_findings(record), *_window_findings(windows_of(record["timestamp"]) or ())]


def _field_findings(record: Mapping[str, Any]) -> Iterator[Finding]:
    for name in REQUIRED_FIELDS:
        if name not in record:
            rule = (
                "null when there is no label, [] when the event is absent" if name == "timestamp" else "it is required"
            )
            yield "missing_field", f"`{name}` is missing; {rule}"
    for name in record:
        if name not in FIELDS:
            match = nearest(name, FIELDS)
            hint = f"did you mean `{match}`? Else " if match and match not in record else ""
            yield "extra_field", f"`{_cut(name)}` is not a field of a row; {hint}move it into `kwargs`"


def _value_findings(record: Mapping[str, Any]) -> Iterator[Finding]:
    unusable = list(_unusable_values(record, ""))
    yield from unusable
    if unusable:
        return
    for name in ("video", "sentence"):
        if name in record and not isinstance(record[name], str):
            yield "wrong_type", f"`{name}` must be a string, got {_show(record[name])}"
    for name in ("duration", "video_start", "video_end"):
        if name in record and not (_is_number(record[name]) or (record[name] is None and name != "duration")):
            yield "wrong_type", f"`{name}` must be a number of seconds without quotes, got {_show(record[name])}"
    if not isinstance(record.get("kwargs"), dict | None):
        yield "wrong_type", f"`kwargs` must be an object {{...}} or null, got {_show(record['kwargs'])}"
    if not _is_timestamp(record.get("timestamp")):
        shown = _show(record["timestamp"])
        yield "wrong_type", f"`timestamp` must be [start, end], [[start, end], ...], [] or null, got {shown}"


def _unusable_values(value: Any, where: str) -> Iterator[Finding]:
    """Values anywhere in the row, `kwargs` included, that JSON or UTF-8 cannot carry."""
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            yield "bad_text", f"`{where}` holds half of a surrogate pair, which no UTF-8 file can hold"
    elif isinstance(value, float | int) and not isinstance(value, bool):
        if not _is_finite(value):
            yield "non_finite", f"`{where}` is {_cut(str(value))}; every number must be finite"
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _unusable_values(key, where)
            yield from _unusable_values(item, f"{where}.{key}" if where else key)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _unusable_values(item, f"{where}[{index}]")


def _text_findings(record: Mapping[str, Any]) -> Iterator[Finding]:
    if not record["video"].strip() or "\0" in record["video"]:
        yield "bad_text", f"`video` must be the path of a file, got {_show(record['video'])}"
    if not any(char.isprintable() and not char.isspace() for char in record["sentence"]):
        yield "empty_sentence", f"`sentence` must say what to look for, got {_show(record['sentence'])}"
    if record["duration"] <= 0:
        yield "bad_duration", f"`duration` must be > 0 s, got {record['duration']}"


def _trim_findings(record: Mapping[str, Any]) -> Iterator[Finding]:
    start, end = record.get("video_start"), record.get("video_end")
    if start is not None and start < 0:
        yield "bad_trim", f"`video_start` must be >= 0 s, got {start}"
    if end is not None and end <= (start or 0):
        yield "bad_trim", f"`video_end` must be after `video_start`, got {start or 0} and {end}"


def _window_findings(windows: Sequence[Span]) -> Iterator[Finding]:
    for start, end in windows:
        if start >= end:
            yield "start_ge_end", f"`timestamp` must start before it ends, got [{start:g}, {end:g}]"
        if min(start, end) < 0:
            yield "negative_start", f"`timestamp` must start at 0 s or later, got [{start:g}, {end:g}]"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of more than 308 digits
        return False


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value))


def _is_timestamp(value: Any) -> bool:
    return value is None or _is_pair(value) or (isinstance(value, list | tuple) and all(map(_is_pair, value)))


def _show(value: Any) -> str:
    return _cut(json.dumps(value, ensure_ascii=True, default=str))


def _cut(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


# ---- normaliser


def windows_of(timestamp: Any) -> tuple[Span, ...] | None:
    """A `timestamp` field of the right type as sorted windows in seconds; None stays None.

    >>> windows_of([[7, 9], [1, 2]])
    (Span(start=1.0, end=2.0), Span(start=7.0, end=9.0))
    """
    if timestamp is None:
        return None
    pairs = [timestamp] if _is_pair(timestamp) else timestamp
    return tuple(sorted(Span(float(start), float(end)) for start, end in pairs))


def record_to_row(record: Mapping[str, Any], file: str = "", line: int = 0) -> Row:
    """The row a record stands for. The record must pass `check_record`."""
    start, end = record.get("video_start"), record.get("video_end")
    return Row(
        video=record["video"],
        duration=float(record["duration"]),
        timestamp=windows_of(record["timestamp"]),
        sentence=record["sentence"],
        video_start=None if start is None else float(start),
        video_end=None if end is None else float(end),
        kwargs={} if record.get("kwargs") is None else record["kwargs"],
        file=file,
        line=line,
    )


def row_to_record(row: Row) -> dict[str, Any]:
    """The seven fields of a row in their written form: `[s, e]` for one window, a list of lists for several, none
    omitted.

    Reading the record back gives the same row (but for `file` and `line`).
    """
    windows = None if row.timestamp is None else [[float(s), float(e)] for s, e in sorted(row.timestamp)]
    return {
        "video": row.video,
        "duration": float(row.duration),
        "timestamp": windows[0] if windows is not None and len(windows) == 1 else windows,
        "sentence": row.sentence,
        "video_start": None if row.video_start is None else float(row.video_start),
        "video_end": None if row.video_end is None else float(row.video_end),
        "kwargs": row.kwargs,
    }


def write_rows(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Write rows as JSONL, atomically. Raises UserError for a row that `read_rows` would refuse, and writes nothing
    then."""
    with atomic_open(path) as handle:
        for number, row in enumerate(rows, start=1):
            record = row_to_record(row)
            for kind, message in check_record(record):
                raise UserError(f"{os.fspath(path)}: row {number} cannot be written: {message} [{kind}]")
            handle.write(dump_record(record) + "\n")


def dump_record(record: Mapping[str, Any]) -> str:
    """One record as one line of JSON. Raises UserError for `kwargs` that JSON cannot hold."""
    try:
        return json.dumps(record, ensure_ascii=False)
    except TypeError as error:
        raise UserError(f"`kwargs` must hold plain JSON values: {error}") from None


# ---- whole files


def load_annotations(
    sources: Sequence[Source],
    *,
    max_bad_fraction: float,
    trim: Trim | None = None,
    videos_root: Path | None = None,
    seed: int = 0,
    kept_faults: Collection[str] = (),
) -> list[Row]:
    """All good rows of all sources, in order, each source repeated by its weight; bad rows are named and counted in
    the log.

    Weight 2.0 gives every row twice, 0.5 a seeded half of them, 1.5 all of them once and a seeded half again (never
    less than one row). The same sources and `seed` give the same rows.
    With `videos_root`, a row whose video lies outside that folder is bad (`outside_root`).
    With `trim`, windows are checked on the clip's clock too: a window that starts outside its clip makes the row bad, a
    window that only ends past it is counted in a warning, and `check_trim` decides whether the reading is the right
    one.

    Rows with no other problems than `kept_faults` (kinds) are good.

    Raises UserError when a file cannot be read at all, when the bad rows are more than `max_bad_fraction` of all
    rows, when all are bad, or when rows fit only another trim reading.
    """
    rows: list[Row] = []
    problems: list[RowProblem] = []
    num_lines = 0
    for index, source in enumerate(sources):
        good, bad = read_rows(source.path, kept_faults=kept_faults)
        if videos_root is not None:
            good, outside = _split_by_root(good, videos_root)
            bad += outside
        if trim is not None:
            check_trim(good, trim)
            good, outside = _split_by_clip(good, trim, kept_faults)
            bad += outside
        num_lines += len(good) + len({problem.line for problem in bad})
        problems += bad
        rows += _weighted(good, source.weight, random.Random(f"{seed}/{index}"))
    _judge(problems, num_lines, max_bad_fraction)
    return rows


def _weighted(rows: list[Row], weight: float, rng: random.Random) -> list[Row]:
    whole = int(weight + ROUNDING_S)
    part = weight - whole
    if part < ROUNDING_S or not rows:
        return rows * whole
    chosen = rng.sample(range(len(rows)), max(1, round(part * len(rows))))
    return rows * whole + [rows[index] for index in sorted(chosen)]


def _split_by_root(rows: list[Row], root: Path) -> tuple[list[Row], list[RowProblem]]:
    findings = {video: root_finding(row, root) for video, row in {row.video: row for row in rows}.items()}
    good = [row for row in rows if findings[row.video] is None]
    bad = [(row, finding) for row in rows if (finding := findings[row.video]) is not None]
    return good, [RowProblem(row.file, row.line, *finding) for row, finding in bad]


def _split_by_clip(
    rows: list[Row], trim: Trim, kept_faults: Collection[str]
) -> tuple[list[Row], list[RowProblem]]:
    good: list[Row] = []
    problems: list[RowProblem] = []
    num_past_end = 0
    for row in rows:
        findings = {kind: message for kind, message in clip_findings(row, trim) if kind not in kept_faults}
        past_end = findings.pop("end_past_duration", None)
        problems += [RowProblem(row.file, row.line, kind, message) for kind, message in findings.items()]
        if not findings:
            good.append(row)
            num_past_end += past_end is not None
    if num_past_end:
        fix = f"{_command(rows[0].file)} --fix OUT.jsonl --policy end_past_duration=clip"
        where = f"{rows[0].file}: {num_past_end} of {len(rows)} rows"
        log.warning(
            "%s have a window that ends past the duration; they are kept as they are. Clip them with: %s", where, fix
        )
    return good, problems


def _judge(problems: list[RowProblem], num_lines: int, max_bad_fraction: float) -> None:
    bad_lines = {(problem.file, problem.line) for problem in problems}
    if not bad_lines:
        return
    for problem in problems[:NUM_NAMED]:
        log.warning("bad annotation row: %s", problem)
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(p.kind for p in problems).most_common())
    fraction = len(bad_lines) / num_lines
    percent = f"{float(f'{100 * fraction:.2g}'):g}"  # two digits, and no 1e+02
    summary = f"{len(bad_lines)} of {num_lines} annotation rows are bad ({percent} %: {kinds})"
    advice = f"list them with: {_command(*dict.fromkeys(problem.file for problem in problems))}"
    if len(bad_lines) == num_lines:
        raise UserError(f"{summary}, so nothing is left to use; first: {problems[0]}; {advice}")
    if fraction > max_bad_fraction:
        raise UserError(
            f"{summary}, more than data.max_bad_fraction = {max_bad_fraction:g} allows; first: {problems[0]}; {advice}"
        )
    log.warning("%s and left out; %s", summary, advice)


def _command(*files: str) -> str:
    return f"python -m utils.data_validation --annotations {' '.join(files)}"


def resolve_video(row: Row, videos_root: str | os.PathLike[str] | None = None) -> Path:
    """The path of a row's video, as `look_up_video` finds it. Raises UserError for one outside `videos_root`."""
    path, fault = look_up_video(row, videos_root)
    if fault is not None:
        raise UserError(f"{row.file}:{row.line}: {fault}")
    return path


def look_up_video(row: Row, videos_root: str | os.PathLike[str] | None = None) -> tuple[Path, str | None]:
    """The path of a row's video, and why it must not be opened (None when it may be).

    A relative path is looked up in `videos_root` (when given), then beside the annotation file, then in the working
    directory; where none of them exists, the first of them is returned. With `videos_root` the video must lie in that
    folder, whichever way it was found: `..`, absolute paths and symbolic links may lead about in it, and not out of it.
    """
    candidates = _candidates(row, videos_root)
    allowed = candidates
    if videos_root is not None:
        root = os.path.realpath(videos_root)
        allowed = [path for path in candidates if _lies_in(os.path.realpath(path), root)]
    found = None
    if len(candidates) > 1:  # an absolute path needs no looking up
        found = next((path for path in allowed if os.path.exists(path)), None)
    if videos_root is not None and found is None and candidates[0] not in allowed:
        return candidates[0], _outside(row, candidates[0], videos_root)
    return found or candidates[0], None


def _candidates(row: Row, videos_root: str | os.PathLike[str] | None) -> list[Path]:
    """Where a row's video may be, in the order of looking."""
    video = Path(os.path.expanduser(row.video))
    if video.is_absolute():
        return [video]
    roots = [] if videos_root is None else [Path(videos_root)]
    return [folder / video for folder in (*roots, Path(row.file).parent, Path())]


def _lies_in(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)


def _outside(row: Row, path: Path, root: str | os.PathLike[str]) -> str:
    """The sentence for a video outside `data.videos_root`."""
    real = os.path.realpath(path)
    leads = f" ({real})" if real != row.video else ""
    return (
        f"`video` {_show(row.video)}{leads} lies outside data.videos_root ({os.fspath(root)}); move the video there, "
        "give the folder that holds them all, or null if you trust the annotations"
    )


def root_finding(row: Row, root: str | os.PathLike[str]) -> Finding | None:
    """`outside_root` when no place that the row's `video` may mean lies in `root`, else None.

    Paths are compared as written, and only those that seem to leave are looked up on disk: a link that leaves is found
    when the video is opened, by `resolve_video`.
    """
    candidates = _candidates(row, root)
    written = os.path.abspath(root)
    if any(_lies_in(os.path.abspath(path), written) for path in candidates):
        return None
    real = os.path.realpath(root)
    if any(_lies_in(os.path.realpath(path), real) for path in candidates):
        return None
    return "outside_root", _outside(row, candidates[0], root)


# ---- trim


def clip_bounds(row: Row, trim: Trim) -> tuple[float, float] | None:
    """The stretch (start_s, end_s) of the file to decode, on the file's clock; None for the whole file.

    A missing `video_start` is 0, a missing `video_end` is `duration` later.
    """
    _require_reading(trim)
    if trim == "pre_cut" or (row.video_start is None and row.video_end is None):
        return None
    start = 0.0 if row.video_start is None else row.video_start
    return start, (start + row.duration if row.video_end is None else row.video_end)


def model_windows(row: Row, trim: Trim) -> tuple[Span, ...] | None:
    """The labelled windows on the clip's clock (0 at the first decoded moment), as the model is taught them; None
    without a label, () for labelled absent. Only the reading `absolute` moves them; nothing is clipped.
    """
    bounds = clip_bounds(row, trim)
    if row.timestamp is None or bounds is None or trim != "absolute":
        return row.timestamp
    return tuple(Span(_since(start, bounds[0]), _since(end, bounds[0])) for start, end in row.timestamp)


def to_file_clock(span: Span, row: Row, trim: Trim) -> Span:
    """A predicted window, from the clip's clock to the file's. For `pre_cut` the clip is the file."""
    bounds = clip_bounds(row, trim)
    return span if bounds is None else Span(span.start + bounds[0], span.end + bounds[0])


def clip_findings(row: Row, trim: Trim) -> list[Finding]:
    """Windows that do not lie in the clip: `window_outside` (nothing of it does), `start_before_clip`,
    `end_past_duration`."""
    findings: list[Finding] = []
    for start, end in model_windows(row, trim) or ():
        shown = f"window [{start:g}, {end:g}] on the clip's clock"
        if start >= row.duration or end <= 0:
            findings.append(("window_outside", f"{shown} lies outside the clip of {row.duration:g} s"))
        elif start < 0:
            findings.append(("start_before_clip", f"{shown} starts before the clip"))
        if end > row.duration + ROUNDING_S:
            findings.append(("end_past_duration", f"{shown} ends past the duration of {row.duration:g} s"))
    return findings


FileDuration = Callable[[Row], float | None]
"""Length in seconds of a row's file, or None where it was not probed."""


def trim_readings(
    rows: Iterable[Row], *, file_duration: FileDuration | None = None, tolerance: float = TRIM_TOLERANCE_S
) -> dict[str, int]:
    """How many of the rows with trim fields and windows (`trimmed`) fit each reading. A row can fit several.

    relative: every window lies in [0, video_end - video_start]. absolute: in [video_start, video_end]. Both:
    `video_end` lies in the file, where it was probed. pre_cut: every window lies in [0, duration], and the file,
    where it was probed, is that long. All within `tolerance` seconds. Unprobed, `relative` and `pre_cut` mostly
    cannot be told apart.
    """
    fits = [_fitting(row, file_duration, tolerance) for row in _trimmed(rows)]
    return {"trimmed": len(fits)} | {reading: sum(reading in fit for fit in fits) for reading in TRIM_READINGS}


def misread_rows(
    rows: Iterable[Row],
    trim: Trim,
    *,
    file_duration: FileDuration | None = None,
    tolerance: float = TRIM_TOLERANCE_S,
) -> list[tuple[Row, list[str]]]:
    """Rows that do not fit `trim` but fit other readings, with those. Rows that fit none speak for no reading."""
    _require_reading(trim)
    fits = ((row, _fitting(row, file_duration, tolerance)) for row in _trimmed(rows))
    return [(row, fit) for row, fit in fits if fit and trim not in fit]


def check_trim(
    rows: Sequence[Row],
    trim: Trim,
    *,
    file_duration: FileDuration | None = None,
    tolerance: float = TRIM_TOLERANCE_S,
) -> None:
    """Raise UserError when rows fit only another reading than `trim` (see `trim_readings`)."""
    misread = misread_rows(rows, trim, file_duration=file_duration, tolerance=tolerance)
    if not misread:
        return
    counts = trim_readings(rows, file_duration=file_duration, tolerance=tolerance)
    num_trimmed = counts.pop("trimmed")
    best = max(counts, key=lambda reading: counts[reading])
    advice = f"set data.trim: {best}, or " if counts[best] > counts[trim] else ""
    fits = ", ".join(f"{reading} {count}" for reading, count in counts.items())
    first = misread[0][0]
    raise UserError(
        f"data.trim is `{trim}`, but {len(misread)} of the {num_trimmed} rows with video_start/video_end fit only "
        f"another reading (rows that fit: {fits}); first: {first.file}:{first.line}; "
        f"{advice}drop them: {_command(first.file)} --trim {trim} --fix OUT.jsonl --policy trim_reading=drop"
    )


def _require_reading(trim: str) -> None:
    if trim not in TRIM_READINGS:
        raise UserError(f"data.trim must be one of {', '.join(TRIM_READINGS)}, got {trim!r}")


def _trimmed(rows: Iterable[Row]) -> Iterator[Row]:
    return (row for row in rows if row.timestamp and clip_bounds(row, "relative") is not None)


def _fitting(row: Row, file_duration: FileDuration | None, tolerance: float) -> list[str]:
    bounds = clip_bounds(row, "relative")
    assert bounds is not None and row.timestamp
    (start, end), length_s = bounds, None if file_duration is None else file_duration(row)
    first, last = row.timestamp[0].start, max(window.end for window in row.timestamp)
    in_file = length_s is None or end <= length_s + tolerance
    fits = {
        "relative": in_file and last <= end - start + tolerance,
        "absolute": in_file and start - tolerance <= first and last <= end + tolerance,
        "pre_cut": last <= row.duration + tolerance and (length_s is None or abs(length_s - row.duration) <= tolerance),
    }
    return [reading for reading in TRIM_READINGS if fits[reading]]


def _since(time_s: float, origin_s: float) -> float:
    moved = time_s - origin_s
    return 0.0 if abs(moved) < ROUNDING_S else moved  # so that -7e-15 is not taught as "-0.0 seconds"
