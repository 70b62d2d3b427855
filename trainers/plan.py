"""What `--dry_run` shows: the plan of a run and one collated batch, as text."""

from __future__ import annotations

import math
import re
from typing import Any

import torch

from datasets.collate_fns import Batch, VideoCollator
from datasets.encoding import IGNORE
from datasets.pixels import VALUES
from datasets.video_dataset import VideoTemporalDataset
from trainers.parts import LearningRates, describe_trainable


def describe_plan(
    model: torch.nn.Module,
    rates: LearningRates,
    train: VideoTemporalDataset,
    val: VideoTemporalDataset | None,
    args: Any,
    *,
    num_batches: int | None = None,
) -> str:
    """Rows, batch, steps and what trains, one fact a line. `args` are TrainingArguments.

    `num_batches`: forward passes of a process in an epoch, where it is not every row once
    (`trainers.rollout_batches.batches_per_epoch`).
    """
    world = max(1, args.world_size)
    batch = args.train_batch_size * args.gradient_accumulation_steps * world
    if num_batches is None:
        num_batches = math.ceil(len(train) / (args.train_batch_size * world))
    per_epoch = math.ceil(num_batches / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
    lengths = sorted(train.lengths)
    lines = [
        f"rows:        {len(train)} train, {len(val) if val is not None else 0} validation",
        f"batch:       {args.train_batch_size} x {args.gradient_accumulation_steps} accumulation x {world} "
        f"process(es) = {batch}",
        f"steps:       {steps} ({per_epoch} an epoch), warm-up {args.get_warmup_steps(steps)}, "
        f"{args.lr_scheduler_type.value}",
        f"tokens:      up to {lengths[len(lengths) // 2]} in the median sample, {lengths[-1]} in the longest; "
        "small frames give fewer",
        f"precision:   weights {next(model.parameters()).dtype}, bf16 autocast {args.bf16}".replace("torch.", ""),
        f"parameters:  {describe_trainable(model, rates)}",
        f"checkpoints: every {args.save_steps} steps to {args.output_dir}, validation every {args.eval_steps}",
    ]
    return "\n".join(lines)


def describe_groups(train: VideoTemporalDataset, args: Any, reward: Any) -> str:
    """What a GRPO step samples and earns, and the first prompt. `args` are TRL's GRPOConfig."""
    prompts = args.generation_batch_size // args.num_generations
    left_out = len(train) % prompts
    parts = ", ".join(f"{weight:g} x {name}" for name, weight in reward.weights.items())
    sample = train[0]
    shown = sample["fault"] if "fault" in sample else _count_pads(train.processor.tokenizer.decode(sample["input_ids"]))
    lines = [
        f"rollouts:    {prompts} prompts x {args.num_generations} completions a generation batch, "
        f"{args.steps_per_generation} micro-batches, {args.num_iterations} pass(es); "
        f"{left_out} rows do not fill one and are left out of an epoch",
        f"reward:      {parts}",
        f"policy:      T {args.temperature:g}, KL {args.beta:g}, clip {args.epsilon:g}, {args.loss_type} loss",
        "--- first prompt",
        shown,
    ]
    return "\n".join(lines)


def describe_batch(dataset: VideoTemporalDataset, size: int) -> str:
    """Collate the first `size` rows and decode them: prompts with visual tokens counted, the learnt answer apart."""
    samples = [dataset[index] for index in range(min(size, len(dataset)))]
    batch = VideoCollator(dataset.processor.tokenizer.pad_token_id, dataset.blank())(samples)
    lines = [
        f"{key}: {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        for key, value in batch.items()
        if isinstance(value, torch.Tensor)
    ]
    num_patches, patch_dim = sum(clip.shape[0] for clip in batch["pixels"]), batch["pixels"][0].shape[1]
    lines.append(f"{VALUES}: {(num_patches, patch_dim)} float32")
    lines += [f"unreadable: {reason}" for _, reason in batch["faults"]]
    for row in range(len(batch["input_ids"])):
        prompt, answer = decode_row(dataset.processor.tokenizer, batch, row)
        lines += [f"--- sample {row}", prompt, f"--- learns: {answer}"]
    return "\n".join(lines)


def decode_row(tokenizer: Any, batch: Batch, row: int) -> tuple[str, str]:
    """Text of one row of a training batch: (prompt with runs of visual tokens counted, answer under the labels)."""
    kept = batch["attention_mask"][row].bool()
    ids, labels = batch["input_ids"][row][kept], batch["labels"][row][kept]
    prompt = tokenizer.decode(ids[labels == IGNORE])
    answer = tokenizer.decode(ids[labels != IGNORE])
    return _count_pads(prompt), answer


def _count_pads(text: str) -> str:
    return re.sub(r"(?:<\|video_pad\|>)+", lambda run: f"<|video_pad|>*{run.group().count('|video_pad|')}", text)
