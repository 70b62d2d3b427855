"""Several sampled answers to one question, the video and the prompt computed once for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from transformers import GenerationConfig

from trainers.generation import vision_token_ids
from trainers.model import Policy
from trainers.shared_prefix import make_prompt, sample_shared


def plain_sampling(policy: Policy, *, temperature: float, max_new_tokens: int) -> GenerationConfig:
    """Sampling from the model's own distribution at `temperature`, as GRPO's rollouts are; the checkpoint's top_k and
    the like do not count. Vision tokens are never drawn: they would ask for pixels that nobody has."""
    tokenizer = policy.processor.tokenizer
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=temperature,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        suppress_tokens=vision_token_ids(policy.processor),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        disable_compile=True,
    )


def sample_texts(
    policy: Policy, samples: Sequence[dict[str, Any]], num_samples: int, config: GenerationConfig
) -> list[list[str]]:
    """`num_samples` answers to each of `samples` (from `VideoTemporalDataset(with_answer=False)`, none faulty), all
    decoded together: each holds `num_samples` copies of its prompt's key/value cache."""
    if not samples:
        return []
    tokenizer = policy.processor.tokenizer
    prompts = [make_prompt(policy.model, sample) for sample in samples]
    ids = sample_shared(policy.model, prompts, num_samples, config, tokenizer.pad_token_id)
    texts = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]  # padding is special
    return [texts[start : start + num_samples] for start in range(0, len(texts), num_samples)]


def sample_answers(
    policy: Policy,
    samples: Iterable[dict[str, Any]],
    *,
    num_samples: int,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    prompts_per_batch: int = 8,
) -> Iterator[tuple[int, list[str]]]:
    """Yields (row number, its answers), in order; samples with a `fault` are passed over."""
    config = plain_sampling(policy, temperature=temperature, max_new_tokens=max_new_tokens)
    batch: list[dict[str, Any]] = []
    for sample in samples:
        if "fault" not in sample:
            batch.append(sample)
        if len(batch) == prompts_per_batch:
            yield from _answers(policy, batch, num_samples, config)
            batch = []
    yield from _answers(policy, batch, num_samples, config)


def _answers(
    policy: Policy, batch: Sequence[dict[str, Any]], num_samples: int, config: GenerationConfig
) -> Iterator[tuple[int, list[str]]]:
    return zip([sample["index"] for sample in batch], sample_texts(policy, batch, num_samples, config), strict=True)
