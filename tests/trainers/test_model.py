"""Loading: what is refused and how, LoRA on tied embeddings, fp32 copies, and a replaced vision tower."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from datasets.video_dataset import VideoTemporalDataset
from trainers.generation import check_sees_video, generate_texts, model_inputs
from trainers.model import load_base, load_for_inference, load_policy, load_processor, pick_attention, resolve_source
from trainers.parts import LearningRates, part_of
from utils.common import UserError
from utils.config import LoraConfig, ModelConfig, SFTConfig

ConfigWith = Callable[..., SFTConfig]
RATES = LearningRates(language=1e-4, mm_projector=1e-5, vision_tower=0.0, head=1e-4)
LORA = LoraConfig(r=4, lora_alpha=8)  # the shipped target_modules and modules_to_save


def model_config(path: Path, dtype: str = "float32") -> ModelConfig:
    return ModelConfig(name_or_path=str(path), torch_dtype=dtype, attn_implementation="sdpa")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.visual.blocks.0.attn.qkv.weight", "vision_tower"),
        ("model.visual.patch_embed.proj.weight", "vision_tower"),
        ("model.visual.merger.linear_fc1.weight", "mm_projector"),
        ("base_model.model.model.visual.deepstack_merger_list.1.modules_to_save.default.norm.bias", "mm_projector"),
        ("model.language_model.embed_tokens.weight", "head"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "head"),
        ("base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight", "language"),
        ("model.language_model.norm.weight", "language"),
    ],
)
def test_part_of(name: str, part: str) -> None:
    assert part_of(name) == part


def test_missing_path_names_the_key() -> None:
    with pytest.raises(UserError, match=r"'\./no/such/model' does not exist.*model.name_or_path"):
        resolve_source("./no/such/model")


def test_run_folder_names_its_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-best").mkdir()
    with pytest.raises(UserError, match="it holds checkpoint-best"):
        resolve_source(str(tmp_path))


def test_another_model_type_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is a 'gpt2' model; this framework trains Qwen3-VL"):
        load_base(str(tmp_path / "m"), model_config(tmp_path / "m"), dtype=torch.float32)


def test_missing_processor_is_named(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model / name, tmp_path / "m" / name)
    with pytest.raises(UserError, match="has no processor"):
        load_for_inference(str(tmp_path / "m"))


def test_trained_weights_without_contract_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    (tmp_path / "m" / "training_args.bin").write_bytes(b"")  # what every Trainer save holds
    with pytest.raises(UserError, match="prompt_contract.json"):
        load_for_inference(str(tmp_path / "m"))
    assert load_for_inference(str(tmp_path / "m"), need_contract=False).contract is None


def test_flash_attention_falls_back_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device, where flash_attention_2 may be right")
    with caplog.at_level("INFO", logger="vtg"):
        assert pick_attention("flash_attention_2") == "sdpa"
    assert [record.message.count("using sdpa") for record in caplog.records] == [1]
    assert pick_attention("eager") == "eager"


def test_default_lora_keeps_tied_embeddings_one(tiny_model: Path) -> None:
    """The shipped lists name lm_head twice: it trains in full, once, tied to embed_tokens, and no low-rank pair on
    it."""
    policy = load_policy(model_config(tiny_model), LORA, RATES)
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert not any("lm_head" in name and "lora" in name for name in trained)
    base = policy.model.get_base_model()
    head = base.lm_head.modules_to_save["default"].weight
    embeddings = base.model.language_model.embed_tokens.modules_to_save["default"].weight
    assert head is embeddings and head.requires_grad
    assert sum("self_attn" in name for name in trained) == 4 * 2 * 4  # layers x (A, B) x projections


def test_lora_on_a_tied_head_alone_is_refused(tiny_model: Path) -> None:
    lora = LoraConfig(r=4, target_modules=("q_proj", "lm_head"), modules_to_save=())
    with pytest.raises(UserError, match="ties lm_head to embed_tokens"):
        load_policy(model_config(tiny_model), lora, RATES)


def test_unknown_lora_target_is_named(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="lora.target_modules"):
        load_policy(model_config(tiny_model), LoraConfig(target_modules=("q_projection",), modules_to_save=()), RATES)


def test_bf16_base_with_fp32_copies(tiny_model: Path, config_with: ConfigWith) -> None:
    """A step of 1e-6 moves the copies, the residual stream stays bf16, and plain generate runs outside autocast."""
    policy = load_policy(model_config(tiny_model, "bfloat16"), LORA, RATES)
    model = policy.model
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    seen: list[torch.dtype] = []
    layer = model.get_base_model().model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0].dtype))
    config = config_with()
    dataset = VideoTemporalDataset(config.data, policy.processor, config.prompt, with_answer=False)
    from datasets.collate_fns import VideoCollator

    batch = VideoCollator(policy.processor.tokenizer.pad_token_id, dataset.blank(), "left")([dataset[0], dataset[1]])
    texts = generate_texts(model, policy.processor, batch, max_new_tokens=3)
    assert len(texts) == 2 and set(seen) == {torch.bfloat16}
    before = {name: p.detach().clone() for name, p in trained.items()}
    model.train()
    model(**model_inputs(batch, torch.device("cpu"))).logits.float().logsumexp(-1).sum().backward()
    for parameter in trained.values():
        if parameter.grad is not None:
            parameter.data -= 1e-6 * parameter.grad.sign()
    for part in ("embed_tokens", "visual.merger", "deepstack_merger_list.0"):
        name = next(n for n in trained if part in n and n.endswith("weight") and "norm" not in n)
        assert not torch.equal(before[name], trained[name]), name


class HalfTower(nn.Module):
    """A replaced vision tower for the test below: the original behind a learned scale."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.inner = original
        self.scale = nn.Parameter(torch.tensor(0.5))

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, hidden_states: torch.Tensor, grid_thw: torch.Tensor, **kwargs):
        return self.inner(hidden_states * self.scale, grid_thw, **kwargs)


def half_tower(vision_config, original: nn.Module) -> nn.Module:
    return HalfTower(original)


def test_vision_tower_can_be_replaced_saved_and_loaded(
    tiny_model: Path, config_with: ConfigWith, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "half_tower_plugin", sys.modules[__name__])
    named = "half_tower_plugin:half_tower"
    full = LoraConfig(enabled=False)
    rates = LearningRates(1e-4, 1e-4, 1e-4, 1e-4)
    config = ModelConfig(name_or_path=str(tiny_model), torch_dtype="float32", vision_tower=named)
    policy = load_policy(config, full, rates)
    assert policy.model.model.visual.scale.requires_grad
    with torch.no_grad():
        policy.model.model.visual.scale.fill_(0.75)
    settings = config_with()
    dataset = VideoTemporalDataset(settings.data, policy.processor, settings.prompt)
    from datasets.collate_fns import VideoCollator
    from utils.prompts import PromptContract

    batch = VideoCollator(policy.processor.tokenizer.pad_token_id, dataset.blank())([dataset[0]])
    check_sees_video(policy.model, batch)
    folder = tmp_path / "trained"
    policy.model.save_pretrained(folder)
    policy.processor.save_pretrained(folder)
    PromptContract.current(settings.prompt, settings.data, policy.vision_tower).save(folder)
    loaded = load_for_inference(str(folder), dtype="float32", device="cpu")
    assert loaded.model.model.visual.scale.item() == 0.75
    inputs = model_inputs(batch, torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(loaded.model(**inputs).logits, policy.model.eval()(**inputs).logits)


def noisy_tower(vision_config, original: nn.Module) -> nn.Module:
    """Random anew at each call, as the weights of a user's own encoder may be: only a checkpoint can say what they
    were."""
    tower = HalfTower(original)
    tower.scale.data = torch.rand(())
    return tower


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tower_lr", [0.0, 1e-4])
def test_an_adapter_carries_a_replaced_vision_tower(
    tower_lr: float,
    dtype: str,
    tiny_model: Path,
    config_with: ConfigWith,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With LoRA the tower's own weights train at vision_tower_lr, are saved whole, and are found again: by inference,
    by a run that goes on with the adapter, in merged weights, and under an adapter on top of those."""
    import sys

    from datasets.collate_fns import VideoCollator
    from trainers.merging import settle_start
    from utils.prompts import PromptContract

    monkeypatch.setitem(sys.modules, "noisy_tower_plugin", sys.modules[__name__])
    config = model_config(tiny_model, dtype).model_copy(update={"vision_tower": "noisy_tower_plugin:noisy_tower"})
    rates = LearningRates(1e-4, 1e-4, tower_lr, 1e-4)
    policy = load_policy(config, LORA, rates)
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad and "visual" in name}
    assert any(name.endswith("visual.modules_to_save.default.scale") for name in trained) == (tower_lr > 0)
    assert any("visual.modules_to_save.default.inner.deepstack_merger_list.1" in name for name in trained)

    settings = config_with()
    dataset = VideoTemporalDataset(settings.data, policy.processor, settings.prompt)
    batch = VideoCollator(policy.processor.tokenizer.pad_token_id, dataset.blank())([dataset[0]])
    inputs = model_inputs(batch, torch.device("cpu"))

    def logits(model) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(**inputs).logits.float()

    def save(policy, name: str) -> str:
        policy.model.save_pretrained(tmp_path / name)
        policy.processor.save_pretrained(tmp_path / name)
        PromptContract.current(settings.prompt, settings.data, policy.vision_tower).save(tmp_path / name)
        return str(tmp_path / name)

    adapter = save(policy, "adapter")
    again = model_config(Path(adapter), dtype)
    near = 1e-5 if dtype == "float32" else 0.05  # copies are fp32 in training alone
    expected = logits(policy.model)
    assert torch.allclose(logits(load_for_inference(adapter, dtype=dtype).model), expected, atol=near)
    assert torch.equal(logits(load_policy(again, LORA, rates).model), expected)
    assert settle_start(again, LORA, rates, tmp_path / "same") is again
    merged = settle_start(again, LORA.model_copy(update={"r": 2}), rates, tmp_path / "other")
    on_top = load_policy(merged, LORA.model_copy(update={"r": 2}), rates)
    assert torch.allclose(logits(on_top.model), expected, atol=near)
    assert torch.allclose(
        logits(load_for_inference(save(on_top, "on_top"), dtype=dtype).model), expected, atol=near
    )


def test_vision_tower_that_cannot_be_imported_names_the_key(tiny_model: Path) -> None:
    config = ModelConfig(name_or_path=str(tiny_model), vision_tower="no_such_package:tower")
    with pytest.raises(UserError, match="model.vision_tower='no_such_package:tower' cannot be imported"):
        load_policy(config, LoraConfig(enabled=False), RATES)


def test_processor_must_read_video(tiny_model: Path) -> None:
    assert hasattr(load_processor(resolve_source(str(tiny_model))), "video_processor")


def test_a_model_that_cannot_be_served_as_asked(tiny_model: Path, tmp_path: Path) -> None:
    """A damaged file, a device that is not there and a wrong dtype are one clear line each."""
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="cut off or damaged: copy or download it again"):
        load_for_inference(str(copy), need_contract=False, device="cpu")
    for name in ("config.json", "tokenizer.json"):
        (copy / name).write_text("{")
        with pytest.raises(UserError, match="cannot load '.*/model': .* copy or download the folder again"):
            load_processor(resolve_source(str(copy)))
    with pytest.raises(UserError, match="dtype must be one of bfloat16, float16, float32, got 'int7'"):
        load_for_inference(str(tiny_model), need_contract=False, device="cpu", dtype="int7")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device=cuda, but torch sees no CUDA device"):
            load_for_inference(str(tiny_model), need_contract=False, device="cuda")
