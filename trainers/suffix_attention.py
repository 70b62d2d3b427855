"""Attention of the completions of one prompt: each to the prompt and to its own past, without a mask.

Two calls of a fused kernel, one over the prompt's keys (which every completion sees whole) and one over the
completions' own (causal, a row each), joined by their log-sum-exp. Exact, as in ring attention (Liu et al. 2023,
arXiv:2310.01889): softmax over the union is the sum of both results, each weighted with its share of the exponentials.
Backward, each kernel is given the joined result and log-sum-exp, from which it computes its part of the softmax again.
So the prompt's keys and values are read where they lie; neither completions nor query heads get copies of them.

The kernels are those behind torch's scaled_dot_product_attention, on CUDA FlashAttention 2 in half precision. That
function does not give the log-sum-exp, so they are called by name: `can_merge` tries them on a small case first, and
where they do not run or are not right there `masked_attention` does the same work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from utils.logging_utils import get_logger

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""What `can_merge` allows, of the largest element: the rounding of the type, a few times over."""


@dataclass(frozen=True)
class SuffixRows:
    """The S tokens of the completions of one prompt: one after the other, or as rows padded at the end."""

    lengths: tuple[int, ...]
    """Tokens of each completion; 0 is allowed."""
    places: Tensor
    """(S,): where each token lies in the padded rows, counted through all of them."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> SuffixRows:
        """`lengths`: tokens of each completion."""
        width = max(lengths, default=0)
        starts = torch.arange(len(lengths), device=device) * width
        rows = [start + torch.arange(length, device=device) for start, length in zip(starts, lengths, strict=True)]
        return cls(tuple(lengths), torch.cat(rows) if rows else starts)

    def pad(self, values: Tensor) -> Tensor:
        """(heads, S, ...) -> (rows, heads, longest, ...), zeros at the end of shorter rows."""
        heads, num_rows, width = len(values), len(self.lengths), max(self.lengths)
        padded = values.new_zeros(heads, num_rows * width, *values.shape[2:])
        padded[:, self.places] = values
        return padded.unflatten(1, (num_rows, width)).transpose(0, 1)

    def unpad(self, values: Tensor) -> Tensor:
        """(rows, heads, longest, ...) -> (heads, S, ...)."""
        return values.transpose(0, 1).flatten(1, 2)[:, self.places]


def suffix_attention(
    query: Tensor, key: Tensor, value: Tensor, rows: SuffixRows, scaling: float, dropout: float = 0.0
) -> Tensor:
    """query (1, heads, S, dim), key and value (1, kv_heads, P + S, dim) -> (1, heads, S, dim).

    The last S keys and values are the completions' own. All of one type and device.
    """
    if dropout or not can_merge(query.device, query.dtype, query.shape[-1]):
        return masked_attention(query, key, value, rows, scaling, dropout)
    merged: Tensor = _Merged.apply(query[0], key[0], value[0], rows, scaling)
    return merged[None]


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, rows: SuffixRows, scaling: float, dropout: float = 0.0
) -> Tensor:
    """As `suffix_attention`, by one call over the prompt and all completions with a mask of S x (P + S)."""
    owner = torch.repeat_interleave(torch.arange(len(rows.lengths)), torch.tensor(rows.lengths)).to(query.device)
    own = (owner[:, None] == owner).tril()
    mask = torch.cat([own.new_ones(len(owner), key.shape[2] - len(owner)), own], dim=1)
    for_each = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(for_each, dim=1), value.repeat_interleave(for_each, dim=1)
    return functional.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling)


# ---------------------------------------------------------------------------------------------- merged
class _Merged(torch.autograd.Function):
    """query (heads, S, dim), key and value (kv_heads, P + S, dim) -> (heads, S, dim)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: SuffixRows, scaling: float) -> Tensor:
        over_prompt = _attend(*_prompt_part(query, key, value), causal=False, scaling=scaling)
        over_own = _attend(*_own_part(query, key, value, rows), causal=True, scaling=scaling)
        prompt, prompt_lse = (_unfold(part, query) for part in over_prompt[:2])
        own, own_lse = map(rows.unpad, over_own[:2])
        lse = torch.logaddexp(prompt_lse, own_lse)  # (heads, S)
        out = prompt * (prompt_lse - lse).exp()[..., None] + own * (own_lse - lse).exp()[..., None]
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.rows, ctx.scaling, ctx.further = rows, scaling, (over_prompt[2], over_own[2])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        rows, kv_heads = ctx.rows, len(key)
        over_prompt = _attend_backward(
            _fold(grad, kv_heads), *_prompt_part(query, key, value), _fold(out, kv_heads), _fold(lse, kv_heads),
            ctx.further[0], causal=False, scaling=ctx.scaling,
        )  # fmt: skip
        over_own = _attend_backward(
            rows.pad(grad), *_own_part(query, key, value, rows), rows.pad(out), rows.pad(lse),
            ctx.further[1], causal=True, scaling=ctx.scaling,
        )  # fmt: skip
        of_query = _unfold(over_prompt[0], query) + rows.unpad(over_own[0])
        of_key, of_value = (
            torch.cat([prompt[0], rows.unpad(own).unflatten(0, (kv_heads, -1)).sum(1)], dim=1)
            for prompt, own in zip(over_prompt[1:], over_own[1:], strict=True)
        )
        return of_query, of_key, of_value, None, None


def _prompt_part(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All queries over the prompt's keys and values, which stay where they are."""
    prefix = key.shape[1] - query.shape[1]
    return _fold(query, len(key)), key[None, :, :prefix], value[None, :, :prefix]


def _own_part(query: Tensor, key: Tensor, value: Tensor, rows: SuffixRows) -> tuple[Tensor, Tensor, Tensor]:
    """A row for each completion, with its keys and values for every query head: they are few."""
    own = (part[:, -query.shape[1] :].repeat_interleave(len(query) // len(key), dim=0) for part in (key, value))
    keys, values = map(rows.pad, own)
    return rows.pad(query), keys, values


def _fold(values: Tensor, kv_heads: int) -> Tensor:
    """(heads, S, ...) -> (1, kv_heads, heads / kv_heads * S, ...): without a mask the queries of several heads that
    meet the same keys are so many more queries."""
    return values.unflatten(0, (kv_heads, -1)).flatten(1, 2)[None]


def _unfold(values: Tensor, query: Tensor) -> Tensor:
    """The reverse, for `query` (heads, S, dim)."""
    return values.reshape(*query.shape[:2], *values.shape[3:])


# ---------------------------------------------------------------------------------------------- kernels
def _attend(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scaling: float
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """(rows, heads, N, dim), (rows, heads, M, dim) twice -> the result, the log-sum-exp (rows, heads, N) in fp32, and
    what `_attend_backward` wants besides."""
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scaling
        )
        return out, lse, ()
    out, lse, *further = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, causal, False, scale=scaling
    )
    return out, lse, tuple(further[:6])


def _attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, further: tuple[Any, ...],
    *, causal: bool, scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value, when `out` and `lse` are those of all that the queries saw."""
    given = (grad, query, key, value, out, lse.contiguous())
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, 0.0, causal, scale=scaling)
    *edges, seed, offset = further  # edges of packed rows, of which there are none, and their longest
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *given, *edges, 0.0, causal, seed, offset, scale=scaling
    )


@cache
def can_merge(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Whether the kernels give, on a small case, what a mask gives in fp32: the result and all gradients."""
    if dtype not in TOLERANCE:
        return False
    try:
        error = _merge_error(device, dtype, dim)
    except (RuntimeError, AttributeError, TypeError, ValueError) as refused:
        reason = str(refused).strip().splitlines()[0] if str(refused).strip() else type(refused).__name__
    else:
        if error <= TOLERANCE[dtype]:
            return True
        reason = f"they are off by {error:.1g}"
    get_logger().info(
        "completions of a prompt attend by a mask, as attention kernels on %s in %s do not serve: %s",
        device.type, str(dtype).removeprefix("torch."), reason,
    )  # fmt: skip
    return False


def _merge_error(device: torch.device, dtype: torch.dtype, dim: int) -> float:
    """Largest difference between both ways, relative to the largest element. The process's random state stays."""
    rows, prefix, heads = SuffixRows.of((3, 0, 5, 1), device), 11, (4, 2, 2)
    lengths, drawn = (9, prefix + 9, prefix + 9), torch.Generator().manual_seed(0)
    as_it_is = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    # Hidden from whoever counts what the pass around it saves: checkpointing does, and this runs in one pass only.
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False), as_it_is:
        inputs = [
            torch.randn(1, number, length, dim, generator=drawn).to(device, dtype)
            for number, length in zip(heads, lengths, strict=True)
        ]
        merged = _with_gradients(inputs, lambda q, k, v: _Merged.apply(q[0], k[0], v[0], rows, dim**-0.5)[None])
        masked = _with_gradients(
            [part.float() for part in inputs], lambda q, k, v: masked_attention(q, k, v, rows, dim**-0.5)
        )
    return max(
        float((mine.float() - theirs).abs().max() / theirs.abs().max())
        for mine, theirs in zip(merged, masked, strict=True)
    )


def _with_gradients(inputs: Sequence[Tensor], attend: Any) -> list[Tensor]:
    """The result of `attend`, and the gradients of its inputs for a slope that differs in every element."""
    with torch.enable_grad():
        leaves = [part.detach().requires_grad_() for part in inputs]
        out = attend(*leaves)
        slope = torch.arange(out.numel(), device=out.device, dtype=torch.float32).cos().view(out.shape)
        return [out.detach(), *torch.autograd.grad(out, leaves, slope.to(out.dtype))]
