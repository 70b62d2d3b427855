"""Invariants of SFT: what the loss is, what moves, what a resume repeats, what a checkpoint holds."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from datasets.collate_fns import VideoCollator
from trainers.generation import model_inputs
from trainers.sft_trainer import VideoSFTTrainer, answer_loss
from utils.checkpoints import complete_checkpoints, manifest_problems
from utils.common import UserError
from utils.config import SFTConfig
from utils.logging_utils import read_metrics
from utils.rows import read_rows, write_rows

ConfigWith = Callable[..., SFTConfig]
TrainerFor = Callable[..., VideoSFTTrainer]

LORA = ("lora.enabled=true", "lora.r=4", "lora.lora_alpha=8")


def losses(trainer: VideoSFTTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_loss_equals_stock_transformers_row_by_row(config_with: ConfigWith, trainer_for: TrainerFor) -> None:
    trainer = trainer_for(config_with())
    samples = [trainer.train_dataset[i] for i in range(3)]
    model: Any = trainer.model.eval()
    batch = trainer.data_collator(samples)
    ours = answer_loss(
        model(**model_inputs(batch, torch.device("cpu")), logits_to_keep=batch["logits_to_keep"]), batch["labels"]
    )
    total, count = 0.0, 0
    for sample in samples:
        one = trainer.data_collator([sample])
        num_labels = int((one["labels"] != -100).sum())
        stock = model(**model_inputs(one, torch.device("cpu")), labels=one["labels"]).loss
        total, count = total + stock.item() * num_labels, count + num_labels
    assert ours.item() == pytest.approx(total / count, rel=1e-5)


def test_batch_order_does_not_change_a_samples_loss(config_with: ConfigWith, trainer_for: TrainerFor) -> None:
    trainer = trainer_for(config_with("data.min_frames=4", "data.max_frames=16", "data.fps=1.0"))
    model: Any = trainer.model.eval()
    samples = [trainer.train_dataset[i] for i in range(4)]

    def loss_of_first(order: list[int]) -> float:
        batch = trainer.data_collator([samples[i] for i in order])
        logits = model(**model_inputs(batch, torch.device("cpu"))).logits
        row = order.index(0)
        labels = batch["labels"][row]
        return float(torch.nn.functional.cross_entropy(logits[row, :-1], labels[1:], ignore_index=-100))

    assert loss_of_first([0, 1, 2, 3]) == pytest.approx(loss_of_first([3, 2, 0, 1]), rel=1e-5)


def test_accumulation_4x2_equals_8x1(config_with: ConfigWith, trainer_for: TrainerFor, tmp_path: Path) -> None:
    runs = []
    for name, batch, accumulation in (("a", 8, 1), ("b", 4, 2)):
        config = config_with(
            f"training.per_device_train_batch_size={batch}",
            f"training.gradient_accumulation_steps={accumulation}",
            "training.max_steps=3",
            f"training.run_name={name}",
        )
        trainer = trainer_for(config, tmp_path / name)
        trainer.train()
        runs.append((losses(trainer), parameters(trainer.model)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-4)
    for name, value in runs[0][1].items():
        assert torch.allclose(value, runs[1][1][name], atol=2e-4), name


def test_golden_losses_of_five_steps(config_with: ConfigWith, trainer_for: TrainerFor) -> None:
    """Recorded once on the CPU in fp32; a change of data, prompt, loss, optimizer or schedule shows here."""
    trainer = trainer_for(config_with("training.max_steps=5"))
    trainer.train()
    assert losses(trainer) == pytest.approx(GOLDEN_LOSSES, rel=2e-3)


GOLDEN_LOSSES = [6.1519, 6.1429, 4.5563, 3.6844, 3.1416]


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_only_what_should_train_moves(
    mode: str, config_with: ConfigWith, trainer_for: TrainerFor, tmp_path: Path
) -> None:
    overrides = ["training.vision_tower_lr=0", *(LORA if mode == "lora" else ())]
    trainer = trainer_for(config_with(*overrides))
    before = parameters(trainer.model)
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    if mode == "lora":
        expected = {n for n in before if "lora_" in n or ".modules_to_save." in n}
        assert any("deepstack_merger_list" in name for name in moved)
        assert any(re.search(r"visual\.merger\.", name) for name in moved)
        assert any("embed_tokens.modules_to_save" in name for name in moved)
    else:
        expected = {n for n in before if "visual" not in n or "merger" in n}
    assert moved == expected


def test_each_part_has_its_learning_rate(config_with: ConfigWith, trainer_for: TrainerFor) -> None:
    config = config_with(
        "training.learning_rate=1e-3",
        "training.mm_projector_lr=2e-3",
        "training.vision_tower_lr=3e-3",
        "training.head_lr=4e-3",
        "training.weight_decay=0.1",
    )
    trainer = trainer_for(config)
    groups = trainer.create_optimizer().param_groups
    rates = {(group["part"], group["weight_decay"] > 0): group["lr"] for group in groups}
    assert rates == {
        ("language", True): 1e-3,
        ("language", False): 1e-3,
        ("mm_projector", True): 2e-3,
        ("mm_projector", False): 2e-3,
        ("vision_tower", True): 3e-3,
        ("vision_tower", False): 3e-3,
        ("head", True): 4e-3,
    }
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert sum(p.numel() for group in groups for p in group["params"]) == trained


def test_resume_repeats_the_uninterrupted_run(config_with: ConfigWith, trainer_for: TrainerFor, tmp_path: Path) -> None:
    overrides = ("training.max_steps=6", "training.save_strategy=steps", "training.save_steps=2", *LORA)
    whole = trainer_for(config_with(*overrides), tmp_path / "whole")
    whole.train()
    run = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", run)
    shutil.rmtree(run / "checkpoint-6")
    (run / "checkpoint-4" / "manifest.json").unlink()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", run / "checkpoint-2", dirs_exist_ok=True)
    resumed = trainer_for(config_with(*overrides), run, resume="auto")
    resumed.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert losses(resumed)[-4:] == losses(whole)[-4:]
    for name, value in parameters(whole.model).items():
        assert torch.equal(value, parameters(resumed.model)[name]), name


def test_validation_best_and_final_checkpoints(
    config_with: ConfigWith, trainer_for: TrainerFor, tmp_path: Path
) -> None:
    trainer = trainer_for(
        config_with("training.eval_strategy=steps", "training.eval_steps=2", "training.save_strategy=steps",
                    "training.save_steps=2", "training.run_name=best")
    )  # fmt: skip
    trainer.train()
    metrics = trainer.finish()
    run = Path(trainer.args.output_dir)
    assert set(metrics) >= {"eval_mIoU", "eval_R1@0.5", "eval_parse_failure_rate"}
    assert metrics["eval_num_samples"] == 8
    for name in ("checkpoint-best", "checkpoint-final"):
        assert manifest_problems(run / name) == []
        assert (run / name / "prompt_contract.json").is_file()
        assert (run / name / "processor_config.json").is_file()
    assert [path.name for path in complete_checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]
    records = read_metrics(tmp_path / "metrics" / "best.jsonl")
    assert {record["step"] for record in records} >= {1, 2, 3, 4}
    last = records[-1]
    for key in ("train/loss", "train/learning_rate/language", "train/tokens_per_second", "train/peak_memory_gb"):
        assert last[key] > 0 or key.endswith("language"), key
    assert last["eval/mIoU"] == pytest.approx(metrics["eval_mIoU"])
    answers = [json.loads(line) for line in (run / "validation" / "step-4.jsonl").read_text().splitlines()]
    assert len(answers) == 8 and set(answers[0]) == set("video sentence timestamp answer qid gt pred duration".split())


def test_faults_are_counted_and_stop_the_run(
    config_with: ConfigWith, trainer_for: TrainerFor, demo_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data"
    shutil.copytree(demo_data, data)
    first = json.loads((data / "train.jsonl").read_text().splitlines()[0])["video"]
    (data / first).write_bytes(b"")
    num_rows = len((data / "train.jsonl").read_text().splitlines())
    bad = sum(json.loads(line)["video"] == first for line in (data / "train.jsonl").read_text().splitlines())
    files = [f"data.train={data / 'train'}.jsonl", f"data.max_bad_fraction={(bad + 0.5) / num_rows}"]
    everything = ["training.max_steps=-1", "training.num_train_epochs=1"]
    trainer = trainer_for(config_with(*files, *everything))
    trainer.train()
    assert len(trainer.faults.rows) == bad
    assert all(first in reason for reason in trainer.faults.rows.values())
    strict = trainer_for(config_with(*files[:1], "data.max_bad_fraction=0", *everything), tmp_path / "strict")
    with pytest.raises(UserError, match="data.max_bad_fraction=0"):
        strict.train()


def test_a_batch_of_faults_only_has_zero_loss(config_with: ConfigWith, trainer_for: TrainerFor) -> None:
    trainer = trainer_for(config_with())
    collator: VideoCollator = trainer.data_collator
    batch = collator([{"index": 3, "fault": "gone"}, {"index": 4, "fault": "gone"}])
    assert batch["faults"] == [(3, "gone"), (4, "gone")] and batch["indices"] == []
    outputs = trainer.model(**model_inputs(batch, torch.device("cpu")), logits_to_keep=batch["logits_to_keep"])
    loss = answer_loss(outputs, batch["labels"])
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


def test_a_blind_model_is_refused(config_with: ConfigWith, trainer_for: TrainerFor) -> None:
    trainer = trainer_for(config_with())
    visual = trainer.model.model.visual
    original = visual.forward
    visual.forward = lambda hidden_states, *a, **k: original(torch.zeros_like(hidden_states), *a, **k)
    with pytest.raises(UserError, match="does not see the video"):
        trainer.train()


def test_an_earlier_run_is_not_trained_over(config_with: ConfigWith, trainer_for: TrainerFor, tmp_path: Path) -> None:
    config = config_with("training.max_steps=1")
    trainer = trainer_for(config)
    trainer.train()
    trainer.finish()
    with pytest.raises(UserError, match="--resume_from_checkpoint auto"):
        trainer_for(config)
    manifest = tmp_path / "run" / "checkpoint-final" / "manifest.json"
    assert manifest.is_file()


@pytest.mark.parametrize(("workers", "share"), [(0, "false"), (2, "false"), (0, "true")])
def test_no_clip_is_decoded_twice(
    config_with: ConfigWith, trainer_for: TrainerFor, demo_data: Path, tmp_path: Path, workers: int, share: str
) -> None:
    """Two epochs over eight rows on four videos, with validation: the records count one decode for each clip, whoever
    reads it and however often, and the losses are those without a cache."""
    rows = [replace(row, video=str(demo_data / row.video)) for row in read_rows(demo_data / "train.jsonl")[0][:8]]
    write_rows(tmp_path / "rows.jsonl", rows)
    overrides = [f"data.train={tmp_path / 'rows.jsonl'}", f"training.share_video={share}", "training.max_steps=-1"]
    overrides += ["training.num_train_epochs=2", "training.eval_strategy=epoch", "training.max_new_tokens=2"]
    overrides += [f"training.dataloader_num_workers={workers}", f"data.cache_dir={tmp_path / 'cache'}"]
    trainer = trainer_for(config_with(*overrides, "training.run_name=cached"), tmp_path / "cached")
    trainer.train()
    num_train = len({row.video for row in rows})
    num_val = len({row.video for row in trainer.eval_dataset.rows})
    assert num_train == 4
    records = [record for record in read_metrics(tmp_path / "metrics/cached.jsonl") if "train/loss" in record]
    decoded = [record["data/decoded"] for record in records]  # two steps an epoch, a validation after each
    assert 0 < decoded[0] <= num_train and decoded[1:] == [num_train, num_train + num_val, num_train + num_val]
    # What is read beside the batches is for the checks at the start; with sharing a clip is read once for a batch.
    hits = [record["data/cache_hits"] for record in records]
    assert hits == sorted(hits) and hits[0] > 0 and trainer.reads.counts["decoded"] == num_train + num_val
    assert all(record["data/cache_rebuilt"] == record["data/not_cached"] == 0 for record in records)
    if workers == 0:
        live = trainer_for(config_with(*overrides, "data.cache_dir=null", "training.run_name=live"), tmp_path / "live")
        live.train()
        assert losses(live) == losses(trainer) and live.reads.decoded > 2 * num_train
