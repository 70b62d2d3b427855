"""Two processes on the CPU through `scripts/sft.sh`, as on two GPUs: plain DDP and DeepSpeed ZeRO-2."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from inference.video_infer import VideoTemporalInference
from utils.checkpoints import manifest_problems
from utils.common import REPO_ROOT
from utils.logging_utils import read_metrics

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

RATES = {"language": 1e-3, "mm_projector": 2e-4, "head": 4e-4}


@pytest.mark.parametrize("deepspeed", [None, "configs/deepspeed/ds_zero2.json"])
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
