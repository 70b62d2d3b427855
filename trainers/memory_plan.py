"""The memory estimate of a run: reads what `trainers.memory_estimate` needs, and shows it as a table.

The model may be on the meta device or memory-mapped: only names, shapes and types of its parameters are read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from datasets.video_dataset import VideoTemporalDataset, estimate_tokens
from trainers import memory_activations as activations
from trainers.memory import ModelShape, Parameters, Precision, Sharding, Trains
from trainers.memory_activations import Answering
from trainers.memory_estimate import GB, MOMENTS, Clip, Estimate, Job, Update, estimate
from trainers.parts import parameter_size, part_of
from utils.config import DataConfig, RLConfig, SFTConfig

PADDED = {"sdpa": "masked", "eager": "eager", "flash_attention_2": "plain"}
"""What attention stores of padded rows (`trainers.memory_activations.Sequence`)."""
ANSWERS_READ = 64
"""Rows whose answers are tokenised to find the longest."""


# ---------------------------------------------------------------------------------------------- the model
def count_parameters(model: nn.Module, *, half: bool = False) -> Parameters:
    """What `model` holds; a tied tensor counts once. `half`: in 16 bits, as DeepSpeed holds it under bf16 or fp16,
    whatever it is now."""
    totals = {True: [0, 0], False: [0, 0]}  # bytes and elements, of what trains and what does not
    largest = 0
    for parameter in model.parameters():
        number = parameter_size(parameter)
        totals[parameter.requires_grad][0] += number * (2 if half else parameter.element_size())
        totals[parameter.requires_grad][1] += number
        largest = max(largest, number * parameter.requires_grad)
    embeddings = {id(p): p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    wide = sum(parameter_size(p) for p in embeddings.values() if p.requires_grad)
    (frozen_bytes, num_frozen), (trained_bytes, num_trained) = totals[False], totals[True]
    return Parameters(frozen_bytes, num_frozen, trained_bytes, num_trained, wide, largest)


def reference_bytes(model: nn.Module, *, half: bool = False) -> int:
    """Bytes of GRPO's frozen reference: a copy of the adapter, or of the whole model where there is none."""
    named = list(model.named_parameters())
    own = [parameter for name, parameter in named if ".default." in name] or [parameter for _, parameter in named]
    return sum(parameter_size(p) * (2 if half else p.element_size()) for p in own)


def what_trains(model: Any) -> Trains:
    """Which parts of `model` have gradients, and its LoRA."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    parts = {part_of(name) for name in trained if ".lora_" not in name}
    settings = getattr(model, "peft_config", {}).get("default")
    return Trains(
        language="language" in parts,
        targets=frozenset(name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained if ".lora_" in name),
        rank=settings.r if settings else 0,
        dropout=bool(settings and settings.lora_dropout),
        head="head" in parts,
        mergers="mm_projector" in parts,
        tower="vision_tower" in parts,
    )


def read_precision(model: nn.Module, args: Any, *, deepspeed: bool) -> Precision:
    """Bytes of weights and activations. `args` are TrainingArguments."""
    half = bool(args.bf16 or args.fp16)
    if deepspeed and half:
        return Precision(2, 2, 2, autocast=False)
    named = dict(model.named_parameters())
    weights = next(p for name, p in named.items() if "layers.0.self_attn.q_proj" in name and ".lora_" not in name)
    adapter = next((p for name, p in named.items() if ".lora_" in name or "modules_to_save" in name), weights)
    size = weights.element_size()
    return Precision(size, adapter.element_size(), 2 if half else size, autocast=half)


# ---------------------------------------------------------------------------------------------- the data
def longest_clip(rows: VideoTemporalDataset) -> Clip:
    """The longest sample of a data set, from durations; its answer is the longest of up to `ANSWERS_READ` rows."""
    estimates = [estimate_tokens(row.duration, rows.data.budget) for row in rows.rows]
    some = rows.rows[:: max(1, len(rows.rows) // ANSWERS_READ)]
    answer = 1 + max(len(rows.processor.tokenizer(rows.answer(row))["input_ids"]) for row in some)
    return replace(_largest(estimates, rows.data.max_prompt_tokens), answer=answer)


def largest_clip(data: DataConfig) -> Clip:
    """The longest sample that `data` allows, without a data set."""
    durations = (frames / data.fps for frames in range(data.min_frames, data.max_frames + 1))
    return _largest([estimate_tokens(duration, data.budget) for duration in durations], data.max_prompt_tokens)


def _largest(estimates: Sequence[tuple[int, int]], most: int) -> Clip:
    """The most visual tokens and the most tokens, be they of two samples; a prompt of over `most` loses frames."""
    return Clip(min(most, max(visual for visual, _ in estimates)), min(most, max(tokens for _, tokens in estimates)))


# ---------------------------------------------------------------------------------------------- the run
def read_job(
    model: Any,
    config: SFTConfig | RLConfig,
    args: Any,
    clip: Clip,
    *,
    deepspeed: Path | str | None = None,
    num_gpus: int | None = None,
) -> Job:
    """What training `model` by `config` and `args` (TrainingArguments or GRPOConfig) comes to.

    `deepspeed` is the JSON file, if any; `num_gpus` defaults to the processes of this run.
    """
    blocks = None if deepspeed is None else json.loads(Path(deepspeed).read_text(encoding="utf-8"))
    half = blocks is not None and bool(args.bf16 or args.fp16)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    shape, trains = ModelShape.from_config(base.config), what_trains(model)
    padded = PADDED.get(base.config.text_config._attn_implementation or "sdpa", "masked")
    parameters = count_parameters(model, half=half)
    if isinstance(config, RLConfig) and args.beta:
        parameters = replace(parameters, reference_bytes=reference_bytes(model, half=half))
    sharding = Sharding.from_deepspeed(blocks, num_gpus or max(1, args.world_size), shape.text.hidden)
    return Job(
        shape=shape,
        parameters=parameters,
        precision=read_precision(model, args, deepspeed=blocks is not None),
        trains=trains,
        clip=clip,
        update=_update(config, args, clip, trains, padded),
        sharding=sharding,
        optimizer=str(getattr(args.optim, "value", args.optim)),
        checkpointing=config.training.gradient_checkpointing,
        tied=bool(base.config.tie_word_embeddings),
        rollout=_rollout(config, args, clip, padded) if isinstance(config, RLConfig) else None,
        validation=_validation(config, args, clip, padded),
        gathers_for_rollout=sharding.stage == 3 and getattr(args, "ds3_gather_for_generation", False),
    )


def _sequence(rows: int, tokens: int, padded: str) -> activations.Sequence:
    """Rows of `tokens` tokens; alone, a row has no padding."""
    kind = padded if rows > 1 or padded == "eager" else "plain"
    return activations.Sequence(rows * tokens, kind, 0 if kind == "plain" else rows * tokens**2)


def _update(config: SFTConfig | RLConfig, args: Any, clip: Clip, trains: Trains, padded: str) -> Update:
    size, passes = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if isinstance(config, SFTConfig):
        if config.training.share_video:  # at worst, every row of a batch is on a clip of its own
            packed = activations.Sequence(size * (clip.tokens + clip.answer), "packed")
            return Update(packed, size, size * clip.answer, accumulates=passes > 1)
        sequence = _sequence(size, clip.tokens + clip.answer, padded)
        # Rows of other lengths have their answers in other columns, and every row computes the columns of all.
        return Update(sequence, size, size * size * clip.answer, accumulates=passes > 1)
    new, group = config.training.max_completion_length, args.num_generations
    groups, prompts = size // group, size * args.steps_per_generation // group
    shared = config.training.share_prefix
    if shared:
        suffix = group * (new - 1)
        sequence = activations.Sequence(groups * (clip.tokens + suffix), "packed")
    else:
        sequence = _sequence(size, clip.tokens + new, padded)
    return Update(
        sequence,
        clips=groups if shared else size,
        scored=size * new,
        features_held=prompts if shared and not (trains.mergers or trains.tower) else 0,
        accumulates=passes > 1,
        fused=True,
    )


def _rollout(config: RLConfig, args: Any, clip: Clip, padded: str) -> Answering:
    group, prompts = args.num_generations, config.training.rollout_prompts
    prompts = min(prompts, args.per_device_train_batch_size * args.steps_per_generation // group)
    rows = prompts if config.training.share_prefix else prompts * group
    new = config.training.max_completion_length
    return Answering(rows, clip.tokens, prompts * group, new, masked=padded != "plain" and rows > 1)


def _validation(config: SFTConfig | RLConfig, args: Any, clip: Clip, padded: str) -> Answering | None:
    if not config.data.val or config.training.eval_strategy == "no":
        return None
    rows = args.per_device_eval_batch_size
    new = config.training.max_new_tokens if isinstance(config, SFTConfig) else config.training.max_completion_length
    return Answering(rows, clip.tokens, rows, new, masked=padded != "plain" and rows > 1)


# ---------------------------------------------------------------------------------------------- the table
def describe_estimate(found: Estimate) -> str:
    """The estimate as a table: what is there at the peak, and in brackets what is there at other moments only."""
    peak, at_peak = found.peak, found.present(found.peak)
    where = "each GPU" if found.num_gpus > 1 else "the GPU"
    lines = [
        f"memory:      about {found.total / GB:.1f} GB on {where}, {MOMENTS[peak]}; "
        f"largest term: {found.largest.name}, {found.largest.num_bytes / GB:.1f} GB",
        "  Arithmetic, for the longest clip with frames as large as allowed. In brackets: at other moments.",
    ]
    for term in found.terms:
        size = f"{term.num_bytes / GB:.2f}"
        lines.append(f"  {term.name:<20}{size if term in at_peak else f'({size})':>9} GB  {term.note}".rstrip())
    lines.append(f"  {'allowance':<20}{found.allowance(peak) / GB:>9.2f} GB  CUDA context, NCCL, fragmentation")
    if found.host:
        lines.append(f"  Offloaded to the host's memory: {found.host / GB:.1f} GB by each process")
    return "\n".join(lines)


def describe_memory(
    model: Any, config: SFTConfig | RLConfig, args: Any, train: VideoTemporalDataset, deepspeed: str | None
) -> str:
    """What `--dry_run` says about memory: `describe_estimate` of this run on its longest clip."""
    return describe_estimate(estimate(read_job(model, config, args, longest_clip(train), deepspeed=deepspeed)))
