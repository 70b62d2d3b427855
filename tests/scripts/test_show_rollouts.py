"""A group of a GRPO run as text and as a picture: the right group, its figures, and windows on the file's clock."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scripts import show_rollouts
from scripts.show_rollouts import choose, describe_step, label_of, main, spread
from trainers.rollout_log import append_records, group_record
from utils.common import REPO_ROOT, UserError
from utils.config import RLConfig, load_config, save_config
from utils.rows import read_rows, row_to_record

CONFIGS = [REPO_ROOT / "configs/demo/rl_config.yaml", REPO_ROOT / "configs/demo/video_config.yaml"]


def record(step: int, row: int, rewards: Sequence[float], spans: Sequence[Any] | None = None, **about: Any) -> Any:
    """A group of which completion i answers `spans[i]`, with advantages of -1, 0, 1, ..."""
    windows: Any = [[(1.0, 2.0)]] * len(rewards) if spans is None else spans
    drawn = {"row": row, "video": "v.mp4", "prompt": "it moves", "timestamp": [(1, 2)], "duration": 8.0} | about
    parts = [{"temporal_iou": reward} for reward in rewards]
    texts = [f"answer {number}" for number in range(len(rewards))]
    return group_record(step, drawn, texts, windows, parts, rewards, range(-1, len(rewards) - 1), [3] * len(rewards))


@pytest.fixture
def run(demo_data: Path, tmp_path: Path) -> Path:
    """The folder of a run of three steps on the demo set: rows 0 and 1, and row 4 in step 2 alone."""
    rows, _ = read_rows(demo_data / "train.jsonl")
    overrides = [f"data.{split}={demo_data / split}.jsonl" for split in ("train", "val", "test")]
    save_config(load_config(RLConfig, CONFIGS, overrides), tmp_path / "config.yaml")

    def of(step: int, row: int, rewards: Sequence[float], spans: Sequence[Any]) -> Any:
        about = {"video": rows[row].video, "prompt": rows[row].sentence, "timestamp": rows[row].timestamp}
        return record(step, row, rewards, spans, **about)

    flat, wide = [0.5, 0.5, 0.5, 0.5], [0.25, 1.0, 0.0, 0.0]
    answers = [[(1.0, 4.0)], [(2.0, 3.5), (5.0, 6.0)], None, []]
    groups = [of(step, row, rewards, answers) for step in (0, 1) for row, rewards in ((0, wide), (1, flat))]
    groups += [of(2, 1, flat, answers), of(2, 4, wide, answers)]
    append_records(tmp_path / "rollouts.jsonl", groups)
    return tmp_path


# ---- a run's folder


def test_the_last_steps_widest_group_is_printed_and_drawn(
    run: Path, demo_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run)]) == 0
    row = read_rows(demo_data / "train.jsonl")[0][4]
    start, end = row.timestamp[0]  # type: ignore[index]
    picture = run / "rollouts" / "step-2-row-4.png"
    assert capsys.readouterr().out.splitlines() == [
        "step 2: 2 groups of 4 completions",
        "  mean reward 0.406, spread within a group 0.205, flat groups (all earn the same) 50.0 %, "
        "unread answers 25.0 %",
        "",
        f"row 4: {row.video} (8 s)",
        f"  {row.sentence!r}",
        f"  label: {start:.1f} - {end:.1f} s",
        "  mean reward 0.312, spread 0.410",
        "  #1   reward 0.250  advantage -1.00  1.0 - 4.0 s  (temporal_iou 0.250; 3 tokens)",
        "       answer 0",
        "  #2   reward 1.000  advantage +0.00  2.0 - 3.5 s, 5.0 - 6.0 s  (temporal_iou 1.000; 3 tokens)",
        "       answer 1",
        "  #3   reward 0.000  advantage +1.00  unread  (temporal_iou 0.000; 3 tokens)",
        "       answer 2",
        "  #4   reward 0.000  advantage +2.00  absent  (temporal_iou 0.000; 3 tokens)",
        "       answer 3",
        f"timeline: {picture}",
    ]
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    blue, green = np.array([0, 114, 178]), np.array([0, 158, 115])
    assert [(pixels == colour).all(-1).sum() > 1000 for colour in (blue, green)] == [True, True]


def test_the_rollouts_file_itself_a_step_a_row_and_a_folder_can_be_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    assert main([str(run / "rollouts.jsonl"), "--step", "1", "--row", "1", "--output", str(folder)]) == 0
    assert "\nrow 1: " in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == ["step-1-row-1.png"]


def test_without_the_video_the_text_stays(run: Path, demo_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row_to_record(row) for row in read_rows(demo_data / "train.jsonl")[0]]
    (run / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))  # no videos beside it
    config = (run / "config.yaml").read_text().replace(str(demo_data / "train.jsonl"), str(run / "rows.jsonl"))
    (run / "config.yaml").write_text(config)
    assert main([str(run)]) == 1
    shown = capsys.readouterr()
    assert "#2   reward 1.000" in shown.out and "timeline" not in shown.out
    assert (
        f"no picture: {run / rows[4]['video']} does not exist; it is the video of {run / 'rows.jsonl'}:5" in shown.err
    )
    assert not (run / "rollouts").exists()


def test_without_its_configuration_the_text_stays(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.yaml").unlink()
    assert main([str(run)]) == 1
    shown = capsys.readouterr()
    assert "#2   reward 1.000" in shown.out
    assert "no picture: " in shown.err and str(run / "config.yaml") in shown.err


def test_annotations_changed_since_the_run_give_no_wrong_picture(
    run: Path, demo_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = (run / "config.yaml").read_text().replace(str(demo_data / "train.jsonl"), str(demo_data / "val.jsonl"))
    (run / "config.yaml").write_text(config)
    assert main([str(run)]) == 1
    assert "row 4 of data.train is no longer videos/train/" in capsys.readouterr().err


@pytest.mark.parametrize(("trim", "shift"), [("relative", 3.0), ("absolute", 3.0), ("pre_cut", 0.0)])
def test_windows_are_drawn_on_the_files_clock(
    run: Path, demo_data: Path, trim: str, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The records hold the clip's clock; with video_start=3 the file's is 3 s ahead, except for files already cut."""
    row = row_to_record(read_rows(demo_data / "train.jsonl")[0][0])
    label = [4.0, 5.0] if trim == "absolute" else [1.0, 2.0]
    video = str(demo_data / row["video"])
    row |= {"video": video, "timestamp": label, "duration": 5.0, "video_start": 3.0, "video_end": 8.0}
    (run / "rows.jsonl").write_text(json.dumps(row) + "\n")
    overrides = [f"data.train={run / 'rows.jsonl'}", f"data.trim={trim}"]
    save_config(load_config(RLConfig, CONFIGS, overrides), run / "config.yaml")
    about = {"video": video, "prompt": row["sentence"], "timestamp": [(1.0, 2.0)], "duration": 5.0}
    append_records(run / "rollouts.jsonl", [record(9, 0, [0.61, -0.2, 0.0], [[(0.5, 1.5)], None, []], **about)])
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(show_rollouts, "visualize_temporal_grounding", lambda **options: drawn.update(options))
    assert main([str(run)]) == 0
    assert drawn["ground_truths"] == [(1 + shift, 2 + shift)]
    assert [answer["segments"] for answer in drawn["predictions"]] == [[(0.5 + shift, 1.5 + shift)], [], []]
    assert [answer["parsed"] for answer in drawn["predictions"]] == [True, False, True]
    assert drawn["labels"] == ["#1 reward 0.61 adv −1.0", "#2 reward −0.20 adv +0.0", "#3 reward 0.00 adv +1.0"]
    assert (drawn["video_path"], drawn["query"], drawn["backend"]) == (Path(video), row["sentence"], "pyav")


# ---- which group


def test_the_group_chosen() -> None:
    path = Path("r.jsonl")
    records = [record(0, 7, [0, 1]), record(1, 7, [0, 0.2]), record(1, 3, [0, 0.5]), record(2, 3, [1, 1])]
    chosen = {
        (step, row): (group["step"], group["row"])
        for step, row in ((None, None), (1, None), (None, 7), (0, 7))
        for group in [choose(records, path, step, row)]
    }
    assert chosen == {(None, None): (2, 3), (1, None): (1, 3), (None, 7): (1, 7), (0, 7): (0, 7)}


@pytest.mark.parametrize(
    ("step", "row", "message"),
    [
        (5, None, "--step 5: r.jsonl has steps 0, 2"),
        (None, 5, "--row 5: r.jsonl has rows 3, 7"),
        (2, 7, "--row 7: step 2 has rows 3"),
    ],
)
def test_a_group_that_is_not_there(step: int | None, row: int | None, message: str) -> None:
    records = [record(0, 7, [0, 1]), record(2, 3, [1, 1])]
    with pytest.raises(UserError) as error:
        choose(records, Path("r.jsonl"), step, row)
    assert str(error.value) == message


def test_many_steps_are_named_in_short() -> None:
    with pytest.raises(UserError) as error:
        choose([record(step, 0, [0, 1]) for step in range(60)], Path("r.jsonl"), 99, None)
    assert str(error.value) == "--step 99: r.jsonl has steps 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ..., 59"


def test_a_run_without_rollouts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        main([str(tmp_path)])
    (tmp_path / "rollouts.jsonl").touch()
    with pytest.raises(UserError, match="holds no rollout yet"):
        main([str(tmp_path)])


# ---- figures


def test_figures_of_a_step() -> None:
    groups = [record(3, 0, [0.0, 1.0], [None, [(1, 2)]]), record(3, 1, [0.5, 0.5])]
    assert spread(groups[0]) == 0.5
    assert describe_step(groups) == (
        "step 3: 2 groups of 2 completions\n  mean reward 0.500, spread within a group 0.250, "
        "flat groups (all earn the same) 50.0 %, unread answers 25.0 %"
    )
    assert label_of(12, {"reward": 0.614, "advantage": 1.23}) == "#12 reward 0.61 adv +1.2"
