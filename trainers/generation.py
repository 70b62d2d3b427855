"""Answers from a batch: greedy decoding for validation and serving, and the check that the model sees the video."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from datasets.collate_fns import Batch
from datasets.encoding import IGNORE
from datasets.pixels import VALUES, blinded, pixel_values
from utils.clip_reader import Reads
from utils.common import UserError

MODEL_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "video_grid_thw")
"""Beside the pixels."""
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
BLINDNESS_RATIO = 100.0
"""Zeroed pixels must move the answer's log-probabilities this many times more than repeating the pass does."""


def model_inputs(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """The part of a batch that the model takes, on `device`."""
    return {key: batch[key].to(device) for key in MODEL_INPUTS} | {VALUES: pixel_values(batch["pixels"], device)}


def vision_token_ids(processor: Any) -> list[int]:
    """Ids that must never be sampled: a generated placeholder would ask the next forward for pixels it has not got."""
    vocabulary = processor.tokenizer.get_vocab()
    return [vocabulary[token] for token in VISION_TOKENS if token in vocabulary]


def autocast_for(model: torch.nn.Module, device: torch.device, *, bf16: bool) -> AbstractContextManager[Any]:
    """bf16 autocast when `bf16` and the weights are fp32; otherwise nothing (the weights' own dtype decides)."""
    if bf16 and any(parameter.dtype == torch.float32 for parameter in model.parameters()):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


@torch.no_grad()
def generate_texts(
    model: Any,
    processor: Any,
    batch: Batch,
    *,
    max_new_tokens: int,
    bf16: bool = False,
    synced_gpus: bool = False,
    **sampling: Any,
) -> list[str]:
    """Answer every row of a left-padded batch; one text per row, special tokens removed.

    Greedy unless `sampling` says otherwise (`do_sample=True, temperature=...`): the hub's generation configs sample by
    default, which would make an evaluation depend on luck. `synced_gpus` is needed under ZeRO-3.
    """
    device = next(model.parameters()).device
    inputs = model_inputs(batch, device)
    was_training = model.training
    model.eval()
    options = generation_options(processor, max_new_tokens, sampling)
    try:
        with autocast_for(model, device, bf16=bf16):
            ids = model.generate(**inputs, **options, synced_gpus=synced_gpus)
    finally:
        model.train(was_training)
        reset_rope(model)
    return decode_texts(processor, ids[:, inputs["input_ids"].shape[1] :])


def generation_options(processor: Any, max_new_tokens: int, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """What `generate` is told: greedy unless `sampling` says otherwise, and never a vision token."""
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return dict(
        **(greedy | dict(sampling)),
        max_new_tokens=max_new_tokens,
        suppress_tokens=vision_token_ids(processor),
        pad_token_id=processor.tokenizer.pad_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        use_cache=True,
    )


def decode_texts(processor: Any, ids: torch.Tensor) -> list[str]:
    """New tokens (rows, C) -> texts without special tokens."""
    return [text.strip() for text in processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]


@dataclass(frozen=True)
class Answers:
    """What a pass over a dataset gave."""

    texts: dict[int, str]
    """Answer per row number; "" for a row whose video could not be read, so that it scores 0 and is not forgotten."""
    faults: list[tuple[int, str]]
    reads: Reads = field(default_factory=Reads)
    """What was decoded for it, by this process and its workers."""


def answer_rows(
    model: Any, processor: Any, loader: Iterable[Batch], *, blind: bool = False, **generation: Any
) -> Answers:
    """Answer every row that `loader` gives (left-padded batches); `generation` goes to `generate_texts`.

    `blind` zeroes the pixels: what the model answers without seeing the video.
    """
    texts: dict[int, str] = {}
    faults: list[tuple[int, str]] = []
    reads = Reads()
    for batch in loader:
        if blind:
            batch = blinded(batch)
        answers = generate_texts(model, processor, batch, **generation)
        # A batch of faults only answers for the blank clip; it has no row number, so zip drops it.
        texts |= dict(zip(batch["indices"], answers, strict=False))
        texts |= {index: "" for index, _ in batch["faults"]}
        faults += batch["faults"]
        reads.add(batch["reads"])
    return Answers(texts, faults, reads)


def reset_rope(model: Any) -> None:
    """Forget the position offsets of the last generation: `generate` leaves them on the model, where a later call with
    another prompt would read them."""
    for module in model.modules():
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = None


def answer_log_probs(logits: torch.Tensor, labels: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Log-probability of every label. `logits` (B, K, V) at `columns` (K,), `labels` (B, L) -> (number of labels,)."""
    targets = labels[:, columns + 1]
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    picked = log_probs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return picked[targets != IGNORE]


@torch.no_grad()
def video_effect(model: Any, batch: Batch) -> tuple[float, float]:
    """How far the answer's log-probabilities move when the pixels are zeroed, and when the same pass is repeated.

    `batch` has labels. Returns (mean absolute change when blind, mean absolute change on repetition).
    """
    device = next(model.parameters()).device
    inputs = model_inputs(batch, device)
    labels, columns = batch["labels"].to(device), batch["logits_to_keep"].to(device)

    def log_probs(pixels: torch.Tensor) -> torch.Tensor:
        logits = model(**{**inputs, VALUES: pixels}, logits_to_keep=columns).logits
        return answer_log_probs(logits, labels, columns)

    was_training = model.training
    model.eval()
    pixels = inputs[VALUES]
    first, again, blind = log_probs(pixels), log_probs(pixels), log_probs(torch.zeros_like(pixels))
    model.train(was_training)
    return float((blind - first).abs().mean()), float((again - first).abs().mean())


def check_sees_video(model: Any, batch: Batch) -> str:
    """Raise UserError when zeroed pixels move the answer no more than 100 times what a repeated pass does (contract 4).

    Returns the line to log.
    """
    blind, repeat = video_effect(model, batch)
    # On a deterministic device the repetition moves nothing: the floor is what fp32 rounding could do.
    if not blind > BLINDNESS_RATIO * max(repeat, 1e-7):
        raise UserError(
            f"the model does not see the video: zeroing the pixels moves the answer's log-probabilities by "
            f"{blind:.2e}, "
            f"repeating the same pass by {repeat:.2e} (at least {BLINDNESS_RATIO:g}x is expected). Check a replaced "
            "model.vision_tower and the checkpoint's processor; training.blindness_guard=false skips this check"
        )
    return (
        f"the model sees the video: zeroed pixels move the answer's log-probabilities by {blind:.3g} "
        f"(repeat: {repeat:.1g})"
    )
