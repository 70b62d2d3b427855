"""From `train_sft.py` and `train_rl.py` to an export, as a user does it; and the memory that an export takes."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Qwen3VLForConditionalGeneration

from inference.export import export, make_plan, parse_args
from inference.lineage import read_validation, trace
from inference.video_infer import VideoTemporalInference
from trainers.merging import MERGED
from utils.common import REPO_ROOT

Train = Callable[..., Path]


@pytest.fixture
def train(demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """`train("sft", name, model, *overrides)`: two steps with validation; returns `checkpoint-best`."""

    def run(stage: str, name: str, model: Path, *overrides: str) -> Path:
        configs = REPO_ROOT / "configs/demo"
        flags = ["--config", str(configs / f"{stage}_config.yaml"), "--data_config", str(configs / "video_config.yaml")]
        flags += ["--output_dir", str(tmp_path / name), "--model_path", str(model)]
        flags += [f"data.{split}={demo_data / split}.jsonl" for split in ("train", "val", "test")]
        flags += ["data.cache_dir=null", "training.max_steps=2", "training.max_eval_samples=8", "training.eval_steps=2"]
        flags += ["training.per_device_train_batch_size=8", "training.save_strategy=no", "training.run_name=null"]
        flags += ["training.dataloader_num_workers=0", "training.disable_tqdm=true", "training.use_cpu=true"]
        flags += [f"training.metrics_dir={tmp_path / 'metrics'}", f"training.logging_dir={tmp_path / 'logs'}"]
        monkeypatch.setattr(sys, "argv", [f"train_{stage}.py", *flags, *overrides])
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
        monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(REPO_ROOT / f"train_{stage}.py"), run_name="__main__")
        assert not ended.value.code
        return tmp_path / name / "checkpoint-best"

    return run


def exported(checkpoint: Path, folder: Path) -> Path:
    flags = ["--checkpoint", str(checkpoint), "--output_dir", str(folder), "--dtype", "float32"]
    export(make_plan(parse_args(flags)))
    return folder


def check_export(checkpoint: Path, folder: Path, demo_data: Path, stages: list[str]) -> None:
    """The export answers as its run's validation did, and its card says where it comes from."""
    run = checkpoint.parent
    engine = VideoTemporalInference(folder)
    lines = [json.loads(line) for line in (run / "validation/step-2.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    for line in lines[:4]:
        assert (
            engine.predict(demo_data / line["video"], line["sentence"], max_new_tokens=24)["raw_text"] == line["answer"]
        )
    found = read_validation(checkpoint)
    assert found is not None and found.step == 2 and found.scores["num_samples"] == 8
    low, high = found.intervals["mIoU"]
    assert 0 <= low <= found.scores["mIoU"] <= high <= 100
    card = (folder / "README.md").read_text()
    assert f"| mIoU | {found.scores['mIoU']:.1f} | {low:.1f} to {high:.1f} | " in card
    assert [stage for stage in ("SFT", "GRPO") if f"| {stage} | `train.jsonl` | `val.jsonl` | " in card] == stages


def difference(folder: Path, model: Qwen3VLForConditionalGeneration) -> float:
    """Largest difference between the export's weights and the model's, relative to the largest weight."""
    stored, expected = load_file(folder / "model.safetensors"), model.state_dict()
    assert stored.keys() <= expected.keys()
    return max(
        float((value - expected[name]).abs().max() / expected[name].abs().max()) for name, value in stored.items()
    )


@pytest.mark.slow
def test_sft_then_rl_both_ways(train: Train, answering_model: Path, demo_data: Path, tmp_path: Path) -> None:
    """SFT adapter; GRPO that goes on with it; GRPO of another shape on the merged SFT weights. Each export equals
    base + adapters as plain PEFT merges them."""
    base = Qwen3VLForConditionalGeneration.from_pretrained
    shape = ("lora.enabled=true", "lora.r=4", "lora.target_modules=[q_proj, v_proj]", "lora.modules_to_save=[]")
    frozen = ("training.mm_projector_lr=0", "training.vision_tower_lr=0", "training.head_lr=0")
    sft = train("sft", "sft", answering_model, *shape, *frozen, "training.learning_rate=5e-3")
    check_export(sft, exported(sft, tmp_path / "sft-out"), demo_data, ["SFT"])
    sft_merged = PeftModel.from_pretrained(base(answering_model), sft).merge_and_unload()
    assert difference(tmp_path / "sft-out", sft_merged) < 1e-6 < difference(tmp_path / "sft-out", base(answering_model))

    rl = ("training.num_generations=4", "training.gradient_accumulation_steps=2", "training.kl_coef=0.05")
    went_on = train("rl", "rl", sft, *rl, *shape, "lora.lora_alpha=128")
    check_export(went_on, exported(went_on, tmp_path / "rl-out"), demo_data, ["SFT", "GRPO"])
    rl_merged = PeftModel.from_pretrained(base(answering_model), went_on).merge_and_unload()
    assert difference(tmp_path / "rl-out", rl_merged) < 1e-6 < difference(tmp_path / "rl-out", sft_merged)

    other = train("rl", "other", sft, *rl, "training.learning_rate=1e-2")  # the demo's r=16 on all layers
    assert (other.parent / MERGED).is_dir()
    check_export(other, exported(other, tmp_path / "other-out"), demo_data, ["SFT", "GRPO"])
    both = PeftModel.from_pretrained(PeftModel.from_pretrained(base(answering_model), sft).merge_and_unload(), other)
    assert difference(tmp_path / "other-out", both.merge_and_unload()) < 1e-6
    assert [run.stage for run in trace(other).runs][-2:] == ["SFT", "GRPO"]


MEASURE = """
import sys
from pathlib import Path
from inference.export import export, make_plan, parse_args
from scripts.make_demo_data import all_sentences
from scripts.make_tiny_model import build_tiny_checkpoint, prompt_texts
from trainers.model import add_lora, load_processor, resolve_source
from trainers.parts import LearningRates
from transformers import Qwen3VLForConditionalGeneration
from utils.checkpoints import write_manifest
from utils.config import DataConfig, LoraConfig, PromptConfig
from utils.prompts import PromptContract

root, action = Path(sys.argv[1]), sys.argv[2]
if action == "make":
    for name, size in (("small", {}), ("large", {"hidden": 1024, "layers": 4})):
        base = build_tiny_checkpoint(root / f"{name}-base", prompt_texts(all_sentences(), PromptConfig()), **size)
        model = Qwen3VLForConditionalGeneration.from_pretrained(base)
        lora = LoraConfig(r=8, lora_alpha=16)
        folder = root / name
        add_lora(model, lora, LearningRates(1e-4, 0.0, 0.0, 1e-4), fp32_copies=True).save_pretrained(folder)
        load_processor(resolve_source(str(base))).save_pretrained(folder)
        PromptContract.current(PromptConfig(), DataConfig()).save(folder)
        write_manifest(folder)
else:
    from utils.logging_utils import peak_memory_bytes

    flags = ["--checkpoint", str(root / action), "--output_dir", str(root / f"{action}-out"), "--dtype", "float32"]
    export(make_plan(parse_args(flags)))
    print(peak_memory_bytes())
"""


@pytest.mark.slow
def test_memory_peaks_at_about_one_copy(tmp_path: Path) -> None:
    """Peak resident memory of an export of 200 MB above that of one of 5 MB: at most 1.5 copies of the weights."""

    def run(action: str) -> str:
        command = [sys.executable, "-c", MEASURE, str(tmp_path), action]
        result = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

    run("make")
    small, large = (int(run(name).split()[-1]) for name in ("small", "large"))
    num_bytes = (tmp_path / "large-out/model.safetensors").stat().st_size
    assert num_bytes > 2e8
    assert large - small < 1.5 * num_bytes
