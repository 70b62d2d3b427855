"""DiDeMo: moments of Flickr videos in chunks of 5 s, each query marked by four or more annotators.

`train_data.json`, `val_data.json`, `test_data.json`: a list; `times` holds first and last chunk, once an annotator:

    {"num_segments": 6, "description": "the dog jumps", "times": [[1, 1], [1, 1], [1, 2], [0, 0]],
     "video": "12345678@N01_1234567890_abcdef0123.mov", "annotation_id": 7, "dl_link": "https://..."}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets.converters.base import Converter, SourceRow, read_json, renamed
from utils.spans import temporal_iou

CHUNK_S = 5.0
"""Length of a chunk; the last one of a video may be shorter."""
NUM_BEST = 3
"""DiDeMo's own score is the mean over the three annotators that a prediction agrees with most."""

Window = tuple[float, float]


class DiDeMo(Converter):
    """Reads one split. Annotators are alternatives, not several windows of one event: a row has the one window that
    DiDeMo's own score prefers (`consensus`), and every annotator's in `kwargs.alternatives`."""

    name = "didemo"
    files = {split: (f"{split}_data.json",) for split in ("train", "val", "test")}
    published = (
        "DiDeMo's own numbers (Rank@1, Rank@5, mIoU over the three best of the annotators) need kwargs.alternatives. "
        "Work with language models scores against one window; which one differs (VideoMind takes the mean)."
    )

    def read(self, path: Path, split: str) -> Iterator[SourceRow]:
        known = {"description", "video", "annotation_id"}
        for record in read_json(path):
            alternatives = [(CHUNK_S * first, CHUNK_S * (last + 1)) for first, last in record["times"]]
            yield SourceRow(
                videos=renamed(record["video"]),
                sentence=record["description"],
                timestamp=(consensus(alternatives),) if alternatives else None,
                split=split,
                qid=record["annotation_id"],
                # the chunks tell how much the annotators saw, the file how long its last chunk is
                labelled_s=CHUNK_S * int(record["num_segments"]),
                kwargs={key: value for key, value in record.items() if key not in known}
                | {"vid": record["video"], "alternatives": [list(window) for window in alternatives]},
            )


def consensus(alternatives: Sequence[Window]) -> Window:
    """The annotator's window with the highest mean IoU with the three annotators that it agrees with most; of equals
    the one that more annotators gave, then the earlier and shorter.

    >>> consensus([(0, 5), (20, 25), (20, 25), (20, 30)])
    (20, 25)
    """
    votes = Counter(alternatives)

    def merit(window: Window) -> tuple[float, int, float, float]:
        ious = sorted((temporal_iou(window, other) for other in alternatives), reverse=True)[:NUM_BEST]
        return sum(ious) / len(ious), votes[window], -window[0], -window[1]

    return max(votes, key=merit)
