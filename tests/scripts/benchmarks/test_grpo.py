"""The GRPO benchmark: its ways agree, and its line can be read by a program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from datasets.pixels import pixel_values
from scripts.benchmarks.common import check_options
from scripts.benchmarks.grpo import LEAST, PHASES, compare, measure_times, table, update
from scripts.benchmarks.grpo_ways import WAYS, Cell, StockWay, Work, _picked, make_way
from scripts.benchmarks.models import make_trainable
from trainers.shared_prefix import IGNORED
from utils.common import REPO_ROOT, UserError


def bench(folder: Path, *options: str, **process: Any) -> subprocess.CompletedProcess[str]:
    """The smallest cell from the command line, called from another folder."""
    command = [sys.executable, str(REPO_ROOT / "scripts/bench.py"), "grpo", "--prompt_tokens", "150", "--repeats", "1"]
    command += ["--generations", "2", "--completion_tokens", "4", *options]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, **process)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON line of the smallest cell."""
    folder = tmp_path_factory.mktemp("bench")
    result = bench(folder, "--json", str(folder / "out.json"))
    line = json.loads(result.stdout.splitlines()[-1])
    assert line == json.loads((folder / "out.json").read_text())
    assert table(line) in result.stdout
    return line


def test_the_three_ways_agree(record: dict[str, Any]) -> None:
    for suffix in ("", "_stock"):
        assert record[f"max_logprob_diff{suffix}"] < 1e-4
        assert record[f"grad_rel_err{suffix}"] < 1e-4
        assert record[f"greedy_equal{suffix}"] is True


def test_the_line_holds_ratios_of_its_own_numbers(record: dict[str, Any]) -> None:
    taken, against = record["seconds"], record["against"]
    assert list(taken) == ["shared", "unshared", "stock"]
    assert record["update_ratio"] == pytest.approx(taken[against]["update"] / taken["shared"]["update"])
    assert record["step_ratio"] == pytest.approx(taken[against]["step"] / taken["shared"]["step"])
    for times in taken.values():
        assert times["step"] == pytest.approx(sum(times[phase] for phase in PHASES))
    rows = 2 * (record["prompt_tokens"] + 4)
    assert record["update_tokens_per_second"]["shared"] == pytest.approx(rows / taken["shared"]["update"])
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert (record["size"], record["device"], record["dtype"]) == ("tiny", "cpu", "float32")


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_two_rows_take_more_memory_than_one_prompt(record: dict[str, Any]) -> None:
    assert record["peak_memory_ratio"] > 1.2
    assert record["peak_mib"]["shared"]["update"] > record["peak_mib"]["shared"]["score"]


@pytest.mark.parametrize("wanted", [150, 300, 1200, 2500])
def test_the_prompt_is_about_as_long_as_asked_for(wanted: int) -> None:
    work = Work(Cell(wanted, 2, 4))
    assert abs(work.length - wanted) <= 36  # half a pair of frames with its marker
    per_pair = 60 if wanted >= 250 else 24
    assert work.num_visual % per_pair == 0 and work.num_visual > 0.5 * work.length
    assert len(pixel_values([work.sample["pixels"]])) == 4 * work.num_visual


def test_stock_gets_the_same_frames_as_images() -> None:
    work = Work(Cell(150, 2, 4, prompts=2))
    inputs, video = StockWay(work).inputs, work.sample
    pairs = int(video["video_grid_thw"][0, 0])
    assert inputs["num_images"] == [pairs] * 4
    assert inputs["image_grid_thw"].tolist() == [[1, *video["video_grid_thw"][0, 1:].tolist()]] * (4 * pairs)
    assert torch.equal(inputs["pixel_values"], pixel_values([video["pixels"]]).repeat(4, 1))
    assert int((inputs["input_ids"] == work.stock.config.image_token_id).sum()) == 4 * work.num_visual
    assert not (inputs["input_ids"] == work.stock.config.video_token_id).any()


def test_log_probs_without_trl() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 3.0], [5.0, 0.0]])
    found = _picked(logits, torch.tensor([1, 0, IGNORED]))
    assert found.tolist() == pytest.approx([-0.693147, -2.126928, 0.0])


def test_plain_logits_give_what_the_fused_head_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(Cell(150, 2, 70))  # more positions than one chunk
    ways = {name: make_way(name, work) for name in ("shared", "unshared")}
    fused = {name: update(way) for name, way in ways.items()}
    slope = work.own.model.visual.patch_embed.proj.weight.grad.clone()
    monkeypatch.setattr("scripts.benchmarks.grpo_ways.HAS_TRL", False)
    for name, way in ways.items():
        assert torch.allclose(update(way), fused[name], atol=1e-5)
        assert torch.allclose(work.own.model.visual.patch_embed.proj.weight.grad, slope, atol=1e-5)
    assert float(slope.abs().max()) > 1e-3


def test_the_ways_agree_on_a_real_sizes_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA, gradient checkpointing and a vision output that is kept over the passes, on the tiny weights."""
    monkeypatch.setattr("scripts.benchmarks.grpo_ways.make_trainable", lambda model, size: make_trainable(model, "4b"))
    work = Work(Cell(150, 3, 6, prompts=2, repeats=1))
    ways = {name: make_way(name, work) for name in WAYS}
    assert [ways[name].keeps_vision for name in ("shared", "unshared")] == [True, False]
    times = measure_times(ways, work.cell)
    for phases in times.values():
        assert min(phases.values()) > 0
        assert phases["step"] == pytest.approx(sum(phases[phase] for phase in PHASES))
    assert all(prompt.vision is not None for prompt in ways["shared"].prompts)
    found = compare(ways)
    for suffix in ("", "_stock"):
        assert found[f"max_logprob_diff{suffix}"] < 1e-4
        assert 0 < found[f"grad_rel_err{suffix}"] < 1e-4
        assert found[f"greedy_equal{suffix}"] is True


@pytest.mark.slow
def test_it_runs_where_trl_is_not_installed(tmp_path: Path) -> None:
    """As on a GPU image that lacks it: stock is left out, and the two own ways still agree."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util, sys\nsys.modules['trl'] = None\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, package=None: None if name == 'trl' else find(name, package)\n"
    )
    result = bench(tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    line = json.loads(result.stdout.splitlines()[-1])
    assert list(line["seconds"]) == ["shared", "unshared"] and line["against"] == "unshared"
    assert line["head"] == "plain logits" and "trl" not in line["versions"]
    assert line["max_logprob_diff"] < 1e-4 and line["grad_rel_err"] < 1e-4
    assert "stock TRL: left out, trl is not installed" in result.stdout


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt_tokens": 20}, "--prompt_tokens must be >= 80, got 20"),
        ({"generations": 1}, "--generations must be >= 2, got 1"),
        ({"repeats": 0}, "--repeats must be >= 1, got 0"),
    ],
)
def test_numbers_out_of_their_rule(change: dict[str, int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_options(Cell(**{"prompt_tokens": 150, "generations": 2, "completion_tokens": 4, **change}), LEAST)


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: torch sees no CUDA device here"):
        check_options(Cell(150, 2, 4, device="cuda"), LEAST)
