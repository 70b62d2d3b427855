"""Queries on one video, read and encoded together: the clip and the prompt up to its end once, each question after it.

Owns which rows share a clip, the order that keeps them side by side, and their batches. Where a prompt is divided is
`datasets.shared_prompt`; the packed sequence and its attention are `trainers.shared_prefix`; what a row asks and
answers is `VideoTemporalDataset`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from datasets.collate_fns import Batch, sum_reads
from datasets.encoding import IGNORE, PromptError, Sample, append_answer, require_plain_text
from datasets.shared_prompt import encode_alike, encode_shared, split_prompt
from datasets.video_dataset import VideoTemporalDataset
from utils.rows import clip_bounds, look_up_video
from utils.video import VideoReadError

Unit = dict[str, Any]
"""Queries on one clip: `prefix` (a sample that ends with the video), `tails` and for training `answers` (token ids of
each query, after the video and of its answer), `indices` (row numbers); or `indices` and a `fault`. Always `reads`, as
a sample."""


class SharedVideoDataset(Dataset[Sample]):
    """A training `VideoTemporalDataset` whose batches are read clip by clip.

    `dataset[i]` is the plain sample of row i. A data loader asks for the rows of a whole batch at once
    (`__getitems__`) and gets units of up to `max_queries` of them that share a clip, each clip decoded and encoded
    once. A clip that cannot be read is a fault of each of its rows.
    """

    def __init__(self, queries: VideoTemporalDataset, max_queries: int) -> None:
        self.queries, self.max_queries = queries, max_queries

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, index: int) -> Sample:
        return self.queries[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Unit]:
        return [self.unit(rows) for rows in share_clips(indices, self.clip_key, self.max_queries)]

    def clip_key(self, index: int) -> Any:
        """Equal for rows whose prompts are equal up to the end of the video: same stretch of the same file, and the
        same text before it. A row that cannot be asked is alone, so that its fault is not the others'."""
        row = self.queries.rows[index]
        try:
            require_plain_text(self.queries.processor, self.queries.question(row))
        except PromptError:
            return index
        before, _ = split_prompt(self.queries.processor, self.queries.question(row))
        path, fault = look_up_video(row, self.queries.data.videos_root)
        return index if fault else (str(path), clip_bounds(row, self.queries.data.trim), before)

    def unit(self, indices: Sequence[int]) -> Unit:
        """Rows of one clip, encoded; a fault when the clip cannot be read."""
        row = self.queries.rows[indices[0]]
        try:
            unit = self._encode(list(indices), self.queries.clip(row))
        except (VideoReadError, PromptError) as error:
            unit = {"indices": list(indices), "fault": f"{row.file}:{row.line}: {error}"}
        return unit | {"reads": self.queries.reader.take()}

    def blank(self) -> Unit:
        """A black clip with a row's question: stands in for a batch of faults, with nothing to learn."""
        return self._encode([self.queries.first_plain_row()], self.queries.blank_clip())

    def _encode(self, indices: list[int], clip: Any) -> Unit:
        processor, data, rows = self.queries.processor, self.queries.data, [self.queries.rows[i] for i in indices]
        first = rows[0]
        shared = encode_shared(
            processor, [self.queries.question(row) for row in rows], clip, max_tokens=data.max_prompt_tokens,
            on_overlong=data.on_overlong, name=f"{first.file}:{first.line} ({first.video})",
            remedy="set training.share_video=false",
        )  # fmt: skip
        nothing = {key: shared.prefix[key][:0] for key in ("input_ids", "mm_token_type_ids")}
        learnt = [append_answer(processor, nothing, self.queries.answer(row))["input_ids"] for row in rows]
        assert processor.tokenizer.eos_token_id == int(learnt[0][-1])
        return {"indices": indices, "prefix": shared.prefix, "tails": shared.tails, "answers": learnt}


class SharedQuestionDataset(SharedVideoDataset):
    """The same for answering: units have no `answers`, and a question sees the frames that it sees alone.

    Where a prompt is overlong, questions on one clip may therefore come in more than one unit. A question that cannot
    be asked is a fault of its own.
    """

    def __init__(self, queries: VideoTemporalDataset) -> None:
        super().__init__(queries, max_queries=len(queries))

    def __getitems__(self, indices: Sequence[int]) -> list[Unit]:
        clips = share_clips(indices, self.clip_key, self.max_queries)
        return [unit for rows in clips for unit in self.units(rows)]

    def units(self, indices: Sequence[int]) -> list[Unit]:
        """Rows of one clip, encoded; a fault for those that cannot be read or asked."""
        rows, data = [self.queries.rows[index] for index in indices], self.queries.data
        names = [f"{row.file}:{row.line}" for row in rows]
        try:
            found, faults = encode_alike(
                self.queries.processor, [self.queries.question(row) for row in rows], self.queries.clip(rows[0]),
                max_tokens=data.max_prompt_tokens, on_overlong=data.on_overlong, name=f"{names[0]} ({rows[0].video})",
                remedy="this checkpoint's tokenizer is not Qwen3-VL's; use the one it was made with",
            )  # fmt: skip
        except (VideoReadError, PromptError) as error:
            return [{"indices": [i], "fault": f"{name}: {error}"} for i, name in zip(indices, names, strict=True)]
        refused = [{"indices": [indices[i]], "fault": f"{names[i]}: {error}"} for i, error in faults.items()]
        return refused + [
            {"indices": [indices[i] for i in places], "prefix": shared.prefix, "tails": shared.tails}
            for places, shared in found
        ]


def share_clips(indices: Sequence[int], key: Callable[[int], Any], most: int) -> list[list[int]]:
    """Rows of the same clip put together, in order of first appearance, at most `most` in each list.

    >>> share_clips([4, 7, 5, 6], key=lambda row: row // 2, most=2)
    [[4, 5], [7, 6]]
    """
    units: dict[Any, list[list[int]]] = {}
    for index in indices:
        lists = units.setdefault(key(index), [[]])
        if len(lists[-1]) == most:
            lists.append([])
        lists[-1].append(index)
    return [unit for lists in units.values() for unit in lists]


class VideoSampler(Sampler[int]):
    """Every row once an epoch, the rows of a clip in runs of up to `max_queries` side by side.

    In each epoch the rows of a clip are shuffled and cut into runs, and the runs of all clips are shuffled: a clip with
    many queries comes back in several places, each time with other neighbours, and any two clips may meet. What is
    lost against a plain shuffle is that rows of a run fall into one batch. A run at the edge of a batch is divided, so
    batches keep their size; its clip is then computed in both.

    The order is a function of (seed, epoch). `epoch` is asked at the start of each iteration (see `GroupSampler`).
    """

    def __init__(
        self, clips: Sequence[Sequence[int]], *, max_queries: int, seed: int, epoch: Callable[[], int]
    ) -> None:
        self.clips, self.max_queries, self.seed, self.epoch = clips, max_queries, seed, epoch

    def __len__(self) -> int:
        return sum(map(len, self.clips))

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch()))
        runs = [
            shuffled[start : start + self.max_queries]
            for shuffled in (rng.permutation(clip) for clip in self.clips)
            for start in range(0, len(shuffled), self.max_queries)
        ]
        for place in rng.permutation(len(runs)):
            yield from runs[place].tolist()


@dataclass(frozen=True)
class UnitCollator:
    """Units -> a batch: `units`, `labels` (1, N) with every answer token of the batch (what an update counts),
    `indices`, `faults`, `reads`. When every unit failed, `blank` keeps the step alive with nothing to learn."""

    blank: Unit

    def __call__(self, units: Sequence[Unit]) -> Batch:
        """Collate; see the class."""
        good = [unit for unit in units if "fault" not in unit]
        answers = [answer for unit in good for answer in unit["answers"]]
        return {
            "units": good or [self.blank],
            # An edge that is ignored, since a label predicts from the column before it.
            "labels": torch.cat([torch.tensor([IGNORE]), *answers])[None],
            "indices": [index for unit in good for index in unit["indices"]],
            "faults": [(index, unit["fault"]) for unit in units if "fault" in unit for index in unit["indices"]],
            "reads": sum_reads(units),
        }
