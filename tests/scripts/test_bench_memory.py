"""The memory benchmark: its measured peaks beside the estimate, and what its command line refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.bench_memory import Cell, default_cells, measure_apart, table_row
from utils.common import REPO_ROOT

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")


def run(folder: Path, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """The script from the command line, called from another folder."""
    command = [sys.executable, str(REPO_ROOT / "scripts/bench_memory.py"), *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == status, result.stderr
    return result


def measure(folder: Path, *options: str) -> dict[str, Any]:
    out = run(folder, "measure", "--size", "tiny", "--what", "full", *options).stdout
    records: list[dict[str, Any]] = json.loads(out.splitlines()[-1])
    assert table_row(records[0]) in out
    return records[0]


@pytest.mark.slow
@needs_proc
def test_estimate_follows_the_measured_peak(tmp_path: Path) -> None:
    """Resident memory on a shared machine: pages of 4 KiB, libraries' buffers. So 25 % either way,
    and 20 % for what a larger batch adds, where constant overheads drop out."""
    one, four = (measure(tmp_path, "--batch", batch, "--prompt_tokens", "1200") for batch in ("1", "4"))
    for record in (one, four):
        assert 0.75 < record["estimate"] / record["measured"] < 1.25
    added = {key: four[key] - one[key] for key in ("estimate", "measured")}
    assert 0.8 < added["estimate"] / added["measured"] < 1.2
    kept = measure(tmp_path, "--batch", "4", "--prompt_tokens", "1200", "--no_checkpointing")
    saved = {key: kept[key] - four[key] for key in ("estimate", "measured")}
    assert 0.8 < saved["estimate"] / saved["measured"] < 1.2


def test_a_plan_needs_neither_weights_nor_data(tmp_path: Path) -> None:
    config = str(REPO_ROOT / "configs/training/sft_8gb.yaml")
    out = run(tmp_path, "plan", "--config", config, "--size", "2b", "data.total_pixels=8388608").stdout
    assert out.startswith("memory:      about 6.8 GB on the GPU") and "4032 visual tokens" in out


def test_a_plan_for_a_missing_deepspeed_file_is_one_line(tmp_path: Path) -> None:
    config = str(REPO_ROOT / "configs/training/sft_8gb.yaml")
    error = run(tmp_path, "plan", "--config", config, "--size", "2b", "--deepspeed", "gone.json", status=2).stderr
    assert error.strip().splitlines()[-1].startswith("error: --deepspeed gone.json cannot be read")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "--batch must be >= 1, got 0"),
        (["--prompt_tokens", "10"], "--prompt_tokens must be >= 80, got 10"),
        (["--device", "cuda"], "--device cuda: torch sees no CUDA device here"),
    ],
)
def test_what_cannot_be_measured_is_one_line(options: list[str], message: str, tmp_path: Path) -> None:
    import torch

    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    error = run(tmp_path, "measure", "--size", "tiny", *options, status=2).stderr.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_the_documented_cells_cover_what_changes_memory() -> None:
    cells = default_cells()
    assert {cell.checkpointing for cell in cells} == {True, False}
    assert {cell.what for cell in cells} == {"full", "lora", "default"}
    assert {cell.stage for cell in cells} == {"sft", "grpo"}
    assert len({(cell.batch, cell.prompt_tokens) for cell in cells if cell.what == "full"}) >= 4
    assert {cell.device for cell in cells} == {"cpu"}


@pytest.mark.gpu
def test_a_gpu_counts_its_own_allocations() -> None:
    record = measure_apart(Cell("sft", "tiny", "cuda", "default", True, 2, 600))
    assert record["reserved"] >= record["measured"] > 0
