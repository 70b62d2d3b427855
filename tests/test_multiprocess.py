"""Two processes on the CPU through `scripts/sft.sh` and `scripts/rl.sh`, as on two GPUs: plain DDP, DeepSpeed ZeRO-2,
and ZeRO-3 with offload."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from inference.video_infer import VideoTemporalInference
from trainers.rollout_log import ROLLOUTS_FILE, read_records
from utils.checkpoints import manifest_problems
from utils.common import REPO_ROOT
from utils.logging_utils import read_metrics

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

ZERO = [None, "configs/deepspeed/ds_zero2.json", "configs/deepspeed/ds_zero3_offload.json"]
RATES = {"language": 1e-3, "mm_projector": 2e-4, "head": 4e-4}


@pytest.mark.parametrize("deepspeed", ZERO, ids=["ddp", "zero2", "zero3"])
def test_two_processes_train_and_the_checkpoint_loads(
    deepspeed: str | None, tiny_model: Path, demo_data: Path, tmp_path: Path
) -> None:
    flags = [
        *("--num_gpus", "2"),
        *("--config", str(REPO_ROOT / "configs/demo/sft_config.yaml")),
        *("--data_config", str(REPO_ROOT / "configs/demo/video_config.yaml")),
        *("--output_dir", str(tmp_path / "run")),
        *("--model_path", str(tiny_model)),
        *(f"data.{split}={demo_data / split}.jsonl" for split in ("train", "val", "test")),
        "data.cache_dir=null",
        *("lora.enabled=true", "lora.r=4", "lora.lora_alpha=8"),
        f"training.learning_rate={RATES['language']}",
        f"training.mm_projector_lr={RATES['mm_projector']}",
        f"training.head_lr={RATES['head']}",
        "training.vision_tower_lr=0",
        "training.lr_scheduler_type=constant",
        "training.warmup_ratio=0",
        "training.bf16=true",
        "training.gradient_checkpointing=true",
        "training.per_device_train_batch_size=2",
        "training.gradient_accumulation_steps=2",
        "training.max_steps=3",
        "training.logging_steps=1",
        "training.eval_steps=3",
        "training.save_steps=3",
        "training.max_eval_samples=5",
        "training.max_new_tokens=4",
        "training.dataloader_num_workers=0",
        "training.run_name=two",
        f"training.metrics_dir={tmp_path / 'metrics'}",
        f"training.logging_dir={tmp_path / 'logs'}",
    ]
    if deepspeed:
        flags += ["--deepspeed", str(REPO_ROOT / deepspeed)]
    ended = subprocess.run(
        [str(REPO_ROOT / "scripts/sft.sh"), *flags], capture_output=True, text=True, cwd=tmp_path, timeout=600
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    steps = [record for record in read_metrics(tmp_path / "metrics" / "two.jsonl") if "train/loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3]
    for record in steps:
        found = {part: record[f"train/learning_rate/{part}"] for part in RATES}
        assert found == pytest.approx(RATES)
    answers = (tmp_path / "run" / "validation" / "step-3.jsonl").read_text().splitlines()
    assert len(answers) == 5  # the padded sixth of two ranks is counted once
    for name in ("checkpoint-best", "checkpoint-final"):
        assert manifest_problems(tmp_path / "run" / name) == []
    video = demo_data / json.loads(answers[0])["video"]
    engine = VideoTemporalInference(tmp_path / "run" / "checkpoint-best")
    assert isinstance(engine.predict(video, "the red square appears", max_new_tokens=4)["raw_text"], str)


@pytest.fixture
def sft(tiny_model: Path, demo_data: Path, tmp_path: Path) -> Callable[..., Path]:
    """`sft("name", num_gpus, *flags)`: three updates of 8 rows by plain gradient descent; returns the run's folder."""

    def launch(name: str, num_gpus: int, *more: str) -> Path:
        flags = [
            *("--num_gpus", str(num_gpus)),
            *("--config", str(REPO_ROOT / "configs/demo/sft_config.yaml")),
            *("--data_config", str(REPO_ROOT / "configs/demo/video_config.yaml")),
            *("--output_dir", str(tmp_path / name)),
            *("--model_path", str(tiny_model)),
            *(f"data.{split}={demo_data / split}.jsonl" for split in ("train", "val", "test")),
            "data.cache_dir=null",
            "training.optim=sgd",
            *(f"training.{part}=0.1" for part in ("learning_rate", "mm_projector_lr", "vision_tower_lr", "head_lr")),
            "training.lr_scheduler_type=constant",
            "training.warmup_ratio=0",
            "training.per_device_train_batch_size=4",
            f"training.gradient_accumulation_steps={2 // num_gpus}",
            "training.max_steps=3",
            "training.logging_steps=1",
            "training.eval_strategy=no",
            "training.save_strategy=no",
            "training.dataloader_num_workers=0",
            f"training.run_name={name}",
            f"training.metrics_dir={tmp_path / 'metrics'}",
            f"training.logging_dir={tmp_path / 'logs'}",
        ]
        command = [str(REPO_ROOT / "scripts/sft.sh"), *flags, *more]
        ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
        assert ended.returncode == 0, ended.stderr[-3000:]
        return tmp_path / name

    return launch


def relative_difference(found: Path, wanted: Path, start: Path) -> float:
    """How far apart two runs moved the weights in `start`: norm of the difference over that of the wanted movement.
    After one step of plain gradient descent that is the relative error of the gradient."""
    after, alone, before = (load_file(next(folder.glob("*model.safetensors"))) for folder in (found, wanted, start))
    assert after.keys() == alone.keys() <= before.keys()
    gap = sum(float((after[name] - alone[name]).double().square().sum()) for name in alone)
    moved = sum(float((alone[name] - before[name]).double().square().sum()) for name in alone)
    return (gap / moved) ** 0.5


SHARE = ("training.share_video=true", "training.max_queries_per_video=2")


@pytest.mark.parametrize("options", [(), SHARE], ids=["rows", "shared"])
@pytest.mark.parametrize("deepspeed", ZERO, ids=["ddp", "zero2", "zero3"])
def test_two_processes_train_as_one_does(
    deepspeed: str | None, options: tuple[str, ...], sft: Callable[..., Path], tiny_model: Path
) -> None:
    """The same rows an update on two processes and on one that accumulates: the same losses, norms and weights to a
    relative 1e-4, row by row and with shared videos."""
    two = sft("two", 2, *options, *(["--deepspeed", str(REPO_ROOT / deepspeed)] if deepspeed else []))
    one = sft("one", 1, *options)
    for key in ("train/loss", "train/grad_norm"):
        assert len(values(one, key)) == 3 and values(two, key) == pytest.approx(values(one, key), rel=1e-4), key
    assert relative_difference(two / "checkpoint-final", one / "checkpoint-final", tiny_model) < 1e-4


# ---------------------------------------------------------------------------------------------- GRPO
@pytest.fixture
def grpo(answering_adapter: Path, demo_data: Path, tmp_path: Path) -> Callable[..., Path]:
    """`grpo("name", num_gpus, *flags)`: a run of `scripts/rl.sh` from an SFT adapter, 4 prompts x 4 completions an
    update on 2 processes; returns its folder."""

    def launch(name: str, num_gpus: int, *more: str) -> Path:
        flags = [
            *("--num_gpus", str(num_gpus), "--sft_checkpoint", str(answering_adapter)),
            *("--config", str(REPO_ROOT / "configs/demo/rl_config.yaml")),
            *("--data_config", str(REPO_ROOT / "configs/demo/video_config.yaml")),
            *("--output_dir", str(tmp_path / name)),
            *(f"data.{split}={demo_data / split}.jsonl" for split in ("train", "val", "test")),
            "data.cache_dir=null",
            "training.num_generations=4",
            "training.per_device_train_batch_size=4",
            "training.gradient_accumulation_steps=2",
            "training.per_device_eval_batch_size=2",
            "training.kl_coef=0.05",
            "training.lr_scheduler_type=constant",
            "training.warmup_ratio=0",
            "training.logging_steps=1",
            "training.max_eval_samples=5",
            "training.dataloader_num_workers=0",
            f"training.run_name={name}",
            f"training.metrics_dir={tmp_path / 'metrics'}",
            f"training.logging_dir={tmp_path / 'logs'}",
        ]
        command = [str(REPO_ROOT / "scripts/rl.sh"), *flags, *more]
        ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
        assert ended.returncode == 0, ended.stderr[-3000:]
        return tmp_path / name

    return launch


def values(folder: Path, key: str) -> list[Any]:
    """A metric of a run, step by step."""
    records = read_metrics(folder.parent / "metrics" / f"{folder.name}.jsonl")
    return [record[key] for record in records if key in record]


BARE = ("training.eval_strategy=no", "training.save_strategy=no")
VALIDATED = ("training.max_steps=3", "training.eval_steps=3", "training.save_steps=3")


@pytest.mark.parametrize("deepspeed", ZERO, ids=["ddp", "zero2", "zero3"])
def test_two_processes_learn_from_rewards_and_the_checkpoint_loads(
    deepspeed: str | None, grpo: Callable[..., Path], demo_data: Path
) -> None:
    options = ["--deepspeed", str(REPO_ROOT / deepspeed), "training.bf16=true"] if deepspeed else []
    folder = grpo("two", 2, *VALIDATED, *options)
    rollouts = read_records(folder / ROLLOUTS_FILE)
    assert [record["step"] for record in rollouts] == [step for step in range(3) for _ in range(4)]
    assert len({record["row"] for record in rollouts}) == 12  # no process repeats the prompt of another
    assert {len(record["completions"]) for record in rollouts} == {4}
    for record in rollouts:  # advantages are made within the group
        assert sum(completion["advantage"] for completion in record["completions"]) == pytest.approx(0, abs=1e-4)
    earned = [c["reward"] for record in rollouts if record["step"] == 0 for c in record["completions"]]
    assert values(folder, "reward/total")[0] == pytest.approx(sum(earned) / 16, abs=1e-5)
    kl = values(folder, "train/kl")
    assert kl[0] == 0.0 and len(kl) == 3 and kl[2] > 0.0
    answers = [json.loads(line) for line in (folder / "validation/step-3.jsonl").read_text().splitlines()]
    assert len(answers) == 5  # the padded sixth of two ranks is counted once
    assert len(values(folder, "eval/reward")) == 1
    for name in ("checkpoint-best", "checkpoint-final"):
        assert manifest_problems(folder / name) == []
        assert not any(".ref." in key for key in load_file(folder / name / "adapter_model.safetensors"))
    engine = VideoTemporalInference(folder / "checkpoint-final")
    found = engine.predict(demo_data / answers[0]["video"], answers[0]["sentence"], max_new_tokens=24)
    assert found["parsed"]
    assert deepspeed or found["raw_text"] == answers[0]["answer"]  # ZeRO-2 answers in bf16, inference here in fp32


def test_sharing_changes_nothing_on_two_processes(grpo: Callable[..., Path]) -> None:
    runs = [
        grpo(f"share_{share}", 2, *BARE, "training.max_steps=2", f"training.share_prefix={share}")
        for share in ("true", "false")
    ]
    for key in ("train/loss", "train/kl", "train/entropy", "reward/total"):
        shared, plain = (values(folder, key) for folder in runs)
        assert len(shared) == 2 and shared == pytest.approx(plain, abs=1e-5), key
    texts = [[c["text"] for r in read_records(f / ROLLOUTS_FILE) for c in r["completions"]] for f in runs]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("deepspeed", ZERO, ids=["ddp", "zero2", "zero3"])
def test_two_processes_step_as_one_with_double_accumulation(
    deepspeed: str | None, grpo: Callable[..., Path], answering_adapter: Path
) -> None:
    """Processes draw from generators of their own, so here nothing is left to chance: every completion is the likeliest
    one (top_k 1), and the labelled answer stands beside three of them, so that rewards differ. Plain gradient descent:
    the weights move by the gradient itself."""
    options = [
        "training.top_k=1", "training.temperature=1", "training.ground_truth_rollout=true", "training.max_steps=1",
        "training.optim=sgd", "training.learning_rate=10", "training.max_grad_norm=0",
    ]  # fmt: skip
    two = grpo("two", 2, *BARE, *options, *(["--deepspeed", str(REPO_ROOT / deepspeed)] if deepspeed else []))
    one = grpo("one", 1, *BARE, *options, "training.gradient_accumulation_steps=4")
    rollouts = [read_records(folder / ROLLOUTS_FILE) for folder in (two, one)]
    assert rollouts[0] == rollouts[1] and len(rollouts[0]) == 4
    assert any(completion["advantage"] > 0.1 for record in rollouts[0] for completion in record["completions"])
    assert values(two, "train/loss") == pytest.approx(values(one, "train/loss"), abs=1e-5)
    assert values(two, "train/grad_norm") == pytest.approx(values(one, "train/grad_norm"), rel=1e-4)
    start, alone = (load_file(f / "adapter_model.safetensors") for f in (answering_adapter, one / "checkpoint-final"))
    assert max(float((alone[name] - start[name]).abs().max()) for name in start) > 1e-2
    assert relative_difference(two / "checkpoint-final", one / "checkpoint-final", answering_adapter) < 1e-4
