"""Answers to different questions on one video: the video and the prompt up to its end are computed once for all.

`prefill` computes each prompt's beginning by itself, `continue_texts` decodes all questions together on that cache.
(Equal prompts with several completions each are `trainers.shared_prefix.sample_shared`'s.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache

from datasets.collate_fns import pad_rows
from datasets.encoding import Sample
from trainers.generation import decode_texts, generation_options, reset_rope
from trainers.prefix_cache import CACHE, SharedPrefixCache
from trainers.shared_prefix import backbone_of, enable_shared_prefix, make_prompt, video_inputs


@dataclass(frozen=True)
class Prefilled:
    """Beginnings of B prompts, computed; any number of questions can follow, several times."""

    input_ids: tuple[Tensor, ...]
    """(P,) for each prompt."""
    next_position: Tensor
    """(B,): where the text after each video counts on, on all three axes."""
    cache: Cache
    """Keys and values, padded on the left to the longest prompt."""


@torch.no_grad()
def prefill(model: Any, prefixes: Sequence[Sample]) -> Prefilled:
    """Compute beginnings of prompts (`SharedPrompt.prefix`), one after the other: the memory of one at a time, and no
    padding. `model` is bare or a `PeftModel`, and is left as `enable_shared_prefix` makes it."""
    enable_shared_prefix(model)
    backbone, was_training = backbone_of(model), model.training
    model.eval()
    ids, following, caches = [], [], []
    try:
        for prefix in prefixes:
            prompt = make_prompt(model, prefix)
            output = backbone(
                input_ids=prompt.input_ids[None],
                position_ids=prompt.position_ids[:, None],
                **video_inputs([prompt]),
                use_cache=True,
            )
            ids.append(prompt.input_ids)
            following.append(prompt.position_ids.max() + 1)
            caches.append(output[CACHE])
    finally:
        model.train(was_training)
        reset_rope(model)
    return Prefilled(tuple(ids), torch.stack(following), _stack(caches))


def _stack(caches: Sequence[Cache]) -> Cache:
    """Caches of one row each -> one of all, padded on the left. Takes them apart as it goes, little is held twice."""
    first, *others = caches
    if not others:
        return first
    widest = max(cache.get_seq_length() for cache in caches)
    for number, target in enumerate(first.layers):
        layers = [cache.layers[number] for cache in caches]
        keys, values = (
            torch.cat([functional.pad(part, (0, 0, widest - part.shape[-2], 0)) for part in parts])
            for parts in ([layer.keys for layer in layers], [layer.values for layer in layers])
        )
        for layer in layers:
            layer.keys = layer.values = None
        target.keys, target.values = keys, values
    return first


@torch.no_grad()
def continue_texts(
    model: Any,
    processor: Any,
    prefilled: Prefilled,
    tails: Sequence[Sequence[Tensor]],
    *,
    max_new_tokens: int,
    **sampling: Any,
) -> list[list[str]]:
    """The answers to the questions `tails` (T,) that follow each prompt, all rows decoded together.

    Greedy unless `sampling` says otherwise, as `generate_texts`. Special tokens are removed.
    """
    inputs = _rows(prefilled, tails, processor.tokenizer.pad_token_id)
    was_training = model.training
    model.eval()
    try:
        ids = model.generate(
            **inputs,
            **{CACHE: SharedPrefixCache(prefilled.cache, [len(group) for group in tails])},
            **generation_options(processor, max_new_tokens, sampling),
        )
    finally:
        model.train(was_training)
        reset_rope(model)
    texts = iter(decode_texts(processor, ids[:, inputs["input_ids"].shape[1] :]))
    return [[next(texts) for _ in group] for group in tails]


def _rows(prefilled: Prefilled, tails: Sequence[Sequence[Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """What `generate` takes: `input_ids` and `attention_mask` (R, P + T), `position_ids` (4, R, P + T).

    Prompts and tails are padded on the left, each on its own, so a row may have padding between the two.
    """
    device = prefilled.next_position.device
    questions = [tail.to(device) for group in tails for tail in group]
    counts = torch.tensor([len(group) for group in tails], device=device)
    parts = list(prefilled.input_ids), questions
    ids, masks = (
        [pad_rows(part, value, "left") for part in made]
        for value, made in ((pad_token_id, parts), (0, [[torch.ones_like(row) for row in part] for part in parts]))
    )
    mask = torch.cat([masks[0].repeat_interleave(counts, dim=0), masks[1]], dim=1)
    text = (mask.cumsum(-1) - 1).clamp(min=0)
    width = masks[1].shape[1]
    lengths = masks[1].sum(dim=1, keepdim=True)
    after = torch.arange(width, device=device) - (width - lengths)  # (R, T): 0 at a tail's first token
    positions = text.expand(4, -1, -1).clone()  # the prompt's own are in its keys already
    positions[1:, :, -width:] = (prefilled.next_position.repeat_interleave(counts)[:, None] + after).clamp(min=0)
    return {
        "input_ids": torch.cat([ids[0].repeat_interleave(counts, dim=0), ids[1]], dim=1),
        "attention_mask": mask,
        "position_ids": positions,
    }
