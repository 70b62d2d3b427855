"""What an evaluation asks: the labelled rows of an annotation file with their qids, and how they are put together.

Loads no model. Rows are `utils.rows`, samples are `datasets.video_dataset`, answers are `inference.eval_store`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasets.shared_video import share_clips
from datasets.video_dataset import VideoTemporalDataset
from inference.eval_store import Answer
from utils.common import UserError
from utils.config import AnnotationSource, DataConfig, PromptConfig
from utils.logging_utils import get_logger
from utils.rows import LABEL_FAULTS, Row, clip_bounds, look_up_video, read_raw_rows, to_file_clock
from utils.spans import Span

NUM_NAMED = 5


class AllRows(VideoTemporalDataset):
    """All good rows of the file, those without a label too: a row's place in the file is its place here. Windows are
    taken as they are, so that the score is over all the rows that published scores are over."""

    kept_faults = LABEL_FAULTS

    def is_usable(self, row: Row) -> bool:
        """Every row is."""
        return True


@dataclass(frozen=True)
class Queries:
    """The rows to answer and score."""

    dataset: VideoTemporalDataset
    """All good rows; its processor is set once there is a model."""
    places: dict[str, int]
    """Place in the dataset by qid, of all labelled rows in the order of the file."""
    chosen: tuple[str, ...]
    """The qids to score: all of them, or an even choice."""
    unlabelled: frozenset[str]
    """Qids of the rows without a label."""
    counts: dict[str, int]
    """Rows of the file that cannot be scored, by reason."""

    def row(self, qid: str) -> Row:
        """The annotation of a query."""
        return self.dataset.rows[self.places[qid]]

    @property
    def durations(self) -> dict[str, float]:
        """Seconds by qid, of all labelled rows."""
        return {qid: self.row(qid).duration for qid in self.places}

    def answered(self, answers: Mapping[str, Answer], qids: Collection[str] | None = None) -> list[dict[str, Any]]:
        """What `utils.metrics` takes, with the row's kwargs beside it, of the chosen queries or of `qids`."""
        wanted = set(self.chosen if qids is None else qids)
        return [self._sample(qid, answers[qid].text) for qid in self.places if qid in wanted]

    def predicted(self, predictions: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The same for windows that are given; a chosen query without any counts as an answer that cannot be read."""
        return [self._sample(qid, "") | {"pred": predictions.get(qid)} for qid in self.chosen]

    def _sample(self, qid: str, text: str) -> dict[str, Any]:
        sample = self.dataset.scored_sample(self.places[qid], text)
        return sample | {"qid": qid, "kwargs": self.row(qid).kwargs}

    def record(self, sample: Mapping[str, Any], answer: Answer | None) -> dict[str, Any]:
        """The line of `predictions.jsonl`: `gt` and `pred` on the clip's clock, `segments` on the file's, and
        `video_path`, where the video is (null where it must not be opened)."""
        row, trim = self.row(sample["qid"]), self.dataset.data.trim
        on_file = {
            name: [[*to_file_clock(Span(*window[:2]), row, trim), *window[2:]] for window in sample[key] or ()]
            for name, key in (("segments", "pred"), ("gt_segments", "gt"))
        }
        about = {"line": row.line, "video": row.video, "sentence": row.sentence}
        path, fault = look_up_video(row, self.dataset.data.videos_root)
        about |= {"video_path": os.path.abspath(path) if fault is None else None}
        about |= {"video_start": row.video_start, "video_end": row.video_end}
        said = {"text": answer.text, "fault": answer.fault} if answer else {}
        return {**sample, **about, **on_file, **said}


def load_queries(
    annotations: Path, data: DataConfig, prompt: PromptConfig, *, max_samples: int | None = None
) -> Queries:
    """The queries of an annotation file. The qid of a row is its `kwargs.qid`, else its line number, as text.

    Raises UserError for a file without labelled rows, too many bad rows, and a qid that two rows share.
    """
    split = data.model_copy(update={"test": (AnnotationSource(path=annotations),), "select": None})
    dataset = AllRows(split, None, prompt, split="test", with_answer=False)
    qids = qids_of(dataset.rows)
    labelled = [qid for qid, place in qids.items() if dataset.rows[place].timestamp is not None]
    if not labelled:
        raise UserError(
            f"--annotations {annotations}: no row is labelled (timestamp is null), so there is nothing to score"
        )
    counts = {
        "num_unlabelled": len(qids) - len(labelled),
        "num_bad_rows": len(read_raw_rows(annotations)) - len(dataset.rows),
    }
    if counts["num_unlabelled"]:
        get_logger().info(
            "%s: %d of %d rows have no label and are left out", annotations, counts["num_unlabelled"], len(qids)
        )
    if num_odd := sum(_is_odd(dataset.rows[qids[qid]]) for qid in labelled):
        get_logger().warning(
            "%s: %d of %d labelled rows have a window that does not start before it ends or starts before 0; they are "
            "scored as they are, as published scores do: the former count 0 whatever is answered",
            annotations, num_odd, len(labelled),
        )  # fmt: skip
    places = {qid: qids[qid] for qid in labelled}
    if max_samples is not None and max_samples < len(labelled):
        labelled = [labelled[place] for place in np.linspace(0, len(labelled) - 1, max_samples).round().astype(int)]
    return Queries(dataset, places, tuple(labelled), frozenset(qids) - frozenset(places), counts)


def _is_odd(row: Row) -> bool:
    """Whether a window of the row is one that training would refuse."""
    return any(start >= end or start < 0 for start, end in row.timestamp or ())


def qids_of(rows: Sequence[Row]) -> dict[str, int]:
    """Place by qid. Raises UserError when two rows have the same."""
    found: dict[str, int] = {}
    for place, row in enumerate(rows):
        given = row.kwargs.get("qid")
        qid = str(row.line if given is None else given)
        if qid in found:
            other = rows[found[qid]]
            raise UserError(
                f"{row.file}:{row.line}: qid {qid!r} belongs to line {other.line} already; give every row a qid of its "
                "own in kwargs.qid, or none (then it is the line number)"
            )
        found[qid] = place
    return found


Round = list[list[str]]
"""Qids whose clips are read together, in batches that are answered together."""


def plan_rounds(queries: Queries, size: int, done: Collection[str] = ()) -> list[Round]:
    """What is asked together, without the qids that are `done`.

    The queries of a clip are always in one round, so that it is read and prefilled once: several clips of no more than
    `size` queries in all, as one batch, or a clip of more than `size` queries, in equal batches. The rounds are those
    of the whole file, whatever is done and however many processes share them: a batch is padded to its longest prompt,
    and so the same answers come out.
    """
    rounds = [_batches(found, size) for found in _packed(_clips(queries), size)]
    left = [[[qid for qid in batch if qid not in done] for batch in batches] for batches in rounds]
    return [kept for batches in left if (kept := [batch for batch in batches if batch])]


def qids_in(rounds: Iterable[Round]) -> list[str]:
    """All qids of `rounds`, in their order."""
    return [qid for batches in rounds for batch in batches for qid in batch]


def _clips(queries: Queries) -> list[list[str]]:
    """The chosen qids of each clip, in order of first appearance."""
    rows, trim = queries.dataset.rows, queries.dataset.data.trim
    places = {queries.places[qid]: qid for qid in queries.chosen}
    clips = share_clips(
        list(places), lambda place: (rows[place].video, clip_bounds(rows[place], trim)), most=max(1, len(places))
    )
    return [[places[place] for place in clip] for clip in clips]


def _packed(clips: Sequence[Sequence[str]], size: int) -> list[list[str]]:
    """Neighbours put together as long as they are no more than `size`."""
    found: list[list[str]] = []
    for clip in clips:
        if found and len(found[-1]) + len(clip) <= size:
            found[-1].extend(clip)
        else:
            found.append(list(clip))
    return found


def _batches(qids: Sequence[str], size: int) -> Round:
    """Equal parts of at most `size`."""
    return [part.tolist() for part in np.array_split(np.array(qids, dtype=object), -(-len(qids) // size))]


def check_videos(queries: Queries, qids: Sequence[str]) -> None:
    """Name and count the videos of `qids` that are not there, before a model is loaded.

    Raises UserError when their rows are more than `data.max_bad_fraction` of all queries.
    """
    data = queries.dataset.data
    paths = {row.video: look_up_video(row, data.videos_root) for row in map(queries.row, qids)}
    absent = {video for video, (path, fault) in paths.items() if fault is not None or not path.is_file()}
    rows = [qid for qid in qids if queries.row(qid).video in absent]
    if not rows:
        return
    named = ", ".join(sorted(absent)[:NUM_NAMED]) + (", ..." if len(absent) > NUM_NAMED else "")
    found = f"{len(absent)} videos of {len(rows)} of {len(queries.chosen)} queries do not exist: {named}"
    if len(rows) > data.max_bad_fraction * len(queries.chosen):
        first = paths[sorted(absent)[0]][0]
        raise UserError(
            f"{found} (looked for {first}), more than max_bad_fraction={data.max_bad_fraction:g} allows. Bring them "
            "back, give the folder that holds them with --videos_root, or raise --max_bad_fraction"
        )
    get_logger().warning("%s; they count as failures", found)
