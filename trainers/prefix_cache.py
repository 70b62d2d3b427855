"""The key/value cache of rows that share a prompt: the prompt's part is kept once, each row adds only its own.

An expanded cache holds the prompt G times, copies all of it with every new token and reads it G times. Here a token of
all G rows is one product with the prompt's keys, beside a small one with the row's own, under one softmax: the same
result, one G-th of the memory. (Known for text as bifurcated attention, Athiwaratkun et al. 2024, arXiv:2403.08845.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE = next(name for name in ("cache", "past_key_values") if name in {f.name for f in fields(CausalLMOutputWithPast)})
"""What models and `generate` call the cache, as keyword and in their outputs: `cache` from transformers 5.24 on."""


class SharedPrefixLayer(DynamicLayer):
    """One layer: `prefix_keys` and `prefix_values` (B, kv_heads, P, dim), and what R = B * G rows added to them."""

    def __init__(self, prefix_keys: Tensor, prefix_values: Tensor) -> None:
        super().__init__()
        self.prefix_keys, self.prefix_values = prefix_keys, prefix_values

    def get_seq_length(self) -> int:
        """Tokens that a new one comes after, the prompt's included."""
        return self.prefix_keys.shape[-2] + super().get_seq_length()


class SharedPrefixCache(Cache):
    """Made of the cache of a prefill over B prompts; takes R rows from then on, neighbours sharing a prompt.

    `rows` says how many rows follow each prompt; without it all have as many, R = B * G. The prefill is not changed, so
    another cache may be made of it. `update` returns the rows' own keys and values only: the model's attention must
    know this cache (`trainers.shared_prefix.enable_shared_prefix`).
    """

    def __init__(self, prefill: Cache, rows: Sequence[int] | None = None) -> None:
        layers = []
        for layer in prefill.layers:
            assert layer.keys is not None and layer.values is not None
            layers.append(SharedPrefixLayer(layer.keys, layer.values))
        super().__init__(layers=layers)
        self.places = None if rows is None or len(set(rows)) == 1 else RowPlaces.of(rows, layers[0].prefix_keys.device)


@dataclass(frozen=True)
class RowPlaces:
    """Rows of prompts that have unlike numbers of them, laid out with the most that any has (G) for each.

    Only attention's small products are computed for the places that stay free; the rest of the model sees R rows.
    """

    rows: Tensor
    """(B * G,): the row in each place; any row where a place is free."""
    places: Tensor
    """(R,): the place of each row."""

    @classmethod
    def of(cls, rows: Sequence[int], device: torch.device) -> RowPlaces:
        """`rows`: how many follow each prompt."""
        numbers = torch.arange(sum(rows), device=device).split(list(rows))
        table = pad_sequence(list(numbers), batch_first=True, padding_value=-1).flatten()
        return cls(table.clamp(min=0), torch.nonzero(table >= 0).flatten())


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
        together = self._by_prompt(own, prompts)  # (B, kv, G * heads / kv * Q, dim)
        scores = torch.cat([together @ layer.prefix_keys.mT, self._by_prompt(own @ key.mT, prompts)], dim=-1).float()
        per_row = num_heads // kv_heads * num_queries
        weights = self._masked(scores, per_row, num_queries).softmax(-1).to(value.dtype)
        out = self._by_row(weights[..., :prefix] @ layer.prefix_values, per_row)
        out = out + self._by_row(weights[..., prefix:], per_row) @ value
        return out.reshape(num_rows, num_heads, num_queries, dim).transpose(1, 2)

    def _masked(self, scores: Tensor, per_row: int, num_queries: int) -> Tensor:
        """`scores` (B, kv, G * per_row, P + C) without padding and without own tokens after the query."""
        prompts, length = len(scores), scores.shape[-1]
        split = scores.unflatten(2, (-1, per_row // num_queries, num_queries))  # (B, kv, G, heads / kv, Q, P + C)
        if self.padding is not None:
            padding = self._placed(self.padding).view(prompts, 1, -1, 1, 1, length)
            split = split.masked_fill(padding, -torch.inf)
        if num_queries > 1:
            later = torch.ones(num_queries, length, dtype=torch.bool, device=scores.device)
            split = split.masked_fill(later.triu(length - num_queries + 1), -torch.inf)
        return split.flatten(2, 4)

    def _placed(self, values: Tensor) -> Tensor:
        """(R, ...) -> (B * G, ...)."""
        return values if self.cache.places is None else values[self.cache.places.rows]

    def _by_prompt(self, values: Tensor, prompts: int) -> Tensor:
        """(R, kv, N, X) -> (B, kv, G * N, X)."""
        return self._placed(values).unflatten(0, (prompts, -1)).transpose(1, 2).flatten(2, 3)

    def _by_row(self, values: Tensor, per_row: int) -> Tensor:
        """(B, kv, G * N, X) -> (R, kv, N, X), N = per_row."""
        rows = values.unflatten(2, (-1, per_row)).transpose(1, 2).flatten(0, 1)
        return rows if self.cache.places is None else rows[self.cache.places.places]
