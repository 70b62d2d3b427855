"""How many bytes the activations of a Qwen3-VL take, from shapes alone.

What a layer keeps for its backward pass is added up tensor by tensor, as Korthikanti et al. 2022 do it for GPT
(arXiv:2205.05198, section 4.1); below stand the layers of Qwen3-VL as transformers computes them, under autocast or
not, with LoRA or without. The tests compare them with what autograd saves. With gradient checkpointing (Chen et al.
2016, arXiv:1604.06174) a layer's input is kept, and one layer at a time computed again.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainers.memory import ModelShape, Precision, TextShape, Trains, VisionShape

MERGE = 4
"""Patches that become one visual token (2 x 2)."""
PIXEL_BYTES = 4
"""Of one value of a patch: `datasets.pixels.pixel_values` gives fp32."""
HEAD_TILE, HEAD_CHUNK = 4096, 32768
"""TRL's fused head: tokens and vocabulary entries of one tile of logits (trl.kernels.chunked_logprob)."""


# ---------------------------------------------------------------------------------------------- language model
@dataclass(frozen=True)
class Sequence:
    """What one forward pass of the language model works on."""

    tokens: int
    """Of all rows, padding included."""
    attention: str = "plain"
    """plain (no mask is stored: causal SDPA, FlashAttention), masked (SDPA on padded rows), packed (a prompt with its
    completions, `trainers.suffix_attention`, which takes no mask either) or eager (scores are stored)."""
    mask: int = 0
    """Elements of the mask, or of the scores of one head."""


def layer_saved(text: TextShape, precision: Precision, trains: Trains, sequence: Sequence) -> float:
    """Bytes that one decoder layer saves for its backward pass (Korthikanti et al., section 4.1, for this layer).

    An fp32 residual stream is itself what the norms save, so the layer's input is then part of this.
    """
    per_token = _norms(text, precision, trains) + _linear_inputs(text, precision, trains, sequence.attention)
    per_token += 3 * precision.products * text.intermediate  # SiLU's input, its output, and what it is multiplied with
    return sequence.tokens * per_token + _attention(text, precision, sequence) + cast_bytes(text, precision, trains)


def _norms(text: TextShape, precision: Precision, trains: Trains) -> int:
    """Each RMSNorm saves its input in fp32 and one factor a row; where its weight trains, what the weight meets too."""
    own = trains.language
    stream = 2 * (4 * text.hidden + 4 + precision.stream * text.hidden * own)
    width, rows = text.queries + text.keys, text.heads + text.kv_heads
    return stream + 4 * width + 4 * rows + precision.products * width * own


def _linear_inputs(text: TextShape, precision: Precision, trains: Trains, attention: str) -> int:
    """Inputs of linear layers, saved only for weights that train. Layers that read the same tensor share it, unless a
    cast makes a copy for each."""
    readers = text.inputs()
    trained = set(readers) if trains.language else {name for name in readers if name in trains.targets}
    copies = precision.autocast or (not trains.language and precision.adapters != precision.stream)
    width = precision.products if precision.autocast or trains.language else precision.adapters
    total = sum(trains.rank * width + trains.dropout * readers[name] for name in trained if not trains.language)
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",)):
        members = [readers[name] for name in group if name in trained]
        total += width * (sum(members) if copies else max(members, default=0))
    # What attention gave is saved already, unless it was cast or put together from parts.
    is_new = (copies and not trains.language) or attention == "packed"
    return total + (width * readers["o_proj"] if "o_proj" in trained and is_new else 0)


def _attention(text: TextShape, precision: Precision, sequence: Sequence) -> int:
    """Queries, keys, values, result and log-sum-exp; a mask makes a copy of keys and values for every query head."""
    saved = sequence.tokens * (precision.products * 2 * (text.queries + text.keys) + 4 * text.heads)
    if sequence.attention in ("plain", "packed"):
        return saved
    saved += sequence.tokens * precision.products * 2 * (text.queries - text.keys)
    if sequence.attention == "masked":
        return saved + precision.products * sequence.mask
    return saved + text.heads * sequence.mask * (4 + (precision.products if precision.products < 4 else 0))


def cast_bytes(text: TextShape, precision: Precision, trains: Trains) -> int:
    """Under autocast: the copies of fp32 weights that the backward pass needs."""
    if not precision.autocast:
        return 0
    ins, outs = text.inputs(), text.outputs()
    adapters = sum(trains.rank * (ins[name] + outs[name]) for name in ins if name in trains.targets)
    weights = sum(ins[name] * outs[name] for name in ins) if precision.weights > precision.products else 0
    return precision.products * (adapters + weights)


def layer_work(text: TextShape, precision: Precision, trains: Trains, tokens: int) -> float:
    """Bytes of gradients at the peak of a layer's backward pass, beside what the layer saved: of the MLP's three wide
    tensors (two, where the last one's input was saved for a weight and is free by then) and of the residual stream."""
    wide = 2 if trains.language or "down_proj" in trains.targets else 3
    return tokens * (wide * precision.products * text.intermediate + precision.stream * text.hidden)


def forward_work(text: TextShape, precision: Precision, sequence: Sequence) -> float:
    """Bytes at the peak of a layer's pass without gradients: the MLP's three wide tensors, the residual stream before
    and after; and the mask, as booleans and as numbers."""
    mask = sequence.mask * (1 + precision.products) if sequence.attention == "masked" else 0
    return sequence.tokens * (3 * precision.products * text.intermediate + 2 * precision.stream * text.hidden) + mask


def language_kept(
    text: TextShape, precision: Precision, trains: Trains, sequence: Sequence, *, checkpointing: bool
) -> float:
    """Bytes that the decoder layers keep until their backward pass: with checkpointing the input of each, else all that
    each saves; beside them the rotary factors and the mask."""
    if checkpointing:
        layer: float = sequence.tokens * text.hidden * precision.stream
    else:
        layer = layer_saved(text, precision, trains, sequence)
    return text.layers * layer + sequence.tokens * 2 * text.head_dim * precision.stream + sequence.mask


def layer_at_work(
    text: TextShape, precision: Precision, trains: Trains, sequence: Sequence, *, checkpointing: bool
) -> float:
    """Bytes of the one layer whose backward pass runs, beside `language_kept`. With checkpointing all that it saves is
    computed again, but for an fp32 input, which was kept."""
    work = layer_work(text, precision, trains, sequence.tokens)
    if not checkpointing:
        return work
    kept = sequence.tokens * 4 * text.hidden if precision.stream == 4 else 0
    return work + layer_saved(text, precision, trains, sequence) - kept


# ---------------------------------------------------------------------------------------------- vision tower
def vision_kept(
    vision: VisionShape, precision: Precision, trains: Trains, patches: int, *, checkpointing: bool
) -> float:
    """Bytes that mergers and vision blocks keep for the backward pass; a frozen tower with frozen mergers keeps none,
    for no gradient passes through it. Mergers are not checkpointed."""
    if not (trains.mergers or trains.tower):
        return 0
    saved = vision.mergers * merger_saved(vision, precision)
    if trains.tower:
        block = vision.hidden * precision.stream if checkpointing else block_saved(vision, precision)
        saved += vision.depth * block + _cast_pixels(vision, precision)
    return patches * saved


def merger_saved(vision: VisionShape, precision: Precision) -> int:
    """Bytes a patch that one merger saves: LayerNorm's input, its output, GELU's input and output."""
    return vision.hidden * (_layer_norm_input(precision) + 3 * precision.products)


def block_saved(vision: VisionShape, precision: Precision) -> int:
    """Bytes a patch that one vision block saves: two LayerNorms' inputs and outputs; queries, keys and values together,
    queries and keys as they were turned, attention's result twice; GELU's input and output."""
    wide = vision.hidden * (2 * _layer_norm_input(precision) + 9 * precision.products)
    return wide + 2 * precision.products * vision.intermediate + 16 + 4 * vision.heads


def _layer_norm_input(precision: Precision) -> int:
    return 4 if precision.autocast else precision.products


def vision_work(vision: VisionShape, precision: Precision, trains: Trains, patches: int) -> float:
    """Bytes at the peak of the tower's own passes, beside what it keeps.

    Forward: pixels in the weights' type, positions, and a block at its rotary embedding, which is computed in fp32, or
    in its MLP, whichever is more. Backward, if the tower trains: a block as it was saved, and gradients of its MLP; the
    last merger is done by then.
    """
    width = precision.products
    turning = vision.hidden * (4 * width + (20 if width == 4 else 24))
    mlp = 2 * width * (vision.intermediate + vision.hidden)
    held = vision.hidden * (precision.stream + 4) + 8 * vision.hidden // vision.heads
    forward = max(turning, mlp) + held + (0 if trains.tower else _cast_pixels(vision, precision))
    if not trains.tower:
        return patches * forward
    kept = 4 * vision.hidden if precision.stream == 4 else 0
    gradients = width * vision.intermediate + precision.stream * vision.hidden
    backward = block_saved(vision, precision) - kept + gradients - merger_saved(vision, precision)
    return patches * max(forward, backward)


def _cast_pixels(vision: VisionShape, precision: Precision) -> int:
    """Bytes a patch of the pixels in the type that the patch embedding computes in, if that is another."""
    return 0 if precision.products == PIXEL_BYTES else vision.patch_values * precision.products


def vision_output(model: ModelShape, precision: Precision, visual_tokens: int) -> float:
    """Bytes of what the language model gets: the merger's features and those of the deepstack mergers."""
    return visual_tokens * model.text.hidden * precision.products * model.vision.mergers


# ---------------------------------------------------------------------------------------------- logits
def head_work(text: TextShape, precision: Precision, trains: Trains, scored: int, *, fused: bool) -> float:
    """Bytes of the output head at its peak. `scored` positions of all rows reach it.

    Plain: logits, and in fp32 their log-softmax with two gradients. Fused (GRPO): one tile of logits, one chunk of the
    weights in the tile's type, and an fp32 gradient of the hidden states. Either way the gradient of a head that
    trains, before it is added to that of earlier forward passes.
    """
    weight = text.vocab * text.hidden
    gradient = weight * precision.adapters * trains.head
    if fused:
        tile = min(text.vocab, HEAD_CHUNK) * (min(scored, HEAD_TILE) + text.hidden) * precision.products
        return tile + 4 * scored * text.hidden + gradient
    cast = weight * precision.products * (trains.head and precision.autocast)
    logits = scored * text.vocab
    return cast + max(logits * (12 + precision.products), logits * precision.products + gradient)


# ---------------------------------------------------------------------------------------------- generation
@dataclass(frozen=True)
class Answering:
    """Answers sampled together: a prefill of `prompts` rows, then one token at a time for `answers` rows."""

    prompts: int
    tokens: int
    """Of a prompt."""
    answers: int
    """More than `prompts` where rows share a prompt's cache, which is kept once (`trainers.prefix_cache`)."""
    new_tokens: int
    masked: bool = False
    """Whether a mask for the padding of shorter prompts is stored (SDPA and eager attention)."""


def cache_bytes(text: TextShape, precision: Precision, answering: Answering) -> float:
    """Keys and values of all layers: of each prompt once, and of each answer its own tokens. Keys have the residual
    stream's type, for the norm before them has; values that of products."""
    token = text.layers * text.keys * (precision.stream + precision.products)
    return token * (answering.prompts * answering.tokens + answering.answers * answering.new_tokens)


def prefill_work(text: TextShape, precision: Precision, answering: Answering) -> float:
    """Bytes at the peak of the prefill, beside the cache."""
    tokens = answering.prompts * answering.tokens
    mask = answering.prompts * answering.tokens**2 if answering.masked else 0
    return forward_work(text, precision, Sequence(tokens, "masked" if mask else "plain", mask))
