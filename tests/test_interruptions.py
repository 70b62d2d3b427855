"""Real processes of `train_sft.py` and `train_rl.py` that are killed or told to stop, and go on as if they were not.

One run is left alone. Its twin is killed again and again (kill -9 at random moments, in a save, in a validation) or
told to stop (SIGTERM), and the same command with `--resume_from_checkpoint auto` takes it up each time. In the end both
have the same losses, rollouts, validations and weights, to the last bit.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from trainers.rollout_log import ROLLOUTS_FILE
from utils.checkpoints import complete_checkpoints, manifest_problems, step_of
from utils.common import REPO_ROOT
from utils.logging_utils import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

DATA = ("--data_config", str(REPO_ROOT / "configs/demo/video_config.yaml"))
NUM_STEPS = 14
VALIDATED = (4, 8, 12, NUM_STEPS)
SAVED_EVERY = 2
COMMON = (
    "data.cache_dir=null",
    f"training.max_steps={NUM_STEPS}",
    f"training.save_steps={SAVED_EVERY}",
    "training.eval_steps=4",
    "training.logging_steps=1",
    "training.save_total_limit=2",
    "training.max_eval_samples=4",
    "training.per_device_eval_batch_size=1",
    "training.dataloader_num_workers=1",
    "training.report_to=none",
)
TIMED = ("per_second", "memory", "time", "runtime", "data/")
"""Parts of names of figures that no two runs share."""
PATIENCE_S = 300
BEGUN = "the model sees the video"


@dataclass
class Training:
    """A run: how it is started, and what is seen of it from outside."""

    entry: str
    folder: Path
    flags: list[str]
    num_processes: int = 1
    errors: list[str] = field(default_factory=list)
    """What each start wrote to standard error."""

    @property
    def metrics(self) -> Path:
        return self.folder.parent / "metrics" / f"{self.folder.name}.jsonl"

    def start(self) -> subprocess.Popen[bytes]:
        launcher = [] if self.num_processes == 1 else ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc_per_node={self.num_processes}"] if launcher else []
        command = [
            sys.executable,
            *launcher,
            str(REPO_ROOT / self.entry),
            "--output_dir",
            str(self.folder),
            *self.flags,
        ]
        self.errors.append("")
        with open(self.error_path, "wb") as errors:
            return subprocess.Popen(
                [*command, "--resume_from_checkpoint", "auto"],
                stdout=errors, stderr=errors, cwd=self.folder.parent, start_new_session=True,
            )  # fmt: skip

    @property
    def error_path(self) -> Path:
        return self.folder.parent / f"{self.folder.name}.{len(self.errors)}.txt"

    def end(self, process: subprocess.Popen[bytes]) -> int:
        """Its exit status, once it has ended."""
        status = process.wait(PATIENCE_S)
        self.errors[-1] = self.error_path.read_text(errors="replace")
        return status

    def finish(self) -> None:
        """Run to the end."""
        status = self.end(self.start())
        assert status == 0, self.errors[-1][-3000:]

    # ------------------------------------------------------------------ moments
    def begun(self) -> bool:
        return BEGUN in self.error_path.read_text(errors="replace")

    def last_record(self) -> dict[str, Any]:
        """The last whole line of the metrics file."""
        lines = self.metrics.read_bytes().split(b"\n") if self.metrics.exists() else []
        return json.loads(lines[-2]) if len(lines) > 1 else {"step": 0}

    def has_reached(self, step: int) -> bool:
        return self.begun() and self.last_record()["step"] >= step

    def in_save(self, step: int) -> bool:
        """The `checkpoint-<step>`, or a later one, is being written."""
        newest = max(self.folder.glob("checkpoint-*"), key=step_of, default=self.folder)
        return step_of(newest) >= step and bool(manifest_problems(newest)) and self.begun()

    def in_validation(self, step: int) -> bool:
        """That of `step`, or a later one: the step is recorded, and what it scores is not."""
        last = self.last_record()
        return last["step"] in VALIDATED and last["step"] >= step and "train/loss" in last and self.begun()

    # ------------------------------------------------------------------ interruptions
    def kill(self, when: Callable[[], bool], delay_s: float, *, only_launcher: bool = False) -> None:
        """Start, wait for the moment and so many seconds more, then kill -9 every process (or the launcher alone)."""
        process = self.start()
        wait_until(when, process)
        time.sleep(delay_s)
        self._kill(process, only_launcher)

    def kill_in(self, moment: Callable[[], bool]) -> None:
        """Start and kill -9 every process in a moment that is soon over: they are frozen, looked at, then killed."""
        process = self.start()
        wait_until(moment, process)
        send(process, signal.SIGSTOP)
        while not moment():
            send(process, signal.SIGCONT)
            wait_until(moment, process)
            send(process, signal.SIGSTOP)
        self._kill(process)

    def _kill(self, process: subprocess.Popen[bytes], only_launcher: bool = False) -> None:
        others = family(process)
        send(process, signal.SIGKILL, others=not only_launcher)
        assert self.end(process) == -signal.SIGKILL
        deadline = time.monotonic() + 20  # a data worker looks for its parent every 5 seconds
        while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in others):
            assert time.monotonic() < deadline, "outlived its parent"
            time.sleep(0.05)

    def stop(self, when: Callable[[], bool]) -> int:
        """Start, wait for the moment, send SIGTERM as a scheduler does, and return the exit status."""
        process = self.start()
        wait_until(when, process)
        if self.num_processes == 1:
            os.killpg(process.pid, signal.SIGTERM)  # the data worker too
        else:
            process.send_signal(signal.SIGTERM)  # torchrun hands it on to the groups of its processes
        return self.end(process)

    # ------------------------------------------------------------------ what came of it
    def trajectory(self) -> dict[int, dict[str, Any]]:
        """Every figure of every step that is not about time. Without the run's summary, which stands at the last step:
        a run that was stopped in its last validation has none, since the one that goes on trains nothing."""
        return {
            record["step"]: {
                name: value
                for name, value in record.items()
                if not name.startswith("run") and name != "train/total_flos" and not any(part in name for part in TIMED)
            }
            for record in read_metrics(self.metrics)
        }

    def num_learning(self) -> int:
        """Steps with a gradient. Without any, equal losses and weights would say nothing about the optimizer."""
        return sum(record["train/grad_norm"] > 0 for record in self.trajectory().values())

    def rollouts(self) -> list[Any]:
        path = self.folder / ROLLOUTS_FILE
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def validations(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in (self.folder / "validation").glob("step-*.jsonl")}

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / "adapter_model.safetensors")


def wait_until(when: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not when():
        assert process.poll() is None, f"ended by itself, with status {process.returncode}, before it was interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes that `process` has started; torchrun gives its own a session each."""
    return psutil.Process(process.pid).children(recursive=True)


def send(process: subprocess.Popen[bytes], number: signal.Signals, *, others: bool = True) -> None:
    for one in family(process) if others else []:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(number)
    process.send_signal(number)


def assert_same(cut: Training, whole: Training) -> None:
    """The run that was interrupted is the one that was not."""
    assert cut.trajectory() == whole.trajectory() and whole.num_learning() > NUM_STEPS / 2
    assert cut.rollouts() == whole.rollouts()
    assert cut.validations() == whole.validations()
    for name in ("checkpoint-best", "checkpoint-final"):
        mine, theirs = cut.weights(name), whole.weights(name)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine), name
    # The newest two are kept. Of the run that was cut, one may be what SIGTERM had saved between two regular saves.
    stops = [re.findall(r"stopped at step (\d+) of", text) for text in cut.errors]
    for training, stopped in ((whole, []), (cut, [int(step) for found in stops for step in found])):
        saved = sorted({*range(SAVED_EVERY, NUM_STEPS + 1, SAVED_EVERY), *stopped})
        assert [path.name for path in complete_checkpoints(training.folder)] == [f"checkpoint-{n}" for n in saved[-2:]]


def random_moments(whole: Training, number: int, seed: int) -> list[tuple[int, float]]:
    """Moments drawn over the time that the uninterrupted run took for its first ten steps, in order: (last step
    recorded by then, seconds since). The twin may be faster and further by then; its last steps are for what follows.
    """
    trained = [record for record in read_metrics(whole.metrics) if "train/loss" in record]
    records = [(record["time"], record["step"]) for record in trained if record["step"] <= 10]
    first = 2 * records[0][0] - records[1][0]  # about where the first step began
    draw = random.Random(seed)
    moments = []
    for moment in sorted(draw.uniform(first, records[-1][0]) for _ in range(number)):
        time_s, step = [record for record in [(first, 0), *records] if record[0] <= moment][-1]
        moments.append((step, moment - time_s))
    return moments


@pytest.fixture
def trainings(
    answering_model: Path, answering_adapter: Path, demo_data: Path, tmp_path: Path
) -> Callable[[str, int], tuple[Training, Training]]:
    """`trainings("train_sft.py", 1)`: a run to leave alone and its twin, over more than two epochs of 12 rows (GRPO) or
    48 (SFT)."""

    def build(entry: str, num_processes: int) -> tuple[Training, Training]:
        flags = {"train_sft.py": sft_flags, "train_rl.py": rl_flags}[entry](num_processes)
        flags += [f"data.{split}={demo_data / split}.jsonl" for split in ("val", "test")]
        flags += [f"training.metrics_dir={tmp_path / 'metrics'}", f"training.logging_dir={tmp_path / 'logs'}"]
        runs = [
            Training(entry, tmp_path / name, [*flags, f"training.run_name={name}"], num_processes)
            for name in ("whole", "cut")
        ]
        return runs[0], runs[1]

    def sft_flags(num_processes: int) -> list[str]:
        return [
            *("--config", str(REPO_ROOT / "configs/demo/sft_config.yaml"), *DATA, *COMMON),
            *("--model_path", str(answering_model), f"data.train={demo_data / 'train'}.jsonl"),
            *("lora.enabled=true", "lora.r=4", "lora.lora_alpha=8", "lora.lora_dropout=0.1"),
            f"training.per_device_train_batch_size={8 // num_processes}",
            "training.group_by_length=true",
        ]

    def rl_flags(num_processes: int) -> list[str]:
        rows = [json.loads(line) for line in (demo_data / "train.jsonl").read_text().splitlines()[:12]]
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row | {"video": str(demo_data / row["video"])}) + "\n" for row in rows))
        return [
            *("--config", str(REPO_ROOT / "configs/demo/rl_config.yaml"), *DATA, *COMMON),
            *("--model_path", str(answering_adapter), f"data.train={path}"),
            *("training.num_generations=4", "training.per_device_train_batch_size=4"),
            f"training.gradient_accumulation_steps={2 // num_processes}",
            "training.kl_coef=0.05",
        ]

    return build


@pytest.mark.parametrize("entry", ["train_sft.py", "train_rl.py"])
def test_one_process_goes_on_as_if_nothing_had_been(
    entry: str, trainings: Callable[[str, int], tuple[Training, Training]]
) -> None:
    """Ten kills at random moments, one in a save, one in a validation, and a SIGTERM in a validation."""
    whole, cut = trainings(entry, 1)
    whole.finish()
    assert sorted(whole.trajectory()) == list(range(1, NUM_STEPS + 1))
    plan: list[tuple[int, Callable[[], Any]]] = [
        (6, lambda: cut.kill_in(lambda: cut.in_save(6))),
        (8, lambda: cut.kill_in(lambda: cut.in_validation(8))),
    ]
    for step, delay_s in random_moments(whole, 10, seed=1):  # the first before any checkpoint
        plan.append((step, lambda step=step, delay_s=delay_s: cut.kill(lambda: cut.has_reached(step), delay_s)))
    for _, interrupt in sorted(plan, key=lambda entry: entry[0]):
        interrupt()
    assert cut.stop(lambda: cut.in_validation(12)) == 143
    assert "stopped at step" in cut.errors[-1] and "Traceback" not in cut.errors[-1]
    cut.finish()
    assert len(cut.errors) == 14
    assert any("is passed over, going on from checkpoint-" in text for text in cut.errors)
    assert_same(cut, whole)


@pytest.mark.parametrize("entry", ["train_sft.py", "train_rl.py"])
def test_two_processes_go_on_as_if_nothing_had_been(
    entry: str, trainings: Callable[[str, int], tuple[Training, Training]]
) -> None:
    """A kill of everything in a validation and in a save, one of the launcher alone, and a SIGTERM to the launcher in
    the middle of a step: both processes stop after the same one."""
    whole, cut = trainings(entry, 2)
    whole.finish()
    cut.kill_in(lambda: cut.in_validation(4))
    [(step, delay_s)] = random_moments(whole, 1, seed=0)
    cut.kill(lambda: cut.has_reached(step), delay_s, only_launcher=True)
    cut.kill_in(lambda: cut.in_save(max(4, step - step % 2)))
    assert cut.stop(lambda: cut.has_reached(11)) != 0
    assert cut.errors[-1].count("stopped at step") == 1
    cut.finish()
    assert_same(cut, whole)
