"""The study's controls: as much time as GRPO had, the entropy it has, and no result of other settings."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import scripts.study_grpo as study
from datasets.pixels import pixel_values
from tests.trainers.test_shared_prefix import load
from trainers.model import load_for_inference
from utils.common import UserError


@pytest.fixture
def args(tmp_path: Path) -> argparse.Namespace:
    return study.parse_args(["--output_dir", str(tmp_path / "study")])


def record_run(args: argparse.Namespace, name: str, speeds: list[float], *, size: int, accumulation: int) -> None:
    """What a run leaves: its configuration, and a record every 10 updates (with one of a validation between)."""
    folder, metrics = args.output_dir / name, args.output_dir / "metrics" / f"{name}.jsonl"
    folder.mkdir(parents=True)
    metrics.parent.mkdir(exist_ok=True)
    training = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    (folder / "config.yaml").write_text(yaml.safe_dump({"training": training}))
    records = [
        {"run": name, "step": 10 * (i + 1), "time": float(i), "train/loss": 0.5, "train/samples_per_second": speed}
        for i, speed in enumerate(speeds)
    ]
    records.append({"run": name, "step": records[-1]["step"], "time": 99.0, "eval/mIoU": 50.0})
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_sft_goes_on_for_as_long_as_grpo_trained(args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """128 completions an update at 64 a second: 40 updates take 80 s. 32 rows at 64 a second: that is 160 of SFT."""
    record_run(args, "grpo", [5.0, 64.0, 64.0, 32.0], size=64, accumulation=2)
    record_run(args, "sft", [5.0, 64.0, 60.0, 80.0], size=32, accumulation=1)
    assert study.seconds_of(args, "grpo") == pytest.approx(80.0)
    assert study.seconds_per_step(args, "sft") == pytest.approx(0.5)
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        study, "train", lambda script, _args, name, _config, model, overrides: asked.update(
            script=script, name=name, model=model, overrides=list(overrides)) or Path("x"),
    )  # fmt: skip
    study.control(args, ["data.train=t.jsonl"], Path("sft/checkpoint-final"), 3e-4)
    assert (asked["script"], asked["name"], asked["model"]) == (
        "train_sft.py",
        "continued-0.0003",
        Path("sft/checkpoint-final"),
    )
    assert {"data.train=t.jsonl", "training.max_steps=160", "training.learning_rate=0.0003"} <= set(asked["overrides"])


def test_a_folder_holds_one_study(args: argparse.Namespace) -> None:
    study.keep_settings(args)
    study.keep_settings(args)
    args.control_rates = [1e-3]  # another control changes nothing of what is there
    study.keep_settings(args)
    args.rl_steps, args.overrides = 7, ["training.temperature=0.5"]
    with pytest.raises(UserError, match=r"rl_steps 300 -> 7, overrides \[\] -> \['training.temperature=0.5'\]"):
        study.keep_settings(args)


def test_the_same_file_with_another_content_is_another_setting(args: argparse.Namespace, tmp_path: Path) -> None:
    args.rl_config = tmp_path / "rl.yaml"
    args.rl_config.write_text("training: {}\n")
    study.keep_settings(args)
    args.rl_config.write_text("training: {max_steps: 3}\n")
    with pytest.raises(UserError, match=r"rl_config .*rl.yaml@\w+ -> .*rl.yaml@\w+\. Give the same"):
        study.keep_settings(args)


def test_entropy_is_that_of_the_stock_model(answering_model: Path, tiny_model: Path, demo_data: Path) -> None:
    """At a temperature other than 1, averaged over all tokens of all answers, the end token's included."""
    args = study.parse_args(["--output_dir", "unused"])
    places = [f"data.{split}={demo_data / split}.jsonl" for split in ("train", "val", "test")]
    policy = load_for_inference(str(answering_model))
    dataset = study.held_out(args, places, policy, "val")
    samples = [dataset[index] for index in range(2)]
    texts = [["From 1.0 to 2.0 seconds.", "From 3.5 to 4.0 seconds."], ["From 2.0 to 9.0 seconds.", "From 1.0"]]
    found = study.entropy(policy, samples, dict(enumerate(texts)), 0.5)
    stock, tokenizer, values = load(answering_model), policy.processor.tokenizer, []
    for sample, answers in zip(samples, texts, strict=True):
        for text in answers:
            answer = torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
            ids = torch.cat([sample["input_ids"], answer])[None]
            kinds = torch.cat([sample["mm_token_type_ids"], torch.zeros_like(answer)])[None]
            pixels, grid = pixel_values([sample["pixels"]]), sample["video_grid_thw"]
            video = {"pixel_values_videos": pixels, "video_grid_thw": grid}
            with torch.no_grad():
                logits = stock(input_ids=ids, mm_token_type_ids=kinds, **video).logits[0, -len(answer) - 1 : -1]
            values += torch.distributions.Categorical(logits=logits / 0.5).entropy().tolist()
    assert found == pytest.approx(sum(values) / len(values), abs=1e-5) and found > 0.01


def test_the_report_pairs_by_query(args: argparse.Namespace, capsys: pytest.CaptureFixture[str]) -> None:
    """The interval of the differences, which are alike, is narrow where that of the values is wide."""
    spread = [0.0, 100.0] * 50

    def result(gain: float) -> dict[str, Any]:
        values = [value + gain for value in spread]
        means = {"mIoU": 50 + gain, "sampled": 50 + gain, "entropy": 0.1, "temperature": 1.0}
        return means | {"greedy_per_query": values, "sampled_per_query": values}

    about = {"chosen": "continued-0.001", "seconds": 80.0, "seconds_continued": 79.6}
    study.report(args.output_dir, {"SFT": result(0.0), "GRPO": result(3.0)}, 0.5, about)
    written = json.loads((args.output_dir / "study.json").read_text())
    assert written["num_queries"] == 100 and written["seconds_continued"] == 79.6
    assert written["rows"]["SFT"]["grpo_minus_this_greedy"] == [3.0, 3.0]
    assert "grpo_minus_this_greedy" not in written["rows"]["GRPO"]
    assert "for 80 s against GRPO's 80 s" in capsys.readouterr().out
