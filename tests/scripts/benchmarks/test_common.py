"""How the benchmarks measure: turns, medians, peaks, the fair baseline and the table."""

from __future__ import annotations

import os
import sys
from functools import partial

import pytest
import torch

from scripts.benchmarks.common import (
    Times,
    baseline,
    ceilings_line,
    compared,
    gradient,
    peak_mib,
    peaks_in_fresh_processes,
    relative_error,
    table_head,
    take_turns,
)

TIMES = {name: {"update": 2.0, "step": 4.0} for name in ("shared", "unshared", "stock")}
PHASES = ("update", "step")


def test_the_fairer_baseline_is_taken() -> None:
    assert baseline(TIMES, "stock", PHASES) == "unshared"
    assert baseline({**TIMES, "stock": {"update": 1.9, "step": 3.7}}, "stock", PHASES) == "unshared"
    assert baseline({**TIMES, "stock": {"update": 1.8, "step": 4.0}}, "stock", PHASES) == "stock"
    assert baseline({name: TIMES[name] for name in ("shared", "unshared")}, "stock", PHASES) == "unshared"


def test_ways_take_turns_and_medians_are_given() -> None:
    calls, clock = [], iter(range(1, 13))

    def timed(way: str, name: str) -> Times:
        calls.append(f"{way}{name}")
        return {name: float(next(clock)) ** 2}

    found = take_turns({"one": "A", "other": "B"}, ("x", "y"), 3, timed)
    assert calls == ["Ax", "Bx", "Ay", "By"] * 3
    assert found == {"one": {"x": 25.0, "y": 49.0, "step": 74.0}, "other": {"x": 36.0, "y": 64.0, "step": 100.0}}


def test_relative_error_is_over_all_parameters_together() -> None:
    found = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    wanted = [torch.tensor([3.0, 3.0]), torch.tensor([[0.0]])]
    assert relative_error(found, wanted) == pytest.approx((9 + 16) ** 0.5 / 18**0.5)
    assert relative_error(wanted, wanted) == 0.0


def test_gradient_is_a_copy_of_what_trains() -> None:
    model = torch.nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    model(torch.tensor([[2.0, 3.0]])).backward()
    found = gradient(model)
    model.zero_grad(set_to_none=False)
    assert [part.tolist() for part in found] == [[[2.0, 3.0]]]


def fill(mebibytes: dict[str, int], name: str) -> Times:
    """The peak of a call that writes to so much memory; and the process it ran in."""
    size = mebibytes[name] << 20
    return {"peak": peak_mib("cpu", lambda: bytearray(os.urandom(1) * size)), "pid": os.getpid()}


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_peaks_are_of_the_call_alone_in_a_process_of_its_own() -> None:
    found = peaks_in_fresh_processes(["small", "large"], partial(fill, {"small": 40, "large": 160}))
    assert found is not None and len({found["small"]["pid"], found["large"]["pid"], os.getpid()}) == 3
    assert 30 < found["small"]["peak"] < 120 < found["large"]["peak"]


def test_memory_is_unknown_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peaks_in_fresh_processes(["small"], partial(fill, {"small": 1})) is None


def test_a_row_of_the_table() -> None:
    values = {"shared": 0.5, "unshared": 1.25, "stock": 2.0}
    row = compared("update", values, ["unshared", "stock"], ".3f", "s")
    head, rule = table_head(list(values), ["unshared", "stock"])
    assert row.split() == ["update", "0.500", "s", "1.250", "s", "2.000", "s", "2.50x", "4.00x"]
    assert len(row) == len(head) == len(rule)
    assert compared("peak", {"shared": 0.0, "unshared": 2.0}, ["unshared"], ".0f", "MiB", least=0.1).endswith(" 20.00x")
    assert compared("samples/s", values, (), ".2f").split() == ["samples/s", "0.50", "1.25", "2.00"]


def test_ceilings_are_said_of_a_gpu_only() -> None:
    assert ceilings_line({"ceilings": None}) == []
    assert ceilings_line({"ceilings": {"matmul_tflops": 701.4, "memory_tb_per_s": 3.217}}) == [
        "this GPU at best: bf16 matrix product 701 TFLOP/s, memory 3.22 TB/s"
    ]
