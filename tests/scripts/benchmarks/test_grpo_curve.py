"""The figure over GRPO's cells."""

from __future__ import annotations

from pathlib import Path

from scripts.benchmarks.grpo_curve import GENERATIONS, LENGTHS, curve_cells, draw, read_rows, write_rows


def test_the_curve_is_drawn_from_its_csv(tmp_path: Path) -> None:
    measured = [
        {"sweep": sweep, "prompt_tokens": cell.prompt_tokens, "generations": cell.generations,
         "completion_tokens": cell.completion_tokens, "token_ratio": 3.0, "update_ratio": 2.0, "step_ratio": 1.5,
         "update_s_shared": 1.0, "update_s_unshared": 2.0, "step_s_shared": 2.0, "step_s_unshared": 3.0}
        for sweep in ("G", "P") for cell in curve_cells(sweep, 1)
    ]  # fmt: skip
    write_rows(tmp_path / "curve.csv", measured)
    assert read_rows(tmp_path / "curve.csv") == measured
    left, right = draw(measured).axes
    assert [list(line.get_xdata()) for line in left.lines] == [list(GENERATIONS)] * 3
    assert [list(line.get_xdata()) for line in right.lines] == [list(LENGTHS)] * 3
    assert {line.get_label(): line.get_ydata()[0] for line in left.lines} == {
        "times fewer tokens": 3.0, "update": 2.0, "whole step": 1.5,
    }  # fmt: skip
    assert left.get_xscale() == "log" and left.get_ylim()[0] == 0
