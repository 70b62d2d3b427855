"""Check annotation files before a run, and repair them under an explicit policy.

    python -m utils.data_validation --annotations train.jsonl [--against test.jsonl] [--probe_videos] [--report r.json]
    python -m utils.data_validation --annotations train.jsonl --fix clean.jsonl --policy end_past_duration=clip

What a row means by itself is `utils.rows`; this file adds what needs other rows (duplicates, train against test, the
trim readings) or the videos: whether they are there, and with --probe_videos whether they can be read and are as long
as the rows say. Exit status: 0 clean (warnings allowed), 1 errors (with --fix: left in the repaired copy), 2 usage.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from utils.common import UserError, atomic_open, nearest, run_command, write_json
from utils.rows import (
    FIELDS,
    TRIM_READINGS,
    TRIM_TOLERANCE_S,
    Finding,
    Row,
    RowProblem,
    Trim,
    check_record,
    clip_bounds,
    clip_findings,
    dump_record,
    look_up_video,
    misread_rows,
    read_raw_rows,
    record_to_row,
    row_to_record,
    trim_readings,
)

if TYPE_CHECKING:
    from utils.video import VideoInfo

NUM_PROBE_THREADS = 4
MAX_FIX_PASSES = 5
"""A repair can bring out the next fault (swapped, then past the end); each pass mends one layer."""

Edit = Callable[[dict[str, Any]], dict[str, Any]]


# ---- kinds


def _edit_windows(record: dict[str, Any], edit: Callable[[float, float], tuple[float, float]]) -> dict[str, Any]:
    stamp = record["timestamp"]
    if isinstance(stamp[0], list):
        return record | {"timestamp": [list(edit(*window)) for window in stamp]}
    return record | {"timestamp": list(edit(*stamp))}


def _strip_sentence(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"sentence": record["sentence"].strip()}


def _swap_ends(record: dict[str, Any]) -> dict[str, Any]:
    return _edit_windows(record, lambda start, end: (min(start, end), max(start, end)))


def _clip_negative(record: dict[str, Any]) -> dict[str, Any]:
    return _edit_windows(record, lambda start, end: (max(start, 0.0), end) if end > 0 else (start, end))


def _clip_to_trim(record: dict[str, Any]) -> dict[str, Any]:
    """Only the reading `absolute` can have a window that starts before its clip."""
    origin = record["video_start"]
    return _edit_windows(record, lambda start, end: (max(start, origin), end) if end > origin else (start, end))


class Kind(NamedTuple):
    """What a kind of problem means, whether it fails the check, and the repairs that make sense for it besides
    `drop`."""

    meaning: str
    is_error: bool = True
    repairs: Mapping[str, Edit | None] = {}
    """By action; None is `_clip_to_duration`, which needs the trim reading."""


KINDS: dict[str, Kind] = {
    "bad_json": Kind("the line is not JSON"),
    "not_an_object": Kind("the line is JSON, but not an object"),
    "duplicate_key": Kind("a key stands twice in the object"),
    "missing_field": Kind("a required field is missing"),
    "extra_field": Kind("a field rows do not have; own fields belong into kwargs"),
    "wrong_type": Kind("a field holds the wrong type"),
    "non_finite": Kind("NaN, Infinity or a number too large for a float"),
    "bad_text": Kind("text that no UTF-8 file or path can hold"),
    "empty_sentence": Kind("nothing to look for"),
    "outer_space": Kind(
        "the sentence begins or ends with white space", is_error=False, repairs={"clip": _strip_sentence}
    ),
    "special_token": Kind("the sentence holds a control token of the model, such as <|im_end|>"),
    "bad_duration": Kind("duration is not > 0"),
    "start_ge_end": Kind("a window does not start before it ends", repairs={"swap": _swap_ends}),
    "negative_start": Kind("a window starts before 0", repairs={"clip": _clip_negative}),
    "end_past_duration": Kind("a window ends past the duration", repairs={"clip": None}),
    "start_before_clip": Kind("a window starts before video_start (absolute)", repairs={"clip": _clip_to_trim}),
    "window_outside": Kind("a window lies outside the clip"),
    "bad_trim": Kind("video_start < 0, or video_end not after it"),
    "trim_length": Kind("duration is not video_end - video_start"),
    "trim_reading": Kind("the row fits only another reading than --trim"),
    "trim_outside_file": Kind("the trimmed stretch goes past the end of the file"),
    "outside_root": Kind("the video lies outside --videos_root, by its path or by a symbolic link"),
    "missing_video": Kind("no such video (in --videos_root, beside the annotations, or here); see --skip_videos"),
    "unreadable_video": Kind("the video cannot be decoded"),
    "duration_mismatch": Kind("the file is not as long as duration says"),
    "duplicate_row": Kind("an earlier row says the same"),
    "shared_pair": Kind("the (video, sentence) pair is in an --against file too"),
    "shared_video": Kind("the video is in an --against file too", is_error=False),
}
"""Every kind of problem, by its slug. All can be dropped."""

_CONTROL_TOKEN = re.compile(r"<\|\w+\|>")
"""Qwen's own way of writing them. Training asks the model's tokenizer, which is not at hand here."""

VALUE_FAULTS = {"empty_sentence", "bad_duration", "start_ge_end", "negative_start", "bad_trim"}
"""Faults of a row by itself that leave it every field, of its type: it can be written in the normal form all the
same."""


@dataclass
class Entry:
    """One line of an annotation file on its way through the checks; `row` is None while it cannot be normalised."""

    file: str
    line: int
    text: str
    record: dict[str, Any] | None
    findings: list[Finding]
    row: Row | None = None

    def __post_init__(self) -> None:
        if self.record is not None and not self.findings:
            self.row = record_to_row(self.record, self.file, self.line)

    def edited(self, record: dict[str, Any]) -> Entry:
        """The same line with another record, checked anew."""
        return Entry(self.file, self.line, dump_record(record), record, check_record(record))

    @property
    def normal_text(self) -> str:
        """The line as a repaired copy holds it: in the normal form, or as it stands where it has none."""
        if self.record is None or not {kind for kind, _ in self.findings} <= VALUE_FAULTS:
            return self.text
        return dump_record(row_to_record(record_to_row(self.record)))


@dataclass(frozen=True)
class Options:
    """What to check rows against. `tolerance` is in seconds and holds for probed durations and trim readings.
    `skip_videos` does not look whether the videos are there, `probe_videos` opens them."""

    videos_root: Path | None = None
    trim: Trim = "relative"
    probe_videos: bool = False
    skip_videos: bool = False
    tolerance: float = TRIM_TOLERANCE_S


@dataclass
class Report:
    """The outcome for one set of files: `problems` in file order, `readings` as `utils.rows.trim_readings`."""

    num_rows: int
    num_videos: int
    problems: list[RowProblem]
    readings: dict[str, int]

    @property
    def counts(self) -> dict[str, int]:
        """Rows (not problems) per kind, in the order of KINDS."""
        rows = Counter(kind for _, _, kind in {(p.file, p.line, p.kind) for p in self.problems})
        return {kind: rows[kind] for kind in KINDS if rows[kind]}

    @property
    def num_errors(self) -> int:
        """Rows with at least one problem that is an error."""
        return len({(p.file, p.line) for p in self.problems if KINDS[p.kind].is_error})


# ---- checks


class Checker:
    """Checks entries under one set of options. Videos are looked up and probed once, however often it is asked."""

    def __init__(self, options: Options, against: Sequence[Row] = ()) -> None:
        self.options = options
        self.look_up = cache(lambda folder, video: _look_up(folder, video, options.videos_root))
        # os.path.exists, not Path.exists: a name of 300 letters is one more missing video, not a crash
        self.is_there = cache(os.path.exists)
        self.name_of = cache(self._name)
        self.probed: dict[Path, VideoInfo | Finding] = {}
        self.against_videos = self._first_by(against, self.video_of)
        self.against_pairs = self._first_by(against, self._pair_of)

    def check(self, entries: Sequence[Entry]) -> Report:
        """All problems of all entries, in their order."""
        rows = [entry.row for entry in entries if entry.row is not None]
        if self.options.probe_videos:
            self._probe(self._path(row) for row in rows if self._outside(row) is None)
        options = self.options
        length_of = self._file_duration
        misread = misread_rows(rows, options.trim, file_duration=length_of, tolerance=options.tolerance)
        others = {id(row): readings for row, readings in misread}
        earlier: dict[Any, Row] = {}
        problems: list[RowProblem] = []
        for entry in entries:
            row = entry.row
            findings = self._row_findings(row, others, earlier) if row else self._bad_findings(entry, earlier)
            problems += [RowProblem(entry.file, entry.line, kind, message) for kind, message in findings]
        readings = trim_readings(rows, file_duration=length_of, tolerance=options.tolerance)
        return Report(len(entries), self._num_videos(entries), problems, readings)

    def video_of(self, row: Row) -> str:
        """What makes two rows' videos the same: the real path of a file that is there, else the path as written."""
        return self.name_of(self._path(row), row.video)

    def _name(self, path: Path, video: str) -> str:
        return os.path.realpath(path) if self.is_there(path) else os.path.normpath(video)

    def _num_videos(self, entries: Sequence[Entry]) -> int:
        """Videos that any row names, be the row good or bad."""
        names = {self.video_of(entry.row) for entry in entries if entry.row is not None}
        for entry in entries:
            if entry.row is None and entry.record is not None and isinstance(entry.record.get("video"), str):
                video = entry.record["video"]
                path, _ = self.look_up(str(Path(entry.file).parent), video)
                names.add(self.name_of(path, video))
        return len(names)

    def _path(self, row: Row) -> Path:
        return self.look_up(str(Path(row.file).parent), row.video)[0]

    def _outside(self, row: Row) -> str | None:
        return self.look_up(str(Path(row.file).parent), row.video)[1]

    def _pair_of(self, row: Row) -> tuple[str, str]:
        return self.video_of(row), " ".join(row.sentence.lower().split()).rstrip(" .")

    @staticmethod
    def _first_by(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, Row]:
        first: dict[Any, Row] = {}
        for row in rows:
            first.setdefault(key(row), row)
        return first

    def _bad_findings(self, entry: Entry, earlier: dict[Any, Row]) -> Iterator[Finding]:
        yield from entry.findings
        if entry.record is not None and {kind for kind, _ in entry.findings} <= {"start_ge_end", "negative_start"}:
            # one fault must not hide another: what the windows have nothing to do with, and an end that is past the
            # duration whichever way round its window is
            row = record_to_row(entry.record, entry.file, entry.line)
            yield from self._text_findings(row)
            yield from self._video_findings(row)
            yield from (found for found in clip_findings(row, self.options.trim) if found[0] == "end_past_duration")
            yield from self._twins(row, earlier)

    def _row_findings(self, row: Row, others: Mapping[int, list[str]], earlier: dict[Any, Row]) -> Iterator[Finding]:
        yield from self._text_findings(row)
        yield from self._trim_length(row)
        yield from self._video_findings(row)
        if id(row) in others:  # one cause: what the wrong reading does to windows and lengths is not counted again
            yield "trim_reading", f"the row fits {' and '.join(others[id(row)])}, not --trim {self.options.trim}"
        else:
            yield from clip_findings(row, self.options.trim)
            yield from self._length_findings(row)
        yield from self._twins(row, earlier)

    @staticmethod
    def _text_findings(row: Row) -> Iterator[Finding]:
        if row.sentence != row.sentence.strip():
            yield "outer_space", "`sentence` begins or ends with white space"
        if token := _CONTROL_TOKEN.search(row.sentence):
            yield "special_token", f"`sentence` holds {token[0]}, which a model would obey; training leaves the row out"

    def _video_findings(self, row: Row) -> Iterator[Finding]:
        path = self._path(row)
        if outside := self._outside(row):
            yield "outside_root", outside
        elif not self.options.skip_videos and not self.is_there(path):
            yield "missing_video", f"no such video: {path}"
        elif isinstance(fault := self.probed.get(path), tuple):
            yield fault

    def _trim_length(self, row: Row) -> Iterator[Finding]:
        bounds = clip_bounds(row, self.options.trim)
        if bounds is not None and abs(bounds[1] - bounds[0] - row.duration) > self.options.tolerance:
            length = f"{bounds[1] - bounds[0]:.3f} s"
            yield (
                "trim_length",
                f"`duration` is {row.duration:g} s, but the stretch from {bounds[0]:g} to {bounds[1]:g} is {length}",
            )

    def _length_findings(self, row: Row) -> Iterator[Finding]:
        length_s = self._file_duration(row)
        if length_s is None:
            return
        bounds, tolerance = clip_bounds(row, self.options.trim), self.options.tolerance
        file = f"{self._path(row)} is {length_s:.3f} s long"
        if bounds is not None and bounds[1] > length_s + tolerance:
            yield "trim_outside_file", f"the stretch ends at {bounds[1]:g} s, but {file}"
        if bounds is None and abs(length_s - row.duration) > tolerance:
            yield "duration_mismatch", f"`duration` is {row.duration:g} s, but {file}"

    def _twins(self, row: Row, earlier: dict[Any, Row]) -> Iterator[Finding]:
        # exact, so that twins share every other fault: a repair that drops the first for one drops both for it
        key = (self.video_of(row), row.video_start, row.video_end, row.timestamp, row.sentence)
        first = earlier.setdefault(key, row)
        if first is not row:
            yield "duplicate_row", f"the same video, window and sentence as {first.file}:{first.line}"
        if twin := self.against_pairs.get(self._pair_of(row)):
            yield "shared_pair", f"the same video and sentence as {twin.file}:{twin.line}"
        if twin := self.against_videos.get(self.video_of(row)):
            yield "shared_video", f"the same video as {twin.file}:{twin.line}"

    def _file_duration(self, row: Row) -> float | None:
        info = self.probed.get(self._path(row))
        return None if info is None or isinstance(info, tuple) else info.duration_s

    def _probe(self, paths: Iterable[Path]) -> None:
        from tqdm import tqdm

        wanted = [path for path in dict.fromkeys(paths) if path not in self.probed and self.is_there(path)]
        if not wanted:
            return
        with ThreadPoolExecutor(NUM_PROBE_THREADS) as pool:
            futures = {pool.submit(_probe_one, path): path for path in wanted}
            try:
                for done in tqdm(as_completed(futures), total=len(futures), desc="probing videos", unit="video"):
                    self.probed[futures[done]] = done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C must not wait for thousands of files
                raise


def _look_up(folder: str, video: str, videos_root: Path | None) -> tuple[Path, str | None]:
    row = Row(video, 0.0, None, "", None, None, {}, os.path.join(folder, "rows.jsonl"), 0)
    return look_up_video(row, videos_root)


def _probe_one(path: Path) -> VideoInfo | Finding:
    from utils.video import VideoReadError, probe_video

    try:
        return probe_video(path)
    except VideoReadError as error:
        return "unreadable_video", str(error)


def read_entries(files: Iterable[str | os.PathLike[str]]) -> list[Entry]:
    """Every non-blank line of the files. Raises UserError for a file that cannot be read at all."""
    return [Entry(os.fspath(file), *raw) for file in files for raw in read_raw_rows(file)]


def validate(
    files: Sequence[str | os.PathLike[str]],
    *,
    against: Sequence[str | os.PathLike[str]] = (),
    options: Options = Options(),  # noqa: B008  frozen
) -> Report:
    """Check annotation files; rows shared with the `against` files (train against test) are problems of `files`."""
    others = [entry.row for entry in read_entries(against) if entry.row is not None]
    return Checker(options, others).check(read_entries(files))


# ---- fixing


@dataclass
class Fix:
    """What a repair did: rows `dropped` and `changed` per kind, the entries that remain and their report."""

    entries: list[Entry]
    report: Report
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)


def parse_policies(items: Sequence[str]) -> dict[str, str]:
    """`["end_past_duration=clip"]` as a dict. Raises UserError for a kind that is unknown or an action it does not
    have."""
    policies: dict[str, str] = {}
    for item in items:
        kind, _, action = item.partition("=")
        if kind not in KINDS:
            match = nearest(kind, KINDS)
            hint = f"did you mean {match}? " if match else ""
            raise UserError(f"--policy {item}: no kind of problem is called {kind!r}; {hint}Kinds: {', '.join(KINDS)}")
        allowed = ["drop", *KINDS[kind].repairs]
        if action not in allowed:
            able = ", ".join(f"{name}={act}" for name, entry in KINDS.items() for act in entry.repairs)
            raise UserError(
                f"--policy {item}: {kind} can be mended by {' or '.join(allowed)} only, got {action!r}. "
                f"Every kind can be dropped; the others are: {able}"
            )
        if policies.setdefault(kind, action) != action:
            raise UserError(f"--policy {item}: {kind} already has the policy {policies[kind]}; give one per kind")
    return policies


def fix_entries(entries: Sequence[Entry], policies: Mapping[str, str], checker: Checker) -> Fix:
    """Apply the policies until nothing changes. A row with a `drop` kind goes; else each of its repairs is tried in
    turn."""
    fix = Fix(list(entries), checker.check(entries))
    for _ in range(MAX_FIX_PASSES):
        kinds_of = defaultdict(set)
        for problem in fix.report.problems:
            kinds_of[problem.file, problem.line].add(problem.kind)
        before = fix.entries
        fix.entries = [
            new for old in before if (new := _fix_one(old, kinds_of[old.file, old.line], policies, fix, checker))
        ]
        if len(fix.entries) == len(before) and all(map(lambda new, old: new is old, fix.entries, before)):
            break
        fix.report = checker.check(fix.entries)
    return fix


def _fix_one(entry: Entry, kinds: set[str], policies: Mapping[str, str], fix: Fix, checker: Checker) -> Entry | None:
    for kind in KINDS:
        if kind in kinds and policies.get(kind) == "drop":
            fix.dropped[kind] += 1
            return None
    for kind in KINDS:
        if kind not in kinds or kind not in policies or entry.record is None:
            continue
        repair = KINDS[kind].repairs[policies[kind]] or _clip_to_duration(checker.options.trim)
        record = repair(entry.record)
        if record != entry.record:
            entry = entry.edited(record)
            fix.changed[kind] += 1
    return entry


def _clip_to_duration(trim: Trim) -> Edit:
    def clip(record: dict[str, Any]) -> dict[str, Any]:
        bounds = clip_bounds(record_to_row(record), trim)
        origin = bounds[0] if bounds is not None and trim == "absolute" else 0.0
        limit = origin + record["duration"]
        return _edit_windows(record, lambda start, end: (start, min(end, limit)) if start < limit else (start, end))

    return clip


def write_fixed(out: Path, entries: Sequence[Entry]) -> None:
    """Write the repaired copy, atomically, every row in the normal form that it has one of: all its rows have the same
    fields, as those of `utils.rows.write_rows`. Raises UserError before an empty one."""
    if not entries:
        raise UserError(f"--fix {out}: the policies drop every row; nothing is written")
    with atomic_open(out) as handle:
        handle.writelines(entry.normal_text + "\n" for entry in entries)


# ---- output


def report_as_json(report: Report, files: Sequence[str], fix: Fix | None = None) -> dict[str, Any]:
    """The report as plain values: rows, videos, rows per kind, trim readings, every problem, and what a fix did."""
    value: dict[str, Any] = {
        "files": list(files),
        "rows": report.num_rows,
        "videos": report.num_videos,
        "rows_with_errors": report.num_errors,
        "counts": report.counts,
        "trim_readings": report.readings,
        "problems": [_problem_as_json(problem) for problem in report.problems],
    }
    if fix is not None:
        value["fix"] = {
            "rows": fix.report.num_rows,
            "dropped": dict(fix.dropped),
            "changed": dict(fix.changed),
            "left": fix.report.counts,
            "problems": [_problem_as_json(problem) for problem in fix.report.problems],
        }
    return value


def _problem_as_json(problem: RowProblem) -> dict[str, Any]:
    level = "error" if KINDS[problem.kind].is_error else "warning"
    return {
        "file": problem.file,
        "line": problem.line,
        "kind": problem.kind,
        "level": level,
        "message": problem.message,
    }


def render(report: Report, max_examples: int) -> str:
    """The report for people: a table of kinds with the number of rows, what they mean and the first examples."""
    lines = [f"{report.num_rows} rows, {report.num_videos} videos"]
    for is_error, title in ((True, "errors"), (False, "warnings")):
        kinds = [kind for kind in report.counts if KINDS[kind].is_error == is_error]
        lines += [f"\n{title} (rows)"] if kinds else []
        for kind in kinds:
            lines.append(f"  {report.counts[kind]:>7}  {kind:<18} {KINDS[kind].meaning}")
            examples = [problem for problem in report.problems if problem.kind == kind][:max_examples]
            lines += [f"           {problem.file}:{problem.line}: {problem.message}" for problem in examples]
    if report.readings["trimmed"]:
        fits = ", ".join(f"{reading} {report.readings[reading]}" for reading in TRIM_READINGS)
        lines.append(f"\n{report.readings['trimmed']} labelled rows with video_start/video_end; they fit: {fits}")
    return "\n".join(lines)


def render_fix(fix: Fix, policies: Mapping[str, str], out: Path) -> str:
    """What the repair did, per policy, and what is left."""
    lines = [f"\n{out}: {fix.report.num_rows} rows written", "  kind               policy  changed  dropped     left"]
    left = Counter(fix.report.counts)
    for kind in KINDS:
        if kind in policies or left[kind]:
            action = policies[kind] if kind in policies else "-"
            numbers = (fix.changed[kind], fix.dropped[kind], left[kind])
            lines.append(f"  {kind:<18} {action:<6}" + "".join(f" {number:>8}" for number in numbers))
    return "\n".join(lines)


def verdict(report: Report, options: Options) -> str:
    """The last line: clean or not, and what was not looked at."""
    num_warned = len({(p.file, p.line) for p in report.problems if not KINDS[p.kind].is_error})
    state = f"{report.num_errors} rows with errors" if report.num_errors else "clean"
    state += f", {num_warned} with warnings" if num_warned else ""
    if options.skip_videos:
        return f"{state} (the videos were not looked for)"
    return state if options.probe_videos else f"{state} (the videos were not opened; --probe_videos does)"


def _parser() -> argparse.ArgumentParser:
    rows = ((name, "|".join(["drop", *kind.repairs]), kind.meaning) for name, kind in KINDS.items())
    kinds = "\n".join(f"  {name:<18} {actions:<10} {meaning}" for name, actions, meaning in rows)
    parser = argparse.ArgumentParser(
        prog="python -m utils.data_validation",
        description=f"Check JSONL annotations; a row holds {', '.join(FIELDS)}.",
        epilog=f"kinds of problems and the policies they take:\n{kinds}\n\nexit status: 0 clean, 1 errors, 2 usage",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--annotations",
        nargs="+",
        required=True,
        action="extend",
        metavar="F",
        type=Path,
        help="files to check, as a set",
    )
    add(
        "--against",
        nargs="+",
        default=[],
        action="extend",
        metavar="F",
        type=Path,
        help="test files: nothing is shared",
    )
    add(
        "--videos_root",
        type=Path,
        help="folder in which relative video paths are looked up first, and that no video may leave",
    )
    add("--trim", choices=TRIM_READINGS, default="relative", help="what the times of trimmed rows count from")
    videos = parser.add_mutually_exclusive_group()
    videos.add_argument("--probe_videos", action="store_true", help="open every video")
    videos.add_argument(
        "--skip_videos",
        action="store_true",
        help="do not look whether the videos are there: they are on another machine",
    )
    add("--tolerance", type=float, default=TRIM_TOLERANCE_S, help="seconds a length may be off (%(default)s)")
    add("--report", type=Path, metavar="OUT.json", help="write every problem as JSON")
    add("--fix", type=Path, metavar="OUT.jsonl", help="write a repaired copy (one input file)")
    add("--policy", nargs="+", default=[], action="extend", metavar="KIND=ACTION", help="drop, clip or swap, per kind")
    add("--max_examples", type=int, default=3, help="examples shown per kind (%(default)s)")
    return parser


def _check_usage(args: argparse.Namespace) -> dict[str, str]:
    policies = parse_policies(args.policy)
    if args.fix and not policies:
        raise UserError(f"--fix {args.fix}: needs at least one --policy kind=action; --help lists the kinds")
    if policies and not args.fix:
        raise UserError("--policy says how to repair; give --fix OUT.jsonl to write the repaired copy")
    if args.fix and len(args.annotations) > 1:
        raise UserError(f"--fix {args.fix}: repairs one file at a time, got {len(args.annotations)} --annotations")
    if not args.tolerance >= 0:  # so that NaN is refused too
        raise UserError(f"--tolerance must be >= 0 s, got {args.tolerance}")
    for flag, out in (("--fix", args.fix), ("--report", args.report)):
        if out is not None:
            _check_output(flag, out, [*args.annotations, *args.against])
    if args.fix and args.report and args.fix.absolute() == args.report.absolute():
        raise UserError(f"--fix and --report are both {args.fix}; give each a name of its own")
    return policies


def _check_output(flag: str, out: Path, inputs: Sequence[Path]) -> None:
    """Before a long run of probing, not after it."""
    if any(out.exists() and path.exists() and os.path.samefile(out, path) for path in inputs):
        raise UserError(f"{flag} {out}: this is an input; the output needs a name of its own")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if out.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{flag} {out}: cannot be written; give the name of a file in a folder you may write to")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = _parser().parse_args(argv)
    policies = _check_usage(args)
    options = Options(args.videos_root, args.trim, args.probe_videos, args.skip_videos, args.tolerance)
    entries, against = read_entries(args.annotations), read_entries(args.against)
    checker = Checker(options, [entry.row for entry in against if entry.row is not None])
    report = result = checker.check(entries)
    _say(render(report, args.max_examples))
    if num_bad := sum(entry.row is None for entry in against):
        _say(f"\n{num_bad} bad rows of the --against files were not compared; check those files too")
    fix = None
    if args.fix:
        fix = fix_entries(entries, policies, checker)
        write_fixed(args.fix, fix.entries)
        result = fix.report
        _say(render_fix(fix, policies, args.fix))
        _say_if_moved(fix, args.fix, options)
    if args.report:
        write_json(args.report, report_as_json(report, [str(path) for path in args.annotations], fix))
    _say("\n" + verdict(result, options))
    return 1 if result.num_errors else 0


def _say_if_moved(fix: Fix, out: Path, options: Options) -> None:
    """Relative paths resolve beside the annotation file, so a copy in another folder may lose its videos."""
    rows = [entry.row for entry in fix.entries if entry.row is not None]
    lost = [
        row
        for row in rows
        if os.path.exists(look_up_video(row, options.videos_root)[0])
        and not os.path.exists(look_up_video(replace(row, file=str(out)), options.videos_root)[0])
    ]
    if lost:
        folder = Path(lost[0].file).parent
        advice = f"move {out.name} there, or set data.videos_root to that folder"
        _say(f"note: {len(lost)} relative video paths count from {folder}; {advice}")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    run_command(main)
