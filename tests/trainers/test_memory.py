"""The memory estimate: what it says of weights, gradients, optimizer and activations against a real tiny model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from scripts.bench_memory import any_tokenizer, build_on
from trainers import memory
from trainers import memory_activations as activations
from trainers.memory import ModelShape, Parameters, Precision, Sharding, TextShape, Trains
from trainers.memory_activations import Answering, Sequence
from trainers.memory_plan import count_parameters, read_precision, what_trains
from trainers.parts import LearningRates
from trainers.prefix_cache import CACHE
from trainers.shared_prefix import PrefixLayout, enable_shared_prefix
from trainers.suffix_attention import SuffixRows
from utils.config import LoraConfig, ModelConfig

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
HEADS = ("embed_tokens", "lm_head")
LORA_ONLY = LearningRates(1e-4, 0.0, 0.0, 0.0)
DEFAULT = LearningRates(1e-4, 1e-5, 0.0, 1e-4)
ALL = LearningRates(1e-4, 1e-4, 1e-4, 1e-4)
HIDDEN = 128
LAYERS = 4
TOKENS = 200


class Args:
    """The part of TrainingArguments that precision depends on."""

    def __init__(self, *, bf16: bool) -> None:
        self.bf16, self.fp16 = bf16, False


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return any_tokenizer()


@pytest.fixture
def build(tokenizer: Any) -> Callable[..., Any]:
    """`build(lora=..., rates=..., dtype=..., half=...)`: the tiny model as `load_policy` prepares it."""

    def make(
        rates: LearningRates = LORA_ONLY,
        *,
        lora: bool = True,
        dtype: Any = "bfloat16",
        half: bool = False,
        targets: tuple[str, ...] = ATTENTION,
        to_save: tuple[str, ...] = (),
        dropout: float = 0.0,
    ) -> Any:
        settings = LoraConfig(
            enabled=lora, r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets, modules_to_save=to_save
        )
        return build_on("cpu", "tiny", tokenizer, ModelConfig(torch_dtype=dtype), settings, rates, half=half)

    return make


def base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def saved_bytes(model: nn.Module, call: Callable[[], Any], *, without: tuple[torch.Tensor, ...] = ()) -> int:
    """Bytes that autograd keeps for the backward pass of `call`, each storage once; weights and `without` left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), *without)}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept.setdefault(place, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    assert output is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


# ---------------------------------------------------------------------------------------------- one layer
def sequence_of(kind: str, rows: int = 2, prefix: int = 120, completions: int = 4, new: int = 20) -> Sequence:
    if kind == "packed":
        return Sequence(prefix + completions * new, "packed")
    return Sequence(rows * TOKENS, kind, 0 if kind == "plain" else rows * TOKENS**2)


def run_layer(model: Any, kind: str, *, autocast: bool) -> tuple[Callable[[], Any], tuple[torch.Tensor, ...]]:
    """A decoder layer's forward pass on random hidden states, and the tensors that all layers share."""
    language = base_of(model).model.language_model
    packed, rows = kind == "packed", 2
    shape = (1, 200, HIDDEN) if packed else (rows, TOKENS, HIDDEN)
    hidden = torch.randn(shape, dtype=language.layers[0].input_layernorm.weight.dtype).requires_grad_()
    factors = language.rotary_emb(hidden, torch.arange(shape[1])[None].expand(3, shape[0], -1))
    options: dict[str, Any] = {"attention_mask": None}
    if packed:
        options["prefix_layout"] = PrefixLayout(((0, 120, SuffixRows.of([20] * 4, torch.device("cpu"))),))
    elif kind == "masked":
        options["attention_mask"] = torch.ones(TOKENS, TOKENS).tril().bool().expand(rows, 1, -1, -1)

    def call() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return language.layers[0](hidden, position_embeddings=factors, **options)

    return call, factors


CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "LoRA, bf16 with fp32 copies": ({}, True),
    "LoRA, DeepSpeed": ({"half": True}, False),
    "LoRA, fp32": ({"dtype": "float32"}, False),
    "LoRA, fp32 under autocast": ({"dtype": "float32"}, True),
    "LoRA on the MLP": ({"targets": (*ATTENTION, "gate_proj", "up_proj", "down_proj")}, True),
    "LoRA on two": ({"targets": ("q_proj", "down_proj"), "half": True}, False),
    "all, fp32": ({"lora": False, "rates": ALL}, False),
    "all, fp32 under autocast": ({"lora": False, "rates": ALL}, True),
    "all, DeepSpeed": ({"lora": False, "rates": ALL, "half": True}, False),
}


@pytest.mark.parametrize("kind", ["plain", "masked", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_a_decoder_layer_saves_what_the_formula_says(case: str, kind: str, build: Callable[..., Any]) -> None:
    options, autocast = CASES[case]
    model = build(**options)
    if kind == "packed":
        enable_shared_prefix(model)
    shape = ModelShape.from_config(base_of(model).config).text
    half = bool(options.get("half"))
    precision = read_precision(model, Args(bf16=autocast or half), deepspeed=half)
    assert precision.autocast is autocast
    call, shared = run_layer(model, kind, autocast=autocast)
    expected = activations.layer_saved(shape, precision, what_trains(model), sequence_of(kind))
    found = saved_bytes(model, call, without=shared)
    assert found == expected


def test_eager_attention_saves_the_scores_of_every_head() -> None:
    text = TextShape(256, 1024, 4, heads=8, kv_heads=2, head_dim=32, vocab=1000)
    half = Precision(2, 2, 2, autocast=False)
    plain, eager = (
        activations.layer_saved(text, half, Trains(), Sequence(100, kind, mask))
        for kind, mask in (("plain", 0), ("eager", 10**4))
    )
    expanded = 100 * 2 * 2 * (256 - 64)
    assert eager - plain == expanded + 8 * 10**4 * (4 + 2)


def test_dropout_keeps_a_mask_for_each_adapter() -> None:
    text = TextShape(256, 1024, 4, heads=8, kv_heads=2, head_dim=32, vocab=1000)
    half = Precision(2, 2, 2, autocast=False)
    trains = Trains(targets=frozenset(ATTENTION), rank=4)
    with_dropout, without = (
        activations.layer_saved(text, half, replace(trains, dropout=used), Sequence(100)) for used in (True, False)
    )
    assert with_dropout - without >= 100 * (3 * 256 + 256)


def test_checkpointing_keeps_the_inputs_and_computes_one_layer_again() -> None:
    text = TextShape(256, 1024, 10, heads=8, kv_heads=2, head_dim=32, vocab=1000)
    half, trains, sequence = (
        Precision(2, 4, 2, autocast=True),
        Trains(targets=frozenset(ATTENTION), rank=4),
        Sequence(100),
    )
    saved = activations.layer_saved(text, half, trains, sequence)
    rotary = 100 * 2 * 32 * 2
    assert activations.language_kept(text, half, trains, sequence, checkpointing=True) == 10 * 100 * 256 * 2 + rotary
    assert activations.language_kept(text, half, trains, sequence, checkpointing=False) == 10 * saved + rotary
    gradients = 100 * (3 * 2 * 1024 + 2 * 256)
    assert activations.layer_at_work(text, half, trains, sequence, checkpointing=True) == saved + gradients
    assert activations.layer_at_work(text, half, trains, sequence, checkpointing=False) == gradients


# ---------------------------------------------------------------------------------------------- vision tower
@pytest.mark.parametrize("case", ["LoRA, bf16 with fp32 copies", "LoRA, DeepSpeed", "LoRA, fp32", "all, fp32"])
def test_a_merger_and_a_vision_block_save_what_the_formula_says(case: str, build: Callable[..., Any]) -> None:
    options, autocast = CASES[case]
    model = build(**{**options, "rates": ALL})
    visual, half = base_of(model).model.visual, bool(options.get("half"))
    shape = ModelShape.from_config(base_of(model).config).vision
    precision = read_precision(model, Args(bf16=autocast or half), deepspeed=half)
    patches, frame = 400, 100
    hidden = torch.randn(patches, shape.hidden, dtype=visual.dtype).requires_grad_()
    factors = (torch.ones(patches, 16), torch.zeros(patches, 16))
    edges = torch.arange(0, patches + 1, frame)

    def block() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return visual.blocks[0](hidden, cu_seqlens=edges, position_embeddings=factors)

    def merger() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return visual.merger(hidden)

    casts = 2 * sum(p.numel() for p in visual.merger.parameters() if p.requires_grad) if autocast else 0
    expected = activations.merger_saved(shape, precision) * patches
    assert expected <= saved_bytes(model, merger) - casts <= expected + 8 * patches  # mean and deviation of a row
    casts = 2 * sum(p.numel() for p in visual.blocks[0].parameters() if p.requires_grad) if autocast else 0
    found = saved_bytes(model, block, without=factors) - casts
    assert found == pytest.approx(activations.block_saved(shape, precision) * patches, rel=0.02)


def test_a_frozen_tower_keeps_no_graph(build: Callable[..., Any]) -> None:
    model = build(LORA_ONLY, dtype="float32")
    visual = base_of(model).model.visual
    output: list[Any] = []

    def call() -> Any:
        output.append(visual(torch.randn(16, 1536), grid_thw=torch.tensor([[1, 4, 4]])))
        return output[0]

    assert saved_bytes(model, call) == 0 and not output[0].pooler_output.requires_grad
    shape = ModelShape.from_config(base_of(model).config).vision
    single = Precision(4, 4, 4, autocast=False)
    assert activations.vision_kept(shape, single, what_trains(model), 16, checkpointing=False) == 0
    mergers = activations.vision_kept(shape, single, Trains(mergers=True), 16, checkpointing=True)
    assert mergers == 16 * 3 * activations.merger_saved(shape, single)


# ---------------------------------------------------------------------------------------------- weights and their like
def test_parameters_of_the_shipped_lora_on_a_tied_model(build: Callable[..., Any]) -> None:
    """Each base weight once in bf16; LoRA pairs, one copy of embeddings = head, and copies of the mergers in fp32."""
    model = build(DEFAULT, to_save=HEADS)
    plain = build(LORA_ONLY, lora=False, dtype="bfloat16", half=True)
    base = sum(parameter.numel() for parameter in plain.parameters())
    visual = plain.model.visual
    mergers = sum(p.numel() for part in (visual.merger, visual.deepstack_merger_list) for p in part.parameters())
    pairs = LAYERS * 4 * ((128 + 128) + 2 * (128 + 64) + (128 + 128))
    found = count_parameters(model)
    assert (found.num_frozen, found.frozen_bytes) == (base, 2 * base)
    embeddings = plain.get_input_embeddings().weight.numel()
    assert found.num_trained == pairs + embeddings + mergers
    assert found.trained_bytes == 4 * found.num_trained
    assert (found.num_trained_embedding, found.largest_trained) == (embeddings, max(embeddings, 256 * 256))
    trains = what_trains(model)
    assert (trains.targets, trains.rank) == (frozenset(ATTENTION), 4)
    assert (trains.language, trains.head, trains.mergers, trains.tower) == (False, True, True, False)
    under_deepspeed = count_parameters(build(DEFAULT, to_save=HEADS, half=True), half=True)
    assert under_deepspeed.trained_bytes == 2 * found.num_trained


def test_full_fine_tuning_holds_everything_once_in_fp32(build: Callable[..., Any]) -> None:
    model = build(ALL, lora=False)
    number = sum(parameter.numel() for parameter in model.parameters())
    found = count_parameters(model)
    assert (found.frozen_bytes, found.trained_bytes, found.num_trained) == (0, 4 * number, number)
    frozen_tower = count_parameters(build(replace(ALL, vision_tower=0.0), lora=False))
    blocks = [*model.model.visual.blocks, model.model.visual.patch_embed, model.model.visual.pos_embed]
    assert frozen_tower.num_frozen == sum(p.numel() for block in blocks for p in block.parameters())


@pytest.mark.parametrize("what", ["full", "lora", "default"])
def test_gradients_and_optimizer_of_a_real_step(what: str) -> None:
    from scripts.bench_memory import Cell, Work

    work = Work(Cell("sft", "tiny", "cpu", what, False, 1, 100))
    work.sft_pass()
    parameters = count_parameters(work.model)
    held = [parameter for parameter in work.model.parameters() if parameter.grad is not None]
    assert sum(p.grad.nbytes for p in held) == memory.gradient_bytes(parameters, Sharding())  # type: ignore[union-attr]
    work.optimizer.step()
    moments = (value for state in work.optimizer.state.values() for key, value in state.items() if key != "step")
    state = sum(moment.nbytes for moment in moments)
    assert state == memory.optimizer_bytes(parameters, Sharding(), "adamw_torch_fused")
    weights = {p.data_ptr(): p.nbytes for p in work.model.parameters()}
    assert sum(weights.values()) == memory.weight_bytes(parameters, Sharding())


@pytest.mark.parametrize(
    ("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)], ids=lambda value: str(value)
)
def test_stages_divide_as_in_the_zero_paper(stage: int, gigabytes: float) -> None:
    """Figure 1 of Rajbhandari et al. 2020: 7.5 billion parameters in mixed precision, Adam, 64 GPUs."""
    parameters = Parameters(0, 0, trained_bytes=15_000_000_000, num_trained=7_500_000_000)
    sharding = Sharding(64, stage=stage, max_live=0)
    total = memory.weight_bytes(parameters, sharding) + memory.gradient_bytes(parameters, sharding)
    total += memory.optimizer_bytes(parameters, sharding, "adamw_torch_fused")
    assert total / 1e9 == pytest.approx(gigabytes, abs=0.05)


PARAMETERS = Parameters(
    frozen_bytes=8_000_000_000, num_frozen=4_000_000_000, trained_bytes=1_000_000_000, num_trained=500_000_000,
    largest_trained=100_000_000,
)  # fmt: skip
"""16-bit weights, of which a ninth trains."""


def test_zero_2_shares_gradients_and_state_of_what_trains() -> None:
    sharding = Sharding(4, stage=2, bucket=1_000_000)
    assert memory.weight_bytes(PARAMETERS, sharding) == 9e9
    assert memory.gradient_bytes(PARAMETERS, sharding) == 1e9 / 4
    assert memory.optimizer_bytes(PARAMETERS, sharding, "adamw_torch_fused") == 12 * 5e8 / 4  # master, two moments
    assert memory.exchange_bytes(PARAMETERS, sharding) == 2 * (2 * 1e6 + 1e8)


def test_zero_3_shares_weights_and_gathers_those_at_work() -> None:
    sharding = Sharding(4, stage=3, max_live=1_000_000_000)
    assert memory.weight_bytes(PARAMETERS, sharding) == pytest.approx(2e9 + 9e9 / 4)
    offloaded = replace(sharding, offload_optimizer=True, offload_weights=True)
    assert memory.weight_bytes(PARAMETERS, offloaded) == pytest.approx(2e9)
    assert memory.gradient_bytes(PARAMETERS, offloaded) == 0
    assert memory.optimizer_bytes(PARAMETERS, offloaded, "adamw_torch_fused") == 0
    assert memory.host_bytes(PARAMETERS, offloaded, "adamw_torch_fused") == (9e9 + 16 * 5e8) / 4
    assert memory.host_bytes(PARAMETERS, sharding, "adamw_torch_fused") == 0


def test_plain_data_parallel_holds_all_and_a_second_copy_of_the_gradients() -> None:
    assert memory.weight_bytes(PARAMETERS, Sharding(4)) == 9e9
    assert memory.exchange_bytes(PARAMETERS, Sharding(4)) == memory.gradient_bytes(PARAMETERS, Sharding(4)) == 1e9
    assert memory.exchange_bytes(PARAMETERS, Sharding(1)) == 0
    single = Parameters(0, 0, trained_bytes=400, num_trained=100)
    assert memory.optimizer_bytes(single, Sharding(4), "adamw_torch_fused") == 800  # fp32 weights are their own masters


@pytest.mark.parametrize(
    ("name", "each"),
    [("adamw_torch", 8), ("adamw_bnb_8bit", 2), ("paged_adamw_32bit", 8), ("lion_32bit", 4), ("paged_lion_8bit", 1),
     ("rmsprop_bnb_8bit", 1), ("adamw_torch_4bit", 1), ("sgd", 0), ("never_heard_of", 8)],
)  # fmt: skip
def test_state_of_other_optimizers(name: str, each: float) -> None:
    assert memory.state_per_parameter(name) == each


def test_bitsandbytes_keeps_embeddings_in_32_bits() -> None:
    parameters = Parameters(0, 0, trained_bytes=4000, num_trained=1000, num_trained_embedding=400)
    assert memory.optimizer_bytes(parameters, Sharding(), "paged_adamw_8bit") == 2 * 600 + 8 * 400
    assert memory.optimizer_bytes(parameters, Sharding(), "adamw_torch_fused") == 8 * 1000


# ---------------------------------------------------------------------------------------------- head and generation
def test_head_of_labelled_positions_alone() -> None:
    text = TextShape(256, 1024, 4, heads=8, kv_heads=2, head_dim=32, vocab=1000)
    single, mixed = Precision(4, 4, 4, autocast=False), Precision(2, 4, 2, autocast=True)
    assert activations.head_work(text, single, Trains(), 50, fused=False) == 50 * 1000 * 16
    assert activations.head_work(text, mixed, Trains(), 50, fused=False) == 50 * 1000 * 14
    weight = 1000 * 256
    few = activations.head_work(text, mixed, Trains(head=True), 2, fused=False)
    assert few == 2 * weight + 2 * 1000 * 2 + 4 * weight  # the cast weight, bf16 logits, the fp32 gradient
    fused = activations.head_work(text, mixed, Trains(), 100_000, fused=True)
    assert fused == 2 * 1000 * (4096 + 256) + 4 * 100_000 * 256  # no tile is wider than the vocabulary
    wide = TextShape(256, 1024, 4, heads=8, kv_heads=2, head_dim=32, vocab=151_936)
    fused = activations.head_work(wide, mixed, Trains(), 100_000, fused=True)
    assert fused == 2 * 32768 * (4096 + 256) + 4 * 100_000 * 256


@pytest.mark.parametrize(("shared", "rows"), [(True, 2), (False, 16)])
def test_cache_of_a_shared_prompt_is_kept_once(shared: bool, rows: int) -> None:
    text = TextShape(256, 1024, 4, heads=8, kv_heads=2, head_dim=32, vocab=1000)
    found = activations.cache_bytes(text, Precision(2, 4, 2, autocast=True), Answering(rows, 1000, 16, 64))
    token = 2 * 4 * 2 * 32 * 2  # keys and values, layers, heads, width, bytes
    assert found == token * (rows * 1000 + 16 * 64)


def test_cache_against_a_real_prefill(build: Callable[..., Any]) -> None:
    model = base_of(build(LORA_ONLY))
    with torch.no_grad():
        cache = model(input_ids=torch.full((2, 50), 5), use_cache=True)[CACHE]
    real = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    text = ModelShape.from_config(model.config).text
    assert real == activations.cache_bytes(text, Precision(2, 4, 2, autocast=True), Answering(2, 50, 2, 0))
