"""How many bytes training takes on each GPU, from shapes alone: weights, gradients, optimizer, and who shares them.

ZeRO's stages are those of Rajbhandari et al. 2020 (arXiv:1910.02054, sections 3 and 5): bytes of a parameter, of its
gradient and its optimizer state, and which of them a stage divides by the number of GPUs.

Pure arithmetic: nothing is loaded, nothing runs. Activations are in `trainers.memory_activations`, the sum of a run in
`trainers.memory_estimate`; `trainers.memory_plan` reads model, configuration and data. `ALLOWANCES` alone are not
derived: they stand for what a process takes beside its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OPTIMIZER_BYTES = {"adamw": 8.0, "8bit": 2.0, "4bit": 1.0, "lion": 4.0, "lion_8bit": 1.0, "ademamix": 12.0,
                   "ademamix_8bit": 3.0, "rmsprop": 4.0, "adagrad": 4.0, "sgd": 0.0, "adafactor": 0.02}  # fmt: skip
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
    wide = parameters.num_trained_embedding if "8bit" in name and "torch" not in name else 0
    state = each * (parameters.num_trained - wide) + OPTIMIZER_BYTES["adamw"] * wide
    is_half = parameters.trained_bytes == 2 * parameters.num_trained
    return state + (4 * parameters.num_trained if sharding.stage is not None and is_half else 0)


def state_per_parameter(name: str) -> float:
    """Bytes of `training.optim`'s state for a parameter; an unknown optimizer counts as AdamW.

    >>> state_per_parameter("adamw_torch_fused"), state_per_parameter("paged_adamw_8bit"), state_per_parameter("sgd")
    (8.0, 2.0, 0.0)
    """
    for kind in ("lion", "ademamix"):
        if kind in name:
            return OPTIMIZER_BYTES[f"{kind}_8bit" if "8bit" in name else kind]
    for kind in ("8bit", "4bit", "rmsprop", "adagrad", "adafactor"):
        if kind in name:
            return OPTIMIZER_BYTES[kind] / (2 if "rmsprop_bnb_8bit" in name else 1)
    return OPTIMIZER_BYTES["sgd" if name == "sgd" else "adamw"]


def host_bytes(parameters: Parameters, sharding: Sharding, name: str) -> float:
    """Memory of the host that one process fills by offloading: its share of weights, optimizer state and gradients."""
    weights = (parameters.frozen_bytes + parameters.trained_bytes) / sharding.num_gpus
    state = (_state_bytes(parameters, sharding, name) + 4 * parameters.num_trained) / sharding.num_gpus
    return (weights if sharding.offload_weights else 0) + (state if sharding.offload_optimizer else 0)
