"""Several sampled answers to one question, the video and the prompt computed once for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import GenerationConfig

from trainers.generation import vision_token_ids
from trainers.model import Policy
from trainers.shared_prefix import make_prompt, sample_shared


@torch.no_grad()
def sample_answers(
    policy: Policy,
    samples: Iterable[dict[str, Any]],
    *,
    num_samples: int,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    prompts_per_batch: int = 8,
) -> Iterator[tuple[int, list[str]]]:
    """Answers drawn from the model's own distribution (no top-p, no top-k), as GRPO's rollouts are.

    Args:
        policy: as `trainers.model.load_for_inference` gives it.
        samples: from `VideoTemporalDataset(with_answer=False)`; those with a `fault` are passed over.
        num_samples: answers to each.
        prompts_per_batch: prompts decoded together, each with `num_samples` copies of its key/value cache.

    Yields:
        (row number, its answers), in order.
    """
    tokenizer = policy.processor.tokenizer
    config = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
        suppress_tokens=vision_token_ids(policy.processor),
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    batch: list[dict[str, Any]] = []

    def answer() -> Iterator[tuple[int, list[str]]]:
        prompts = [make_prompt(policy.model, sample) for sample in batch]
        ids = sample_shared(policy.model, prompts, num_samples, config, tokenizer.pad_token_id)
        texts = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        for place, sample in enumerate(batch):
            yield sample["index"], texts[place * num_samples : (place + 1) * num_samples]

    for sample in samples:
        if "fault" not in sample:
            batch.append(sample)
        if len(batch) == prompts_per_batch:
            yield from answer()
            batch.clear()
    if batch:
        yield from answer()
