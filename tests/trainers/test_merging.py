"""When the start of GRPO is merged weights, and from which adapter."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration

from trainers.merging import MERGED, merge_reason, plan_start, settle_start
from trainers.model import add_lora
from trainers.parts import LearningRates
from utils.checkpoints import manifest_problems
from utils.common import REPO_ROOT, UserError
from utils.config import LoraConfig, ModelConfig, RLConfig, load_config

RATES = LearningRates(1e-4, 0.0, 0.0, 0.0)
FULL = LoraConfig(enabled=False)


@pytest.fixture
def start(answering_adapter: Path, tmp_path: Path) -> ModelConfig:
    """A copy of an SFT adapter, to be changed."""
    shutil.copytree(answering_adapter, tmp_path / "adapter")
    return ModelConfig(name_or_path=str(tmp_path / "adapter"), torch_dtype="float32", attn_implementation="sdpa")


def test_the_same_shape_goes_on_with_the_adapter(start: ModelConfig, tmp_path: Path) -> None:
    same = load_config(RLConfig, [REPO_ROOT / "configs/demo/rl_config.yaml"]).lora
    assert settle_start(start, same, RATES, tmp_path) is start
    assert plan_start(start, same, RATES) is start
    assert not (tmp_path / MERGED).exists()


@pytest.mark.parametrize("untied", [False, True])
def test_full_copies_of_head_and_embeddings_go_on(untied: bool, tiny_model: Path, tmp_path: Path) -> None:
    """The shipped lists. Where the two are one tensor, PEFT notes one of the names."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    model = Qwen3VLForConditionalGeneration.from_pretrained(base)
    if untied:
        for config in (model.config, model.config.text_config):
            config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.save_pretrained(base)
    rates = LearningRates(1e-4, 0.0, 0.0, 1e-4)
    shipped = LoraConfig(r=4, lora_alpha=8)
    embeddings_alone = shipped.model_copy(
        update={"modules_to_save": ("embed_tokens",), "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")}
    )
    reasons = {}
    for name, lora in (("both", shipped), ("embeddings", embeddings_alone)):
        folder = tmp_path / name
        wrapped = add_lora(Qwen3VLForConditionalGeneration.from_pretrained(base), lora, rates, fp32_copies=True)
        wrapped.save_pretrained(folder)
        reasons[name] = merge_reason(folder, shipped, rates)
    assert reasons["both"] is None
    assert reasons["embeddings"] == (
        "['lm_head'] should train in full, and the adapter has no copy of it" if untied else None
    )


def test_a_merge_is_made_once(start: ModelConfig, tmp_path: Path) -> None:
    merged = settle_start(start, FULL, RATES, tmp_path)
    assert merged.name_or_path == str(tmp_path / MERGED) and manifest_problems(tmp_path / MERGED) == []
    weights = tmp_path / MERGED / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert settle_start(start, FULL, RATES, tmp_path) == merged
    assert weights.stat().st_mtime_ns == written


def test_a_merge_of_other_weights_is_never_used(start: ModelConfig, tmp_path: Path) -> None:
    """As when SFT was run again into the folder that --model_path names."""
    settle_start(start, FULL, RATES, tmp_path)
    before = load_file(tmp_path / MERGED / "model.safetensors")
    path = tmp_path / "adapter/adapter_model.safetensors"
    save_file({name: 2 * value for name, value in load_file(path).items()}, path)
    with pytest.raises(UserError, match=r"merged_base was merged from other weights .* another --output_dir"):
        settle_start(start, FULL, RATES, tmp_path)
    after = load_file(tmp_path / MERGED / "model.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_plan_merges_nothing(start: ModelConfig, answering_model: Path, tmp_path: Path) -> None:
    planned = plan_start(start, FULL, RATES)
    assert planned.name_or_path == str(answering_model)
    assert not (tmp_path / MERGED).exists()


def test_the_merge_is_one_rounding_of_an_exact_sum(start: ModelConfig, answering_model: Path, tmp_path: Path) -> None:
    """In bf16: base rounded, then base + delta rounded once, with the delta from the fp32 adapter."""
    rounded = start.model_copy(update={"torch_dtype": "bfloat16"})
    merged = load_file(Path(settle_start(rounded, FULL, RATES, tmp_path).name_or_path) / "model.safetensors")
    base = load_file(answering_model / "model.safetensors")
    adapter = load_file(Path(start.name_or_path) / "adapter_model.safetensors")
    name = "model.language_model.layers.2.mlp.up_proj"
    low, high = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    expected = (base[f"{name}.weight"].bfloat16().float() + 2 * (high @ low)).bfloat16()
    assert torch.equal(merged[f"{name}.weight"], expected)
