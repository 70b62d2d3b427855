"""TimeLens: TimeLens-Bench (test sets of Charades, ActivityNet, QVHighlights, annotated anew) and TimeLens-100K.

`charades-timelens.json`, `activitynet-timelens.json`, `qvhighlights-timelens.json`: one object by video, seconds:

    {"AB1CD": {"duration": 30.5, "spans": [[4.3, 12.5]], "queries": ["A person hangs a picture on the wall."]}}

`timelens-100k.jsonl`: one video a line, its path below the set's `videos/`, one or several windows an event:

    {"source": "didemo", "video_path": "didemo/abc.mp4", "duration": 30.0,
     "events": [{"query": "the dog jumps", "span": [[5.0, 9.0]]}]}
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets.converters.base import (
    Converter,
    SourceRow,
    names_of,
    number,
    read_json,
    read_json_lines,
    tails,
    windows,
)


class TimeLens(Converter):
    """Reads one of the four files, told apart by `.json` and `.jsonl`."""

    name = "timelens"
    files = {
        "train": ("timelens-100k.jsonl",),
        "charades": ("charades-timelens.json",),
        "activitynet": ("activitynet-timelens.json",),
        "qvhighlights": ("qvhighlights-timelens.json",),
    }
    published = (
        "TimeLens-Bench is scored on all rows as released. TimeLens strips queries of outer space and full stops "
        "before it asks them; its training leaves out rows none of whose windows lies in the video."
    )

    def read(self, path: Path, split: str) -> Iterator[SourceRow]:
        yield from self._train(path, split) if path.suffix == ".jsonl" else self._bench(path, split)

    def _bench(self, path: Path, split: str) -> Iterator[SourceRow]:
        for video, item in read_json(path).items():
            for index, (span, query) in enumerate(zip(item["spans"], item["queries"], strict=True)):
                yield SourceRow(
                    videos=(*names_of(video), *names_of(f"{split}/{video}")),
                    sentence=query,
                    timestamp=_several(span),
                    split="test",
                    qid=f"timelens-{split}-{video}-{index}",
                    duration=number(item["duration"]),
                    kwargs={"vid": video, "source": split},
                )

    def _train(self, path: Path, split: str) -> Iterator[SourceRow]:
        for record in read_json_lines(path):
            about = {key: value for key, value in record.items() if key not in ("events", "duration")}
            for index, event in enumerate(record["events"]):
                extra = {key: value for key, value in event.items() if key not in ("query", "span")}
                yield SourceRow(
                    videos=tuple(reversed(tails(record["video_path"]))),
                    sentence=event["query"],
                    timestamp=_several(event["span"]),
                    split=split,
                    qid=f"timelens-100k-{record['video_path']}-{index}",
                    duration=number(record["duration"]),
                    kwargs=about | extra,
                )


def _several(span: Any) -> tuple[tuple[float, float], ...] | None:
    """`[start, end]` or `[[start, end], ...]`; None for no window at all, which is no label."""
    return windows(span if not span or isinstance(span[0], list) else [span]) or None
