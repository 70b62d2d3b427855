"""The comparison of the shared and the row-by-row path, once at the start of a run (contract 9).

A patched attention or a changed library would train on something else without an error: an open-source trainer's
custom mask has been replaced in silence before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trainers.shared_prefix import Packed, Prompt, backbone_of, pack, rows
from utils.common import UserError

SHARING_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Largest difference of a token's log-probability between the two paths that rounding alone explains. bf16 keeps 8
bits: a log-probability of -10 is stored to 0.03, and the two paths add in another order."""


@torch.no_grad()
def check_sharing(
    prompt: Prompt,
    answer: Tensor,
    log_probs: Callable[[Packed], Tensor],
    *,
    pad_token_id: int,
    dtype: torch.dtype,
    key: str,
) -> str:
    """Score two completions of `prompt`, `answer` and a part of it backwards, packed and row by row.

    Three forward passes, alike on every rank. Returns the line to log. Raises UserError when the log-probabilities
    differ by more than rounding explains: something in this installation makes completions see each other, or hides the
    prompt from them.

    Args:
        answer: (C,) token ids.
        log_probs: of the targets of what `pack` or `rows` gives, in its order, (B, K).
        dtype: in which the forward pass computes.
        key: the configuration key that switches sharing.
    """
    answers = [answer, answer.flip(0)[: max(1, len(answer) // 2)]]
    packed = pack([prompt], [answers])
    together = packed.unpack(log_probs(packed))
    alone = [log_probs(rows([prompt], [[one]], pad_token_id=pad_token_id))[0] for one in answers]
    difference = largest_difference(together, alone)
    if not difference <= SHARING_TOLERANCE[dtype]:
        raise UserError(
            f"{key}: the shared and the row-by-row path differ by {difference:.3g} in the log-probability of a token "
            f"(rounding explains up to {SHARING_TOLERANCE[dtype]:g}), so sharing is not exact in this installation. "
            f"Set {key}=false to train row by row, and report the versions in the run's environment.json"
        )
    return f"sharing is exact: shared and row-by-row log-probabilities differ by {difference:.1g} at most"


def largest_difference(together: Tensor, alone: Sequence[Tensor]) -> float:
    """Over the tokens of all completions; rows of `together` (R, C) may be longer than their completion."""
    return max(float((row[: len(one)] - one).abs().max()) for row, one in zip(together, alone, strict=True))


def picked_log_probs(model: Any, packed: Packed) -> Tensor:
    """Log-probability (B, K) of every target of `packed`, through the model's own output head."""
    logits = model(**packed.inputs, logits_to_keep=packed.columns, use_cache=False).logits.float()
    return torch.log_softmax(logits, -1).gather(-1, packed.targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def compute_dtype(model: Any, args: Any) -> torch.dtype:
    """In which type the forward pass computes under these TrainingArguments."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else next(backbone_of(model).language_model.parameters()).dtype
