"""Rows that share a prompt's cache compute what rows with a cache of their own compute."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache

from trainers.prefix_cache import CachedPrefix, SharedPrefixCache

KV_HEADS, HEADS, DIM = 2, 6, 8


def prefill(prompts: int, length: int) -> DynamicCache:
    """A one-layer cache of `prompts` prompts with random contents."""
    cache = DynamicCache()
    cache.update(*torch.randn(2, prompts, KV_HEADS, length, DIM), layer_idx=0)
    return cache


def expected(
    cache: DynamicCache, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """torch's own attention over the expanded cache; `mask` (R, P + C)."""
    rows = len(query) // len(cache.layers[0].keys)
    keys, values = (
        torch.cat([old.repeat_interleave(rows, 0), new], dim=2).repeat_interleave(HEADS // KV_HEADS, 1)
        for old, new in ((cache.layers[0].keys, key), (cache.layers[0].values, value))
    )
    (num_queries, length) = query.shape[2], keys.shape[2]
    causal = torch.ones(num_queries, length, dtype=torch.bool).tril(length - num_queries)
    seen = mask.bool()[:, None, None, :] & causal
    return functional.scaled_dot_product_attention(query, keys, values, seen).transpose(1, 2)


@pytest.mark.parametrize(
    ("prompts", "rows", "num_queries", "own"), [(1, 4, 1, 1), (2, 3, 1, 5), (3, 1, 1, 2), (2, 2, 4, 6)]
)
def test_attention_equals_that_over_an_expanded_cache(prompts: int, rows: int, num_queries: int, own: int) -> None:
    """Several prompts, rows, grouped heads, new tokens, with padding before the prompt and among the rows' own."""
    torch.manual_seed(0)
    cache, num_rows = prefill(prompts, 11), prompts * rows
    query = torch.randn(num_rows, HEADS, num_queries, DIM)
    key, value = torch.randn(2, num_rows, KV_HEADS, own, DIM)
    mask = torch.ones(num_rows, 11 + own, dtype=torch.long)
    if prompts > 1:
        mask[rows : 2 * rows, :3] = 0  # the second prompt is shorter
    mask[-1, 11 : 11 + own - num_queries] = 0
    found = CachedPrefix.of(SharedPrefixCache(cache), mask).attend(0, query, key, value, DIM**-0.5)
    assert found.shape == (num_rows, num_queries, HEADS, DIM)
    torch.testing.assert_close(found, expected(cache, query, key, value, mask), rtol=0, atol=2e-6)


@pytest.mark.parametrize("numbers", [(3, 1, 2), (1, 4), (2, 2)])
@pytest.mark.parametrize(("num_queries", "own"), [(1, 3), (5, 5)])
def test_prompts_with_unlike_numbers_of_rows(numbers: tuple[int, ...], num_queries: int, own: int) -> None:
    """Each row meets its own prompt; padding before prompts and before the rows' first tokens."""
    torch.manual_seed(0)
    filled, num_rows = prefill(len(numbers), 7), sum(numbers)
    query = torch.randn(num_rows, HEADS, num_queries, DIM)
    key, value = torch.randn(2, num_rows, KV_HEADS, own, DIM)
    mask = torch.ones(num_rows, 7 + own, dtype=torch.long)
    mask[: numbers[0], :2] = 0  # the first prompt is shorter
    mask[-1, 7:9] = 0
    found = CachedPrefix.of(SharedPrefixCache(filled, numbers), mask).attend(0, query, key, value, DIM**-0.5)
    whole = DynamicCache()
    repeats = torch.tensor(numbers)
    whole.update(*(part.repeat_interleave(repeats, 0) for part in (filled.layers[0].keys, filled.layers[0].values)), 0)
    wanted = expected(whole, query, key, value, mask)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


def test_the_prompt_is_kept_once_and_counts_in_the_length() -> None:
    """No copy of the prefill; new tokens come after prompt and own tokens; `update` gives the rows' own."""
    filled = prefill(2, 7)
    cache = SharedPrefixCache(filled)
    assert cache.get_seq_length() == 7 and CachedPrefix.of(cache, None).padding is None
    assert cache.layers[0].prefix_keys.data_ptr() == filled.layers[0].keys.data_ptr()
    key, value = torch.randn(2, 6, KV_HEADS, 1, DIM)
    cache.update(key, value, layer_idx=0)
    keys, values = cache.update(2 * key, 2 * value, layer_idx=0)
    assert cache.get_seq_length() == 9
    assert torch.equal(keys, torch.cat([key, 2 * key], 2)) and torch.equal(values, torch.cat([value, 2 * value], 2))


def test_an_unpadded_batch_needs_no_mask() -> None:
    """A mask of ones and none at all are the same."""
    cache = SharedPrefixCache(prefill(1, 4))
    assert CachedPrefix.of(cache, torch.ones(3, 5)).padding is None
    assert CachedPrefix.of(cache, None).padding is None
    padded = CachedPrefix.of(cache, torch.tensor([[0, 1, 1, 1, 1]])).padding
    assert padded is not None and padded.tolist() == [[True, False, False, False, False]]
