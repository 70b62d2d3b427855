"""Time-R1's 2,500 training rows, drawn from five sets of YouTube, Flickr and cooking videos by difficulty.

`train_2k5.json`: a list; with `video_start` and `video_end`, `duration` and `timestamp` are those of that stretch:

    {"video": "./dataset/timer1/videos/timerft_data/abcdefghijk_00:00:39:000_00:01:24:700.mp4", "duration": 45.7,
     "timestamp": [34.9, 41.9], "sentence": "a statue of a man",
     "qid": "my|internvid-vtime|abcdefghijk|a statue of a man", "video_start": 39.0, "video_end": 84.7,
     "difficulty": 50.0, "pred": [0.0, 3.0]}

A file named like this one is the stretch alone: applied to it, `video_start` would cut a second time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets.converters.base import Converter, SourceRow, number, read_json, tails, windows
from datasets.converters.trimmed import with_doubts


class TimeR1Train(Converter):
    """Reads `train_2k5.json`; `difficulty` and `pred` (of Time-R1's base model) stay in kwargs."""

    name = "timer1_train"
    files = {"train": ("train_2k5.json",)}
    published = "Time-R1 trains on all rows whose video is there, windows as released, in lower case without full stop."

    def read(self, path: Path, split: str) -> Iterator[SourceRow]:
        yield from with_doubts([self._row(record, split) for record in read_json(path)])

    @staticmethod
    def _row(record: dict[str, Any], split: str) -> SourceRow:
        known = {"duration", "timestamp", "sentence", "qid", "video_start", "video_end"}
        start, end = record["video_start"], record["video_end"]
        return SourceRow(
            videos=tails(record["video"]),
            sentence=record["sentence"],
            timestamp=windows([record["timestamp"]]),
            split=split,
            qid=record["qid"],
            duration=number(record["duration"]),
            video_start=None if start is None else number(start),
            video_end=None if end is None else number(end),
            kwargs={key: value for key, value in record.items() if key not in known},
        )
