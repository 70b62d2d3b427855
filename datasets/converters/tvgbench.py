"""TVGBench (Time-R1): 800 test queries drawn from Charades-STA, ActivityNet, TACoS, HiREST and Ego4D NLQ.

`tvgbench.json`: a list; with `start` and `end`, `duration` and `answer` are those of that stretch of the file:

    {"path": "./dataset/timer1/videos/tvgbench_data/AB1CD.mp4", "question": "a person sits down.",
     "answer": "13.4-28.1", "start": null, "end": null, "duration": 30.12, "question_type": "video temporal grounding",
     "source": "./dataset/timer1/videos/annotations/tvgbench/raw_data/Charades_sta_test.json",
     "dataset_name": "charades", "qsemtype": "Human Pose", "bins": {"dataset": "charades", "qsemtype": "HP"}}
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from datasets.converters.base import Converter, SourceRow, number, read_json, tails
from datasets.converters.trimmed import with_doubts
from utils.spans import parse_spans


class TVGBench(Converter):
    """Reads `tvgbench.json`. `kwargs.qid` is what Time-R1's evaluation calls a query when all videos are there."""

    name = "tvgbench"
    files = {"test": ("tvgbench.json",)}
    published = (
        "Time-R1 scores all 800 rows as released: 11 of them have windows of no length, which no answer can meet, and "
        "27 windows end past the video or clip."
    )

    def read(self, path: Path, split: str) -> Iterator[SourceRow]:
        yield from with_doubts([self._row(record, index, split) for index, record in enumerate(read_json(path))])

    @staticmethod
    def _row(record: dict[str, Any], index: int, split: str) -> SourceRow:
        spans = parse_spans(record["answer"])
        if spans is None or len(spans) != 1:
            raise ValueError(f"`answer` must be one window as in 13.4-28.1, got {record['answer']!r}")
        source = PurePosixPath(record["source"]).stem.replace(".", "_").replace("-", "_")
        known = {"question", "start", "end", "duration", "dataset_name"}
        start, end = record["start"], record["end"]
        return SourceRow(
            videos=tails(record["path"]),
            sentence=record["question"],
            timestamp=spans,
            split=split,
            qid=f"{source}_{index}",
            duration=number(record["duration"]),
            video_start=None if start is None else number(start),
            video_end=None if end is None else number(end),
            kwargs={key: value for key, value in record.items() if key not in known}
            | {"dataset_name": record.get("dataset_name", record.get("bins", {}).get("dataset"))},
        )
