"""What a GRPO step costs when a prompt with its video is computed once, against once for every completion.

    python scripts/bench.py grpo --prompt_tokens 1200 --generations 8 --completion_tokens 32
    python scripts/bench.py grpo --size 4b --device cuda --prompt_tokens 8192 --generations 8 --completion_tokens 64
    python scripts/bench.py grpo_curve

Random weights, a synthetic clip, one process. Three ways of doing the same work, taken in turn within every repeat:

    shared     pack and sample_shared of trainers/shared_prefix.py
    unshared   rows and sample_rows of the same file, which training.share_prefix=false takes
    stock      TRL's own scoring method and stock `generate`; TRL takes no video, so it gets the same frames as images,
               one for each pair of frames: the same number of tokens, and the same numbers out

A whole step is rollout (prefill and decode), one pass without gradient (the reference) and one update (forward and
backward). Left out, since all three share it: decoding the video, rewards and the optimizer. The last line of the
output is one line of JSON.

Without TRL the stock way is skipped, and log-probabilities come from the logits of the completions' positions. What
stays needed beside torch, transformers, peft and matplotlib is `datasets` and `pydantic`.
"""

from __future__ import annotations

import argparse
import copy
import csv
import ctypes
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # Python had put scripts/ there; see utils/attach.py

from utils.attach import attach
from utils.common import UserError, atomic_open, run_command, settle_accelerator, write_json

attach()
settle_accelerator()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from transformers import GenerationConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration  # noqa: E402

from datasets.encoding import Sample, encode_prompt  # noqa: E402
from scripts.make_demo_data import all_sentences  # noqa: E402
from scripts.make_tiny_model import build_config, build_processor, build_tokenizer, prompt_texts  # noqa: E402
from trainers.generation import reset_rope, vision_token_ids  # noqa: E402
from trainers.model import add_lora  # noqa: E402
from trainers.parts import LearningRates  # noqa: E402
from trainers.shared_prefix import (  # noqa: E402
    IGNORED,
    Packed,
    Prompt,
    enable_shared_prefix,
    make_prompt,
    pack,
    rows,
    sample_rows,
    sample_shared,
    vision_is_frozen,
    with_vision,
)
from utils.config import LoraConfig, PromptConfig  # noqa: E402
from utils.curves import BLUE, INK, MUTED, VERMILION, figure_format, figure_style, save_figure  # noqa: E402
from utils.prompts import build_messages  # noqa: E402
from utils.video import VideoClip  # noqa: E402

HAS_TRL = importlib.util.find_spec("trl") is not None
WAYS = ("shared", "unshared", "stock")
PHASES = ("prefill", "decode", "score", "update")
PASSES = ("rollout", "score", "update")
PACKAGES = ("torch", "transformers", "trl", "peft")
SLOWER = 1.1
"""An unshared way slower than stock by more than this is no fair baseline; ratios are then given against stock."""


# ---------------------------------------------------------------------------------------------- models
@dataclass(frozen=True)
class Size:
    """Widths and depths of a released Qwen3-VL."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    tie: bool
    vision: tuple[int, int, int]
    """Depth, hidden size and intermediate size of the vision tower (16 heads)."""
    deepstack: tuple[int, int, int]


SIZES = {
    "2b": Size(2048, 6144, 28, 16, True, (24, 1024, 4096), (5, 11, 17)),
    "4b": Size(2560, 9728, 36, 32, True, (24, 1024, 4096), (5, 11, 17)),
    "8b": Size(4096, 12288, 36, 32, False, (27, 1152, 4304), (8, 16, 24)),
}
TINY: dict[str, Any] = {"hidden": 128, "layers": 4, "vision_hidden": 64, "vision_layers": 2, "tie": True}


def model_config(size: str, tokenizer: Any) -> Qwen3VLConfig:
    """The configuration of `size`; special tokens are numbered as in `tokenizer`."""
    config = build_config(tokenizer, **TINY)
    if size == "tiny":
        return config
    chosen = SIZES[size]
    depth, width, inner = chosen.vision
    text = config.text_config.to_dict() | {
        "vocab_size": 151936,
        "hidden_size": chosen.hidden,
        "intermediate_size": chosen.intermediate,
        "num_hidden_layers": chosen.layers,
        "num_attention_heads": chosen.heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "initializer_range": 0.02,
        "tie_word_embeddings": chosen.tie,
        "rope_parameters": config.text_config.rope_parameters | {"mrope_section": [24, 20, 20]},
    }
    vision = config.vision_config.to_dict() | {
        "depth": depth,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_heads": 16,
        "out_hidden_size": chosen.hidden,
        "num_position_embeddings": 2304,
        "initializer_range": 0.02,
        "deepstack_visual_indexes": list(chosen.deepstack),
    }
    markers = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: getattr(config, name) for name in markers}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=chosen.tie, **ids)


def build_model(size: str, device: str, tokenizer: Any) -> Any:
    """Random weights made on the device itself: fp32 for the tiny model on a CPU, else bf16."""
    dtype = torch.float32 if (size, device) == ("tiny", "cpu") else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3VLForConditionalGeneration._from_config(model_config(size, tokenizer), dtype=dtype)
    return model.eval()


def make_trainable(model: Any, size: str) -> Any:
    """Everything trains in the tiny model; a real size gets LoRA on its attention and gradient checkpointing."""
    if size == "tiny":
        return model
    lora = LoraConfig(r=64, lora_alpha=128, target_modules=("q_proj", "k_proj", "v_proj", "o_proj"), modules_to_save=())
    wrapped = add_lora(model, lora, LearningRates(1e-5, 0.0, 0.0, 0.0), fp32_copies=False)
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # zeros: no gradient would reach the other matrix
            parameter.data.normal_(std=0.01)
    wrapped.gradient_checkpointing_enable({"use_reentrant": False})
    return wrapped


# ---------------------------------------------------------------------------------------------- prompt
def make_sample(processor: Any, prompt_tokens: int) -> Sample:
    """A prompt of about `prompt_tokens` tokens, markers and question included, about a clip of noise.

    A pair of frames takes 60 visual tokens (192 x 320 pixels), 24 when the prompt is short, and a marker.
    """
    height, width = (192, 320) if prompt_tokens >= 250 else (128, 192)
    per_pair = height * width // 1024 + 10
    pairs = max(1, round((prompt_tokens - 40) / per_pair))
    sample = _encode(processor, pairs, height, width)
    more = round((prompt_tokens - len(sample["input_ids"])) / per_pair)  # how long markers are depends on the times
    return _encode(processor, max(1, pairs + more), height, width) if more else sample


def _encode(processor: Any, pairs: int, height: int, width: int) -> Sample:
    frames = np.random.default_rng(0).integers(0, 256, (2 * pairs, height, width, 3), dtype=np.uint8)
    clip = VideoClip(frames, np.arange(2 * pairs) / 2.0, 0.0, float(pairs))
    return encode_prompt(processor, build_messages(PromptConfig(), "the red square appears"), clip)


def as_images(model: Any, prompts: Sequence[Prompt], num: int) -> dict[str, Any]:
    """The prompts as stock TRL takes them: `num` rows each, every pair of frames an image of the same patches."""
    config = model.config
    repeated = [prompt for prompt in prompts for _ in range(num)]
    ids = torch.stack([prompt.input_ids for prompt in repeated])
    grids = [prompt.video_grid_thw[0] for prompt in repeated]
    images = [grid.new_tensor([[1, *grid[1:].tolist()]]).expand(int(grid[0]), 3) for grid in grids]
    return {
        "input_ids": ids.masked_fill(ids == config.video_token_id, config.image_token_id),
        "mm_token_type_ids": torch.stack([prompt.mm_token_type_ids for prompt in repeated]).clamp(max=1),
        "pixel_values": torch.cat([prompt.pixel_values_videos for prompt in repeated]),
        "image_grid_thw": torch.cat(images),
        "num_images": [len(image) for image in images],
    }


# ---------------------------------------------------------------------------------------------- ways
@dataclass(frozen=True)
class Cell:
    """What is measured."""

    prompt_tokens: int
    generations: int
    completion_tokens: int
    prompts: int = 1
    size: str = "tiny"
    device: str = "cpu"
    repeats: int = 3


class Work:
    """The model, prompts and completions of a cell, alike for every way; nothing is built before it is asked for."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.processor = build_processor(build_tokenizer(prompt_texts(all_sentences(), PromptConfig())))
        self.tokenizer = self.processor.tokenizer
        self.sample = make_sample(self.processor, cell.prompt_tokens)

    @property
    def length(self) -> int:
        """Tokens of the prompt, as reached."""
        return len(self.sample["input_ids"])

    @property
    def num_visual(self) -> int:
        """Visual tokens of the prompt."""
        return int(self.sample["mm_token_type_ids"].count_nonzero())

    @cached_property
    def own(self) -> Any:
        """The model that `shared` and `unshared` use."""
        model = build_model(self.cell.size, self.cell.device, self.tokenizer)
        if HAS_TRL:
            _add_head(model)
        model = make_trainable(model, self.cell.size)
        enable_shared_prefix(model)
        return model

    @cached_property
    def stock(self) -> Any:
        """The same weights without a change of ours."""
        model = build_model(self.cell.size, self.cell.device, self.tokenizer)
        _add_head(model)
        return make_trainable(model, self.cell.size)

    @cached_property
    def prompts(self) -> list[Prompt]:
        """Of the cell; equal prompts, each with pixels of its own."""
        return [make_prompt(self.own, copy.deepcopy(self.sample)) for _ in range(self.cell.prompts)]

    @cached_property
    def completions(self) -> list[list[Tensor]]:
        """(C,) random text tokens, for each prompt and generation."""
        added = set(self.tokenizer.get_added_vocab().values())
        text = torch.tensor([index for index in range(len(self.tokenizer)) if index not in added])
        generator = torch.Generator().manual_seed(1)
        shape = (self.cell.prompts, self.cell.generations, self.cell.completion_tokens)
        ids = text[torch.randint(len(text), shape, generator=generator)].to(self.cell.device)
        return [list(group) for group in ids]

    @cached_property
    def advantages(self) -> Tensor:
        """(rows, 1), of mean 0 and deviation 1."""
        drawn = torch.randn(self.cell.prompts * self.cell.generations, 1, generator=torch.Generator().manual_seed(2))
        return ((drawn - drawn.mean()) / drawn.std()).to(self.cell.device)

    @property
    def pad(self) -> int:
        """Id of the padding token."""
        return int(self.tokenizer.pad_token_id)

    def generation(self, num_tokens: int, *, greedy: bool = False) -> GenerationConfig:
        """Exactly `num_tokens` tokens, chosen as the trainer chooses them."""
        choice = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0}
        return GenerationConfig(
            **choice,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            pad_token_id=self.pad,
            eos_token_id=self.tokenizer.eos_token_id,
            suppress_tokens=sorted(vision_token_ids(self.processor)),
            disable_compile=True,
        )

    def row_tokens(self) -> int:
        """Tokens of all rows when nothing is shared."""
        return self.cell.prompts * self.cell.generations * (self.length + self.cell.completion_tokens)


def _add_head(model: Any) -> None:
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy"))  # as GRPOTrainer adds it


class OwnWay:
    """The project's two paths: `share` or not. Used as `VideoGRPOTrainer` uses them."""

    def __init__(self, work: Work, *, share: bool) -> None:
        self.work, self.model, self.shares = work, work.own, share
        self.keeps_vision = share and vision_is_frozen(work.own)
        self.prompts = work.prompts

    def rollout(self, config: GenerationConfig) -> Tensor:
        """(rows, C) new tokens."""
        if self.keeps_vision:
            self.prompts = with_vision(self.model, self.work.prompts)
        sample = sample_shared if self.shares else sample_rows
        return sample(self.model, self.prompts, self.work.cell.generations, config, self.work.pad)

    def log_probs(self) -> Tensor:
        """(rows, C) of the completions."""
        completions = self.work.completions
        packed = pack(self.prompts, completions) if self.shares else rows(
            self.prompts, completions, pad_token_id=self.work.pad
        )  # fmt: skip
        return packed.unpack(_scored(self.model, packed))


def _scored(model: Any, packed: Packed) -> Tensor:
    """(B, K) log-probabilities: the trainer's own `score`, or without TRL from the logits of the wanted positions."""
    if HAS_TRL:
        from trainers.rl_trainer import score

        return score(model, packed).log_probs
    logits = model(**packed.inputs, gather_columns=packed.columns).logits
    pairs = zip(logits.flatten(0, 1).split(64), packed.targets.flatten().split(64), strict=True)
    parts = [checkpoint(_picked, chunk, targets, use_reentrant=False) for chunk, targets in pairs]
    return torch.cat(parts).view(packed.targets.shape)


def _picked(logits: Tensor, targets: Tensor) -> Tensor:
    """(N,) log-probabilities of `targets`, 0 where one is IGNORED; `logits` is (N, vocabulary)."""
    values = torch.log_softmax(logits.float(), -1).gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    return values.masked_fill(targets == IGNORED, 0.0)


class StockWay:
    """TRL's scoring method on a stand-in for its trainer, and stock `generate`, both on images."""

    shares = False

    def __init__(self, work: Work) -> None:
        from accelerate import Accelerator
        from trl import GRPOTrainer

        self.work, self.model = work, work.stock
        self.trainer = SimpleNamespace(accelerator=Accelerator(cpu=work.cell.device == "cpu"))
        self.score = GRPOTrainer._get_per_token_logps_and_entropies

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Of all rows; TRL makes them once for a generation batch."""
        return as_images(self.model, self.work.prompts, self.work.cell.generations)

    def rollout(self, config: GenerationConfig) -> Tensor:
        """(rows, C) new tokens."""
        inputs = {key: value for key, value in self.inputs.items() if key != "num_images"}
        mask = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            ids = self.model.generate(**inputs, attention_mask=mask, generation_config=config)
        reset_rope(self.model)
        return ids[:, mask.shape[1] :]

    def log_probs(self) -> Tensor:
        """(rows, C) of the completions."""
        answers = torch.stack([answer for group in self.work.completions for answer in group])
        inputs = dict(self.inputs)
        ids = torch.cat([inputs.pop("input_ids"), answers], dim=1)
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(answers)], dim=1)
        reset_rope(self.model)
        return self.score(self.trainer, self.model, ids, torch.ones_like(ids), answers.shape[1], **inputs)[0]


def make_way(name: str, work: Work) -> Any:
    """One of `WAYS`."""
    return StockWay(work) if name == "stock" else OwnWay(work, share=name == "shared")


# ---------------------------------------------------------------------------------------------- phases
def run_phase(way: Any, phase: str) -> Any:
    """Do the work of one of `PASSES` once."""
    work: Work = way.work
    if phase == "rollout":
        return way.rollout(work.generation(work.cell.completion_tokens))
    if phase == "update":
        return update(way)
    with torch.no_grad():
        return way.log_probs()


def update(way: Any) -> Tensor:
    """Forward and backward of GRPO's loss on fresh completions (ratio 1, nothing clipped); returns the log-probs."""
    way.model.train()
    way.model.zero_grad(set_to_none=True)
    log_probs = way.log_probs()
    ratio = (log_probs - log_probs.detach()).exp()
    (-(ratio * way.work.advantages).mean()).backward()
    way.model.eval()
    return log_probs.detach()


def seconds(device: str, call: Callable[[], Any]) -> float:
    """Wall clock of one call, the device's queue drained before and after."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure_times(ways: Mapping[str, Any], cell: Cell) -> dict[str, dict[str, float]]:
    """Median seconds of every way and phase; the ways take turns within each repeat. Warm them up first."""
    taken: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in PHASES} for name in ways}
    for name_of_pass in PASSES * cell.repeats:
        for name, way in ways.items():
            for phase, elapsed in _timed(way, name_of_pass).items():
                taken[name][phase].append(elapsed)
    medians = {name: {key: statistics.median(values) for key, values in found.items()} for name, found in taken.items()}
    return {name: found | {"step": sum(found.values())} for name, found in medians.items()}


def _timed(way: Any, name: str) -> dict[str, float]:
    """Seconds of one pass by phase: a rollout is split at its first token."""
    call = partial(run_phase, way, name)
    if name != "rollout":
        return {name: seconds(way.work.cell.device, call)}
    with _first_token(way) as moments:
        start = time.perf_counter()
        whole = seconds(way.work.cell.device, call)
    prefill = moments[0] - start
    return {"prefill": prefill, "decode": whole - prefill}


@contextmanager
def _first_token(way: Any) -> Iterator[list[float]]:
    """Gives the moment when a rollout knows the logits of its first tokens, as the list's one element.

    Sharing takes a second pass for it, over the prompt's last token on all rows.
    """
    passes, moments = 0, []

    def mark(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == (2 if way.shares else 1):
            _wait(way.work.cell.device)
            moments.append(time.perf_counter())

    handle = way.model.get_output_embeddings().register_forward_hook(mark)
    yield moments
    handle.remove()


def compare(ways: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the ways agree: log-probabilities, gradients of what trains, greedy tokens. Also warms them up."""
    values, slopes, greedy = {}, {}, {}
    for name, way in ways.items():
        values[name] = update(way)
        slopes[name] = _gradient(way.model)
        greedy[name] = way.rollout(way.work.generation(way.work.cell.completion_tokens, greedy=True))
    found: dict[str, Any] = {}
    for name, suffix in (("unshared", ""), ("stock", "_stock")):
        if name in ways:
            found[f"max_logprob_diff{suffix}"] = float((values["shared"] - values[name]).abs().max())
            found[f"grad_rel_err{suffix}"] = _relative_error(slopes["shared"], slopes[name])
            found[f"greedy_equal{suffix}"] = bool(torch.equal(greedy["shared"], greedy[name]))
    return found


def _gradient(model: Any) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def _relative_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm of `wanted`, over all parameters together."""
    pairs = list(zip(found, wanted, strict=True))
    difference = sum(float((one.double() - other.double()).square().sum()) for one, other in pairs)
    return (difference / sum(float(other.double().square().sum()) for other in wanted)) ** 0.5


# ---------------------------------------------------------------------------------------------- memory
def peak_memory(cell: Cell, ways: Mapping[str, Any]) -> dict[str, dict[str, float]] | None:
    """Peak MiB of every way and phase, above what was in use before the phase (weights, pixels); None if unknown.

    CUDA: torch's own count. Linux: resident memory, sampled every 2 ms in a process for each way that runs nothing
    else and hands freed memory back at once; freed memory that the allocator keeps would hide a peak.
    """
    if cell.device == "cuda":
        return {name: {phase: _cuda_peak(way, phase) for phase in PASSES} for name, way in ways.items()}
    if sys.platform != "linux":
        return None
    found = {}
    for name in ways:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
            found[name] = pool.submit(_resident_peaks, cell, name).result()
    return found


def _forget(way: Any) -> None:
    """Drop what earlier phases left: gradients, and the rows that stock TRL keeps for all of them."""
    way.model.zero_grad(set_to_none=True)
    vars(way).pop("inputs", None)


def _cuda_peak(way: Any, phase: str) -> float:
    _forget(way)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run_phase(way, phase)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _resident_peaks(cell: Cell, name: str) -> dict[str, float]:
    """In a process of its own, forked before torch has computed anything."""
    library = ctypes.CDLL(None)
    for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: memory goes back when it is freed
        library.mallopt(option, 1 << 16)
    way = make_way(name, Work(cell))
    run_phase(way, "score")  # what a first pass makes and keeps is no peak
    return {phase: _resident_peak(way, phase) for phase in PASSES}


def _resident_peak(way: Any, phase: str) -> float:
    _forget(way)
    before, peak, done = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    run_phase(way, phase)
    done.set()
    thread.join()
    return max(0, peak - before) / 2**20


def resident_bytes() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def ceilings() -> dict[str, float]:
    """What the GPU gives at best: bf16 matrix product in TFLOP/s, copy within its memory in TB/s (read and written)."""
    n, size = 8192, 2**32
    left, right = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    product = _best(lambda: left @ right)
    copied = _best(lambda: target.copy_(source))
    return {"matmul_tflops": 2 * n**3 / product / 1e12, "memory_tb_per_s": 2 * size / copied / 1e12}


def _best(call: Callable[[], Any]) -> float:
    """Seconds of a call, best of 5 times 10 in a row."""
    seconds("cuda", call)
    return min(seconds("cuda", lambda: [call() for _ in range(10)]) for _ in range(5)) / 10


# ---------------------------------------------------------------------------------------------- one cell
def run_cell(cell: Cell) -> dict[str, Any]:
    """Measure one cell; the record that becomes the JSON line."""
    check_cell(cell)
    names = [name for name in WAYS if name != "stock" or HAS_TRL]
    if HAS_TRL:
        import trainers.rl_trainer  # noqa: F401  here, and not once in every process that measures memory
    limits = ceilings() if cell.device == "cuda" else None
    memory = peak_memory(cell, dict.fromkeys(names)) if cell.device == "cpu" else None
    work = Work(cell)
    ways = {name: make_way(name, work) for name in names}
    agreement = compare(ways)
    times = measure_times(ways, cell)
    if cell.device == "cuda":
        memory = peak_memory(cell, ways)
    record = asdict(cell) | {"prompt_tokens": work.length, "visual_tokens": work.num_visual}
    return record | summary(work, times, memory) | agreement | {"ceilings": limits} | circumstances(work)


def check_cell(cell: Cell) -> None:
    """Raises UserError for numbers out of their rule and for a device that is not there."""
    for name, least in (("prompt_tokens", 80), ("generations", 2), ("completion_tokens", 2), ("prompts", 1)):
        if getattr(cell, name) < least:
            raise UserError(f"--{name} must be >= {least}, got {getattr(cell, name)}")
    if cell.repeats < 1:
        raise UserError(f"--repeats must be >= 1, got {cell.repeats}")
    if cell.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu, or install torch for CUDA")


def summary(
    work: Work, times: Mapping[str, Mapping[str, float]], memory: Mapping[str, Mapping[str, float]] | None
) -> dict[str, Any]:
    """Ratios against the fair baseline, rates and peaks."""
    against = baseline(times)
    ratios = {f"{phase}_ratio": times[against][phase] / times["shared"][phase] for phase in (*PHASES, "step")}
    rates = {name: work.row_tokens() / taken["update"] for name, taken in times.items()}
    peaks = memory and max(memory[against].values()) / max(memory["shared"].values())
    return {
        **ratios,
        "against": against,
        "peak_memory_ratio": peaks,
        "seconds": times,
        "update_tokens_per_second": rates,
        "peak_mib": memory,
    }


def baseline(times: Mapping[str, Mapping[str, float]]) -> str:
    """ "unshared", or "stock" where the unshared way would flatter the comparison.

    >>> baseline({"unshared": {"update": 1.2, "step": 2.0}, "stock": {"update": 1.0, "step": 2.0}})
    'stock'
    """
    if "stock" not in times:
        return "unshared"
    slower = max(times["unshared"][phase] / times["stock"][phase] for phase in ("update", "step"))
    return "stock" if slower > SLOWER else "unshared"


def circumstances(work: Work) -> dict[str, Any]:
    """Model, machine and versions."""
    on_gpu = work.cell.device == "cuda"
    packages = [name for name in PACKAGES if importlib.util.find_spec(name)]
    return {
        "parameters": sum(parameter.numel() for parameter in work.own.parameters()),
        "trained": sum(parameter.numel() for parameter in work.own.parameters() if parameter.requires_grad),
        "dtype": str(next(work.own.parameters()).dtype).removeprefix("torch."),
        "head": "TRL fused" if HAS_TRL else "plain logits",
        "machine": torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} cores ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "date": time.strftime("%Y-%m-%d"),
    }


# ---------------------------------------------------------------------------------------------- table
def table(record: Mapping[str, Any]) -> str:
    """The record for a reader."""
    names = list(record["seconds"])
    head = f"{'':<12}" + "".join(f"{name:>12}" for name in names) + f"{record['against'] + '/shared':>18}"
    lines = [_heading(record), head, "-" * len(head)]
    for phase in (*PHASES, "step"):
        cells = "".join(f"{record['seconds'][name][phase]:>10.3f} s" for name in names)
        lines.append(f"{phase if phase != 'step' else 'whole step':<12}{cells}{record[f'{phase}_ratio']:>17.2f}x")
    if record["peak_mib"]:
        lines += ["", "peak memory above what was in use before the phase:"]
        lines += [_memory_line(record, names, phase) for phase in PASSES]
    return "\n".join([*lines, "", *_notes(record, names)])


def _heading(record: Mapping[str, Any]) -> str:
    return (
        f"{record['size']}: {record['parameters'] / 1e6:,.2f} M parameters, {record['trained'] / 1e6:,.2f} M train, "
        f"{record['dtype']}, {record['machine']}, {record['threads']} thread(s)\n"
        f"{record['prompts']} prompt(s) of {record['prompt_tokens']} tokens ({record['visual_tokens']} visual), "
        f"{record['generations']} completions of {record['completion_tokens']} tokens; median of {record['repeats']}\n"
    )


def _memory_line(record: Mapping[str, Any], names: Sequence[str], phase: str) -> str:
    peaks = record["peak_mib"]
    ratio = peaks[record["against"]][phase] / max(peaks["shared"][phase], 0.1)
    return f"{phase:<12}" + "".join(f"{peaks[name][phase]:>8.0f} MiB" for name in names) + f"{ratio:>17.2f}x"


def _notes(record: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    rates = ", ".join(f"{name} {record['update_tokens_per_second'][name]:,.0f}" for name in names)
    lines = [f"row tokens per second in the update (G x (P + C) over its time): {rates}"]
    if record["against"] == "stock":
        lines += ["ratios are against stock TRL: the unshared path is more than 10 % slower than it"]
    for name, suffix in (("unshared", ""), ("stock", "_stock")):
        if name in names:
            lines += [
                f"shared against {name}: log-probabilities differ by {record['max_logprob_diff' + suffix]:.1e}, the "
                f"gradient by {record['grad_rel_err' + suffix]:.1e} of its norm; greedy tokens "
                f"{'equal' if record['greedy_equal' + suffix] else 'DIFFER'}"
            ]
    if "stock" not in names:
        lines += ["stock TRL: left out" + ("" if HAS_TRL else ", trl is not installed")]
    if not HAS_TRL:
        lines += ["head: plain logits at the completions' positions and log-softmax in chunks, not TRL's fused head"]
    if record["ceilings"]:
        limits = record["ceilings"]
        lines += [f"this GPU at best: bf16 matrix product {limits['matmul_tflops']:.0f} TFLOP/s, memory "
                  f"{limits['memory_tb_per_s']:.2f} TB/s"]  # fmt: skip
    return lines


# ---------------------------------------------------------------------------------------------- curve
GENERATIONS, LENGTHS = (2, 4, 8, 16), (300, 1200, 2500, 5000)
COLUMNS = ("sweep", "prompt_tokens", "generations", "completion_tokens", "update_ratio", "step_ratio", "token_ratio",
           "update_s_shared", "update_s_unshared", "step_s_shared", "step_s_unshared")  # fmt: skip


def curve_cells(sweep: str, repeats: int) -> list[Cell]:
    """The cells of one panel: over the number of completions ("G") or the length of the prompt ("P")."""
    if sweep == "G":
        return [Cell(1200, size, 32, repeats=repeats) for size in GENERATIONS]
    return [Cell(length, 8, 32, repeats=repeats) for length in LENGTHS]


def curve_row(sweep: str, cell: Cell) -> dict[str, Any]:
    """Measure a cell; a row of the CSV. The ratios are of the project's own two paths."""
    work = Work(cell)
    times = measure_times({name: make_way(name, work) for name in ("shared", "unshared")}, cell)
    numbers = summary(work, times, None)
    length, size, answer = work.length, cell.generations, cell.completion_tokens
    return {
        "sweep": sweep,
        "prompt_tokens": length,
        "generations": size,
        "completion_tokens": answer,
        "update_ratio": numbers["update_ratio"],
        "step_ratio": numbers["step_ratio"],
        "token_ratio": size * (length + answer) / (length + size * answer),
        **{f"{phase}_s_{way}": times[way][phase] for phase in ("update", "step") for way in ("shared", "unshared")},
    }


def write_rows(path: Path, measured: Sequence[Mapping[str, Any]]) -> None:
    """The CSV, ratios and seconds to four digits."""
    with atomic_open(path) as handle:
        writer = csv.DictWriter(handle, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in measured:
            short = {key: f"{value:.4g}" for key, value in row.items() if isinstance(value, float)}
            writer.writerow({**row, **short})


def read_rows(path: Path) -> list[dict[str, Any]]:
    """What `write_rows` wrote."""
    with open(path, encoding="utf-8", newline="") as handle:
        return [
            {key: value if key == "sweep" else float(value) for key, value in row.items()}
            for row in csv.DictReader(handle)
        ]


def draw(measured: Sequence[Mapping[str, Any]]) -> Figure:
    """Two panels: the ratios over the number of completions and over the length of the prompt."""
    with figure_style():
        figure = Figure(figsize=(10.4, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr, call-arg]
        left, right = figure.subplots(1, 2, sharey=True)
        by_group = [row for row in measured if row["sweep"] == "G"]
        by_length = [row for row in measured if row["sweep"] == "P"]
        _panel(left, by_group, "generations", "More completions, prompt of 1,200 tokens", "completions of a prompt, G")
        _panel(right, by_length, "prompt_tokens", "Longer prompt, G = 8", "tokens of the prompt, P")
        left.set_ylabel("times as fast as row by row")
        left.legend(loc="upper left", labelcolor=INK)
    return figure


def _panel(axes: Axes, measured: Sequence[Mapping[str, Any]], key: str, title: str, label: str) -> None:
    measured = sorted(measured, key=lambda row: row[key])
    places = [row[key] for row in measured]
    lines = (("token_ratio", "times fewer tokens", MUTED, "--"), ("update_ratio", "update", BLUE, "-"),
             ("step_ratio", "whole step", VERMILION, "-"))  # fmt: skip
    for column, name, colour, style in lines:
        marker = "" if column == "token_ratio" else "o"
        axes.plot(places, [row[column] for row in measured], style, color=colour, marker=marker, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:,.0f}" for place in places])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.set_xlabel(label)


# ---------------------------------------------------------------------------------------------- command line
def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    grpo = commands.add_parser("grpo", help="one cell: table and JSON line")
    grpo.add_argument("--prompt_tokens", type=int, required=True, help="P; the clip is chosen to come near it")
    grpo.add_argument("--generations", type=int, required=True, help="G, completions of a prompt")
    grpo.add_argument("--completion_tokens", type=int, required=True, help="C, tokens of a completion")
    grpo.add_argument("--prompts", type=int, default=1, help="prompts in a step (%(default)s)")
    grpo.add_argument("--size", choices=("tiny", *SIZES), default="tiny")
    grpo.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    grpo.add_argument("--repeats", type=int, default=3, help="timed repeats after a warm-up (%(default)s)")
    grpo.add_argument("--json", type=Path, help="also write the record here, indented")
    curve = commands.add_parser("grpo_curve", help="the figure of docs/benchmarks.md, and its numbers beside it as CSV")
    curve.add_argument("--out", type=Path, default=Path("docs/images/grpo_sharing.png"), help="png, svg or pdf")
    curve.add_argument("--sweep", choices=("G", "P", "both"), default="both", help="measure one panel, keep the other")
    curve.add_argument("--repeats", type=int, default=2, help="timed repeats after a warm-up (%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and say it."""
    args = parse_args(argv)
    if args.command == "grpo_curve":
        run_curve(args)
        return
    options = {key: value for key, value in vars(args).items() if key not in ("command", "json")}
    record = run_cell(Cell(**options))
    if args.json:
        write_json(args.json, record)
    print(table(record))
    print(json.dumps(record))


def run_curve(args: argparse.Namespace) -> None:
    """Measure the cells, write CSV and picture; a sweep that is not measured keeps its rows of the CSV."""
    figure_format(args.out)
    numbers = args.out.with_suffix(".csv")
    sweeps = ("G", "P") if args.sweep == "both" else (args.sweep,)
    kept = read_rows(numbers) if numbers.is_file() else []
    measured = [row for row in kept if row["sweep"] not in sweeps]
    curve_row("", Cell(150, 2, 4, repeats=1))  # warms up
    for sweep in sweeps:
        for cell in curve_cells(sweep, args.repeats):
            measured.append(row := curve_row(sweep, cell))
            write_rows(numbers, measured)
            print(f"P {row['prompt_tokens']} G {row['generations']}: update {row['update_ratio']:.2f}x, "
                  f"step {row['step_ratio']:.2f}x", flush=True)  # fmt: skip
    save_figure(draw(read_rows(numbers)), args.out)
    print(f"{args.out} and {numbers}")


if __name__ == "__main__":
    run_command(main)
