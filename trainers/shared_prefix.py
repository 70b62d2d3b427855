"""A prompt with its video, computed once for all completions that share it. Exact, not approximate (contract 9).

Scoring packs `[prompt, c1 .. cG]` into one sequence: the vision tower and the prompt run once, every completion attends
to the prompt and to itself. Sampling prefills the prompt once, and its G rows share that cache
(`trainers.prefix_cache`). The plain row-by-row path (`rows`, `sample_rows`) stays beside it, with the same inputs and
the same outputs.

Owns packing, its attention, and generation from a shared prefill. Leaves the output head and the loss to the callers:
`Packed.columns` says at which positions hidden states are read, `Packed.targets` which tokens they predict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel, eager_attention_forward

from datasets.pixels import VALUES, Pixels, pixel_values
from trainers.generation import reset_rope
from trainers.prefix_cache import CACHE, CachedPrefix, SharedPrefixCache
from trainers.suffix_attention import SuffixRows, suffix_attention

PREFIX = "shared_prefix_"
"""Name of the attention that understands `PrefixLayout`, before the name of the one it falls back to."""


# ---------------------------------------------------------------------------------------------- prompts
@dataclass(frozen=True)
class Prompt:
    """One prompt and its video, as the model takes them."""

    input_ids: Tensor
    """(P,)"""
    mm_token_type_ids: Tensor
    """(P,)"""
    position_ids: Tensor
    """(3, P): temporal, height and width positions."""
    video_grid_thw: Tensor
    """(1, 3)"""
    pixels: Pixels
    """Of its clip, in the host's memory until a pass needs them."""
    vision: Any = None
    """What the vision tower made of the pixels, when it was computed beforehand (`with_vision`)."""

    def __len__(self) -> int:
        return len(self.input_ids)


def make_prompt(model: Any, sample: dict[str, Any]) -> Prompt:
    """A prompt from a sample of `VideoTemporalDataset(with_answer=False)`, with its positions, on the model's device.

    `sample` has `input_ids` (P,), `mm_token_type_ids` (P,), `video_grid_thw` (1, 3) and `pixels`.
    """
    device = next(model.parameters()).device
    ids, kinds = sample["input_ids"].to(device), sample["mm_token_type_ids"].to(device)
    grid = sample["video_grid_thw"].to(device)
    positions, _ = backbone_of(model).get_rope_index(
        ids[None], mm_token_type_ids=kinds[None], video_grid_thw=grid, attention_mask=torch.ones_like(ids[None])
    )
    return Prompt(ids, kinds, positions[:, 0], grid, sample["pixels"])


def prompt_pixels(prompts: Sequence[Prompt]) -> Tensor:
    """What the vision tower reads of `prompts`, on their device: (patches, patch_dim)."""
    return pixel_values([prompt.pixels for prompt in prompts], prompts[0].input_ids.device)


@torch.no_grad()
def with_vision(model: Any, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts with the vision tower's output kept, for passes that follow while tower and mergers are frozen."""
    backbone = backbone_of(model)
    return [
        replace(
            prompt,
            vision=backbone.get_video_features(
                prompt_pixels([prompt]).to(backbone.visual.dtype), prompt.video_grid_thw, return_dict=True
            ),
        )
        for prompt in prompts
    ]


def vision_is_frozen(model: torch.nn.Module) -> bool:
    """Whether no parameter of the vision tower and the mergers trains, so that its output may be kept over passes."""
    return not any(parameter.requires_grad for parameter in backbone_of(model).visual.parameters())


def backbone_of(model: torch.nn.Module) -> Any:
    """The `Qwen3VLModel` inside `model` (bare, in PEFT, or wrapped for several processes)."""
    return next(module for module in model.modules() if isinstance(module, Qwen3VLModel))


def video_inputs(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The model's video arguments for prompts in this order: the kept vision output if all have one, else pixels."""
    if any(prompt.vision is None for prompt in prompts):
        return {
            VALUES: prompt_pixels(prompts),
            "video_grid_thw": torch.cat([prompt.video_grid_thw for prompt in prompts]),
        }
    outputs = [prompt.vision for prompt in prompts]
    merged = type(outputs[0])(
        pooler_output=tuple(video for output in outputs for video in output.pooler_output),
        deepstack_features=[
            tuple(video for layer in layers for video in layer)
            for layers in zip(*(output.deepstack_features for output in outputs), strict=True)
        ],
    )
    return {"mm_encoder_outputs": {"video": merged}}


# ---------------------------------------------------------------------------------------------- packing
@dataclass(frozen=True)
class PrefixLayout:
    """Where prompts and completions lie in a packed sequence. Travels to the attention as a keyword argument."""

    groups: tuple[tuple[int, int, SuffixRows], ...]
    """For each group: first position, length of the prompt, its completions as packed."""


@dataclass(frozen=True)
class Packed:
    """Model inputs whose hidden states at `columns` predict `targets`."""

    inputs: dict[str, Any]
    columns: Tensor
    """(K,): positions whose hidden states are wanted; a prompt's last one stands once for each completion."""
    targets: Tensor
    """(B, K): the completion tokens; IGNORED where a row has none."""
    rows: tuple[int, ...]
    """Tokens of each completion, in order; `unpack` puts them back into rows."""

    def unpack(self, values: Tensor) -> Tensor:
        """(B, K) values -> (rows, longest completion), 0 where a completion has no token."""
        if len(values) == len(self.rows):  # one row each already: `rows`
            return values
        widest = max(self.rows, default=0)
        out = values.new_zeros(len(self.rows), widest)
        mask = torch.arange(widest, device=values.device) < torch.tensor(self.rows, device=values.device)[:, None]
        return out.masked_scatter(mask, values.flatten())


IGNORED = -100


def pack(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Tensor]],
    num_scored: Sequence[Sequence[int]] | None = None,
) -> Packed:
    """One sequence for all groups: each prompt once, followed by its completions.

    A completion's last token predicts nothing that is scored, so it is left out of the sequence.

    Args:
        prompts: one per group.
        completions: for each prompt its completions, each (C,) token ids; a C of 0 is allowed.
        num_scored: for each completion how many of its last tokens are targets; all of them by default.
    """
    if num_scored is None:
        num_scored = [[len(answer) for answer in answers] for answers in completions]
    ids, positions, columns, targets, groups = [], [], [], [], []
    start, device = 0, prompts[0].input_ids.device
    for prompt, answers, scored in zip(prompts, completions, num_scored, strict=True):
        suffixes = [answer[:-1] for answer in answers]
        after = prompt.position_ids.max() + 1
        ids += [prompt.input_ids, *suffixes]
        positions += [prompt.position_ids, *(_text_positions(after, len(suffix)) for suffix in suffixes)]
        groups.append((start, len(prompt), SuffixRows.of([len(suffix) for suffix in suffixes], device)))
        end = start + len(prompt)
        for answer, suffix, num in zip(answers, suffixes, scored, strict=True):
            before = torch.cat([torch.tensor([start + len(prompt) - 1]), torch.arange(end, end + len(suffix))])
            columns.append(before[len(answer) - num : len(answer)])
            targets.append(answer[len(answer) - num :])
            end += len(suffix)
        start = end
    inputs = {"input_ids": torch.cat(ids)[None], "position_ids": torch.cat(positions, dim=1)[:, None]}
    return Packed(
        inputs | video_inputs(prompts) | {"prefix_layout": PrefixLayout(tuple(groups))},
        torch.cat(columns).to(device),
        torch.cat(targets)[None],
        tuple(map(len, targets)),
    )


def rows(prompts: Sequence[Prompt], completions: Sequence[Sequence[Tensor]], *, pad_token_id: int) -> Packed:
    """The same tokens as `pack`, one row for each completion with its own copy of prompt and pixels, as stock training
    does it: prompts padded on the left, completions on the right."""
    repeated = [prompt for prompt, answers in zip(prompts, completions, strict=True) for _ in answers]
    flat = [answer for answers in completions for answer in answers]
    widest, longest = max(map(len, repeated)), max(map(len, flat))
    ids = prompts[0].input_ids.new_full((len(flat), widest + longest), pad_token_id)
    targets = ids.new_full((len(flat), longest), IGNORED)
    mask, positions = torch.zeros_like(ids), ids.new_zeros(3, *ids.shape)
    for row, (prompt, answer) in enumerate(zip(repeated, flat, strict=True)):
        first, stop = widest - len(prompt), widest + len(answer)
        after = _text_positions(prompt.position_ids.max() + 1, len(answer))
        ids[row, first:stop] = torch.cat([prompt.input_ids, answer])
        mask[row, first:stop] = 1
        positions[:, row, first:stop] = torch.cat([prompt.position_ids, after], dim=1)
        targets[row, : len(answer)] = answer
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **video_inputs(repeated)}
    columns = torch.arange(widest - 1, widest + longest - 1, device=ids.device)
    return Packed(inputs, columns, targets, tuple(map(len, flat)))


def _text_positions(first: Tensor, length: int) -> Tensor:
    """(3, length): text after a video counts on alike on all three axes."""
    return (first + torch.arange(length, device=first.device)).expand(3, -1)


# ---------------------------------------------------------------------------------------------- attention
def enable_shared_prefix(model: torch.nn.Module) -> None:
    """Let `model` take `pack`'s inputs. Everything else it computes as before.

    The language model's attention is wrapped under a name of its own (the vision tower keeps its own); a call takes two
    keywords more: `prefix_layout`, and `gather_columns` (K,), which reduces the hidden states to those positions before
    the output head. A `SharedPrefixCache` is taken as the cache. Calling it again changes nothing.
    """
    backbone = backbone_of(model)
    base = backbone.config.text_config._attn_implementation
    if base.startswith(PREFIX):
        return
    _register(base)
    backbone.set_attn_implementation({"text_config": PREFIX + base})
    arguments = _PackedArguments()
    backbone.register_forward_pre_hook(arguments.take, with_kwargs=True)
    backbone.language_model.register_forward_pre_hook(arguments.give, with_kwargs=True)
    backbone.register_forward_hook(arguments.gather)


class _PackedArguments:
    """Carries the keywords past the vision tower, which does not know them."""

    def __init__(self) -> None:
        self.layout: PrefixLayout | CachedPrefix | None = None
        self.columns: Tensor | None = None

    def take(self, _module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        kwargs = dict(kwargs)
        self.layout, self.columns = kwargs.pop("prefix_layout", None), kwargs.pop("gather_columns", None)
        cache = kwargs.get(CACHE)
        if isinstance(cache, SharedPrefixCache):
            self.layout = CachedPrefix.of(cache, kwargs.get("attention_mask"))
        return args, kwargs

    def give(self, _module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        return None if self.layout is None else (args, {**kwargs, "prefix_layout": self.layout})

    def gather(self, _module: Any, _args: Any, output: Any) -> Any:
        columns, self.layout, self.columns = self.columns, None, None
        if columns is not None:
            output.last_hidden_state = output.last_hidden_state[:, columns]
        return output


def _register(base: str) -> None:
    """Make the wrapped attention known to transformers, with the base's own way of building masks."""
    plain = eager_attention_forward if base == "eager" else ALL_ATTENTION_FUNCTIONS[base]
    AttentionInterface.register(PREFIX + base, _prefix_attention(base, plain))
    AttentionMaskInterface.register(PREFIX + base, ALL_MASK_ATTENTION_FUNCTIONS[base])


def _prefix_attention(base: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    causal = sdpa_attention_forward if plain is eager_attention_forward else plain  # eager wants a mask of P x P

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        prefix_layout: PrefixLayout | CachedPrefix | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """query (1, heads, L, dim), key and value (1, kv_heads, L, dim) -> (1, L, heads, dim).

        The prompt attends to itself, causally; the completions to the prompt and each to its own past
        (`trainers.suffix_attention`). Neither takes a mask. Keys and values are views: nothing is copied G times.
        """
        if isinstance(prefix_layout, CachedPrefix):
            return prefix_layout.attend(module.layer_idx, query, key, value, kwargs["scaling"]), None
        module = _known_as(base, module)
        if prefix_layout is None:
            return plain(module, query, key, value, attention_mask, **kwargs)
        query, key, value = _as_autocast(query, key, value)
        parts = []
        for start, prefix, rows in prefix_layout.groups:
            middle, end = start + prefix, start + prefix + sum(rows.lengths)
            own, rest, whole = slice(start, middle), slice(middle, end), slice(start, end)
            parts.append(causal(module, query[:, :, own], key[:, :, own], value[:, :, own], None, **kwargs)[0])
            if end > middle:
                given = query[:, :, rest], key[:, :, whole], value[:, :, whole], rows
                parts.append(suffix_attention(*given, kwargs["scaling"], kwargs.get("dropout", 0.0)).transpose(1, 2))
        return torch.cat(parts, dim=1), None

    return attention


def _as_autocast(*tensors: Tensor) -> list[Tensor]:
    """In the type that autocast would have attention compute in, once for all its parts."""
    kind = tensors[0].device.type
    return [part.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else part for part in tensors]


def _known_as(base: str, module: Any) -> Any:
    """`module` with the name of its own attention: FlashAttention's wrapper looks up there which library to load."""
    if "flash" not in base:
        return module
    return _Changed(module, config=_Changed(module.config, _attn_implementation=base))


class _Changed:
    """Another object with some of its attributes replaced."""

    def __init__(self, other: Any, **attributes: Any) -> None:
        self.__dict__.update(attributes)
        self._other = other

    def __getattr__(self, name: str) -> Any:
        return getattr(self._other, name)


# ---------------------------------------------------------------------------------------------- sampling
@torch.no_grad()
def sample_shared(model: Any, prompts: Sequence[Prompt], num: int, generation_config: Any, pad_token_id: int) -> Tensor:
    """`num` completions of every prompt, all decoded together from one prefill a prompt.

    Args:
        model: bare, or a `PeftModel`; its parameters gathered.
        prompts: B of them; left-padded to the longest.
        generation_config: transformers' GenerationConfig.

    Returns:
        (B * num, C) new token ids, padded after the end.
    """
    enable_shared_prefix(model)
    batch = _padded(prompts, pad_token_id)
    text = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)[None]
    positions = torch.cat([text, batch.pop("position_ids")])  # (4, B, P): `generate` wants the text's own first
    try:
        head = {key: batch[key][:, :-1] for key in ("input_ids", "attention_mask")}
        output = model(
            **head, position_ids=positions[..., :-1], **video_inputs(prompts), use_cache=True, logits_to_keep=1
        )
        ids = model.generate(
            input_ids=batch["input_ids"].repeat_interleave(num, dim=0),
            attention_mask=batch["attention_mask"].repeat_interleave(num, dim=0),
            position_ids=positions.repeat_interleave(num, dim=1),
            **{CACHE: SharedPrefixCache(output[CACHE])},
            generation_config=generation_config,
        )
    finally:
        reset_rope(model)
    return ids[:, batch["input_ids"].shape[1] :]


@torch.no_grad()
def sample_rows(model: Any, prompts: Sequence[Prompt], num: int, generation_config: Any, pad_token_id: int) -> Tensor:
    """As `sample_shared`, by stock `generate` on `num` full copies of every prompt and its pixels."""
    repeated = [prompt for prompt in prompts for _ in range(num)]
    batch = _padded(repeated, pad_token_id)
    del batch["position_ids"]  # stock generate makes them itself
    try:
        ids = model.generate(**batch, **video_inputs(repeated), generation_config=generation_config)
    finally:
        reset_rope(model)
    return ids[:, batch["input_ids"].shape[1] :]


def _padded(prompts: Sequence[Prompt], pad_token_id: int) -> dict[str, Tensor]:
    """Left-padded `input_ids`, `attention_mask`, `mm_token_type_ids` (B, P) and `position_ids` (3, B, P)."""
    widest = max(map(len, prompts))
    ids = prompts[0].input_ids.new_full((len(prompts), widest), pad_token_id)
    batch = {"input_ids": ids, "attention_mask": torch.zeros_like(ids), "mm_token_type_ids": torch.zeros_like(ids)}
    batch["position_ids"] = ids.new_zeros(3, *ids.shape)
    for row, prompt in enumerate(prompts):
        first = widest - len(prompt)
        batch["input_ids"][row, first:] = prompt.input_ids
        batch["attention_mask"][row, first:] = 1
        batch["mm_token_type_ids"][row, first:] = prompt.mm_token_type_ids
        batch["position_ids"][:, row, first:] = prompt.position_ids
    return batch
