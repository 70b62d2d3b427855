"""What the report's page knows of each query, as plain JSON values, and where its video is. All times are seconds on
the file's clock."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from inference.eval_report import MAX_GROUPS, word_of
from inference.report_compare import Comparison
from inference.report_data import Evaluation, Judged
from utils.common import UserError, finite_or_null
from utils.rows import Row, Trim, clip_bounds, look_up_video
from utils.spans import Span, temporal_iou

LONGEST_TEXT = 2000
"""Characters shown of an answer; a thinking model may say much more."""
VIDEOS_FOLDER = "videos"


# ---------------------------------------------------------------------------------------------- videos
@dataclass
class Videos:
    """The videos of the rows, each once: a link relative to the report, or why there is none."""

    report: Path
    """The report's folder as it will be called."""
    root: Path | None = None
    """Where to look for them instead of where the evaluation found them."""
    copies: bool = False
    """Whether they are copied into the report."""
    listed: list[dict[str, Any]] = field(default_factory=list)
    """For the page: `name` as in the annotations, `src` relative to the report, `uri` for a report that was moved or is
    reached through a link, and a `note` where `src` is None."""
    files: dict[str, Path] = field(default_factory=dict)
    """What to copy, by its name in the report."""
    _places: dict[str, int] = field(default_factory=dict)

    def place_of(self, record: Mapping[str, Any]) -> int:
        """The place of a row's video in `listed`."""
        video = record["video"]
        if video not in self._places:
            self._places[video] = len(self.listed)
            self.listed.append({"name": video, **self._link(record)})
        return self._places[video]

    def copy_into(self, folder: Path) -> None:
        """Put the files of `files` under `folder`: a hard link where the disk is the same, else a copy."""
        for name, source in self.files.items():
            target = folder / name
            target.parent.mkdir(exist_ok=True)
            try:
                os.link(source, target)
            except OSError:  # another disk, or one without hard links
                shutil.copyfile(source, target)

    def _link(self, record: Mapping[str, Any]) -> dict[str, str | None]:
        path, fault = self._find(record)
        if fault is None and not path.is_file():
            what = "is no file that a browser can play" if path.exists() else "was not there when this report was made"
            fault = f"{path} {what}."
        if fault is not None:
            return {"src": None, "note": fault}
        if self.copies:
            name = f"{VIDEOS_FOLDER}/{len(self.listed):05d}-{path.name}"
            self.files[name] = path.resolve()
            return {"src": quote(name), "note": None}
        relative = Path(os.path.relpath(path, self.report)).as_posix()
        return {"src": quote(relative), "uri": path.absolute().as_uri(), "note": None}

    def _find(self, record: Mapping[str, Any]) -> tuple[Path, str | None]:
        if self.root is not None:
            return look_up_video(_row(record), self.root)
        if "video_path" in record and record["video_path"] is None:
            return Path(record["video"]), f"{record['video']} lies outside the evaluation's videos_root."
        return Path(record.get("video_path") or record["video"]).absolute(), None


def _row(record: Mapping[str, Any]) -> Row:
    """What can be told of a row from its answer."""
    start, end = record.get("video_start"), record.get("video_end")
    return Row(record["video"], record["duration"], None, record["sentence"], start, end, record["kwargs"], "", 0)


# ---------------------------------------------------------------------------------------------- groups
def group_keys(rows: Collection[Judged]) -> dict[str, list[str]]:
    """The keys of `kwargs` that rows can be filtered by, each with its values in order.

    Those with at least two values and at most `MAX_GROUPS`; never the qid, nor lists and objects.
    """
    keys = dict.fromkeys(key for row in rows for key in row.record["kwargs"] if key != "qid")
    found = {}
    for key in keys:
        values = [row.record["kwargs"].get(key) for row in rows]
        words = {word_of(value) for value in values}
        if 2 <= len(words) <= MAX_GROUPS and not any(isinstance(value, list | dict) for value in values):
            found[key] = sorted(words, key=_naturally)
    return found


def _naturally(word: str) -> tuple[float, str]:
    try:
        return float(word), word
    except ValueError:
        return math.inf, word


# ---------------------------------------------------------------------------------------------- rows
def page_rows(
    evaluation: Evaluation, comparison: Comparison | None, videos: Videos, keys: Sequence[str]
) -> list[dict[str, Any]]:
    """One object for each query, in the order of the annotations."""
    trim = evaluation.run.get("data.trim", "relative")
    if trim not in ("relative", "absolute", "pre_cut"):
        raise UserError(f"{evaluation.folder}/run.json: data.trim is {trim!r}; evaluate again")
    rows = []
    for qid, judged in evaluation.rows.items():
        other = comparison.theirs.rows.get(qid) if comparison else None
        rows.append(finite_or_null(_page_row(judged, other, comparison, videos, keys, trim)))
    return rows


def _page_row(
    judged: Judged, other: Judged | None, comparison: Comparison | None, videos: Videos, keys: Sequence[str], trim: Trim
) -> dict[str, Any]:
    record = judged.record
    clip = clip_bounds(_row(record), trim)
    shown = {
        "qid": record["qid"],
        "line": record["line"],
        "sentence": record["sentence"],
        "video": videos.place_of(record),
        "duration": record["duration"],
        "clip": list(clip or (0.0, record["duration"])),
        "trimmed": clip is not None,
        "truth": record["gt_segments"],
        "groups": {key: word_of(record["kwargs"].get(key)) for key in keys},
        **_answer(judged),
        "offsets": judged.offsets_s,
    }
    if other is not None and comparison is not None:
        shown |= {"vs": _answer(other), "change": comparison.changes[record["qid"]]}
    return shown


def _answer(judged: Judged) -> dict[str, Any]:
    """`pred` is None for an answer that cannot be read, `[]` for a stated absence."""
    record, text = judged.record, judged.record.get("text")
    if text and len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]} … ({len(text) - LONGEST_TEXT} more characters in predictions.jsonl)"
    return {
        "pred": None if record["pred"] is None else record["segments"],
        "counted": judged.counted,
        "ious": [_iou(window, record["gt_segments"]) for window in record["segments"]],
        "score": judged.score,
        "text": text,
        "fault": record.get("fault"),
    }


def _iou(window: Sequence[float], truths: Sequence[Sequence[float]]) -> float:
    return max((temporal_iou(Span(*window[:2]), Span(*truth[:2])) for truth in truths), default=0.0)
