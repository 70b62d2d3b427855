"""Samples -> batches: padding, label columns, and the count of samples that failed. No processor, no decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from datasets.encoding import IGNORE, Sample
from utils.clip_reader import Reads

Batch = dict[str, Any]


def sum_reads(samples: Sequence[Sample]) -> Reads:
    """What was decoded for all of them; samples that were not read by a `VideoTemporalDataset` count nothing."""
    total = Reads()
    for sample in samples:
        if "reads" in sample:
            total.add(sample["reads"])
    return total


def answer_columns(labels: torch.Tensor) -> torch.Tensor:
    """Columns whose logits predict a label in any row: the only ones the head must compute.

    `labels` (B, L) -> sorted column indices (K,), K >= 1. Column c predicts the label at c + 1. With no label at all,
    column 0 stands in, so that the graph stays connected and the loss is an exact zero.
    """
    columns = torch.nonzero((labels[:, 1:] != IGNORE).any(dim=0)).flatten()
    return columns if len(columns) else torch.zeros(1, dtype=torch.long, device=labels.device)


def pad_rows(rows: Sequence[torch.Tensor], value: int, side: str) -> torch.Tensor:
    """Stack 1-D tensors of different length into (B, L), filled with `value` on the "left" or "right"."""
    length = max(len(row) for row in rows)
    out = rows[0].new_full((len(rows), length), value)
    for target, row in zip(out, rows, strict=True):
        if side == "right":
            target[: len(row)] = row
        else:
            target[length - len(row) :] = row
    return out


@dataclass(frozen=True)
class VideoCollator:
    """Pads samples of `VideoTemporalDataset` into one batch.

    Training (`side="right"`): `input_ids`, `attention_mask`, `mm_token_type_ids`, `labels` (B, L), `logits_to_keep`
    (K,), `video_grid_thw` (B, 3), `pixels` (of each clip; the model reads `datasets.pixels.pixel_values` of them).
    Generation (`side="left"`): the same without `labels` and `logits_to_keep`. Always `indices` (row numbers of the
    batch's good samples), `faults` (`[(row number, reason), ...]`) and `reads` (the sum of the samples'). When every
    sample failed, `blank` keeps the step alive with nothing to learn.
    """

    pad_token_id: int
    blank: Sample
    side: str = "right"

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Collate; see the class."""
        faults = [(sample["index"], sample["fault"]) for sample in samples if "fault" in sample]
        good = [sample for sample in samples if "fault" not in sample]
        batch = self._pad(good or [self._nothing_to_learn()])
        indices = [sample["index"] for sample in good]
        return {**batch, "indices": indices, "faults": faults, "reads": sum_reads(samples)}

    def _nothing_to_learn(self) -> Sample:
        if "labels" not in self.blank:
            return self.blank
        return {**self.blank, "labels": torch.full_like(self.blank["labels"], IGNORE)}

    def _pad(self, samples: Sequence[Sample]) -> Batch:
        ids = [sample["input_ids"] for sample in samples]
        batch: Batch = {
            "input_ids": pad_rows(ids, self.pad_token_id, self.side),
            "attention_mask": pad_rows([torch.ones_like(row) for row in ids], 0, self.side),
            "mm_token_type_ids": pad_rows([sample["mm_token_type_ids"] for sample in samples], 0, self.side),
            "video_grid_thw": torch.cat([sample["video_grid_thw"] for sample in samples]),
            "pixels": [sample["pixels"] for sample in samples],
        }
        if "labels" in samples[0]:
            batch["labels"] = pad_rows([sample["labels"] for sample in samples], IGNORE, self.side)
            batch["logits_to_keep"] = answer_columns(batch["labels"])
        return batch
