"""What a training step costs when the queries on a video share it, against one row for each.

Three ways of learning the same rows, taken in turn within every repeat:

    shared     every video once, followed by its queries: the batch of `SharedVideoDataset`, `packed_inputs` and
               `answer_loss`, as training.share_video=true trains
    unshared   a padded row for each query: the batch of `VideoCollator` and `answer_loss`, as share_video=false trains;
               like "shared" it computes the head only where an answer is, and all frames in one vision attention
    trainer    what a plain transformers Trainer does with that batch: the model's own loss on the logits of every
               position, and stock attention

So unshared against shared is what sharing saves, and trainer against shared what the project saves in all. A step is
forward and backward. Left out, since all three need them: the optimizer, and reading and moving the batch.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from datasets.collate_fns import Batch, VideoCollator
from datasets.encoding import IGNORE
from datasets.pixels import with_pixel_values
from datasets.shared_video import SharedVideoDataset, UnitCollator
from datasets.video_dataset import VideoTemporalDataset
from scripts.benchmarks.common import (
    Times,
    baseline,
    ceilings,
    ceilings_line,
    check_options,
    circumstances,
    compared,
    gradient,
    heading,
    memory_row,
    peak_mib,
    peaks_in_fresh_processes,
    relative_error,
    seconds,
    table_head,
    take_turns,
    tell,
)
from scripts.benchmarks.models import build_model, demo_processor, make_clip, make_trainable
from scripts.make_demo_data import all_sentences
from trainers.sft_trainer import answer_loss, packed_inputs
from trainers.shared_prefix import enable_shared_prefix
from trainers.vision_attention import batch_vision_frames
from utils.config import AnnotationSource, DataConfig
from utils.rows import Row, write_rows
from utils.spans import Span
from utils.video import VideoClip

WAYS = ("shared", "unshared", "trainer")
OTHERS = WAYS[1:]
LEAST = {"prompt_tokens": 80, "queries": 2, "videos": 1, "answer_tokens": 2, "repeats": 1}


def run(args: argparse.Namespace) -> None:
    """Measure one cell and say it."""
    options = {key: value for key, value in vars(args).items() if key not in ("command", "json")}
    options["vision"] = args.vision or ("trained" if args.size == "tiny" else "frozen")
    record = run_cell(Cell(**options))
    tell(record, table(record), args.json)


# ---------------------------------------------------------------------------------------------- rows
@dataclass(frozen=True)
class Cell:
    """What is measured."""

    prompt_tokens: int
    queries: int
    videos: int = 1
    answer_tokens: int | None = None
    """Of every answer, its end included; None takes the project's own answers."""
    vision: str = "trained"
    """ "trained" or "frozen": vision tower and mergers."""
    size: str = "tiny"
    device: str = "cpu"
    repeats: int = 3


class NoiseVideos(VideoTemporalDataset):
    """The rows of a cell about clips of noise that no file holds."""

    def __init__(self, cell: Cell, processor: Any) -> None:
        self.answer_tokens = cell.answer_tokens
        self.clips = {f"{i}.mp4": make_clip(processor, cell.prompt_tokens, seed=i) for i in range(cell.videos)}
        with TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            write_rows(path, make_rows(self.clips, cell.queries))
            data = DataConfig(train=(AnnotationSource(path=path),), max_prompt_tokens=2 * cell.prompt_tokens + 1000)
            super().__init__(data, processor)

    def clip(self, row: Row) -> VideoClip:
        """The row's noise."""
        return self.clips[row.video]

    def answer(self, row: Row) -> str:
        """As the project answers, or words of the wanted number."""
        if self.answer_tokens is None:
            return super().answer(row)
        return words(self.processor.tokenizer, self.answer_tokens - 1, seed=row.line)


def make_rows(clips: Mapping[str, VideoClip], queries: int) -> list[Row]:
    """So many queries about each clip: one to four events in a question, so that questions differ in length."""
    rng = random.Random(0)
    rows = []
    for video, clip in clips.items():
        for number in range(queries):
            question = " and ".join(rng.sample(all_sentences(), 1 + number % 4))
            start = round(rng.uniform(0, 0.5 * clip.duration_s), 1)
            window = Span(start, start + round(0.4 * clip.duration_s, 1))
            rows.append(Row(video, clip.duration_s, (window,), question, None, None, {}, "", 0))
    return rows


def words(tokenizer: Any, num_tokens: int, seed: int) -> str:
    """A text of `num_tokens` tokens: words of one token each."""
    known = sorted(text[1:] for text in tokenizer.get_vocab() if text[0] == "Ġ" and text[1:].isalpha())
    whole = [f" {word}" for word in known if len(tokenizer(f" {word}")["input_ids"]) == 1]
    return "".join(random.Random(seed).choices(whole, k=num_tokens))


# ---------------------------------------------------------------------------------------------- ways
class Work:
    """The models and batches of a cell, alike for every way; nothing is built before it is asked for."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.processor = demo_processor()
        self.queries = NoiseVideos(cell, self.processor)

    @cached_property
    def own(self) -> Any:
        """The model that `shared` and `unshared` use, prepared as `load_policy` and `VideoSFTTrainer` do."""
        model = build_model(self.cell.size, self.cell.device, self.processor.tokenizer)
        batch_vision_frames(model)
        model = make_trainable(model, self.cell.size, vision=self.cell.vision == "trained")
        enable_shared_prefix(model)
        return model

    @cached_property
    def stock(self) -> Any:
        """The same weights without a change of ours."""
        model = build_model(self.cell.size, self.cell.device, self.processor.tokenizer)
        return make_trainable(model, self.cell.size, vision=self.cell.vision == "trained")

    @cached_property
    def units(self) -> Batch:
        """All rows, by video, as the data loader gives them with training.share_video=true."""
        shared = SharedVideoDataset(self.queries, self.cell.queries)
        collate = UnitCollator(shared.blank())
        return send_to_device(collate(shared.__getitems__(range(len(shared)))), self.cell.device)

    @cached_property
    def rows(self) -> Batch:
        """All rows, padded, as the data loader gives them otherwise; what the model takes of it."""
        collate = VideoCollator(self.processor.tokenizer.pad_token_id, self.queries.blank())
        batch = collate([self.queries[index] for index in range(len(self.queries))])
        del batch["indices"], batch["faults"], batch["reads"]
        return with_pixel_values(send_to_device(batch, self.cell.device), self.cell.device)

    def sizes(self) -> dict[str, Any]:
        """Tokens of the mean prompt, of its video and of the mean answer, and those that each way computes."""
        labels, num = self.rows["labels"], len(self.queries)
        answers = int((labels != IGNORE).sum())
        computed = self.rows["input_ids"].numel()
        return {
            "prompt_tokens": round((int(self.rows["attention_mask"].sum()) - answers) / num),
            "visual_tokens": int(self.rows["mm_token_type_ids"].count_nonzero()) // num,
            "answer_tokens": answers / num,
            "rows": num,
            "tokens": {
                "shared": packed_inputs(self.own, self.units)["input_ids"].numel(),
                "unshared": computed,
                "trainer": computed,
            },
        }


class Way:
    """One of `WAYS`: a model, a batch, and the loss."""

    def __init__(self, name: str, work: Work) -> None:
        self.name, self.work = name, work
        self.model = work.stock if name == "trainer" else work.own
        self.batch = work.units if name == "shared" else work.rows
        self.num_learnt = int((self.batch["labels"] != IGNORE).sum())
        """Answer tokens of the step, which Trainer counts beforehand."""

    def loss(self) -> Tensor:
        """The forward pass."""
        if self.name == "trainer":
            inputs = {key: value for key, value in self.batch.items() if key != "logits_to_keep"}
            return self.model(**inputs, use_cache=False, num_items_in_batch=self.num_learnt).loss
        inputs = packed_inputs(self.model, self.batch) if self.name == "shared" else dict(self.batch)
        labels = inputs.pop("labels")
        return answer_loss(self.model(**inputs, use_cache=False), labels, self.num_learnt)


def forward(way: Way) -> Tensor:
    """The first half of a step; gradients of the last one are forgotten."""
    way.model.train()
    way.model.zero_grad(set_to_none=True)
    return way.loss()


def step(way: Way) -> float:
    """Forward and backward; the loss."""
    loss = forward(way)
    loss.backward()
    return float(loss.detach())


# ---------------------------------------------------------------------------------------------- one cell
def run_cell(cell: Cell) -> dict[str, Any]:
    """Measure one cell; the record that becomes the JSON line.

    Raises UserError for numbers out of their rule and for a device that is not there.
    """
    check_options(cell, LEAST)
    limits = ceilings() if cell.device == "cuda" else None
    memory = peaks_in_fresh_processes(WAYS, partial(peaks_alone, cell)) if cell.device == "cpu" else None
    work = Work(cell)
    ways = {name: Way(name, work) for name in WAYS}
    agreement = compare(ways)
    times = take_turns(ways, ("step",), cell.repeats, timed)
    if cell.device == "cuda":
        memory = {name: peaks(way) for name, way in ways.items()}
    record = asdict(cell) | work.sizes()
    found = circumstances(work.own, cell.device)
    return record | summary(record["rows"], times, memory) | agreement | {"ceilings": limits} | found


def compare(ways: Mapping[str, Way]) -> dict[str, Any]:
    """Whether the ways agree: loss, and gradient of what trains. Also warms them up."""
    losses, slopes = {}, {}
    for name, way in ways.items():
        losses[name] = step(way)
        slopes[name] = gradient(way.model)
    found: dict[str, Any] = {"loss": losses}
    for name, suffix in (("unshared", ""), ("trainer", "_trainer")):
        found[f"loss_diff{suffix}"] = abs(losses["shared"] - losses[name])
        found[f"grad_rel_err{suffix}"] = relative_error(slopes["shared"], slopes[name])
    return found


def timed(way: Way, _: str) -> Times:
    """Seconds of one step, by phase."""
    device, losses = way.work.cell.device, []
    taken = {"forward": seconds(device, lambda: losses.append(forward(way)))}
    return taken | {"backward": seconds(device, losses[0].backward)}


def peaks(way: Way) -> Times:
    """Peak MiB of a step."""
    way.model.zero_grad(set_to_none=True)
    return {"step": peak_mib(way.work.cell.device, partial(step, way))}


def peaks_alone(cell: Cell, name: str) -> Times:
    """`peaks` in a process that has done nothing else."""
    way = Way(name, Work(cell))
    with torch.no_grad():
        way.loss()  # what a first pass makes and keeps is no peak
    return peaks(way)


def summary(rows: int, times: Mapping[str, Times], memory: Mapping[str, Times] | None) -> dict[str, Any]:
    """Rates of a step with so many rows, ratios of rates, and peaks against the fair baseline."""
    rates = {name: rows / taken["step"] for name, taken in times.items()}
    against = baseline(times, "trainer", ("step",))
    return {
        "shared_vs_unshared": rates["shared"] / rates["unshared"],
        "shared_vs_trainer": rates["shared"] / rates["trainer"],
        "against": against,
        "peak_memory_ratio": memory and memory[against]["step"] / memory["shared"]["step"],
        "samples_per_second": rates,
        "seconds": times,
        "peak_mib": memory,
    }


# ---------------------------------------------------------------------------------------------- table
def table(record: Mapping[str, Any]) -> str:
    """The record for a reader."""
    lines = [heading(record), _about(record), "", *table_head(WAYS, OTHERS)]
    for phase in ("forward", "backward", "step"):
        times = {name: taken[phase] for name, taken in record["seconds"].items()}
        lines.append(compared(phase, times, OTHERS, ".3f", "s"))
    lines.append(compared("samples/s", record["samples_per_second"], (), ".2f"))
    lines.append(compared("tokens", record["tokens"], OTHERS, ",d"))
    if record["peak_mib"]:
        lines += ["", "peak memory above what was in use before the step:", memory_row(record, "step", OTHERS)]
    return "\n".join([*lines, "", *_notes(record)])


def _about(record: Mapping[str, Any]) -> str:
    return (
        f"{record['videos']} video(s), {record['queries']} rows on each: prompts of {record['prompt_tokens']} tokens "
        f"({record['visual_tokens']} visual), answers of {record['answer_tokens']:.1f} tokens; vision "
        f"{record['vision']}; median of {record['repeats']}"
    )


def _notes(record: Mapping[str, Any]) -> list[str]:
    lines = ["a step is forward and backward, without the optimizer"]
    if record["against"] == "trainer":
        lines += ["a fair baseline is the trainer: the unshared path is more than 10 % slower than it"]
    for name, suffix in (("unshared", ""), ("trainer", "_trainer")):
        lines += [
            f"shared against {name}: the loss ({record['loss']['shared']:.4f}) differs by "
            f"{record['loss_diff' + suffix]:.1e}, the gradient by {record['grad_rel_err' + suffix]:.1e} of its norm"
        ]
    return lines + ceilings_line(record)
