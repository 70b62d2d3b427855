"""What an answer costs when the queries on a video are asked together, against one by one.

Four ways of answering the same queries on one file, taken in turn within every repeat:

    shared     VideoTemporalInference.predict_batch: the video and the prompt up to its end once, all questions decoded
               together on that cache
    batched    what a data loader and `generate_texts` do: a left-padded row for each query, with frames and a copy of
               the video's tokens of its own
    single     VideoTemporalInference.predict, query after query
    stock      transformers' own generate on the same frames, query after query, without a change of ours

Each is timed twice. "model" begins with tokens and pixels in memory and ends with the texts. The headline, the ratios
without a suffix, is of it: it does not depend on how hard a file is to decode. "whole" begins with the file, as a user
sees it: shared decodes it once, the others once for each query (`..._with_decode`). Every answer has the same number of
tokens. Weights are random, so where sums are rounded otherwise (bf16) a near tie may fall the other way: `equal_texts`
counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from datasets.collate_fns import Batch, VideoCollator
from datasets.encoding import Sample, fit_prompt
from datasets.shared_prompt import SharedPrompt, encode_shared
from inference.video_infer import VideoTemporalInference
from scripts.benchmarks.common import (
    Times,
    ceilings,
    ceilings_line,
    check_options,
    circumstances,
    compared,
    heading,
    memory_row,
    peak_mib,
    peaks_in_fresh_processes,
    seconds,
    table_head,
    take_turns,
    tell,
)
from scripts.benchmarks.models import build_model, demo_processor, make_clip
from scripts.benchmarks.sft import make_rows
from trainers.generation import generate_texts
from trainers.model import Policy
from trainers.shared_decoding import continue_texts, prefill
from trainers.vision_attention import batch_vision_frames
from utils.config import DataConfig, PromptConfig
from utils.prompts import PromptContract, build_messages
from utils.video import VideoClip, read_clip, write_mp4

WAYS = ("shared", "batched", "single", "stock")
OTHERS = WAYS[1:]
PASSES = ("model", "whole")
LEAST = {"prompt_tokens": 80, "queries": 2, "answer_tokens": 1, "repeats": 1}
FILE_FPS = 24
"""Of the video file; twelve times what the model is shown."""


def run(args: argparse.Namespace) -> None:
    """Measure one cell and say it."""
    options = {key: value for key, value in vars(args).items() if key not in ("command", "json")}
    record = run_cell(Cell(**options))
    tell(record, table(record), args.json)


# ---------------------------------------------------------------------------------------------- ways
@dataclass(frozen=True)
class Cell:
    """What is measured."""

    prompt_tokens: int
    queries: int
    answer_tokens: int = 16
    size: str = "tiny"
    device: str = "cpu"
    repeats: int = 3


class Work:
    """The file, questions and models of a cell, alike for every way; no model is built before it is asked for."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.processor = demo_processor()
        shown = make_clip(self.processor, cell.prompt_tokens)
        self.questions = [row.sentence for row in make_rows({"": shown}, cell.queries)]
        self.folder = TemporaryDirectory()
        self.video = Path(self.folder.name) / "clip.mp4"
        write_mp4(self.video, np.repeat(shown.frames, FILE_FPS // 2, axis=0), fps=FILE_FPS)
        pixels = shown.frames.shape[1] * shown.frames.shape[2]
        data = DataConfig(
            fps=2.0, min_frames=2, max_frames=len(shown.frames), min_pixels_per_frame=1024, max_pixels_per_frame=pixels,
            total_pixels=len(shown.frames) * pixels, max_prompt_tokens=2 * cell.prompt_tokens + 1000,
        )  # fmt: skip
        self.contract = PromptContract.current(PromptConfig(), data)
        self.length: dict[str, Any] = {"max_new_tokens": cell.answer_tokens, "min_new_tokens": cell.answer_tokens}

    @cached_property
    def engine(self) -> VideoTemporalInference:
        """What `shared`, `batched` and `single` use, prepared as `load_for_inference` does."""
        model = self._model()
        batch_vision_frames(model)
        return VideoTemporalInference.of(Policy(model, self.processor, self.contract))

    @cached_property
    def stock(self) -> Any:
        """The same weights without a change of ours."""
        return self._model()

    def _model(self) -> Any:
        return build_model(self.cell.size, self.cell.device, self.processor.tokenizer).requires_grad_(False)

    def clip(self) -> VideoClip:
        """The file, decoded."""
        data = self.contract.data
        return read_clip(self.video, data.budget, backend=data.backend)

    def sample(self, question: str, clip: VideoClip) -> Sample:
        """One question alone, encoded."""
        messages = build_messages(self.contract.prompt, question)
        sample, _ = fit_prompt(self.processor, messages, clip, **self._limits)
        return {**sample, "index": 0}

    def together(self, clip: VideoClip) -> SharedPrompt:
        """All questions on one clip, encoded."""
        messages = [build_messages(self.contract.prompt, question) for question in self.questions]
        return encode_shared(self.processor, messages, clip, **self._limits, remedy="")

    @property
    def _limits(self) -> dict[str, Any]:
        data = self.contract.data
        return {"max_tokens": data.max_prompt_tokens, "on_overlong": data.on_overlong, "name": "clip.mp4"}

    def rows(self, samples: list[Sample]) -> Batch:
        """Left-padded."""
        return VideoCollator(self.processor.tokenizer.pad_token_id, samples[0], side="left")(samples)

    def sizes(self) -> dict[str, Any]:
        """Tokens of the mean prompt, of its video, and of the prompts that each way computes."""
        clip = self.clip()
        lengths = [len(self.sample(question, clip)["input_ids"]) for question in self.questions]
        shared = self.together(clip)
        apart = sum(lengths)
        return {
            "prompt_tokens": round(apart / len(lengths)),
            "visual_tokens": int(shared.prefix["mm_token_type_ids"].count_nonzero()),
            "tokens": {
                "shared": len(shared.prefix["input_ids"]) + len(lengths) * max(map(len, shared.tails)),
                "batched": len(lengths) * max(lengths),
                "single": apart,
                "stock": apart,
            },
        }


class Way:
    """One of `WAYS`. `whole` answers the questions from the file, `model` from the inputs made beforehand."""

    def __init__(self, name: str, work: Work) -> None:
        self.name, self.work = name, work

    @cached_property
    def inputs(self) -> Any:
        """What `model` is given: a `SharedPrompt`, or a batch for each call of `generate`."""
        clip = self.work.clip()
        if self.name == "shared":
            return self.work.together(clip)
        return self._batches([self.work.sample(question, clip) for question in self.work.questions])

    def _batches(self, samples: list[Sample]) -> list[Batch]:
        if self.name == "batched":
            return [self.work.rows(samples)]
        return [self.work.rows([sample]) for sample in samples]

    def model(self) -> list[str]:
        """The texts, from tokens and pixels."""
        if self.name == "shared":
            return self._shared(self.inputs)
        return [text for batch in self.inputs for text in self._generate(batch)]

    def whole(self) -> list[str]:
        """The texts, from the file."""
        work = self.work
        if self.name == "shared":
            items = [(work.video, question) for question in work.questions]
            found = work.engine.predict_batch(items, batch_size=len(items), **work.length)
            return [prediction["raw_text"] for prediction in found]
        if self.name == "single":
            engine = work.engine
            return [engine.predict(work.video, question, **work.length)["raw_text"] for question in work.questions]
        batches = self._batches([work.sample(question, work.clip()) for question in work.questions])
        return [text for batch in batches for text in self._generate(batch)]

    def _shared(self, shared: SharedPrompt) -> list[str]:
        engine = self.work.engine
        prefilled = prefill(engine.model, [shared.prefix])
        return continue_texts(engine.model, engine.processor, prefilled, [shared.tails], **self.work.length)[0]

    def _generate(self, batch: Batch) -> list[str]:
        model = self.work.stock if self.name == "stock" else self.work.engine.model
        return generate_texts(model, self.work.processor, batch, **self.work.length)


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
    times = take_turns(ways, PASSES, cell.repeats, timed)
    if cell.device == "cuda":
        memory = {name: peaks(way) for name, way in ways.items()}
    record = asdict(cell) | work.sizes()
    found = circumstances(work.engine.model, cell.device)
    return record | summary(cell.queries, times, memory) | agreement | {"ceilings": limits} | found


def compare(ways: Mapping[str, Way]) -> dict[str, Any]:
    """How many texts of each way are stock's. Also warms the ways up."""
    texts = {name: [way.model(), way.whole()] for name, way in ways.items()}
    wanted = texts["stock"][0]
    assert all(len(text) == len(wanted) for found in texts.values() for text in found)
    same = {name: min(_num_equal(found, wanted) for found in both) for name, both in texts.items()}
    return {"equal_texts": same}


def _num_equal(found: list[str], wanted: list[str]) -> int:
    return sum(one == other for one, other in zip(found, wanted, strict=True))


def timed(way: Way, name_of_pass: str) -> Times:
    """Seconds of one pass."""
    return {name_of_pass: seconds(way.work.cell.device, getattr(way, name_of_pass))}


def peaks(way: Way) -> Times:
    """Peak MiB of the model's work."""
    return {"model": peak_mib(way.work.cell.device, way.model)}


def peaks_alone(cell: Cell, name: str) -> Times:
    """`peaks` in a process that has done nothing else but one pass: what a first pass makes and keeps is no peak."""
    way = Way(name, Work(cell))
    way.model()
    return peaks(way)


def summary(queries: int, times: Mapping[str, Times], memory: Mapping[str, Times] | None) -> dict[str, Any]:
    """Rates, ratios of rates with and without the file's decoding, and peaks against the batched way."""
    taken = {name: {phase: found[phase] for phase in PASSES} for name, found in times.items()}
    rates = {name: {phase: queries / value for phase, value in found.items()} for name, found in taken.items()}
    found: dict[str, Any] = {}
    for phase, suffix in zip(PASSES, ("", "_with_decode"), strict=True):
        for name, base in (("shared", "single"), ("batched", "single"), ("shared", "stock"), ("single", "stock")):
            found[f"{name}_vs_{base}{suffix}"] = rates[name][phase] / rates[base][phase]
    return found | {
        "peak_memory_ratio": memory and memory["batched"]["model"] / max(memory["shared"]["model"], 0.1),
        "queries_per_second": rates,
        "seconds": taken,
        "peak_mib": memory,
    }


# ---------------------------------------------------------------------------------------------- table
def table(record: Mapping[str, Any]) -> str:
    """The record for a reader."""
    lines = [heading(record), _about(record), "", *table_head(WAYS, OTHERS)]
    for phase in PASSES:
        times = {name: taken[phase] for name, taken in record["seconds"].items()}
        lines.append(compared(phase, times, OTHERS, ".3f", "s"))
    for phase in PASSES:
        rates = {name: found[phase] for name, found in record["queries_per_second"].items()}
        lines.append(compared(f"queries/s {'' if phase == 'model' else '*'}".rstrip(), rates, (), ".2f"))
    lines.append(compared("tokens", record["tokens"], OTHERS, ",d"))
    if record["peak_mib"]:
        lines += ["", "peak memory of the model's work, above what was in use before:"]
        lines += [memory_row(record, "model", OTHERS)]
    return "\n".join([*lines, "", *_notes(record)])


def _about(record: Mapping[str, Any]) -> str:
    return (
        f"{record['queries']} queries on one video: prompts of {record['prompt_tokens']} tokens "
        f"({record['visual_tokens']} visual), answers of {record['answer_tokens']}; median of {record['repeats']}"
    )


def _notes(record: Mapping[str, Any]) -> list[str]:
    equal = ", ".join(f"{name} {count}" for name, count in record["equal_texts"].items() if name != "stock")
    return [
        "model: from tokens and pixels to texts. whole (*): from the file, decoded once for shared, else once a query",
        f"of {record['queries']} texts equal stock generate's: {equal}",
        *ceilings_line(record),
    ]
