"""An exported folder holds the same model: logits, tying, predictions, and everything it takes to ask it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, Qwen3VLForConditionalGeneration

from datasets.encoding import encode_prompt
from datasets.pixels import with_pixel_values
from inference.export import export, main, make_plan, parse_args
from inference.video_infer import VideoTemporalInference
from tests import tiny
from trainers.merging import MERGED, settle_start
from trainers.model import add_lora, load_processor, resolve_source
from trainers.parts import LearningRates
from utils.checkpoints import manifest_problems, write_manifest
from utils.common import REPO_ROOT, UserError
from utils.config import DataConfig, LoraConfig, ModelConfig, PromptConfig
from utils.prompts import PromptContract, build_messages
from utils.video import read_clip

PROMPT = PromptConfig(question="When {sentence}?")
DATA = DataConfig(
    backend="pyav", fps=2.0, min_frames=16, max_frames=16,
    min_pixels_per_frame=2048, max_pixels_per_frame=2048, total_pixels=32768, max_prompt_tokens=1024,
)  # fmt: skip
EXACT = 1e-5
"""Relative, in fp32."""

Logits = Callable[[Any], torch.Tensor]


def model_inputs_of(sample: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A batch of one."""
    ready = with_pixel_values(sample)
    return {key: value[None] if value.ndim == 1 else value for key, value in ready.items()}


@pytest.fixture(scope="module")
def untied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a head of its own, as 8B has."""
    return tiny.tiny_checkpoint(tmp_path_factory, prompt=PROMPT, tie=False)


@pytest.fixture(scope="module")
def logits_of(tiny_model: Path, demo_data: Path) -> Logits:
    """Logits of a model for a prompt with video, in fp32."""
    processor = AutoProcessor.from_pretrained(tiny_model)
    clip = read_clip(demo_data / "videos/test/000000.mp4", DATA.budget, backend="pyav")
    sample = encode_prompt(processor, build_messages(PROMPT, "the red square appears"), clip)
    inputs = model_inputs_of(sample)

    def logits(model: Any) -> torch.Tensor:
        pixels = inputs["pixel_values_videos"].to(model.dtype)
        with torch.no_grad():
            return model.eval()(**{**inputs, "pixel_values_videos": pixels}).logits.float()

    return logits


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def seal(folder: Path, base: Path) -> Path:
    """What makes weights a checkpoint: processor, prompt contract, manifest."""
    load_processor(resolve_source(str(base))).save_pretrained(folder)
    PromptContract.current(PROMPT, DATA).save(folder)
    write_manifest(folder)
    return folder


def disturb(model: Any, seed: int = 0) -> None:
    """Make a new adapter one that matters: everything it holds moves."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        elif "modules_to_save" in name:
            parameter.data += 0.02 * torch.randn_like(parameter)


def our_adapter(base: Path, folder: Path, lora: LoraConfig, rates: LearningRates, seed: int = 0) -> Path:
    """An adapter on `base` as train_sft.py leaves one."""
    wrapped = add_lora(plain(base), lora, rates, fp32_copies=True)
    disturb(wrapped, seed)
    wrapped.save_pretrained(folder)
    return seal(folder, base)


def foreign_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter that plain PEFT made, in shapes that training here refuses."""
    wrapped = get_peft_model(plain(base), PeftLoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings))
    disturb(wrapped)
    wrapped.save_pretrained(folder)
    return seal(folder, base)


def plain(folder: Path | str, dtype: torch.dtype = torch.float32) -> Any:
    return Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=dtype)


def exported(checkpoint: Path, folder: Path, *flags: str) -> Path:
    """`export_to_hf.sh --checkpoint checkpoint --output_dir folder *flags`, without its messages."""
    export(make_plan(parse_args(["--checkpoint", str(checkpoint), "--output_dir", str(folder), *flags])))
    return folder


def stored_keys(folder: Path) -> set[str]:
    return {key for path in folder.glob("model*.safetensors") for key in safe_open(path, "pt").keys()}


def ties(folder: Path) -> tuple[bool, bool]:
    config = json.loads((folder / "config.json").read_text())
    return config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]


# --- merged weights ---------------------------------------------------------------------------------------------------
ADAPTERS: dict[str, tuple[bool, bool, Callable[[Path, Path], Path]]] = {
    # name: the base is tied, the export is tied, how the adapter is made
    "attention, tied": (
        True, True, lambda base, to: our_adapter(
            base, to, LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj"), modules_to_save=()),
            LearningRates(1e-4, 0.0, 0.0, 0.0),
        )
    ),
    "the shipped LoRA with mergers, tied": (
        True, True, lambda base, to: our_adapter(
            base, to, LoraConfig(r=4, lora_alpha=8), LearningRates(1e-4, 1e-4, 0.0, 1e-4)
        )
    ),
    "the shipped LoRA with mergers, untied": (
        False, False, lambda base, to: our_adapter(
            base, to, LoraConfig(r=4, lora_alpha=8), LearningRates(1e-4, 1e-4, 0.0, 1e-4)
        )
    ),
    "low-rank head, untied": (
        False, False, lambda base, to: our_adapter(
            base, to, LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "lm_head"), modules_to_save=()),
            LearningRates(1e-4, 0.0, 0.0, 0.0),
        )
    ),
    "low-rank head, tied": (True, False, lambda base, to: foreign_adapter(base, to, target_modules=["lm_head"])),
    "low-rank embedding, tied": (
        True, False, lambda base, to: foreign_adapter(base, to, target_modules=["embed_tokens"])
    ),
    "low-rank head and embedding, untied": (
        False, False, lambda base, to: foreign_adapter(base, to, target_modules=["embed_tokens", "lm_head"])
    ),
    "full head alone, tied": (
        True, False, lambda base, to: foreign_adapter(base, to, target_modules=["q_proj"], modules_to_save=["lm_head"])
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", ADAPTERS)
def test_merged_logits_equal_adapter_and_base(
    case: str, tiny_model: Path, untied_model: Path, logits_of: Logits, tmp_path: Path
) -> None:
    """Reference and result are loaded by plain transformers and PEFT; 1e-5 relative in fp32, tying true to the
    weights."""
    base_is_tied, is_tied, make = ADAPTERS[case]
    base = tiny_model if base_is_tied else untied_model
    checkpoint = make(base, tmp_path / "checkpoint-best")
    folder = exported(checkpoint, tmp_path / "out", "--dtype", "float32")
    expected = logits_of(PeftModel.from_pretrained(plain(base), checkpoint))
    assert relative(expected, logits_of(plain(base))) > 0.01  # the adapter matters
    model = plain(folder)
    assert relative(logits_of(model), expected) < EXACT
    assert ties(folder) == (is_tied, is_tied)
    assert ("lm_head.weight" in stored_keys(folder)) is not is_tied
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding.data_ptr() == head.data_ptr()) is is_tied and torch.equal(embedding, head) is is_tied
    auto = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    assert type(auto) is Qwen3VLForConditionalGeneration and auto.dtype == torch.float32
    assert torch.equal(logits_of(auto), logits_of(model))


def test_bf16_is_rounded_once(tiny_model: Path, logits_of: Logits, tmp_path: Path) -> None:
    """bf16 weights are bf16(bf16 base + fp32 delta), bit for bit; logits differ from those of adapter + base by 2 %
    at most, which is what bf16 arithmetic costs."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj"), modules_to_save=())
    checkpoint = our_adapter(tiny_model, tmp_path / "adapter", lora, LearningRates(1e-4, 0.0, 0.0, 0.0))
    folder = exported(checkpoint, tmp_path / "out")  # the default dtype
    stored, base = load_file(folder / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    for layer in range(4):
        name = f"model.language_model.layers.{layer}.self_attn.q_proj"
        low, high = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        rounded = base[f"{name}.weight"].bfloat16()
        assert torch.equal(stored[f"{name}.weight"], (rounded.float() + 2 * (high @ low)).bfloat16())
    wrapped = PeftModel.from_pretrained(plain(tiny_model, torch.bfloat16), checkpoint)
    assert relative(logits_of(plain(folder, torch.bfloat16)), logits_of(wrapped)) < 0.02
    exact = logits_of(PeftModel.from_pretrained(plain(tiny_model), checkpoint))
    assert relative(logits_of(plain(folder, torch.bfloat16)), exact) < 0.02


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_full_weights_are_exported_as_they_are(
    dtype: str, answering_model: Path, logits_of: Logits, tmp_path: Path
) -> None:
    folder = exported(answering_model, tmp_path / "out", "--dtype", dtype)
    stored, trained = load_file(folder / "model.safetensors"), load_file(answering_model / "model.safetensors")
    assert stored.keys() == trained.keys()
    assert all(torch.equal(stored[name], value.to(getattr(torch, dtype))) for name, value in trained.items())
    assert not {"training_args.bin", "optimizer.pt", "metrics.json"} & {path.name for path in folder.iterdir()}


def test_shards(answering_model: Path, tmp_path: Path) -> None:
    folder = exported(answering_model, tmp_path / "out", "--dtype", "float32", "--max_shard_size", "2MB")
    sizes = [path.stat().st_size for path in folder.glob("model-*.safetensors")]
    assert len(sizes) >= 2 and max(sizes) < 2.2e6
    stored = plain(folder).state_dict()
    assert all(torch.equal(stored[name], value) for name, value in plain(answering_model).state_dict().items())


# --- nested adapters --------------------------------------------------------------------------------------------------
@pytest.fixture
def sft_adapter(tiny_model: Path, tmp_path: Path) -> Path:
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj"), modules_to_save=("embed_tokens",))
    return our_adapter(tiny_model, tmp_path / "sft/checkpoint-best", lora, LearningRates(1e-4, 0.0, 0.0, 1e-4))


def test_rl_adapter_on_merged_sft_weights(
    sft_adapter: Path, tiny_model: Path, logits_of: Logits, tmp_path: Path
) -> None:
    """GRPO with another LoRA shape: its adapter sits on `merged_base`. The export holds base + both."""
    wanted = LoraConfig(r=8, lora_alpha=8, target_modules=("o_proj", "gate_proj"), modules_to_save=())
    rates = LearningRates(1e-4, 0.0, 0.0, 0.0)
    start = ModelConfig(name_or_path=str(sft_adapter), torch_dtype="float32", attn_implementation="sdpa")
    merged = Path(settle_start(start, wanted, rates, tmp_path / "rl").name_or_path)
    assert merged == tmp_path / "rl" / MERGED
    rl_adapter = our_adapter(merged, tmp_path / "rl/checkpoint-best", wanted, rates, seed=1)
    folder = exported(rl_adapter, tmp_path / "out", "--dtype", "float32")
    sft = PeftModel.from_pretrained(plain(tiny_model), sft_adapter)
    both = PeftModel.from_pretrained(sft.merge_and_unload(), rl_adapter)
    expected = logits_of(both)
    assert relative(expected, logits_of(PeftModel.from_pretrained(plain(tiny_model), sft_adapter))) > 0.01
    assert relative(logits_of(plain(folder)), expected) < EXACT
    shutil.rmtree(merged)  # the export needs nothing of the run
    assert relative(logits_of(plain(folder)), expected) < EXACT


def test_rl_that_went_on_with_the_sft_adapter(
    sft_adapter: Path, tiny_model: Path, logits_of: Logits, tmp_path: Path
) -> None:
    """The same shape goes on: one adapter on the first base, beside it TRL's frozen copy `ref`, which is no part of
    the policy."""
    wrapped = PeftModel.from_pretrained(plain(tiny_model), sft_adapter, is_trainable=True)
    wrapped.add_adapter("ref", wrapped.peft_config["default"])
    disturb(wrapped, seed=2)
    wrapped.set_adapter("default")
    expected = logits_of(wrapped)
    folder = tmp_path / "rl/checkpoint-best"
    wrapped.save_pretrained(folder, selected_adapters=["default"])
    out = exported(seal(folder, tiny_model), tmp_path / "out", "--dtype", "float32")
    assert relative(logits_of(plain(out)), expected) < EXACT


# --- predictions ------------------------------------------------------------------------------------------------------
QUERIES = ("the red square appears", "the blue square appears", "the red square disappears")


@pytest.fixture(scope="module")
def answers(answering_adapter: Path, demo_data: Path) -> dict[tuple[str, str], str]:
    """What the checkpoint answers, by video and query; not all the same."""
    engine = VideoTemporalInference(answering_adapter)
    videos = sorted(str(path) for path in (demo_data / "videos/test").iterdir())[:4]
    found = {(v, q): engine.predict(v, q)["raw_text"] for v in videos for q in QUERIES}
    assert len(set(found.values())) > 1
    return found


@pytest.fixture(scope="module")
def merged_export(answering_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(answering_adapter, tmp_path_factory.mktemp("merged") / "vtg-tiny", "--dtype", "float32")


@pytest.fixture(scope="module")
def adapter_export(answering_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(answering_adapter, tmp_path_factory.mktemp("adapter") / "vtg-tiny-lora", "--merge_lora", "false")


def test_predictions_with_this_project(
    merged_export: Path, adapter_export: Path, answers: dict[tuple[str, str], str]
) -> None:
    for folder in (merged_export, adapter_export):
        engine = VideoTemporalInference(folder)
        assert {key: engine.predict(*key)["raw_text"] for key in answers} == answers


def test_predictions_with_plain_transformers(
    merged_export: Path, adapter_export: Path, answering_model: Path, answers: dict[tuple[str, str], str]
) -> None:
    """`generate` with nothing but the folder's own generation config; the adapter by plain PEFT on its base."""
    processor = AutoProcessor.from_pretrained(merged_export)
    settings = GenerationConfig.from_pretrained(adapter_export)
    merged = AutoModelForImageTextToText.from_pretrained(merged_export, dtype="auto").eval()
    adapter = PeftModel.from_pretrained(plain(answering_model), adapter_export).eval()

    def answer(video: str, query: str, model: Any, **options: Any) -> str:
        clip = read_clip(Path(video), DATA.budget, backend="pyav")
        sample = encode_prompt(processor, build_messages(PROMPT, query), clip)
        inputs = model_inputs_of(sample)
        ids = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        return processor.decode(ids, skip_special_tokens=True).strip()

    assert {key: answer(*key, merged) for key in answers} == answers
    assert {key: answer(*key, adapter, generation_config=settings) for key in answers} == answers


def test_the_adapter_is_shipped_as_it_is(answering_adapter: Path, adapter_export: Path) -> None:
    assert {path.name for path in adapter_export.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "processor_config.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "prompt_contract.json", "README.md",
        "manifest.json", "export.json",
    }  # fmt: skip
    stored = load_file(adapter_export / "adapter_model.safetensors")
    trained = load_file(answering_adapter / "adapter_model.safetensors")
    assert stored.keys() == trained.keys() and all(torch.equal(stored[k], v) for k, v in trained.items())


def test_the_adapter_in_another_dtype(answering_adapter: Path, tmp_path: Path) -> None:
    flags = ("--merge_lora", "false", "--dtype", "bfloat16", "--base_model", "me/base")
    folder = exported(answering_adapter, tmp_path / "out", *flags)
    stored = load_file(folder / "adapter_model.safetensors")
    trained = load_file(answering_adapter / "adapter_model.safetensors")
    assert all(torch.equal(stored[name], value.bfloat16()) for name, value in trained.items())
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/base"


# --- what lies beside the weights -------------------------------------------------------------------------------------
def test_the_folder(merged_export: Path, answering_adapter: Path, answering_model: Path) -> None:
    assert {path.name for path in merged_export.iterdir()} == {
        "config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "generation_config.json", "prompt_contract.json", "README.md", "manifest.json",
        "export.json",
    }  # fmt: skip
    assert manifest_problems(merged_export) == []
    for name in ("chat_template.jinja", "tokenizer.json", "prompt_contract.json"):
        assert (merged_export / name).read_bytes() == (answering_adapter / name).read_bytes()
    here = [str(answering_model), str(answering_adapter.parent), str(REPO_ROOT), str(Path.home())]
    texts = [p.read_text() for p in merged_export.iterdir() if p.suffix in (".json", ".md", ".jinja")]
    assert not [path for path in here for text in texts if path in text]  # nothing of this machine


def test_generation_is_greedy(merged_export: Path, answering_model: Path) -> None:
    """The base samples; the export answers as inference does."""
    assert GenerationConfig.from_pretrained(answering_model).do_sample is True
    config, processor = GenerationConfig.from_pretrained(merged_export), AutoProcessor.from_pretrained(merged_export)
    tokens = processor.tokenizer.get_vocab()
    assert (config.do_sample, config.temperature, config.top_p, config.top_k) == (False, None, None, None)
    assert (config.max_new_tokens, config.eos_token_id) == (64, tokens["<|im_end|>"])
    assert {tokens["<|video_pad|>"], tokens["<|image_pad|>"], tokens["<|vision_start|>"]} < set(config.suppress_tokens)


def test_the_processor_carries_the_sampling(merged_export: Path) -> None:
    video = AutoProcessor.from_pretrained(merged_export).video_processor
    assert (video.fps, video.min_frames, video.max_frames) == (2.0, 16, 16)
    assert dict(video.size) == {"shortest_edge": 2048, "longest_edge": 32768}
    assert (video.cap_pixels_per_frame, video.max_video_tokens) == (True, 2)


def test_the_checkpoint_and_its_base_stay_as_they_are(
    answering_adapter: Path, answering_model: Path, tmp_path: Path
) -> None:
    folders = (answering_adapter, answering_model)
    before = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    exported(answering_adapter, tmp_path / "merged")
    exported(answering_adapter, tmp_path / "adapter", "--merge_lora", "false", "--base_model", "me/base")
    assert [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders] == before


def test_an_export_is_a_checkpoint(merged_export: Path, tmp_path: Path) -> None:
    """It can be exported again, in another dtype."""
    again = exported(merged_export, tmp_path / "again", "--dtype", "bfloat16")
    stored, first = load_file(again / "model.safetensors"), load_file(merged_export / "model.safetensors")
    assert all(torch.equal(stored[name], value.bfloat16()) for name, value in first.items())


# --- bad input --------------------------------------------------------------------------------------------------------
@pytest.fixture
def checkpoint(answering_adapter: Path, tmp_path: Path) -> Path:
    """A copy, to be spoilt."""
    return Path(shutil.copytree(answering_adapter, tmp_path / "run/checkpoint-best"))


def run_main(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr("sys.argv", ["export.py", *flags])
    main()


def drop_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def drop_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def drop_contract(folder: Path) -> None:
    (folder / "prompt_contract.json").unlink()
    write_manifest(folder)


def pickle_weights(folder: Path) -> None:
    torch.save({}, folder / "adapter_model.bin")
    drop_weights(folder)
    write_manifest(folder)


def lose_base(folder: Path) -> None:
    name_base(folder, "./gone/Qwen3-VL")


def far_base(folder: Path) -> None:
    name_base(folder, "nobody/no-such-model")


def name_base(folder: Path, base: str) -> None:
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))
    write_manifest(folder)


def break_weights(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    save_file({**tensors, name: torch.full_like(tensors[name], torch.nan)}, folder / "adapter_model.safetensors")
    write_manifest(folder)


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (shutil.rmtree, (), r"--checkpoint .*checkpoint-best is no folder"),
        (drop_weights, (), "is not a complete checkpoint: adapter_model.safetensors is missing"),
        (drop_manifest, (), "is not a complete checkpoint: manifest.json is missing"),
        (drop_contract, (), "has no prompt_contract.json: nobody could say with which prompt"),
        (pickle_weights, (), "holds no safetensors"),
        (lose_base, (), r"was trained on ./gone/Qwen3-VL, which does not exist here"),
        (
            far_base,
            (),
            r"cannot load 'nobody/no-such-model'.*named by base_model_name_or_path in .*adapter_config.json",
        ),
        (break_weights, (), "values that are not finite in bfloat16; choose another checkpoint"),
        (None, ("--dtype", "fp8"), "--dtype must be one of bfloat16, float16, float32, got 'fp8'"),
        (None, ("--push_to_hub", "true"), "--push_to_hub true needs --repo_id owner/name"),
        (None, ("--private",), "--private is for a repository that --push_to_hub true makes"),
        (None, ("--base_model", "./here"), "--base_model must be a name on the hub"),
        (None, ("--merge_lora", "false", "--max_shard_size", "1GB"), "--max_shard_size is for merged weights"),
    ],
)
def test_bad_input_is_one_user_error(
    spoil: Callable[[Path], Any] | None,
    flags: tuple[str, ...],
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if spoil:
        spoil(checkpoint)
    given = ("--checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "out"), *flags)
    with pytest.raises(UserError, match=message) as caught:
        run_main(monkeypatch, *given)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) in (["run"], [])  # nothing half-written


def test_the_base_of_an_adapter_that_is_pushed_has_a_name(
    checkpoint: Path, answering_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--merge_lora", "false", "--push_to_hub", "true", "--repo_id", "me/it")
    with pytest.raises(UserError, match=f"is a folder of this machine .{answering_model}.*--base_model"):
        run_main(monkeypatch, "--checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "out"), *flags)


def test_full_weights_have_no_adapter_to_ship(answering_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds full weights and no adapter"):
        exported(answering_model, tmp_path / "out", "--merge_lora", "false")


def test_float16_that_overflows(answering_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(answering_model, tmp_path / "checkpoint-best"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.language_model.norm.weight"
    save_file({**tensors, name: tensors[name] * 1e6}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} holds values that are not finite in float16; .*--dtype bfloat16"):
        exported(folder, tmp_path / "out", "--dtype", "float16")


def test_nothing_is_deleted(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"out is not empty \(mine.txt\); choose another name. Nothing was changed"):
        exported(checkpoint, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"] and (out / "mine.txt").read_text() == "mine"
    with pytest.raises(UserError, match="mine.txt cannot be made a folder: Not a directory"):
        exported(checkpoint, out / "mine.txt")
    (out / "mine.txt").unlink()
    exported(checkpoint, out, "--merge_lora", "false")  # an empty folder will do
    with pytest.raises(UserError, match=r"is not empty \(README.md, adapter_config.json, adapter_model.safetensors, "):
        exported(checkpoint, out, "--merge_lora", "false")


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_full_disk(when: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if when == "before":
        full = shutil._ntuple_diskusage(10**9, 10**9, 1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: full)
        message = (
            r"not enough disk space to save .*out: about 2\.\d MiB needed, 1000 B free.*start the same command again$"
        )
    else:

        def save_half(_self: Any, folder: Path, **_options: Any) -> None:
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Qwen3VLForConditionalGeneration, "save_pretrained", save_half)
        message = r"the disk filled up while saving .*out .*start the same command again$"
    with pytest.raises(UserError, match=message):
        exported(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--merge_lora", "yes"), "argument --merge_lora: must be true or false, got 'yes'"),
        (("--max_shard_size", "0GB"), "argument --max_shard_size: must be a whole number with KB, MB or GB"),
        (("--token", "hf_x"), "unrecognized arguments: --token"),
    ],
)
def test_flags_that_cannot_be_read(flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_args(["--checkpoint", "a", "--output_dir", "b", *flags])
    assert ended.value.code == 2 and message in capsys.readouterr().err
