"""The vision tower's attention over all frames of a batch at once, without FlashAttention.

Frames attend within themselves. transformers runs SDPA once per frame in a Python loop, thousands of small calls for
a long video; frames of equal size fit into one call as a batch, with the same result. FlashAttention needs none of it.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionAttention

FRAMEWISE = "framewise_sdpa"
MAX_SCORES = 2**28
"""Frames in one call are limited so that heads x frames x patches x patches stays below this: kernels that store the
scores (the fallback where no fused one fits) then need at most 1 GB in fp32."""


def batch_vision_frames(model: Any) -> None:
    """Let the vision tower of a Qwen3-VL model on SDPA attend to frames of equal size in one call.

    Does nothing to a tower with another attention (FlashAttention, eager), or one that was replaced by modules of
    another kind.
    """
    visual = model.model.visual
    layers = [module for module in visual.modules() if isinstance(module, Qwen3VLVisionAttention)]
    if not layers or model.config.vision_config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(FRAMEWISE, framewise_attention)
    model.set_attn_implementation({"vision_config": FRAMEWISE})
    for layer in layers:
        layer.register_forward_pre_hook(_all_frames_at_once, with_kwargs=True)


def _all_frames_at_once(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hand the module one long sequence, and the attention the frames' lengths."""
    if module.config._attn_implementation != FRAMEWISE:
        return None
    edges = kwargs["cu_seqlens"]
    lengths = (edges[1:] - edges[:-1]).tolist()
    return args, {**kwargs, "cu_seqlens": edges[[0, -1]], "frame_lengths": lengths}


def framewise_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    frame_lengths: list[int],
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(1, heads, N, dim) -> (1, N, heads, dim): every frame attends to itself. `frame_lengths` sum up to N patches."""
    outputs, start = [], 0
    for length, run in groupby(frame_lengths):
        left = len(list(run))
        most = max(1, MAX_SCORES // (query.shape[1] * length * length))
        while left:
            count = min(left, most)
            stop = start + count * length
            frames = (_as_batch(tensor[:, :, start:stop], count) for tensor in (query, key, value))
            output, _ = sdpa_attention_forward(module, *frames, attention_mask, **kwargs)  # (count, length, heads, dim)
            outputs.append(output.flatten(0, 1)[None])
            start, left = stop, left - count
    return torch.cat(outputs, dim=1), None


def _as_batch(tensor: Tensor, count: int) -> Tensor:
    """(1, heads, count * n, dim) -> (count, heads, n, dim)."""
    return tensor[0].unflatten(1, (count, -1)).transpose(0, 1)
