"""The key/value cache of rows that share a prompt: the prompt's part is kept once, each row adds only its own.

An expanded cache holds the prompt G times, copies all of it with every new token and reads it G times. Here a token of
all G rows is one product with the prompt's keys, beside a small one with the row's own, under one softmax: the same
result, one G-th of the memory. (Known for text as bifurcated attention, Athiwaratkun et al. 2024, arXiv:2403.08845.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class SharedPrefixLayer(DynamicLayer):
    """One layer: `prefix_keys` and `prefix_values` (B, kv_heads, P, dim), and what R = B * G rows added to them."""

    def __init__(self, prefix_keys: Tensor, prefix_values: Tensor) -> None:
        super().__init__()
        self.prefix_keys, self.prefix_values = prefix_keys, prefix_values

    def get_seq_length(self) -> int:
        """Tokens that a new one comes after, the prompt's included."""
        return self.prefix_keys.shape[-2] + super().get_seq_length()


class SharedPrefixCache(Cache):
    """Made of the cache of a prefill over B prompts; takes R = B * G rows from then on, G neighbours sharing a prompt.

    `update` returns the rows' own keys and values only: the model's attention must know this cache
    (`trainers.shared_prefix.enable_shared_prefix`).
    """

    def __init__(self, prefill: Cache) -> None:
        layers = []
        for layer in prefill.layers:
            assert layer.keys is not None and layer.values is not None
            layers.append(SharedPrefixLayer(layer.keys, layer.values))
        super().__init__(layers=layers)


@dataclass(frozen=True)
class CachedPrefix:
    """What the attention needs in one forward pass beside the rows' own keys and values."""

    cache: SharedPrefixCache
    padding: Tensor | None
    """(R, P + C), bool: True where a row has padding; None when no row has any."""

    @classmethod
    def of(cls, cache: SharedPrefixCache, attention_mask: Tensor | None) -> CachedPrefix:
        """`attention_mask` (R, P + C) as the model takes it: 0 where a row has padding."""
        padded = attention_mask is not None and not bool(attention_mask.all())
        return cls(cache, ~attention_mask.bool() if padded and attention_mask is not None else None)

    def attend(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query (R, heads, Q, dim), key and value (R, kv_heads, C, dim) whose last Q tokens are the queries' own
        -> (R, Q, heads, dim)."""
        layer = self.cache.layers[layer_index]
        assert isinstance(layer, SharedPrefixLayer)
        (num_rows, num_heads, num_queries, dim), kv_heads = query.shape, key.shape[1]
        prompts, prefix = len(layer.prefix_keys), layer.prefix_keys.shape[-2]
        # All queries that meet the same keys: the heads of a key/value head, and their places in the sequence.
        own = (query * scaling).reshape(num_rows, kv_heads, -1, dim)  # (R, kv, heads / kv * Q, dim)
        together = _by_prompt(own, prompts)  # (B, kv, G * heads / kv * Q, dim)
        scores = torch.cat([together @ layer.prefix_keys.mT, _by_prompt(own @ key.mT, prompts)], dim=-1).float()
        weights = self._masked(scores, num_rows, num_queries, key.shape[-2]).softmax(-1).to(value.dtype)
        out = _by_row(weights[..., :prefix] @ layer.prefix_values, num_rows)
        out = out + _by_row(weights[..., prefix:], num_rows) @ value
        return out.reshape(num_rows, num_heads, num_queries, dim).transpose(1, 2)

    def _masked(self, scores: Tensor, num_rows: int, num_queries: int, num_own: int) -> Tensor:
        """`scores` (B, kv, G * heads / kv * Q, P + C) without padding and without own tokens after the query."""
        prompts, length = len(scores), scores.shape[-1]
        split = scores.unflatten(2, (num_rows // prompts, -1, num_queries))  # (B, kv, G, heads / kv, Q, P + C)
        if self.padding is not None:
            split = split.masked_fill(self.padding.view(prompts, 1, -1, 1, 1, length), -torch.inf)
        if num_queries > 1:
            later = torch.ones(num_queries, length, dtype=torch.bool, device=scores.device)
            split = split.masked_fill(later.triu(length - num_queries + 1), -torch.inf)
        return split.flatten(2, 4)


def _by_prompt(values: Tensor, prompts: int) -> Tensor:
    """(R, kv, N, X) -> (B, kv, G * N, X)."""
    return values.unflatten(0, (prompts, -1)).transpose(1, 2).flatten(2, 3)


def _by_row(values: Tensor, num_rows: int) -> Tensor:
    """(B, kv, G * N, X) -> (R, kv, N, X)."""
    return values.unflatten(2, (num_rows // len(values), -1)).transpose(1, 2).flatten(0, 1)
