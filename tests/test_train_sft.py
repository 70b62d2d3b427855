"""`train_sft.py` as a user runs it: a whole small run, a dry run, a resume, and what bad input says."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from utils.checkpoints import complete_checkpoints, manifest_problems
from utils.common import REPO_ROOT
from utils.logging_utils import read_metrics

CONFIGS = [
    "--config",
    str(REPO_ROOT / "configs/demo/sft_config.yaml"),
    "--data_config",
    str(REPO_ROOT / "configs/demo/video_config.yaml"),
]


class Result(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def arguments(tiny_model: Path, demo_data: Path, tmp_path: Path) -> list[str]:
    """The flags of a four-step run."""
    return [
        *CONFIGS,
        "--output_dir",
        str(tmp_path / "run"),
        "--model_path",
        str(tiny_model),
        *(f"data.{split}={demo_data / split}.jsonl" for split in ("train", "val", "test")),
        "data.cache_dir=null",
        "training.per_device_train_batch_size=4",
        "training.max_steps=4",
        "training.max_eval_samples=4",
        "training.eval_steps=2",
        "training.save_steps=2",
        "training.logging_steps=1",
        "training.run_name=null",
        "training.dataloader_num_workers=0",
        f"training.metrics_dir={tmp_path / 'metrics'}",
        f"training.logging_dir={tmp_path / 'logs'}",
    ]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run `train_sft.py` in this process, as `python train_sft.py ARGUMENTS` would."""

    def call(arguments: Sequence[str], *more: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["train_sft.py", *arguments, *more])
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
        monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(REPO_ROOT / "train_sft.py"), run_name="__main__")
        captured = capfd.readouterr()
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    return call


def test_a_whole_run_and_its_resume(arguments: list[str], run: Run, tmp_path: Path) -> None:
    assert run(arguments).status == 0
    folder = tmp_path / "run"
    for name in ("config.yaml", "environment.json", "log.txt", "prompt_contract.json"):
        assert (folder / name).stat().st_size > 0, name
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(environment["git"]) and environment["versions"]["transformers"]
    assert [path.name for path in complete_checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]
    assert manifest_problems(folder / "checkpoint-best") == [] == manifest_problems(folder / "checkpoint-final")
    records = read_metrics(tmp_path / "metrics" / "run.jsonl")
    assert [record["step"] for record in records if "train/loss" in record] == [1, 2, 3, 4]
    assert (tmp_path / "metrics" / "run.png").read_bytes()[:4] == b"\x89PNG"
    assert list((tmp_path / "logs" / "run").glob("events.out.tfevents.*"))
    again = run(arguments)
    assert again.status == 2 and "--resume_from_checkpoint auto" in again.err and "Traceback" not in again.err
    shutil.rmtree(folder / "checkpoint-4")
    resumed = run(arguments, "--resume_from_checkpoint")
    assert resumed.status == 0 and "going on from" in resumed.err
    assert "missing keys" not in resumed.err  # the head is the embeddings
    after = read_metrics(tmp_path / "metrics" / "run.jsonl")
    assert [r["train/loss"] for r in after if "train/loss" in r] == [
        r["train/loss"] for r in records if "train/loss" in r
    ]


def test_dry_run_shows_the_plan_and_trains_nothing(
    arguments: list[str], run: Run, demo_data: Path, tmp_path: Path
) -> None:
    result = run(arguments, "--dry_run", "lora.enabled=true", "training.vision_tower_lr=0")
    assert result.status == 0
    num_rows = len((demo_data / "train.jsonl").read_text().splitlines())
    assert f"rows:        {num_rows} train, 4 validation" in result.out
    assert f"steps:       4 ({math.ceil(num_rows / 4)} an epoch)" in result.out
    assert "mm_projector" in result.out and "frozen" in result.out
    table = result.out[result.out.index("memory:      about 0.") : result.out.index("input_ids:")]
    assert "largest term: " in table and "validation cache" in table and "rollout" not in table
    terms = [line.split()[0] for line in table.splitlines()[2:-1]]
    assert terms[:6] == ["weights", "optimizer", "pixels", "gradients", "activations", "one"]
    assert result.out.count("--- learns: From ") == 2
    assert re.search(r"^pixel_values_videos: \(\d+, 1536\) float32$", result.out, re.MULTILINE)
    assert "<0.2 seconds><|vision_start|><|video_pad|>*2<|vision_end|><1.2 seconds>" in result.out
    assert not (tmp_path / "run").exists()


def test_three_mistakes_are_named_at_once(arguments: list[str], run: Run) -> None:
    result = run(arguments, "data.fps=-2", "training.learning_rat=1e-4", "lora.r=many")
    assert result.status == 2 and "Traceback" not in result.err
    assert "data.fps must be > 0, got -2" in result.err
    assert "did you mean learning_rate?" in result.err
    assert "lora.r" in result.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_path", "./no/such/folder"], "'./no/such/folder' does not exist"),
        (["--model_path", "Qwen/Qwen3-VL-4B-Instruct"], "cannot load 'Qwen/Qwen3-VL-4B-Instruct'"),
        (["data.train=nowhere.jsonl"], "nowhere.jsonl"),
        (["data.train=[]"], "data.train names no annotation file"),
        (["--config", "no.yaml"], "no.yaml"),
        (["--deepspeed", "no.json"], "no.json"),
        (["--resume_from_checkpoint", "no/checkpoint-1"], "no/checkpoint-1"),
    ],
)
def test_what_cannot_be_found_is_one_clear_error(
    flags: list[str], message: str, arguments: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty_cache"))
    result = run(arguments, *flags)
    assert result.status == 2, result.err
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert "Traceback" not in result.err


def test_all_missing_annotation_files_are_named_before_anything_is_written(
    arguments: list[str], run: Run, tmp_path: Path
) -> None:
    result = run(arguments, "data.train=[a.jsonl, b.jsonl]", "data.val=c.jsonl")
    last = result.err.strip().splitlines()[-1]
    assert "data.train names a.jsonl; data.train names b.jsonl; data.val names c.jsonl: no such file" in last
    assert result.status == 2 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["--output_dir", "training.metrics_dir", "training.logging_dir"])
def test_a_folder_that_cannot_be_made_is_named(key: str, arguments: list[str], run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    place = tmp_path / "file" / "folder"
    result = run(arguments, *([key, str(place)] if key.startswith("-") else [f"{key}={place}"]))
    last = result.err.strip().splitlines()[-1]
    assert result.status == 2 and last.startswith(f"error: {key} {place} cannot be made a folder: ")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_run_that_left_no_checkpoint_is_begun_anew_and_its_log_kept(
    arguments: list[str], run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoint-2").mkdir(parents=True)  # cut off in its first save
    (folder / "checkpoint-2/model.safetensors").write_bytes(b"half")
    (folder / "log.txt").write_text("a line of the earlier run\n")
    short = ["training.max_steps=1", "training.eval_strategy=no", "training.save_strategy=no"]
    result = run(arguments, *short)
    assert result.status == 0 and "checkpoint-2 is passed over, starting from the beginning" in result.err
    assert (folder / "log.txt").read_text().startswith("a line of the earlier run\n")
    assert (folder / "checkpoint-2/model.safetensors").read_bytes() == b"half"
    assert manifest_problems(folder / "checkpoint-final") == []


def test_the_record_of_a_run_repeats_it(arguments: list[str], run: Run, tmp_path: Path) -> None:
    short = ["training.max_steps=1", "training.eval_strategy=no", "training.save_strategy=no"]
    assert run(arguments, *short).status == 0
    record = tmp_path / "run/config.yaml"
    again = run(["--config", str(record), "--output_dir", str(tmp_path / "again")], "training.run_name=again")
    assert again.status == 0 and (tmp_path / "again/config.yaml").read_text() == record.read_text().replace(
        "run_name: null", "run_name: again"
    )
    first, second = (read_metrics(tmp_path / f"metrics/{name}.jsonl")[0]["train/loss"] for name in ("run", "again"))
    assert first == second


def test_empty_and_bad_annotation_files(arguments: list[str], run: Run, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("")
    empty = run(arguments, f"data.train={path}")
    assert empty.status == 2 and "rows.jsonl" in empty.err.splitlines()[-1]
    path.write_text('{"video": "a.mp4"}\nnot json\n')
    bad = run(arguments, f"data.train={path}")
    assert bad.status == 2 and "rows.jsonl" in bad.err and "Traceback" not in bad.err


@pytest.mark.parametrize("moment", ["_move_model_to_device", "training_step"])
def test_out_of_memory_names_the_knobs(
    moment: str, arguments: list[str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a step, and where the weights alone are too large for the card."""
    from transformers import Trainer

    def fail(*_args: object, **_kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(Trainer, moment, fail)
    result = run(arguments)
    last = result.err.strip().splitlines()[-1]
    assert result.status == 2 and "Tried to allocate 20.00 GiB" in last
    for knob in ("training.per_device_train_batch_size", "data.total_pixels", "gradient_checkpointing", "--deepspeed"):
        assert knob in last


def test_full_disk_leaves_the_earlier_checkpoint(
    arguments: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage

    def full_after_first(path: object) -> object:
        usage = real(str(path))
        done = (tmp_path / "run" / "checkpoint-2" / "manifest.json").exists()
        return usage._replace(free=1000) if done else usage

    monkeypatch.setattr(shutil, "disk_usage", full_after_first)
    result = run(arguments)
    last = result.err.strip().splitlines()[-1]
    assert result.status == 2 and "not enough disk space" in last and "needed" in last
    assert [path.name for path in complete_checkpoints(tmp_path / "run")] == ["checkpoint-2"]


@pytest.mark.parametrize("name", ["optimizer.pt", "progress.json", "manifest.json"])
def test_disk_that_fills_up_in_a_save(
    name: str, arguments: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a file is written: the checkpoint before is whole, and with space again the run goes on from there."""
    place = tmp_path / "run/checkpoint-4"
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fails_for(place / name, os.replace))
        patch.setattr("torch.save", fails_for(place / name, torch.save))
        result = run(arguments)
    last = result.err.strip().splitlines()[-1]
    assert result.status == 2 and "Traceback" not in result.err
    assert last.startswith(f"error: the disk filled up while saving {place} (about ") and " needed)" in last
    assert [path.name for path in complete_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert manifest_problems(tmp_path / "run/checkpoint-best") == []
    resumed = run(arguments, "--resume_from_checkpoint", "auto")
    assert resumed.status == 0
    assert f"warn  {place} is passed over, going on from checkpoint-2: it is not complete" in resumed.err
    assert "is passed over" in (tmp_path / "run/log.txt").read_text()
    assert [path.name for path in complete_checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-4"]


def fails_for(place: Path, plain: Callable[..., None]) -> Callable[..., None]:
    """`plain(source, target)`, on a disk that is full when it comes to `place`."""

    def write(source: object, target: object, *more: object, **options: object) -> None:
        if Path(str(target)) != place:
            return plain(source, target, *more, **options)
        place.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    return write


def test_video_that_vanishes_mid_run_stops_with_its_name(
    arguments: list[str], run: Run, demo_data: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(demo_data, copy)
    for path in sorted((copy / "videos" / "train").iterdir())[4:]:
        path.unlink()
    result = run(arguments, f"data.train={copy / 'train.jsonl'}")
    last = result.err.strip().splitlines()[-1]
    assert result.status == 2 and "data.max_bad_fraction=0.01" in last and ".mp4" in last


@pytest.mark.slow
def test_ctrl_c_leaves_a_resumable_run(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(REPO_ROOT / "train_sft.py"), *arguments]
    command += ["training.max_steps=400", "training.dataloader_num_workers=1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = tmp_path / "metrics" / "run.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("train/loss") >= 3):
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the data workers too
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 130, err
    assert "--resume_from_checkpoint auto" in err and "Traceback" not in err
    step = int(complete_checkpoints(tmp_path / "run")[-1].name.split("-")[1])
    assert step >= 3
    ended = subprocess.run(
        [*command, "--resume_from_checkpoint", "auto", f"training.max_steps={step + 2}"], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run" / "checkpoint-final" / "manifest.json").exists()
