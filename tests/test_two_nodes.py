"""Two "nodes" of one process each on loopback through `scripts/sft.sh` and `scripts/rl.sh`, and DeepSpeed without a
launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from inference.video_infer import VideoTemporalInference
from utils.checkpoints import manifest_problems
from utils.common import REPO_ROOT
from utils.logging_utils import read_metrics

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}


@pytest.fixture
def flags(
    tiny_model: Path, answering_adapter: Path, demo_data: Path, tmp_path: Path
) -> Callable[[str, str], list[str]]:
    """`flags("sft", "name")`: the arguments of a run of three updates on 2 processes, of 8 rows each (SFT) or of 4
    prompts x 4 completions (GRPO)."""
    own = {
        "sft": ["--model_path", str(tiny_model), "training.per_device_train_batch_size=2"],
        "rl": [
            *("--model_path", str(answering_adapter), "training.per_device_train_batch_size=4"),
            *("training.num_generations=4", "training.kl_coef=0.05"),
        ],
    }

    def make(stage: str, name: str) -> list[str]:
        return [
            *("--config", str(REPO_ROOT / f"configs/demo/{stage}_config.yaml")),
            *("--data_config", str(REPO_ROOT / "configs/demo/video_config.yaml")),
            *("--output_dir", str(tmp_path / name), *own[stage]),
            *(f"data.{split}={demo_data / split}.jsonl" for split in ("train", "val", "test")),
            "data.cache_dir=null",
            "training.gradient_accumulation_steps=2",
            "training.max_steps=3",
            "training.logging_steps=1",
            "training.eval_strategy=no",
            "training.save_strategy=no",
            "training.dataloader_num_workers=0",
            f"training.run_name={name}",
            f"training.metrics_dir={tmp_path / 'metrics'}",
            f"training.logging_dir={tmp_path / 'logs'}",
        ]

    return make


def run_all(commands: Sequence[Sequence[str]], folder: Path) -> list[str]:
    """Run commands side by side; returns their standard errors."""
    processes = []
    for number, command in enumerate(commands):
        with open(folder / f"err{number}", "w") as err:
            processes.append(subprocess.Popen(command, stderr=err, stdout=err, cwd=folder, env=ENVIRONMENT))
    try:
        statuses = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    errors = [(folder / f"err{number}").read_text() for number in range(len(commands))]
    assert statuses == [0] * len(commands), "\n".join(error[-3000:] for error in errors)
    return errors


def losses(tmp_path: Path, name: str) -> list[float]:
    records = read_metrics(tmp_path / "metrics" / f"{name}.jsonl")
    return [record["train/loss"] for record in records if "train/loss" in record]


ZERO = {
    name: ["--deepspeed", str(REPO_ROOT / f"configs/deepspeed/ds_{name}.json")] for name in ("zero2", "zero3_offload")
}


@pytest.mark.parametrize("options", [[], *ZERO.values()], ids=["ddp", *ZERO])
@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_two_nodes_train_as_two_processes_of_one(
    stage: str, options: list[str], flags: Callable[[str, str], list[str]], tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    script = str(REPO_ROOT / f"scripts/{stage}.sh")
    place = ["--num_nodes", "2", "--num_gpus", "1", "--master_addr", "127.0.0.1", "--master_port", port]
    run_all(
        [[script, *place, "--node_rank", rank, *flags(stage, "two_nodes"), *options] for rank in ("0", "1")], tmp_path
    )
    run_all([[script, "--num_gpus", "2", *flags(stage, "one_node"), *options]], tmp_path)
    apart, together = losses(tmp_path, "two_nodes"), losses(tmp_path, "one_node")
    assert len(apart) == 3 and apart == pytest.approx(together, rel=1e-6, abs=1e-9)
    assert apart[0] != apart[1]
    assert manifest_problems(tmp_path / "two_nodes" / "checkpoint-final") == []
    VideoTemporalInference(tmp_path / "two_nodes" / "checkpoint-final")  # which knows nothing of DeepSpeed


def test_deepspeed_without_a_launcher_is_a_world_of_one(flags: Callable[[str, str], list[str]], tmp_path: Path) -> None:
    """DeepSpeed itself would look for MPI, and stop at `import mpi4py`."""
    zero2 = ["--deepspeed", str(REPO_ROOT / "configs/deepspeed/ds_zero2.json"), "training.bf16=true"]
    run_all([[sys.executable, str(REPO_ROOT / "train_sft.py"), *flags("sft", "alone"), *zero2]], tmp_path)
    found = losses(tmp_path, "alone")
    assert len(found) == 3 and found[2] < found[0]
    assert manifest_problems(tmp_path / "alone" / "checkpoint-final") == []
