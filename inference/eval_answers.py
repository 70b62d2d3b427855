"""The model's side of an evaluation: the queries on a clip are answered together, the clip read and prefilled once.

As `inference.batching` does it for `predict_batch`, but clips are read and encoded by a data loader's processes while
the model works, and which queries are computed together is planned (`eval_queries.plan_rounds`) rather than found, so
that a run that goes on after a stop computes what it would have computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

from datasets.shared_video import SharedQuestionDataset, Unit
from datasets.video_dataset import VideoTemporalDataset
from inference.video_infer import VideoTemporalInference
from trainers.shared_decoding import continue_texts, prefill
from utils.common import UserError

Found = tuple[dict[int, str], list[tuple[int, str]]]
"""The answer of each place of the dataset ("" where the video could not be read), and the faults `(place, reason)`."""


def answer(
    engine: VideoTemporalInference,
    dataset: VideoTemporalDataset,
    rounds: Sequence[Sequence[Sequence[int]]],
    max_new_tokens: int,
    num_workers: int,
) -> Iterator[Found]:
    """Answer the rows of `dataset` in `rounds[round][batch]`; yields what is found batch by batch.

    All that an evaluation asks of a model goes through here. Raises UserError when the GPU's memory is full.
    """
    together = [[place for batch in batches for place in batch] for batches in rounds]
    loader: Any = DataLoader(
        SharedQuestionDataset(dataset), batch_sampler=together, collate_fn=list, num_workers=num_workers
    )
    for batches, units in zip(rounds, loader, strict=True):
        faults = [(place, unit["fault"]) for unit in units if "fault" in unit for place in unit["indices"]]
        if faults:
            yield {place: "" for place, _ in faults}, faults
        for texts in _decoded(engine, [unit for unit in units if "fault" not in unit], batches, max_new_tokens):
            yield texts, []


def _decoded(
    engine: VideoTemporalInference, units: Sequence[Unit], batches: Sequence[Sequence[int]], max_new_tokens: int
) -> Iterator[dict[int, str]]:
    """The texts of each batch. What is prefilled serves the following batches as long as they ask the same clips."""
    tails = [dict(zip(unit["indices"], unit["tails"], strict=True)) for unit in units]
    held: list[int] = []
    prefilled: Any = None
    for batch in batches:
        asked = {number: [place for place in found if place in batch] for number, found in enumerate(tails)}
        asked = {number: places for number, places in asked.items() if places}
        if not asked:
            continue
        with _plain_memory_errors():
            if list(asked) != held:
                prefilled = None  # before the next one is made
                prefilled = prefill(engine.model, [units[number]["prefix"] for number in asked])
                held = list(asked)
            questions = [[tails[number][place] for place in places] for number, places in asked.items()]
            texts = continue_texts(
                engine.model, engine.processor, prefilled, questions, max_new_tokens=max_new_tokens
            )
        yield {
            place: text
            for places, found in zip(asked.values(), texts, strict=True)
            for place, text in zip(places, found, strict=True)
        }


@contextmanager
def _plain_memory_errors() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory is full ({str(error).splitlines()[0]}): run again with a smaller --batch_size; "
            "what is answered is kept"
        ) from error
