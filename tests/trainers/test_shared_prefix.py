"""Sharing a prompt is exact: the reference is stock transformers, one row at a time, from pixels."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, Qwen3VLForConditionalGeneration

from datasets.pixels import pixel_values
from datasets.video_dataset import VideoTemporalDataset
from trainers.model import add_lora, load_processor, resolve_source
from trainers.parts import LearningRates
from trainers.shared_prefix import (
    Packed,
    Prompt,
    backbone_of,
    enable_shared_prefix,
    make_prompt,
    pack,
    rows,
    sample_rows,
    sample_shared,
    vision_is_frozen,
    with_vision,
)
from utils.common import UserError
from utils.config import DataConfig, LoraConfig, PromptConfig

RATES = LearningRates(1e-4, 1e-4, 0.0, 1e-4)
PAD = 0


@pytest.fixture(scope="module")
def samples(tiny_model: Path, demo_data: Path) -> list[dict[str, Any]]:
    """Prompts of different videos, lengths (98, 58 and 78 tokens or so) and questions."""
    processor = load_processor(resolve_source(str(tiny_model)))
    made = []
    for row, num_frames in ((0, 16), (3, 8), (5, 12)):
        data = DataConfig(
            train=(str(demo_data / "train.jsonl"),),  # type: ignore[arg-type]
            backend="pyav", min_frames=num_frames, max_frames=num_frames,
            min_pixels_per_frame=2048, max_pixels_per_frame=2048,
        )  # fmt: skip
        prompt = PromptConfig(question="When {sentence}?")
        made.append(VideoTemporalDataset(data, processor, prompt, with_answer=False).sample(row))
    assert len({len(sample["input_ids"]) for sample in made}) == 3
    return made


def load(path: Path, **options: Any) -> Any:
    return Qwen3VLForConditionalGeneration.from_pretrained(path, **{"dtype": torch.float32, **options}).eval()


def answers(lengths: Sequence[Sequence[int]]) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [[torch.randint(60, 200, (length,), generator=generator) for length in group] for group in lengths]


def log_probs(model: Any, packed: Packed) -> Tensor:
    """(rows, longest): from the stock head, at the packed columns."""
    logits = model(**packed.inputs, logits_to_keep=packed.columns).logits.float()
    targets = packed.targets
    picked = torch.log_softmax(logits, -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return packed.unpack(picked.masked_fill(targets < 0, 0.0))


def stock_log_probs(model: Any, sample: dict[str, Any], answer: Tensor) -> Tensor:
    """(C,): the stock model on one row: prompt, completion and pixels."""
    ids = torch.cat([sample["input_ids"], answer])[None]
    kinds = torch.cat([sample["mm_token_type_ids"], torch.zeros_like(answer)])[None]
    pixels = pixel_values([sample["pixels"]], ids.device)
    video = {"pixel_values_videos": pixels, "video_grid_thw": sample["video_grid_thw"]}
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **video).logits
    scores = torch.log_softmax(logits[0, len(sample["input_ids"]) - 1 : -1].float(), -1)
    return scores.gather(-1, answer[:, None])[:, 0]


def reference(model: Any, samples: Sequence[dict[str, Any]], completions: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    pairs = [(sample, answer) for sample, group in zip(samples, completions, strict=True) for answer in group]
    return [stock_log_probs(model, sample, answer) for sample, answer in pairs]


def largest_difference(values: Tensor, expected: Sequence[Tensor]) -> float:
    values, expected = values.detach(), [one.detach() for one in expected]
    return max(float((row[: len(one)] - one).abs().max()) for row, one in zip(values, expected, strict=True))


def gradients(model: Any) -> Tensor:
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def weighted(values: Sequence[Tensor]) -> Tensor:
    """A loss in which every token counts differently, so that no two gradients can cancel."""
    return sum(((torch.arange(len(row)) + 1).cos() * row).sum() * (i + 1) for i, row in enumerate(values))  # type: ignore[return-value]


GROUPS = {
    "one group of 2": [[5, 9]],
    "one group of 16": [[3, 8, 1, 6, 2, 7, 4, 5, 9, 3, 1, 1, 2, 12, 5, 6]],
    "three groups": [[5, 1, 9], [2, 2, 2], [1, 1, 1]],
}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("layout", ["packed", "packed, vision kept", "rows"])
def test_log_probs_and_gradients_equal_stock_row_by_row(
    tiny_model: Path, samples: list[Any], name: str, layout: str
) -> None:
    completions, stock, model = answers(GROUPS[name]), load(tiny_model), load(tiny_model)
    used = samples[: len(completions)]
    expected = reference(stock, used, completions)
    weighted(expected).backward()
    enable_shared_prefix(model)
    prompts = [make_prompt(model, sample) for sample in used]
    if layout == "packed, vision kept":
        backbone_of(model).visual.requires_grad_(False)
        backbone_of(stock).visual.zero_grad()
        assert vision_is_frozen(model)
        prompts = with_vision(model, prompts)
    packed = rows(prompts, completions, pad_token_id=PAD) if layout == "rows" else pack(prompts, completions)
    values = log_probs(model, packed)
    weighted([row[: len(one)] for row, one in zip(values, expected, strict=True)]).backward()
    assert largest_difference(values, expected) < 1e-5
    wanted = gradients(stock)
    assert (gradients(model) - wanted).norm() / wanted.norm() < 1e-5


@pytest.mark.parametrize("reentrant", [True, False])
def test_lora_and_gradient_checkpointing_are_exact(tiny_model: Path, samples: list[Any], reentrant: bool) -> None:
    completions = answers([[4, 7], [6, 3]])
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj"), modules_to_save=("embed_tokens",))
    torch.manual_seed(0)
    stock = add_lora(load(tiny_model), lora, RATES, fp32_copies=True)
    for parameter in (p for n, p in stock.named_parameters() if "lora_B" in n):
        torch.nn.init.normal_(parameter, std=0.02)  # an adapter that does something
    model = copy.deepcopy(stock)
    expected = reference(stock, samples[:2], completions)
    weighted(expected).backward()
    enable_shared_prefix(model)
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    packed = pack([make_prompt(model, sample) for sample in samples[:2]], completions)
    values = log_probs(model, packed)
    weighted([row[: len(one)] for row, one in zip(values, expected, strict=True)]).backward()
    assert largest_difference(values, expected) < 1e-5
    wanted, found = gradients(stock), gradients(model)
    assert (found - wanted).norm() / wanted.norm() < 1e-5


def test_bf16_differs_by_rounding_only(tiny_model: Path, samples: list[Any]) -> None:
    """In bf16 (8 bits) the packed path lies as near to the fp32 truth as stock bf16 does, within a factor of 2."""
    completions = answers([[9, 14, 6]])
    truth = reference(load(tiny_model), samples[:1], completions)
    stock, model = (load(tiny_model, dtype=torch.bfloat16) for _ in range(2))
    enable_shared_prefix(model)
    values = log_probs(model, pack([make_prompt(model, samples[0])], completions))
    stock_values = reference(stock, samples[:1], completions)
    error = torch.cat([(row[: len(one)] - one).abs() for row, one in zip(values, truth, strict=True)])
    stock_error = torch.cat([(row - one).abs() for row, one in zip(stock_values, truth, strict=True)])
    assert error.mean() < 2 * stock_error.mean()
    assert error.max() < 0.05


def test_completions_cannot_see_each_other(tiny_model: Path, samples: list[Any]) -> None:
    model = load(tiny_model)
    enable_shared_prefix(model)
    prompts = [make_prompt(model, sample) for sample in samples[:2]]
    completions = answers([[6, 9, 4], [5, 5, 5]])
    before = log_probs(model, pack(prompts, completions))
    completions[0][1] = completions[0][1].flip(0) + 1
    after = log_probs(model, pack(prompts, completions))
    changed = (before - after).abs().amax(dim=1)
    assert changed[1] > 1e-3
    assert torch.equal(changed[[0, 2, 3, 4, 5]], torch.zeros(5))


def test_the_first_token_is_predicted_from_the_prompt_alone(tiny_model: Path, samples: list[Any]) -> None:
    """Completions of one token add nothing to the sequence, and still all of them are scored."""
    model = load(tiny_model)
    enable_shared_prefix(model)
    prompt = make_prompt(model, samples[0])
    packed = pack([prompt], [[torch.tensor([70]), torch.tensor([71])]])
    assert packed.inputs["input_ids"].shape == (1, len(prompt))
    values = log_probs(model, packed)
    logits = model(**pack([prompt], [[torch.tensor([70])]]).inputs, logits_to_keep=1).logits[0, -1]
    assert torch.allclose(values[:, 0], torch.log_softmax(logits, -1)[[70, 71]], atol=1e-6)


def test_everything_else_computes_as_before(tiny_model: Path, samples: list[Any], tmp_path: Path) -> None:
    stock, model = load(tiny_model), load(tiny_model)
    enable_shared_prefix(model)
    enable_shared_prefix(model)  # twice is once
    answer = answers([[8]])[0][0]
    assert torch.equal(stock_log_probs(stock, samples[0], answer), stock_log_probs(model, samples[0], answer))
    assert backbone_of(model).visual.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    assert load(tmp_path).config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_plain_attentions_are_understood(tiny_model: Path, samples: list[Any], attention: str) -> None:
    model = load(tiny_model, attn_implementation=attention)
    completions = answers([[5, 3]])
    expected = reference(model, samples[:1], completions)
    enable_shared_prefix(model)
    values = log_probs(model, pack([make_prompt(model, samples[0])], completions))
    assert largest_difference(values, expected) < 1e-5


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """A stand-in for the package flash-attn, which needs a GPU; gives the queries that reach it."""
    import transformers.modeling_flash_attention_utils as utils

    seen: list[Tensor] = []

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0, softmax_scale: float = 1, causal: bool = False
    ) -> Tensor:
        seen.append(q)
        parts = (part.transpose(1, 2) for part in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            *parts, is_causal=causal, scale=softmax_scale, enable_gqa=True
        )
        return out.transpose(1, 2)

    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    vars(package).update(
        flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_func, flash_attn_with_kvcache=flash_attn_func
    )
    vars(padding).update(pad_input=None, unpad_input=None)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    return seen


def test_flash_attention_is_found_under_the_wrapped_name(
    tiny_model: Path, samples: list[Any], flash_attn: list[Tensor]
) -> None:
    """transformers looks up by the configured name which library to load, and knows nothing of ours."""
    completions, stock, model = answers([[5, 3], [4, 1]]), load(tiny_model), load(tiny_model)
    model.config.text_config._attn_implementation = "flash_attention_2"
    enable_shared_prefix(model)
    values = log_probs(model, pack([make_prompt(model, sample) for sample in samples[:2]], completions))
    assert largest_difference(values, reference(stock, samples[:2], completions)) < 1e-5
    layers = model.config.text_config.num_hidden_layers
    assert [len(query[0]) for query in flash_attn] == [len(s["input_ids"]) for s in samples[:2]] * layers
    answer = answers([[8]])[0][0]
    expected = stock_log_probs(stock, samples[0], answer)
    assert torch.allclose(stock_log_probs(model, samples[0], answer), expected, atol=1e-5)


@pytest.mark.parametrize("keep_vision", [True, False])
def test_greedy_tokens_equal_stock_generate(tiny_model: Path, samples: list[Any], keep_vision: bool) -> None:
    """Prompts of different length decoded together, three completions each, against stock generate row by row."""
    stock, model = load(tiny_model), load(tiny_model)
    enable_shared_prefix(model)
    config = GenerationConfig(max_new_tokens=10, do_sample=False, pad_token_id=PAD, eos_token_id=3)
    prompts = [make_prompt(model, sample) for sample in samples]
    prompts = with_vision(model, prompts) if keep_vision else prompts
    shared = sample_shared(model, prompts, 3, config, PAD)
    for index, sample in enumerate(samples):
        keys = ("input_ids", "mm_token_type_ids")
        alone = stock.generate(
            **{key: sample[key][None] for key in keys},
            attention_mask=torch.ones_like(sample["input_ids"])[None],
            pixel_values_videos=pixel_values([sample["pixels"]]),
            video_grid_thw=sample["video_grid_thw"],
            generation_config=config,
        )[0, len(sample["input_ids"]) :]
        for row in shared[3 * index : 3 * index + 3]:
            assert row[: len(alone)].tolist() == alone.tolist()
    assert sample_rows(stock, [make_prompt(stock, s) for s in samples], 3, config, PAD).tolist() == shared.tolist()
    assert backbone_of(model).rope_deltas is None  # the next prompt's positions are its own


def test_a_cache_that_the_attention_does_not_get_stops_the_sampling(tiny_model: Path, samples: list[Any]) -> None:
    """As when a library renames the argument: completions without their prompt would look like bad answers."""
    model = load(tiny_model)
    enable_shared_prefix(model)
    backbone_of(model)._forward_pre_hooks.clear()
    config = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=PAD, eos_token_id=3)
    with pytest.raises(UserError, match="answers would not see the video.*training.share_prefix=false"):
        sample_shared(model, [make_prompt(model, samples[0])], 2, config, PAD)


def test_samples_of_one_prompt_differ_and_follow_the_seed(tiny_model: Path, samples: list[Any]) -> None:
    model = load(tiny_model)
    config = GenerationConfig(max_new_tokens=12, do_sample=True, temperature=1.0, top_k=0, pad_token_id=PAD)
    prompt = make_prompt(model, samples[0])
    torch.manual_seed(3)
    first = sample_shared(model, [prompt], 4, config, PAD)
    torch.manual_seed(3)
    assert torch.equal(first, sample_shared(model, [prompt], 4, config, PAD))
    assert len({tuple(row) for row in first.tolist()}) == 4


def test_positions_go_on_after_the_prompt(tiny_model: Path, samples: list[Any]) -> None:
    model = load(tiny_model)
    prompt: Prompt = make_prompt(model, samples[0])
    packed = pack([prompt], answers([[4, 3]]))
    positions = packed.inputs["position_ids"][:, 0, len(prompt) :]
    after = int(prompt.position_ids.max()) + 1
    assert positions.tolist() == [[after, after + 1, after + 2, after, after + 1]] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_on_a_gpu_in_bf16(tiny_model: Path, samples: list[Any], attention: str) -> None:
    """The CUDA kernels: packed scoring and shared sampling lie as near to fp32 as stock bf16 does, within 2x."""
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn", reason="FlashAttention 2 is optional (env/install.sh --with-flash-attn)")
    completions = [[answer.cuda() for answer in group] for group in answers([[9, 14, 6], [4, 12, 5]])]
    on_gpu = [{k: v.cuda() if isinstance(v, Tensor) else v for k, v in sample.items()} for sample in samples[:2]]
    truth = reference(load(tiny_model).cuda(), on_gpu, completions)
    stock, model = (load(tiny_model, dtype=torch.bfloat16, attn_implementation=attention).cuda() for _ in range(2))
    enable_shared_prefix(model)
    prompts = [make_prompt(model, sample) for sample in on_gpu]
    values = log_probs(model, pack(prompts, completions))
    error = torch.cat([(row[: len(one)] - one).abs() for row, one in zip(values, truth, strict=True)])
    stock_values = reference(stock, on_gpu, completions)
    stock_error = torch.cat([(row - one).abs() for row, one in zip(stock_values, truth, strict=True)])
    assert error.mean() < 2 * stock_error.mean()
    config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=PAD, eos_token_id=3)
    assert sample_shared(model, prompts, 2, config, PAD).shape[0] == 4
