"""This project's own rows, to list the quirks of a file of yours or to export it for another trainer.

{"video": "videos/a.mp4", "duration": 93.3, "timestamp": [1.0, 4.0], "sentence": "a woman hangs up a sweater",
 "video_start": null, "video_end": null, "kwargs": {"qid": "a-1"}}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets.converters.base import Converter, SourceRow
from utils.rows import read_raw_rows, windows_of

OWN_SPLIT = "unknown"


class OwnRows(Converter):
    """Reads JSONL as `utils.rows` describes it; kwargs stay as they are, relative paths count from `--videos_dir`."""

    name = "rows"
    published = "They are your rows."

    def find(self, annotations: Path, split: str | None) -> tuple[Path, str]:
        return annotations, split or self._split_in_name(annotations.stem) or OWN_SPLIT

    def read(self, path: Path, split: str) -> Iterator[SourceRow]:
        for raw in read_raw_rows(path):
            if raw.record is None:
                raise ValueError(raw.findings[0][1])
            yield from_record(raw.record, split, f"{path.stem}-{raw.line}")


def from_record(record: Mapping[str, Any], split: str, qid: str) -> SourceRow:
    """A row's record as a source row; `split` and `qid` are for one whose kwargs name none. Raises KeyError, TypeError
    or ValueError."""
    kwargs = dict(record.get("kwargs") or {})
    return SourceRow(
        videos=(record["video"],),
        sentence=record["sentence"],
        timestamp=windows_of(record["timestamp"]),
        split=kwargs.get("split", split),
        qid=kwargs.get("qid", qid),
        duration=record["duration"],
        video_start=record.get("video_start"),
        video_end=record.get("video_end"),
        quirks=tuple(kwargs.get("quirks", ())),
        kwargs=kwargs,
    )
