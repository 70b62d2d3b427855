"""Curves: which panels appear, what their lines hold, and that nothing global is touched."""

import math
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from utils.common import REPO_ROOT, UserError
from utils.curves import Panel, draw_curves, figure_style, plot_curves, save_figure, smoothed
from utils.logging_utils import MetricsWriter


def records(count=100, every=10):
    """A run with every metric that has a panel."""
    result = []
    for step in range(1, count + 1):
        record = {
            "run": "r",
            "step": step,
            "time": 0.0,
            "train/loss": 3.0 / step,
            "train/grad_norm": 1.0,
            "train/samples_per_second": 5.0,
            "train/learning_rate/language": 1e-4,
            "train/learning_rate/merger": 1e-5,
            "train/learning_rate/vision": 0.0,
        }
        if step % every == 0:
            quality = 50.0 - abs(step - 70) / 2
            record |= {"eval/mIoU": quality, "eval/R1@0.5": quality + 5, "eval/parse_failure_rate": 1.0}
        result.append(record)
    return result


def panel(figure, title):
    [axes] = [axes for axes in figure.axes if axes.get_title(loc="left") == title]
    return axes


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def draw(rows):
    with figure_style():
        return draw_curves(rows)


def test_every_panel_with_its_values():
    figure = draw(records())
    assert titles(figure) == [
        "Training loss", "Learning rate", "Validation", "Gradient norm", "Unparsable answers", "Throughput",
    ]  # fmt: skip
    raw, smooth = panel(figure, "Training loss").lines
    assert raw.get_ydata()[:2] == pytest.approx([3.0, 1.5]) and raw.get_alpha() < 0.5
    assert list(smooth.get_ydata()) == pytest.approx(smoothed([3.0 / step for step in range(1, 101)]))
    assert {axes.get_xlim() for axes in figure.axes} == {panel(figure, "Validation").get_xlim()}


def grpo_records(count=30):
    """What `trainers.callbacks.slash_names` makes of a GRPO run with two rewards."""
    result = []
    for step in range(1, count + 1):
        record = {
            "step": step,
            "train/loss": 0.0,
            "train/kl": 0.001 * step,
            "train/entropy": 0.2,
            "train/completions/mean_length": 14.0,
            "reward/temporal_iou": step / 100,
            "reward/temporal_iou_std": 0.3,
            "reward/temporal_iou_zero_spread": 0.1,
            "reward/format": 0.9,
            "reward/total": step / 100 + 0.09,
            "reward/total_std": 0.3,
            "reward/zero_spread": 0.05,
        }
        if step % 10 == 0:
            record |= {
                "eval/mIoU": 50.0,
                "eval/reward": 0.4 + step / 1000,
                "eval/reward/temporal_iou": 0.4 + step / 1000,
            }
        result.append(record)
    return result


def test_a_grpo_run_begins_with_its_rewards():
    figure = draw(grpo_records())
    assert titles(figure) == [
        "Reward", "Validation reward", "Groups without spread", "KL from the start", "Entropy", "Completion length",
        "Training loss", "Validation",
    ]  # fmt: skip
    rewards = panel(figure, "Reward")
    assert legend(rewards) == ["total", "temporal iou", "format"]
    lines = {line.get_label(): list(line.get_ydata()) for line in rewards.lines if line.get_label() != "_raw"}
    assert lines["total"] == pytest.approx(smoothed([step / 100 + 0.09 for step in range(1, 31)]))
    assert lines["format"] == pytest.approx([0.9] * 30)
    assert list(panel(figure, "KL from the start").lines[0].get_ydata()) == pytest.approx(
        [0.001 * step for step in range(1, 31)]
    )


def test_a_line_on_another_is_dashed():
    """A single reward of weight 1 is the total: both must be seen."""
    axes = panel(draw(grpo_records()), "Validation reward")
    assert legend(axes) == ["reward, best 0.430 at step 30", "temporal iou"]
    total, component = (line for line in axes.lines if line.get_marker() == "o")
    assert list(total.get_ydata()) == list(component.get_ydata()) == pytest.approx([0.41, 0.42, 0.43])
    assert (total.get_linestyle(), component.get_linestyle()) == ("-", "--")


@pytest.mark.parametrize(("num_panels", "rows"), [(3, 1), (6, 2), (8, 2), (12, 3)])
def test_panels_stand_in_rows(num_panels, rows):
    many = [Panel(f"panel {index}", "", (f"train/{index}",)) for index in range(num_panels)]
    figure = draw_curves([{"step": 1} | {f"train/{index}": 1.0 for index in range(num_panels)}], many)
    grid = figure.axes[0].get_gridspec()
    assert (grid.nrows, len(figure.axes)) == (rows, num_panels)


def test_learning_rates_far_apart_share_a_logarithmic_axis():
    axes = panel(draw(records()), "Learning rate")
    assert axes.get_yscale() == "log"
    assert legend(axes) == ["language", "merger", "vision (frozen)"]
    low, high = axes.get_ylim()
    assert low == pytest.approx(1e-7) and high == pytest.approx(3e-4)


def test_learning_rates_close_together_stay_linear():
    rows = [{"step": 1, "train/learning_rate/a": 1e-4, "train/learning_rate/b": 2e-4}]
    axes = panel(draw(rows), "Learning rate")
    assert axes.get_yscale() == "linear" and axes.get_ylim()[0] == 0


def test_the_best_validation_is_marked():
    axes = panel(draw(records()), "Validation")
    assert legend(axes) == ["mIoU, best 50.0 at step 70", "R1@0.5, best 55.0 at step 70"]
    stars = [line for line in axes.lines if line.get_marker() == "*"]
    assert [(star.get_xdata()[0], star.get_ydata()[0]) for star in stars] == [(70, 50.0), (70, 55.0)]


def test_one_point_is_enough(tmp_path):
    rows = [{"step": 7, "train/loss": 2.0, "eval/mIoU": 0.0}]
    figure = draw(rows)
    assert titles(figure) == ["Training loss", "Validation"]
    assert figure.axes[0].get_xlim() == (6.0, 8.0)
    assert panel(figure, "Validation").get_ylim() == (0.0, 1.0)
    assert figure.axes[0].lines[0].get_marker() == "o"
    assert save_figure(figure, tmp_path / "one.png").stat().st_size > 5000


def test_gaps_are_left_out_not_drawn_as_zero():
    rows = [{"step": step, "train/loss": None if step == 2 else 1.0 * step} for step in (1, 2, 3)]
    rows.append({"step": 4, "train/loss": math.nan})
    [line] = draw(rows).axes[0].lines
    assert list(line.get_xdata()) == [1, 3] and list(line.get_ydata()) == [1.0, 3.0]


def test_nothing_to_plot_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path, "r") as writer:
        writer.write(1, {"train/other": 1.0})
    with pytest.raises(UserError, match=r"m\.jsonl holds nothing to plot; looked for reward/total"):
        plot_curves(path, tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_from_file_to_picture(tmp_path):
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path, "r") as writer:
        for record in records(30):
            writer.write(record["step"], {key: value for key, value in record.items() if "/" in key})
    picture = plot_curves(path, tmp_path / "new folder" / "curves.png")
    assert picture == tmp_path / "new folder" / "curves.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in picture.parent.iterdir()] == ["curves.png"]


@pytest.mark.parametrize("name", ["curves.jpg", "curves", "curves.png.bak"])
def test_other_formats_are_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"\.png, \.svg or \.pdf"):
        plot_curves(tmp_path / "missing.jsonl", tmp_path / name)


@pytest.mark.parametrize(("name", "start"), [("a.svg", b"<?xml"), ("a.pdf", b"%PDF")])
def test_vector_formats_are_reproducible(tmp_path, name, start):
    rows = [{"step": 1, "train/loss": 1.0}]
    first = save_figure(draw(rows), tmp_path / name).read_bytes()
    second = save_figure(draw(rows), tmp_path / name).read_bytes()
    assert first.startswith(start) and first == second


def test_smoothing_keeps_constants_and_does_not_lag():
    assert smoothed([4.0] * 300) == pytest.approx([4.0] * 300)
    ramp = np.arange(500.0)
    assert smoothed(ramp)[100:400] == pytest.approx(ramp[100:400])  # a running mean would lie below
    assert smoothed([5.0]) == [5.0]


def test_the_users_style_and_backend_stay():
    with matplotlib.rc_context({"axes.facecolor": "black", "text.color": "white", "font.size": 3.0}):
        figure = draw(records(5))
        assert matplotlib.rcParams["axes.facecolor"] == "black" and matplotlib.rcParams["font.size"] == 3.0
    axes = figure.axes[0]
    assert to_rgb(axes.get_facecolor()) == (1.0, 1.0, 1.0)
    assert sum(to_rgb(axes._left_title.get_color())) < 0.6  # dark ink
    code = "import sys, utils.curves; sys.exit('matplotlib.pyplot' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO_ROOT).returncode == 0
