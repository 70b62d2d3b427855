"""The three ways of `grpo`, on one model, one set of prompts and one set of completions."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig

from scripts.benchmarks.models import build_model, demo_processor, make_sample, make_trainable
from trainers.generation import reset_rope, vision_token_ids
from trainers.shared_prefix import (
    IGNORED,
    Packed,
    Prompt,
    enable_shared_prefix,
    make_prompt,
    pack,
    prompt_pixels,
    rows,
    sample_rows,
    sample_shared,
    vision_is_frozen,
    with_vision,
)

HAS_TRL = importlib.util.find_spec("trl") is not None
WAYS = ("shared", "unshared", "stock")


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
        self.processor = demo_processor()
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
        "pixel_values": prompt_pixels(repeated),
        "image_grid_thw": torch.cat(images),
        "num_images": [len(image) for image in images],
    }


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
