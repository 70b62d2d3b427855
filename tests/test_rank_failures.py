"""Two processes of which one fares worse than the other: nobody waits for ever.

A process whose rows cannot be read goes on with blank ones; a process that dies takes the others with it, and what
happened is shown.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from utils.checkpoints import manifest_problems
from utils.common import REPO_ROOT
from utils.logging_utils import read_metrics

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

ZERO3 = ("--deepspeed", str(REPO_ROOT / "configs/deepspeed/ds_zero3_offload.json"))
GRACE_S = 60
"""How long the others may live on after one process has died."""

REWARD = '''
import os

import torch
from torch import nn


class Breaks(nn.Module):
    """Raises on the second process, the third time it is asked."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, pred, gt):
        self.calls += 1
        if os.environ["RANK"] == "1" and self.calls == 3:
            raise RuntimeError("the reward of rank 1 broke")
        return torch.rand(len(pred), dtype=torch.float64)
'''


@pytest.fixture
def start(
    tiny_model: Path, answering_adapter: Path, demo_data: Path, tmp_path: Path
) -> Callable[..., tuple[subprocess.Popen[bytes], Path]]:
    """`start("sft", rows, *flags)`: two processes that train on `rows`; returns the launcher and its standard error."""

    def launch(stage: str, rows: Path, *more: str) -> tuple[subprocess.Popen[bytes], Path]:
        own = {
            "sft": ["--model_path", str(tiny_model), "training.per_device_train_batch_size=2"],
            "rl": [
                *("--sft_checkpoint", str(answering_adapter), "training.num_generations=4"),
                *("training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=2"),
                "training.kl_coef=0.05",
            ],
        }[stage]
        flags = [
            *("--num_gpus", "2", "--output_dir", str(tmp_path / "run"), *own),
            *("--config", str(REPO_ROOT / f"configs/demo/{stage}_config.yaml")),
            *("--data_config", str(REPO_ROOT / "configs/demo/video_config.yaml")),
            *("data.cache_dir=null",),
            *(f"data.train={rows}", *(f"data.{split}={demo_data / split}.jsonl" for split in ("val", "test"))),
            *("training.eval_strategy=no", "training.save_strategy=no", "training.logging_steps=1"),
            *("training.dataloader_num_workers=0", "training.run_name=run"),
            *(f"training.metrics_dir={tmp_path / 'metrics'}", f"training.logging_dir={tmp_path / 'logs'}"),
        ]
        command = [str(REPO_ROOT / f"scripts/{stage}.sh"), *flags, *more]
        error_path = tmp_path / "stderr"
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        with error_path.open("wb") as errors:
            return subprocess.Popen(command, stdout=errors, stderr=errors, cwd=tmp_path, env=environment), error_path

    return launch


def losses(folder: Path) -> list[float]:
    path = folder / "metrics/run.jsonl"
    return [record["train/loss"] for record in read_metrics(path) if "train/loss" in record] if path.is_file() else []


def wait_until(when: Callable[[], Any], process: subprocess.Popen[bytes], errors: Path) -> None:
    deadline = time.monotonic() + 300
    while not when():
        assert process.poll() is None, errors.read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("options", [(), ZERO3], ids=["ddp", "zero3"])
@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_rows_that_fail_on_one_process_hold_up_nobody(
    stage: str, options: tuple[str, ...], start: Callable[..., Any], demo_data: Path, tmp_path: Path
) -> None:
    """Of every eight rows three have no video, and the clips of the rest have different lengths: in some steps one
    process has nothing to learn from."""
    rows = write_rows_with_faults(demo_data, tmp_path)
    more = ["data.max_bad_fraction=1", "training.max_steps=6", *options]
    process, errors = start(stage, rows, *more)
    assert process.wait(timeout=540) == 0, errors.read_text()[-3000:]
    assert len(losses(tmp_path)) == 6
    records = [record for record in read_metrics(tmp_path / "metrics/run.jsonl") if "train/unreadable_videos" in record]
    assert records[-1]["train/unreadable_videos"] == len(left_out(errors)) >= 3
    assert "gone.mp4" in errors.read_text()
    assert manifest_problems(tmp_path / "run/checkpoint-final") == []


def test_the_limit_is_of_the_faults_of_all_processes(
    start: Callable[..., Any], demo_data: Path, tmp_path: Path
) -> None:
    """12 of 32 rows cannot be read, of which each process meets about six in an epoch."""
    rows = write_rows_with_faults(demo_data, tmp_path)
    process, errors = start("sft", rows, "data.max_bad_fraction=0.28", "training.num_train_epochs=1")
    assert process.wait(timeout=540) != 0
    [number] = set(re.findall(r"error: (\d+) of 32 rows could not be used", errors.read_text()))
    assert int(number) == len(left_out(errors)) > 0.28 * 32


def left_out(errors: Path) -> set[str]:
    """Lines of the annotation file that were reported by any process."""
    return set(re.findall(r"left out: \S+?:(\d+): ", errors.read_text()))


def write_rows_with_faults(demo_data: Path, tmp_path: Path) -> Path:
    """32 rows, of every eight three without a video."""
    lines = (demo_data / "train.jsonl").read_text().splitlines()[:32]
    rows = tmp_path / "rows.jsonl"
    with rows.open("w") as handle:
        for number, line in enumerate(lines):
            row = json.loads(line)
            video = tmp_path / "gone.mp4" if number % 8 in (1, 4, 6) else demo_data / row["video"]
            row |= {"video": str(video)}
            if number % 2 and row["timestamp"][1] < 0.75 * row["duration"]:
                row |= {"video_start": 0.0, "video_end": 0.75 * row["duration"], "duration": 0.75 * row["duration"]}
            handle.write(json.dumps(row) + "\n")
    return rows


def test_a_process_that_is_killed_ends_the_other(start: Callable[..., Any], demo_data: Path, tmp_path: Path) -> None:
    process, errors = start("sft", demo_data / "train.jsonl", "training.max_steps=10000", "training.num_train_epochs=9")
    wait_until(lambda: len(losses(tmp_path)) >= 2, process, errors)
    family = psutil.Process(process.pid).children(recursive=True)
    [victim] = [one for one in family if one.environ().get("RANK") == "1" and "train_sft.py" in " ".join(one.cmdline())]
    victim.send_signal(signal.SIGKILL)
    died = time.monotonic()
    assert process.wait(timeout=GRACE_S) != 0
    _, alive = psutil.wait_procs(family, timeout=GRACE_S - (time.monotonic() - died))
    assert alive == []
    text = errors.read_text()
    assert "SIGKILL" in text and str(victim.pid) in text  # torchrun's report names who died, and of what


def test_an_error_on_one_process_ends_the_other_and_is_shown(
    start: Callable[..., Any], demo_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "own_rewards.py").write_text(REWARD)
    shipped = (REPO_ROOT / "configs/demo/rl_config.yaml").read_text()
    config = tmp_path / "rl_config.yaml"
    config.write_text(shipped.replace("  temporal_iou:\n", '  "own_rewards:Breaks":\n'))
    more = ["--config", str(config), "training.max_steps=10000"]
    process, errors = start("rl", demo_data / "train.jsonl", *more)
    wait_until(lambda: "the reward of rank 1 broke" in errors.read_text(), process, errors)
    died = time.monotonic()
    assert process.wait(timeout=GRACE_S) != 0
    text = errors.read_text()
    assert time.monotonic() - died < GRACE_S
    assert "RuntimeError: the reward of rank 1 broke" in text and "own_rewards.py" in text
    assert 1 <= len(losses(tmp_path)) <= 3
