"""From source rows to the project's JSONL: where the videos lie, how long they are, the quirks, and the policies.

Every source row becomes a row unless a policy says otherwise, and every quirk is counted and listed in
`kwargs.quirks`. Quirks are the problems that `utils.data_validation` finds, found by its own `Checker`, so that
validating the output reports exactly those that were kept; and a few that only the source can tell (`OWN_KINDS`).
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from datasets.converters.base import Converter, SourceRow
from utils.common import UserError, atomic_open, nearest
from utils.data_validation import (
    KINDS,
    NUM_PROBE_THREADS,
    VALUE_FAULTS,
    Checker,
    Entry,
    Fix,
    Options,
    Report,
    fix_entries,
    parse_policies,
)
from utils.rows import TRIM_TOLERANCE_S, check_record, dump_record, record_to_row, row_to_record, windows_of

OWN_KINDS: dict[str, str] = {
    "empty_window": "a window of no length (counted as start_ge_end too)",
    "unlabelled": "the source gives no window; written as `timestamp: null`, which is never trained on or scored",
    "already_cut": "the file is the stretch alone: video_start and video_end went to kwargs.cut_from",
    "doubtful_trim": "nobody can tell without the file whether video_start and video_end count in it",
    "nominal_duration": "the file was not there to be measured: duration is what the annotators may have seen at most",
    "unread_answer": "no window could be read from the conversation's answer; written as unlabelled",
    "whole_question": "the event could not be told from the rest of the question, which became the sentence",
    "differing_rows": "the conversation was changed after this project wrote it; its `vtg_rows` were taken",
}
"""Quirks that the validator does not know, because a row by itself does not show them. They can be kept or dropped."""

MAIN_KINDS = (
    "end_past_duration",
    "start_ge_end",
    "empty_window",
    "negative_start",
    "duplicate_row",
    "outer_space",
    "missing_video",
)
"""Counted in every report, also when there are none."""

Lengths = Mapping[str, float | str]
"""Seconds by path of a video that was opened, or why it could not be."""


@dataclass(frozen=True)
class Request:
    """What to convert. `videos_dir` may be absolute (the rows get absolute paths) or relative (theirs then count from
    the output's folder). `policies` are by kind; those of the converter are not in it."""

    annotations: Path
    videos_dir: Path
    output: Path
    split: str | None = None
    policies: Mapping[str, str] = field(default_factory=dict)
    skip_videos: bool = False
    probe_videos: bool = False


@dataclass
class Conversion:
    """The outcome: `records` to write, and by kind the rows of the source (`found`), those left (`kept`), `changed`
    and `dropped`."""

    source: Path
    split: str
    records: list[dict[str, Any]]
    num_source_rows: int
    num_videos: int
    policies: Mapping[str, str]
    found: Mapping[str, int]
    kept: Mapping[str, int]
    changed: Mapping[str, int]
    dropped: Mapping[str, int]

    def as_json(self, dataset: str) -> dict[str, Any]:
        """The report as plain values; `quirks` counts rows of the source, `kept` those of the output."""
        return {
            "dataset": dataset,
            "split": self.split,
            "annotations": str(self.source),
            "rows": len(self.records),
            "videos": self.num_videos,
            "source_rows": self.num_source_rows,
            "quirks": dict(self.found),
            "kept": dict(self.kept),
            "policies": dict(self.policies),
            "changed": dict(self.changed),
            "dropped": dict(self.dropped),
        }


# ---- policies


def read_policies(items: Sequence[str]) -> dict[str, str]:
    """`["end_past_duration=clip"]` as a dict; every kind takes `keep` and `drop`, some `clip` or `swap`. Raises
    UserError."""
    policies: dict[str, str] = {}
    for item in items:
        kind, _, action = item.partition("=")
        _check_policy(item, kind, action)
        if policies.setdefault(kind, action) != action:
            raise UserError(f"--policy {item}: {kind} already has the policy {policies[kind]}; give one per kind")
    return policies


def _check_policy(item: str, kind: str, action: str) -> None:
    if kind in OWN_KINDS:
        if action not in ("keep", "drop"):
            raise UserError(f"--policy {item}: {kind} can be kept or dropped only, got {action!r}")
    elif kind not in KINDS:
        close = nearest(kind, [*KINDS, *OWN_KINDS])
        hint = f"did you mean {close}? " if close else ""
        kinds = ", ".join([*MAIN_KINDS, *(kind for kind in (*OWN_KINDS, *KINDS) if kind not in MAIN_KINDS)])
        raise UserError(f"--policy {item}: no quirk is called {kind!r}; {hint}They are: {kinds}")
    elif action != "keep":
        parse_policies([item])


# ---- videos


def find_videos(rows: Iterable[SourceRow], request: Request) -> list[Path]:
    """The path of every row's video: of its names the first that is in `videos_dir`, else the first."""
    folder = Path(os.path.expanduser(request.videos_dir))

    @cache
    def find(names: tuple[str, ...]) -> Path:
        there = (folder / name for name in names if not request.skip_videos and os.path.exists(folder / name))
        return next(there, folder / names[0])

    return [find(row.videos) for row in rows]


def as_written(video: Path, output: Path) -> str:
    """A video's path as the rows have it: absolute, or relative to the folder of the annotation file."""
    if video.is_absolute():
        return str(video)
    return os.path.relpath(video, output.parent)


def measure(paths: Iterable[Path]) -> dict[str, float | str]:
    """The length in seconds of every file that is there, or why it cannot be read; with a progress bar."""
    from tqdm import tqdm

    wanted = [path for path in dict.fromkeys(paths) if os.path.exists(path)]
    if not wanted:
        return {}
    with ThreadPoolExecutor(NUM_PROBE_THREADS) as pool:
        lengths = tqdm(pool.map(_length, wanted), total=len(wanted), desc="measuring videos", unit="video")
        return {str(path): length for path, length in zip(wanted, lengths, strict=True)}


def _length(path: Path) -> float | str:
    from utils.video import VideoReadError, probe_video

    try:
        return probe_video(path).duration_s
    except VideoReadError as error:
        return str(error)


def _needs_file(row: SourceRow) -> bool:
    return row.duration is None or row.stretch != "certain"


def _settled(row: SourceRow, length: float | str | None) -> SourceRow:
    """The row with its duration and its stretch decided, as far as the file (None or a fault: not measured) allows."""
    length_s = length if isinstance(length, float) else None
    if row.labelled_s is not None:
        return _settled_part(row, row.labelled_s, length_s)
    if row.duration is None:
        return replace(row, duration=length_s)
    if row.stretch == "certain" or row.video_start is None or row.video_end is None:
        return row
    if length_s is not None:
        alone = abs(length_s - row.duration) <= TRIM_TOLERANCE_S
        inside = row.video_end <= length_s + TRIM_TOLERANCE_S
        return _cut(row) if alone and not inside else row if inside else _flagged(row, "doubtful_trim")
    return _cut(row) if row.stretch == "named" else _flagged(row, "doubtful_trim")


def _settled_part(row: SourceRow, labelled_s: float, length_s: float | None) -> SourceRow:
    if length_s is None:
        return _flagged(replace(row, duration=labelled_s), "nominal_duration")
    if length_s > labelled_s + TRIM_TOLERANCE_S:
        return replace(row, duration=labelled_s, video_start=0.0, video_end=labelled_s)
    return replace(row, duration=length_s)


def _cut(row: SourceRow) -> SourceRow:
    """A row whose file is the stretch alone: applied to it, the fields would cut a second time."""
    kwargs = {**row.kwargs, "cut_from": [row.video_start, row.video_end]}
    return _flagged(replace(row, video_start=None, video_end=None, kwargs=kwargs), "already_cut")


def _flagged(row: SourceRow, kind: str) -> SourceRow:
    return replace(row, quirks=(*row.quirks, kind))


# ---- rows


def read_source(converter: Converter, path: Path, split: str) -> list[SourceRow]:
    """Every row of the source. Raises UserError for a file that is not as the benchmark's are."""
    rows: list[SourceRow] = []
    try:
        rows.extend(converter.read(path, split))
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{path}: after {len(rows)} rows, a record is not as {converter.name} has them ({what}); is --dataset "
            f"right? The docstring of {type(converter).__module__} shows a record"
        ) from error
    if not rows:
        raise UserError(f"{path}: holds no row of {converter.name}; is it the right file?")
    return rows


def _record(row: SourceRow, video: str, dataset: str) -> dict[str, Any]:
    about = {"qid": row.qid, "dataset": dataset, "split": row.split}
    stamp = None if row.timestamp is None else [[float(start), float(end)] for start, end in row.timestamp]
    return {
        "video": video,
        "duration": row.duration,
        "timestamp": stamp[0] if stamp is not None and len(stamp) == 1 else stamp,
        "sentence": row.sentence,
        "video_start": row.video_start,
        "video_end": row.video_end,
        # first what every row has; a source that has such a key itself (our own rows) keeps its value
        "kwargs": about | {key: value for key, value in row.kwargs.items() if key != "quirks"},
    }


def _own_quirks(row: SourceRow, record: Mapping[str, Any]) -> set[str]:
    """Quirks of a row, as it reads now, that the validator does not know."""
    quirks = {kind for kind in row.quirks if kind in OWN_KINDS and kind != "empty_window"}
    if any(start == end for start, end in windows_of(record["timestamp"]) or ()):
        quirks.add("empty_window")
    return quirks | ({"unlabelled"} if record["timestamp"] is None else set())


def convert(converter: Converter, request: Request) -> Conversion:
    """Read, locate, measure, check and repair; writes nothing, but makes the output's folder.

    Raises UserError for a source that is not of the benchmark's form, for rows whose duration nobody knows, and for a
    policy that drops every row.
    """
    path, split = converter.find(request.annotations, request.split)
    policies = {**converter.policies, **request.policies}
    source = read_source(converter, path, split)
    videos = find_videos(source, request)
    unsure = [video for row, video in zip(source, videos, strict=True) if _needs_file(row)]
    lengths = {} if request.skip_videos else measure(unsure)
    rows = [_settled(row, lengths.get(str(video))) for row, video in zip(source, videos, strict=True)]
    entries, gone = _entries(rows, videos, lengths, converter.name, request, policies)
    own = {entry.line: rows[entry.line - 1] for entry in entries}
    request.output.parent.mkdir(parents=True, exist_ok=True)  # relative paths lead through it
    checker = Checker(Options(skip_videos=request.skip_videos, probe_videos=request.probe_videos))
    before = checker.check(entries)
    found = _count(before, entries, own) + gone
    fix = _repaired(entries, before, policies, checker, own)
    records = _finished(fix, own, entries)
    if not records:
        raise UserError(f"{path}: the policies drop every row; nothing is written")
    kept = _count(fix.report, fix.entries, own)
    shown = list(_shown(found + kept, policies, not request.skip_videos))
    return Conversion(
        source=path,
        split=split,
        records=records,
        num_source_rows=len(rows),
        num_videos=fix.report.num_videos,
        policies={kind: policies.get(kind, "keep") for kind in shown},
        found={kind: found[kind] for kind in shown},
        kept={kind: kept[kind] for kind in shown},
        changed=dict(fix.changed),
        dropped=dict(fix.dropped + gone),
    )


def _entries(
    rows: Sequence[SourceRow],
    videos: Sequence[Path],
    lengths: Lengths,
    dataset: str,
    request: Request,
    policies: Mapping[str, str],
) -> tuple[list[Entry], Counter[str]]:
    """The rows as the validator takes them, and by kind those that are dropped before, for want of a duration."""
    entries: list[Entry] = []
    gone: Counter[str] = Counter()
    unknown: list[tuple[Path, str]] = []
    for line, (row, video) in enumerate(zip(rows, videos, strict=True), start=1):
        if row.duration is None:
            kind = "unreadable_video" if str(video) in lengths else "missing_video"
            if policies.get(kind) == "drop":
                gone[kind] += 1
            else:
                unknown.append((video, kind))
            continue
        record = _record(row, as_written(video, request.output), dataset)
        entries.append(Entry(str(request.output), line, dump_record(record), record, check_record(record)))
    if unknown:
        raise UserError(_no_durations(unknown, len(rows), dataset, lengths, request))
    return entries, gone


def _no_durations(
    unknown: Sequence[tuple[Path, str]], num_rows: int, dataset: str, lengths: Lengths, request: Request
) -> str:
    video, kind = unknown[0]
    fault = lengths.get(str(video), "--skip_videos keeps it shut" if request.skip_videos else "not there")
    beside = "put Charades_v1_<split>.csv beside the annotations, or " if dataset == "charades_sta" else ""
    return (
        f"{request.annotations}: {len(unknown)} of {num_rows} rows have no duration, neither in the annotations nor "
        f"from their video; first: {video} ({fault}). To mend it, {beside}put the videos into --videos_dir "
        f"{request.videos_dir}, or leave those rows out with --policy {kind}=drop"
    )


def _repaired(
    entries: Sequence[Entry],
    before: Report,
    policies: Mapping[str, str],
    checker: Checker,
    own: Mapping[int, SourceRow],
) -> Fix:
    """The entries after the policies: those of the validator by its own repair, then what the own kinds drop."""
    repairs = {kind: action for kind, action in policies.items() if kind in KINDS and action != "keep"}
    fix = fix_entries(entries, repairs, checker) if repairs else Fix(list(entries), before)
    drops = [kind for kind in OWN_KINDS if policies.get(kind) == "drop"]
    left = []
    for entry in fix.entries:
        quirks = _own_quirks(own[entry.line], entry.record) if entry.record is not None else set()
        kind = next((kind for kind in drops if kind in quirks), None)
        if kind is None:
            left.append(entry)
        else:
            fix.dropped[kind] += 1
    if len(left) < len(fix.entries):
        fix.entries, fix.report = left, checker.check(left)
    return fix


def _finished(fix: Fix, own: Mapping[int, SourceRow], entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The records to write, each with its quirks, and with the source's values where a policy changed them."""
    kinds_of: dict[int, set[str]] = defaultdict(set)
    for problem in fix.report.problems:
        kinds_of[problem.line].add(problem.kind)
    sources = {entry.line: entry.record for entry in entries}
    records = []
    for entry in fix.entries:
        unwritable = [message for kind, message in entry.findings if kind not in VALUE_FAULTS]
        if entry.record is None or unwritable:
            raise UserError(
                f"row {entry.line} of the source cannot be written: {unwritable[0]}; mend the source, or drop the row "
                f"with --policy {entry.findings[0][0]}=drop"
            )
        record, source = row_to_record(record_to_row(entry.record)), sources[entry.line]
        assert source is not None
        changed = {key: source[key] for key in ("timestamp", "sentence") if source[key] != entry.record[key]}
        quirks = kinds_of[entry.line] | _own_quirks(own[entry.line], entry.record)
        record["kwargs"] = {**record["kwargs"], **({"repaired": changed} if changed else {})}
        record["kwargs"]["quirks"] = [kind for kind in (*KINDS, *OWN_KINDS) if kind in quirks]
        records.append(record)
    return records


def _count(report: Report, entries: Iterable[Entry], own: Mapping[int, SourceRow]) -> Counter[str]:
    """Rows by kind of quirk."""
    counts = Counter(report.counts)
    for entry in entries:
        if entry.record is not None:
            counts.update(_own_quirks(own[entry.line], entry.record))
    return counts


def _shown(counts: Mapping[str, int], policies: Mapping[str, str], looked: bool) -> Iterator[str]:
    """The kinds that a report names: the main ones, and what else there is or a policy names."""
    yield from (kind for kind in MAIN_KINDS if looked or kind != "missing_video")
    others = (kind for kind in (*KINDS, *OWN_KINDS) if kind not in MAIN_KINDS)
    yield from (kind for kind in others if counts.get(kind) or kind in policies)


# ---- output


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSONL, atomically. Unlike `utils.rows.write_rows` this writes rows with quirks too."""
    with atomic_open(path) as handle:
        handle.writelines(dump_record(record) + "\n" for record in records)


def render(conversion: Conversion, converter: Converter) -> str:
    """The report for people: rows, then a line for every kind with its policy and what became of it."""
    lines = [
        f"{converter.name}, split {conversion.split}: {conversion.num_source_rows} rows in {conversion.source}, "
        f"{len(conversion.records)} written, {conversion.num_videos} videos",
        f"  {'quirk':<18} {'in source':>9} {'policy':>7} {'changed':>8} {'dropped':>8} {'kept':>8}",
    ]
    for kind, policy in conversion.policies.items():
        numbers = (conversion.changed.get(kind, 0), conversion.dropped.get(kind, 0), conversion.kept.get(kind, 0))
        lines.append(
            f"  {kind:<18} {conversion.found.get(kind, 0):>9} {policy:>7}" + "".join(f" {n:>8}" for n in numbers)
        )
    lines.append(f"published numbers: {converter.published}")
    return "\n".join(lines)
