"""The model card says what is on record, and its snippets run."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from inference.export import export, make_plan, parse_args
from inference.lineage import Lineage, TrainedRun, base_licence, is_hub_name, read_validation, trace
from inference.model_card import CardFacts, rename, transformers_snippet, write_card
from inference.video_infer import VideoTemporalInference
from utils.checkpoints import write_manifest
from utils.common import REPO_ROOT
from utils.config import LoraConfig, ModelConfig, PromptConfig, RLConfig, SFTConfig, load_config, save_config
from utils.metrics import evaluate, evaluate_intervals
from utils.prompts import PromptContract

QWEN = "Qwen/Qwen3-VL-4B-Instruct"
SAMPLES: list[dict[str, Any]] = [
    {"qid": 0, "gt": [[2.0, 6.0]], "pred": [[2.0, 6.0]], "duration": 8.0},
    {"qid": 1, "gt": [[0.0, 4.0]], "pred": [[2.0, 4.0]], "duration": 8.0},
    {"qid": 2, "gt": [[1.0, 2.0]], "pred": None, "duration": 8.0},
    {"qid": 3, "gt": [[0.0, 8.0]], "pred": [[0.0, 2.0]], "duration": 8.0},
]


def sft_config(**model: Any) -> SFTConfig:
    """The demo's, from `model.name_or_path`, with LoRA."""
    config = load_config(SFTConfig, [REPO_ROOT / f"configs/demo/{name}_config.yaml" for name in ("sft", "video")])
    lora = LoraConfig(r=4, target_modules=("q_proj", "lm_head"), modules_to_save=("embed_tokens", "lm_head"))
    return config.model_copy(update={"model": ModelConfig(**model), "lora": lora})


def rl_config(**model: Any) -> RLConfig:
    config = load_config(RLConfig, [REPO_ROOT / f"configs/demo/{name}_config.yaml" for name in ("rl", "video")])
    return config.model_copy(update={"model": ModelConfig(**model)})


def make_run(folder: Path, config: SFTConfig | RLConfig, checkpoint: Path, samples: list[dict[str, Any]]) -> Path:
    """A run's folder: configuration, a checkpoint, and the validation of step 7. Returns the checkpoint."""
    save_config(config, folder / "config.yaml")
    best = Path(shutil.copytree(checkpoint, folder / "checkpoint-best"))
    metrics = {f"eval_{name}": value for name, value in evaluate(samples).items()}
    (best / "metrics.json").write_text(json.dumps({"step": 7, **metrics}))
    write_manifest(best)
    (folder / "validation").mkdir()
    lines = [json.dumps({"sentence": "x", "answer": "y", **sample}) for sample in samples]
    (folder / "validation/step-7.jsonl").write_text("\n".join(lines) + "\n")
    return best


@pytest.fixture
def sft_best(answering_adapter: Path, tmp_path: Path) -> Path:
    return make_run(tmp_path / "sft", sft_config(name_or_path=QWEN), answering_adapter, SAMPLES)


@pytest.fixture
def rl_best(sft_best: Path, answering_adapter: Path, tmp_path: Path) -> Path:
    """GRPO that began with `sft_best`."""
    return make_run(tmp_path / "rl", rl_config(name_or_path=str(sft_best)), answering_adapter, SAMPLES)


def exported(checkpoint: Path, folder: Path, *flags: str) -> str:
    export(make_plan(parse_args(["--checkpoint", str(checkpoint), "--output_dir", str(folder), *flags])))
    return (folder / "README.md").read_text()


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---")[1])


def snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


# --- what is on record ------------------------------------------------------------------------------------------------
def test_the_way_back_goes_through_both_runs(rl_best: Path) -> None:
    lineage = trace(rl_best)
    assert [run.stage for run in lineage.runs] == ["SFT", "GRPO"]
    assert (lineage.base, lineage.is_on_hub, lineage.base_name) == (QWEN, True, QWEN)
    assert base_licence(lineage) == "apache-2.0"


def test_without_its_run_an_adapter_still_names_its_base(answering_adapter: Path, answering_model: Path) -> None:
    lineage = trace(answering_adapter)
    assert (lineage.runs, lineage.base, lineage.is_on_hub) == ((), str(answering_model), False)
    assert lineage.base_name == "checkpoint-final"  # not the path on this machine
    assert base_licence(lineage) == "other"


def test_a_merge_remembers_its_adapter(answering_adapter: Path, answering_model: Path, tmp_path: Path) -> None:
    (tmp_path / "merged_from.json").write_text(json.dumps({"adapter": str(answering_adapter), "sha256": ""}))
    assert trace(tmp_path).base == str(answering_model)


def test_a_run_that_starts_from_itself_ends_the_search(sft_best: Path) -> None:
    save_config(sft_config(name_or_path=str(sft_best)), sft_best.parent / "config.yaml")
    lineage = trace(sft_best)
    assert len(lineage.runs) == 1 and not lineage.is_on_hub


def test_a_configuration_that_cannot_be_read_is_left_out(
    sft_best: Path, answering_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (sft_best.parent / "config.yaml").write_text("model: {nam: 3}\n")
    assert trace(sft_best) == Lineage((), str(answering_model), False)
    assert "the model card says nothing of that run" in caplog.text


@pytest.mark.parametrize(
    ("name", "is_hub"),
    [(QWEN, True), ("outputs/sft", False), ("./a", False), ("a/b/c", False), ("tiny", False), ("/tmp/x", False)],
)
def test_hub_names(name: str, is_hub: bool) -> None:
    assert is_hub_name(name) is is_hub


def test_licence_of_a_folder_with_a_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Base\n")
    assert base_licence(Lineage((), str(tmp_path), False)) == "cc-by-4.0"
    (tmp_path / "README.md").write_text("no front matter")
    assert base_licence(Lineage((), str(tmp_path), False)) == "other"


def test_validation_with_intervals_and_baselines(sft_best: Path) -> None:
    found = read_validation(sft_best)
    assert found is not None and found.step == 7 and found.scores["num_samples"] == 4
    assert found.scores["mIoU"] == pytest.approx(100 * (1 + 0.5 + 0 + 0.25) / 4)
    for name, interval in evaluate_intervals(SAMPLES).items():
        assert found.intervals[name] == pytest.approx(interval, nan_ok=True), name
    assert found.baselines["whole_video"]["mIoU"] == pytest.approx(100 * (0.5 + 0.5 + 0.125 + 1) / 4)


def test_an_average_over_no_rows(sft_best: Path, tmp_path: Path) -> None:
    """No row is labelled absent. A NaN is written as null where JSON is kept strict."""
    metrics = json.loads((sft_best / "metrics.json").read_text())
    assert math.isnan(metrics["eval_absent_accuracy"])
    (sft_best / "metrics.json").write_text(json.dumps({**metrics, "eval_absent_accuracy": None}))
    found = read_validation(sft_best)
    assert found is not None and math.isnan(found.scores["absent_accuracy"]) and found.scores["mIoU"] == 43.75
    write_manifest(sft_best)
    assert "absence recognised" not in exported(sft_best, tmp_path / "vtg")


def test_metrics_of_an_older_run_are_read_without_those_it_lacks(sft_best: Path) -> None:
    metrics = json.loads((sft_best / "metrics.json").read_text())
    old = {key: value for key, value in metrics.items() if "mAP" not in key and "set_IoU" not in key}
    (sft_best / "metrics.json").write_text(json.dumps(old))
    found = read_validation(sft_best)
    assert found is not None and found.scores["mIoU"] == 43.75 and math.isnan(found.scores["mAP"])


def test_a_numbered_checkpoint_has_the_answers_alone(sft_best: Path) -> None:
    (sft_best / "metrics.json").unlink()
    numbered = sft_best.rename(sft_best.with_name("checkpoint-7"))
    found = read_validation(numbered)
    assert found is not None and (found.step, found.scores["mIoU"]) == (7, pytest.approx(43.75))


def test_answers_of_another_run_give_no_interval(sft_best: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = (sft_best.parent / "validation/step-7.jsonl").read_text().splitlines()
    (sft_best.parent / "validation/step-7.jsonl").write_text("\n".join(lines[:-1]))
    found = read_validation(sft_best)
    assert found is not None and found.scores["mIoU"] == pytest.approx(43.75)
    assert found.intervals == {} and found.baselines == {}
    assert "step-7.jsonl is of another run" in caplog.text


def test_no_validation(answering_adapter: Path) -> None:
    assert read_validation(answering_adapter) is None


# --- the card ---------------------------------------------------------------------------------------------------------
def test_card_of_both_stages(rl_best: Path, tmp_path: Path) -> None:
    card = exported(rl_best, tmp_path / "vtg", "--repo_id", "me/vtg")
    assert front_matter(card) == {
        "base_model": QWEN,
        "base_model_relation": "finetune",
        "license": "apache-2.0",
        "pipeline_tag": "video-text-to-text",
        "library_name": "transformers",
        "tags": ["qwen3_vl", "video-temporal-grounding", "video-moment-retrieval", "grpo", "sft"],
    }
    data = ModelCard(card).data  # as the hub reads it
    assert (data.base_model, data.license, data.pipeline_tag) == (QWEN, "apache-2.0", "video-text-to-text")
    for line in (
        "# vtg",
        f"It is [{QWEN}](https://huggingface.co/{QWEN}) after supervised fine-tuning and reinforcement learning with "
        "temporal rewards (GRPO), done with Qwen3-VL-GRPO-VTG; this repository holds full weights in bfloat16.",
        "    user: <video> When the person opens the door?",
        "    assistant: From 3.2 to 7.9 seconds.",
        "    several windows: From 3.2 to 7.9 seconds and from 12.0 to 15.4 seconds.",
        "    the event is absent: The event does not happen in the video.",
        "| frames per second | 2, 16 frames a clip |",
        "| pixels per frame | 2,048 |",
        "| pixels per clip | 32,768 at most, over all frames |",
        "| SFT | `train.jsonl` | `val.jsonl` | LoRA r=4 on q_proj; in full: embed_tokens, lm_head | 0.002 "
        "| 240 steps |",
        "| GRPO | `train.jsonl` | `val.jsonl` | LoRA r=16 on q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, "
        "down_proj | 0.001 | 60 steps |",
        "Greedy answers to the 4 validation queries at step 7 with 95 % bootstrap intervals, beside constant answers "
        "that need no video.",
        "| metric, in % | value | 95 % interval | whole video | centre half |",
        "| unreadable answers | 25.0 | 0.0 to 75.0 | 0.0 | 0.0 |",
        f"These weights are derived from [{QWEN}](https://huggingface.co/{QWEN}), whose licence, `apache-2.0`, applies "
        "to them.",
    ):
        assert line in card, line
    low, high = evaluate_intervals(SAMPLES)["mIoU"]
    centre = 100 * (1 + 2 / 6 + 0 + 0.5) / 4
    assert f"| mIoU | 43.8 | {low:.1f} to {high:.1f} | 53.1 | {centre:.1f} |" in card
    assert "absence recognised" not in card  # no row was labelled absent: nothing was measured
    assert str(tmp_path) not in card


def test_card_of_an_adapter(sft_best: Path, answering_model: Path, tmp_path: Path) -> None:
    card = exported(sft_best, tmp_path / "vtg", "--merge_lora", "false", "--base_model", "me/base")
    metadata = {key: value for key, value in front_matter(card).items() if key not in ("pipeline_tag", "tags")}
    assert metadata == {
        "base_model": "me/base", "base_model_relation": "adapter", "library_name": "peft", "license": "other",
    }  # fmt: skip
    assert 'base = AutoModelForImageTextToText.from_pretrained("me/base", ' in card
    assert "this repository holds a LoRA adapter (PEFT)" in card
    assert "its licence applies, and was not on record here" in card
    assert str(answering_model) not in card


def test_card_with_nothing_on_record(answering_adapter: Path, tmp_path: Path) -> None:
    card = exported(answering_adapter, tmp_path / "vtg")
    assert "base_model" not in front_matter(card) and front_matter(card)["license"] == "other"
    assert "Not on record: the checkpoint was exported without its run's folder." in card
    assert "None on record: the checkpoint was not validated." in card


def test_a_replaced_vision_tower_needs_this_project(answering_adapter: Path) -> None:
    contract = PromptContract.load(answering_adapter)
    towered = PromptContract(contract.prompt, contract.data, contract.transformers_version, "my.towers:make")
    card = write_card(CardFacts("me/x", Lineage((), QWEN, True), "apache-2.0", towered, None, "bfloat16"))
    assert len(snippets(card)) == 1 and "VideoTemporalInference" in snippets(card)[0]
    assert "its vision tower is `my.towers:make`" in card


def test_prompts_with_quotes_thinking_and_a_system_text(answering_adapter: Path) -> None:
    """Whatever the prompt holds, the snippet is Python that rebuilds it."""
    contract = PromptContract.load(answering_adapter)
    prompt = PromptConfig(question='Say "when" {sentence}\n\\ é | happens', system='Be "brief"', thinking=True)
    asked = PromptContract(prompt, contract.data, "5.23.0", None)
    facts = CardFacts("me/x", Lineage((TrainedRun("SFT", sft_config()),), QWEN, True), "other", asked, None, "bfloat16")
    code = transformers_snippet(facts)
    start, end = code.index("query ="), code.index("# The processor")
    found: dict[str, Any] = {}
    exec(code[start:end], found)
    from utils.prompts import build_messages

    assert found["messages"] == build_messages(prompt, "the person opens the door")
    compile(code, "snippet", "exec")


def test_a_new_name_leaves_edits_alone(sft_best: Path, tmp_path: Path) -> None:
    card = exported(sft_best, tmp_path / "vtg") + "\nMy own words about vtg.\n"
    renamed = rename(card, "vtg", "me/vtg")
    assert renamed.count('"me/vtg"') == 2 and 'model_id = "me/vtg"' in renamed and 'model_path="me/vtg"' in renamed
    assert renamed.replace('"me/vtg"', '"vtg"') == card


# --- the snippets run -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "dtype"),
    [(("--dtype", "float32"), "float32"), ((), "bfloat16"), (("--merge_lora", "false"), "float32")],
    ids=["merged", "merged, bf16", "adapter"],
)
def test_snippets_answer_as_the_checkpoint_does(
    flags: tuple[str, ...],
    dtype: str,
    answering_adapter: Path,
    demo_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both snippets of the card, taken out of it and executed beside a `video.mp4`. The first loads the stored dtype,
    the second float32, since this is the CPU."""
    folder = tmp_path / "vtg"
    codes = snippets(exported(answering_adapter, folder, *flags))
    shutil.copy(demo_data / "videos/test/000001.mp4", tmp_path / "video.mp4")
    monkeypatch.chdir(tmp_path)
    served = answering_adapter if dtype == "float32" else folder
    engines = [VideoTemporalInference(served, dtype=dtype), VideoTemporalInference(served)]
    expected = [engine.predict("video.mp4", "the person opens the door")["raw_text"] for engine in engines]
    assert all(expected) and len(codes) == 2 and "inference.video_infer" not in codes[0]
    for code, answer in zip(codes, expected, strict=True):
        capsys.readouterr()
        exec(compile(code, "README.md", "exec"), {})
        assert capsys.readouterr().out.strip() == answer
