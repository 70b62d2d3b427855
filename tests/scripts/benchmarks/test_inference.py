"""The inference benchmark: its four ways give the same texts, and its line can be read by a program."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import scripts.benchmarks.inference as bench
from scripts.benchmarks.common import check_options
from scripts.benchmarks.inference import LEAST, WAYS, Cell, Way, Work, compare, summary, table
from trainers.vision_attention import FRAMEWISE
from utils import clip_reader
from utils.common import REPO_ROOT, UserError

SMALL = partial(Cell, 100, 3, answer_tokens=3)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON line of a small cell, from the command line in another folder."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, str(REPO_ROOT / "scripts/bench.py"), "inference", "--prompt_tokens", "100"]
    command += ["--queries", "4", "--answer_tokens", "3", "--repeats", "1", "--json", str(folder / "out.json")]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    line = json.loads(result.stdout.splitlines()[-1])
    assert line == json.loads((folder / "out.json").read_text())
    assert table(line) in result.stdout
    return line


def test_the_four_ways_answer_the_same(record: dict[str, Any]) -> None:
    assert record["equal_texts"] == {"shared": 4, "batched": 4, "single": 4, "stock": 4}
    assert "of 4 texts equal stock generate's: shared 4, batched 4, single 4" in table(record)


def test_the_line_holds_ratios_of_its_own_numbers(record: dict[str, Any]) -> None:
    taken = record["seconds"]
    assert list(taken) == list(WAYS) and all(list(times) == ["model", "whole"] for times in taken.values())
    for name, times in taken.items():
        for phase in ("model", "whole"):
            assert record["queries_per_second"][name][phase] == pytest.approx(4 / times[phase])
    assert record["shared_vs_single"] == pytest.approx(taken["single"]["model"] / taken["shared"]["model"])
    assert record["batched_vs_single"] == pytest.approx(taken["single"]["model"] / taken["batched"]["model"])
    assert record["shared_vs_stock_with_decode"] == pytest.approx(taken["stock"]["whole"] / taken["shared"]["whole"])
    assert (record["size"], record["device"], record["dtype"]) == ("tiny", "cpu", "float32")
    assert (record["queries"], record["answer_tokens"], record["repeats"], record["trained"]) == (4, 3, 1, 0)
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_four_rows_take_more_memory_than_one_video(record: dict[str, Any]) -> None:
    peaks = record["peak_mib"]
    assert list(peaks) == list(WAYS)
    assert record["peak_memory_ratio"] == pytest.approx(peaks["batched"]["model"] / max(peaks["shared"]["model"], 0.1))
    assert peaks["batched"]["model"] > 0


def test_sizes_are_those_of_the_inputs() -> None:
    work = Work(SMALL())
    clip = work.clip()
    lengths = [len(work.sample(question, clip)["input_ids"]) for question in work.questions]
    assert len(set(lengths)) == 3  # questions differ in length
    shared, batched = Way("shared", work).inputs, Way("batched", work).inputs[0]
    prefix = len(shared.prefix["input_ids"])
    assert [prefix + len(tail) for tail in shared.tails] == lengths
    assert work.sizes() == {
        "prompt_tokens": round(sum(lengths) / 3),
        "visual_tokens": int(batched["mm_token_type_ids"][0].count_nonzero()),
        "tokens": {
            "shared": prefix + 3 * (max(lengths) - prefix),
            "batched": batched["input_ids"].numel(),
            "single": sum(lengths),
            "stock": sum(lengths),
        },
    }


def test_each_way_computes_what_it_is_named_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """How often each reads the file and runs the vision tower, and on how many rows it decodes."""
    work, reads = Work(SMALL()), []

    def counting(real: Any) -> Any:
        return lambda *args, **kwargs: reads.append(args) or real(*args, **kwargs)

    monkeypatch.setattr(bench, "read_clip", counting(bench.read_clip))
    monkeypatch.setattr(clip_reader, "decode", counting(clip_reader.decode))
    found = {}
    for name in WAYS:
        model = work.stock if name == "stock" else work.engine.model
        passes: list[Any] = []
        rows: list[int] = []
        hooks = [
            model.model.visual.register_forward_hook(lambda *_, passes=passes: passes.append(1)),
            model.lm_head.register_forward_hook(lambda *args, rows=rows: rows.append(len(args[2]))),
        ]
        reads.clear()
        assert len(Way(name, work).whole()) == 3
        found[name] = (len(reads), len(passes), sorted(set(rows)), len(rows))
        for hook in hooks:
            hook.remove()
        framewise = model.config.vision_config._attn_implementation == FRAMEWISE
        assert framewise == (name != "stock")
    assert found == {
        "shared": (1, 1, [3], 3),
        "batched": (3, 1, [3], 3),
        "single": (3, 3, [1], 9),
        "stock": (3, 3, [1], 9),
    }


def test_texts_are_counted_that_are_stocks_in_both_passes() -> None:
    """The agreement is no accident: it ends where a way answers something else."""

    def way(model: list[str], whole: list[str]) -> Any:
        return SimpleNamespace(model=lambda: model, whole=lambda: whole)

    ways = {"shared": way(["a", "b", "x"], ["a", "y", "x"]), "stock": way(["a", "b", "c"], ["a", "b", "c"])}
    assert compare(ways) == {"equal_texts": {"shared": 1, "stock": 3}}
    with pytest.raises(AssertionError):
        compare({"shared": way(["a"], ["a", "b"]), "stock": way(["a", "b"], ["a", "b"])})


def test_summary() -> None:
    times = {
        name: {"model": value, "whole": 2 * value + 1, "step": 0.0}
        for name, value in (("shared", 1.0), ("batched", 3.0), ("single", 6.0), ("stock", 5.0))
    }
    peaks = {"shared": {"model": 0.0}, "batched": {"model": 50.0}, "single": {"model": 1.0}, "stock": {"model": 1.0}}
    found = summary(8, times, peaks)
    assert (found["shared_vs_single"], found["batched_vs_single"], found["shared_vs_stock"]) == (6.0, 2.0, 5.0)
    assert found["single_vs_stock"] == pytest.approx(5 / 6)
    assert found["shared_vs_single_with_decode"] == pytest.approx(13 / 3)
    assert found["queries_per_second"]["shared"] == {"model": 8.0, "whole": pytest.approx(8 / 3)}
    assert found["peak_memory_ratio"] == pytest.approx(500.0)  # nothing counts as a tenth of a MiB
    assert summary(8, times, None)["peak_memory_ratio"] is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt_tokens": 20}, "--prompt_tokens must be >= 80, got 20"),
        ({"queries": 1}, "--queries must be >= 2, got 1"),
        ({"answer_tokens": 0}, "--answer_tokens must be >= 1, got 0"),
        ({"repeats": 0}, "--repeats must be >= 1, got 0"),
    ],
)
def test_numbers_out_of_their_rule(change: dict[str, int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_options(replace(Cell(prompt_tokens=150, queries=2), **change), LEAST)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_on_a_gpu_in_bf16() -> None:
    work = Work(SMALL(device="cuda"))
    ways = {name: Way(name, work) for name in WAYS}
    assert {parameter.dtype for parameter in work.engine.model.parameters()} == {torch.bfloat16}
    same = compare(ways)["equal_texts"]
    assert same["stock"] == 3 and set(same) == set(WAYS)
