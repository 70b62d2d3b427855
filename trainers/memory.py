"""How many bytes training takes on each GPU, from shapes alone: nothing is loaded, nothing runs.

Sources:
    ZeRO           Rajbhandari et al. 2020, arXiv:1910.02054, sections 3 and 5: bytes of a parameter, its gradient and
                   its optimizer state, and what each stage divides by the number of GPUs
    activations    Korthikanti et al. 2022, arXiv:2205.05198, section 4: what a layer keeps for its backward pass, added
                   up tensor by tensor. Theirs is GPT's layer; below stand those of Qwen3-VL as transformers computes
                   them, under autocast or not, with LoRA or without. The tests compare them with what autograd saves
    checkpointing  Chen et al. 2016, arXiv:1604.06174: a layer's input is kept, and one layer at a time computed again

`ALLOWANCES` are not derived: they stand for what a process takes beside its tensors. Reading a model, a configuration
and a data set is `trainers.memory_plan`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MERGE = 4
"""Patches that become one visual token (2 x 2)."""
PIXEL_BYTES = 4
"""Of one value of a patch: the processor gives fp32."""
HEAD_TILE, HEAD_CHUNK = 4096, 32768
"""TRL's fused head: tokens and vocabulary entries of one tile of logits (trl.kernels.chunked_logprob)."""

OPTIMIZER_BYTES = {"adamw": 8.0, "8bit": 2.0, "4bit": 1.0, "lion": 4.0, "lion_8bit": 1.0, "rmsprop": 4.0,
                   "adagrad": 4.0, "sgd": 0.0, "adafactor": 0.02}  # fmt: skip
"""Bytes of optimizer state for a parameter. AdamW: two fp32 moments."""


@dataclass(frozen=True)
class Allowances:
    """What a process takes beside its tensors. Round figures from common practice; not measured here."""

    context: int = 600_000_000
    """CUDA context, kernels and cuBLAS workspace of a process."""
    nccl: int = 400_000_000
    """NCCL's channels, with more than one GPU."""
    fragmentation: float = 0.1
    """Of what is allocated and freed again within a step: gaps that torch's allocator cannot use."""


ALLOWANCES = Allowances()


# ---------------------------------------------------------------------------------------------- what trains, and how
@dataclass(frozen=True)
class TextShape:
    """Widths and depth of the language model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def queries(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads, or of all value heads."""
        return self.kv_heads * self.head_dim

    def inputs(self) -> dict[str, int]:
        """Width that each linear layer of a decoder layer reads."""
        wide = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), self.hidden)
        return {**wide, "o_proj": self.queries, "down_proj": self.intermediate}

    def outputs(self) -> dict[str, int]:
        """Width that each of them writes."""
        wide = {"q_proj": self.queries, "k_proj": self.keys, "v_proj": self.keys, "o_proj": self.hidden}
        return {**wide, "gate_proj": self.intermediate, "up_proj": self.intermediate, "down_proj": self.hidden}


@dataclass(frozen=True)
class VisionShape:
    """Widths and depth of the vision tower."""

    hidden: int
    intermediate: int
    heads: int
    depth: int
    mergers: int
    """The merger and the deepstack mergers."""
    patch_values: int
    """Values of one patch: 3 colours x 2 frames x 16 x 16 pixels."""


@dataclass(frozen=True)
class ModelShape:
    """Both halves of a Qwen3-VL."""

    text: TextShape
    vision: VisionShape

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """Of transformers' `Qwen3VLConfig`."""
        text, vision = config.text_config, config.vision_config
        language = TextShape(
            text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.num_attention_heads,
            text.num_key_value_heads, text.head_dim, text.vocab_size,
        )  # fmt: skip
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        mergers = 1 + len(vision.deepstack_visual_indexes)
        tower = VisionShape(
            vision.hidden_size, vision.intermediate_size, vision.num_heads, vision.depth, mergers, values
        )
        return cls(language, tower)


@dataclass(frozen=True)
class Parameters:
    """What a model holds, in bytes as loaded and in numbers (`trainers.memory_plan.count_parameters`)."""

    frozen_bytes: int
    num_frozen: int
    trained_bytes: int
    num_trained: int
    num_trained_embedding: int = 0
    """Of `num_trained`, in `nn.Embedding`: bitsandbytes keeps their optimizer state in 32 bits."""
    largest_trained: int = 0
    """Elements of the largest trained tensor, whose gradient is whole for a moment."""
    reference_bytes: int = 0
    """A frozen copy for the KL term of GRPO: of the adapter, or of the model in full fine-tuning."""


@dataclass(frozen=True)
class Precision:
    """Bytes of an element."""

    weights: int
    """Of the model as loaded."""
    adapters: int
    """Of LoRA's matrices and of copies trained in full."""
    products: int
    """Of what matrix products give."""
    autocast: bool
    """Whether inputs and fp32 weights of matrix products are cast to `products` on the way."""

    @property
    def stream(self) -> int:
        """Of the residual stream, which takes the type of the weights."""
        return self.weights


@dataclass(frozen=True)
class Trains:
    """Which parts have gradients."""

    language: bool = False
    """The language model's own weights (full fine-tuning)."""
    targets: frozenset[str] = frozenset()
    """Linear layers with a LoRA pair."""
    rank: int = 0
    dropout: bool = False
    head: bool = False
    """Embeddings and output head."""
    mergers: bool = False
    tower: bool = False


@dataclass(frozen=True)
class Sharding:
    """How the GPUs share the model: ZeRO's stages, and what waits in the host's memory."""

    num_gpus: int = 1
    stage: int | None = None
    """None: no DeepSpeed; with several GPUs, plain data parallel."""
    offload_optimizer: bool = False
    offload_weights: bool = False
    bucket: int = 0
    """Elements of gradients that are reduced together."""
    max_live: int = 0
    """Elements of gathered weights at once, in stage 3."""

    @classmethod
    def from_deepspeed(cls, blocks: Mapping[str, Any] | None, num_gpus: int, hidden: int) -> Sharding:
        """From a DeepSpeed file's contents; `hidden` fills in `auto` as transformers does (hidden size squared)."""
        if blocks is None:
            return cls(num_gpus)
        zero: dict[str, Any] = dict(blocks.get("zero_optimization", {}))
        bucket = zero.get("reduce_bucket_size", 500_000_000)
        return cls(
            num_gpus,
            stage=int(zero.get("stage", 0)),
            offload_optimizer=_offloads(zero.get("offload_optimizer")),
            offload_weights=_offloads(zero.get("offload_param")),
            bucket=hidden * hidden if bucket == "auto" else int(bucket),
            max_live=int(float(zero.get("stage3_max_live_parameters", 1e9))),
        )

    def share(self, num_bytes: float, from_stage: int) -> float:
        """`num_bytes`, divided by the GPUs where the stage is at least `from_stage`."""
        return num_bytes / self.num_gpus if (self.stage or 0) >= from_stage else num_bytes


def _offloads(block: Mapping[str, Any] | None) -> bool:
    return bool(block) and str((block or {}).get("device", "none")) != "none"


# ---------------------------------------------------------------------------------------------- weights and their like
def weight_bytes(parameters: Parameters, sharding: Sharding) -> float:
    """Weights on a GPU. Stage 3 holds a share, and gathers up to `max_live` elements for the layers at work."""
    whole = parameters.frozen_bytes + parameters.trained_bytes
    if sharding.stage != 3:
        return whole
    number = parameters.num_frozen + parameters.num_trained
    gathered = whole * min(1.0, sharding.max_live / number)
    return gathered + (0 if sharding.offload_weights else whole / sharding.num_gpus)


def gradient_bytes(parameters: Parameters, sharding: Sharding) -> float:
    """Gradients on a GPU, in the type of what trains. Stages 2 and 3 keep a share, offload none."""
    if sharding.offload_optimizer and (sharding.stage or 0) >= 2:
        return 0
    return sharding.share(parameters.trained_bytes, 2)


def exchange_bytes(parameters: Parameters, sharding: Sharding) -> float:
    """Buffers in which gradients meet: a second copy under plain data parallel; in stages 2 and 3 two buckets, and the
    largest gradient, which is whole before it is divided."""
    if sharding.num_gpus == 1 and not sharding.stage:
        return 0
    if (sharding.stage or 0) < 2:
        return parameters.trained_bytes
    size = parameters.trained_bytes / max(1, parameters.num_trained)
    return size * (2 * min(sharding.bucket, parameters.num_trained) + parameters.largest_trained)


def optimizer_bytes(parameters: Parameters, sharding: Sharding, name: str) -> float:
    """Optimizer state on a GPU. Where 16-bit weights train under DeepSpeed, their fp32 masters are part of it."""
    return 0 if sharding.offload_optimizer else sharding.share(_state_bytes(parameters, sharding, name), 1)


def _state_bytes(parameters: Parameters, sharding: Sharding, name: str) -> float:
    each = state_per_parameter(name)
    wide = parameters.num_trained_embedding if "8bit" in name or name == "adamw_bnb_8bit" else 0
    state = each * (parameters.num_trained - wide) + OPTIMIZER_BYTES["adamw"] * wide
    is_half = parameters.trained_bytes == 2 * parameters.num_trained
    return state + (4 * parameters.num_trained if sharding.stage is not None and is_half else 0)


def state_per_parameter(name: str) -> float:
    """Bytes of `training.optim`'s state for a parameter; an unknown optimizer counts as AdamW.

    >>> state_per_parameter("adamw_torch_fused"), state_per_parameter("paged_adamw_8bit"), state_per_parameter("sgd")
    (8.0, 2.0, 0.0)
    """
    if "lion" in name:
        return OPTIMIZER_BYTES["lion_8bit" if "8bit" in name else "lion"]
    for kind in ("8bit", "4bit", "rmsprop", "adagrad", "adafactor"):
        if kind in name:
            return OPTIMIZER_BYTES[kind] / (2 if "rmsprop_bnb_8bit" in name else 1)
    return OPTIMIZER_BYTES["sgd" if name == "sgd" else "adamw"]


def host_bytes(parameters: Parameters, sharding: Sharding, name: str) -> float:
    """Memory of the host that one process fills by offloading: its share of weights, optimizer state and gradients."""
    weights = (parameters.frozen_bytes + parameters.trained_bytes) / sharding.num_gpus
    state = (_state_bytes(parameters, sharding, name) + 4 * parameters.num_trained) / sharding.num_gpus
    return (weights if sharding.offload_weights else 0) + (state if sharding.offload_optimizer else 0)


# ---------------------------------------------------------------------------------------------- activations
@dataclass(frozen=True)
class Sequence:
    """What one forward pass of the language model works on."""

    tokens: int
    """Of all rows, padding included."""
    attention: str = "plain"
    """plain (no mask is stored: causal SDPA, FlashAttention), masked (SDPA on padded rows), packed (a prompt with its
    completions, `trainers.shared_prefix`) or eager (scores are stored)."""
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
    expanded = sequence.tokens * precision.products * 2 * text.queries
    if sequence.attention == "packed":  # completions see expanded keys and values, the prompt plain ones
        return saved + expanded + precision.products * sequence.mask
    if sequence.attention == "plain":
        return saved
    saved += expanded - sequence.tokens * precision.products * 2 * text.keys
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
        tile = HEAD_CHUNK * (min(scored, HEAD_TILE) + text.hidden) * precision.products
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
