"""QVHighlights: YouTube clips of 150 s, already cut, a third of the queries with several windows.

`highlight_train_release.jsonl`, `highlight_val_release.jsonl`; `highlight_test_release.jsonl` has no labels. The file
of a clip is `<vid>.mp4`, and its times count from the clip's start:

    {"qid": 17, "query": "A man cooks in a small kitchen.", "duration": 150, "vid": "abcdefghijk_360.0_510.0",
     "relevant_clip_ids": [36, 37], "saliency_scores": [[4, 3, 2], [4, 1, 3]], "relevant_windows": [[72, 76]]}
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from datasets.converters.base import Converter, SourceRow, names_of, number, read_json_lines, windows


class QVHighlights(Converter):
    """Reads one of the three releases; the test rows come out unlabelled (`timestamp: null`)."""

    name = "qvhighlights"
    files = {split: (f"highlight_{split}_release.jsonl",) for split in ("train", "val", "test")}
    published = (
        "moment_detr's and lighthouse's evaluation takes the windows as released. Test labels are hidden: predictions "
        "go to the authors' server with kwargs.qid and kwargs.vid."
    )

    def read(self, path: Path, split: str) -> Iterator[SourceRow]:
        known = {"qid", "query", "duration", "relevant_windows"}
        for record in read_json_lines(path):
            yield SourceRow(
                videos=names_of(record["vid"]),
                sentence=record["query"],
                # no window at all says nothing of an event that is absent: such a row is not labelled
                timestamp=windows(record.get("relevant_windows") or ()) or None,
                split=split,
                qid=record["qid"],
                duration=number(record["duration"]),
                kwargs={key: value for key, value in record.items() if key not in known},
            )
