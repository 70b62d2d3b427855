"""Difficulty scores: what a row gets, whose keys change, each video computed once, and going on after a stop."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

import inference.sampling
from scripts.score_difficulty import (
    contract_as_overrides,
    flat_share,
    main,
    name_of,
    parse_args,
    question_of,
    with_score,
)
from trainers.model import load_processor, resolve_source
from utils.common import REPO_ROOT, UserError
from utils.config import DataFile, SelectConfig, load_config
from utils.prompts import PromptContract
from utils.rows import Row, read_rows, row_to_record, write_rows
from utils.selection import select_rows

DATA_CONFIG = REPO_ROOT / "configs/demo/video_config.yaml"
OURS = ("model_iou_mean", "model_iou_std", "model_id")


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a run saves it: with the demo's prompt and sampling on record."""
    folder = tmp_path_factory.mktemp("sft") / "checkpoint-best"
    shutil.copytree(tiny_model, folder)
    config = load_config(DataFile, [DATA_CONFIG])
    PromptContract.current(config.prompt, config.data).save(folder)
    return folder


@pytest.fixture
def annotations(demo_data: Path, tmp_path: Path) -> Path:
    """Eight rows: the first with keys of the user's and of an earlier model, 2 without a label, 4 labelled absent."""
    rows = [replace(row, video=str(demo_data / row.video)) for row in read_rows(demo_data / "train.jsonl")[0][:8]]
    rows[0].kwargs.update(difficulty=0.7, model_iou_mean=0.9, model_iou_std=0.1, model_id="older", tags=["a"])
    rows[2] = replace(rows[2], timestamp=None, kwargs={**rows[2].kwargs, "model_iou_mean": 0.9, "model_id": "older"})
    rows[4] = replace(rows[4], timestamp=())
    write_rows(tmp_path / "rows.jsonl", rows)
    return tmp_path / "rows.jsonl"


@pytest.fixture
def command(checkpoint: Path, annotations: Path) -> list[str]:
    files = ["--annotations", str(annotations), "--output", str(annotations.with_name("scored.jsonl"))]
    sizes = ["--num_samples", "4", "--batch_size", "3", "--num_workers", "0", "--max_new_tokens", "16"]
    return ["--model_path", str(checkpoint), *files, *sizes]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> Callable[[Callable[..., str]], list[int]]:
    """`answers(text_of)`: in the place of the model, `text_of(prompt)` for each sample; gives the prompts per call."""
    tokenizer = load_processor(resolve_source(str(checkpoint))).tokenizer

    def give(text_of: Callable[..., str]) -> list[int]:
        calls: list[int] = []

        def sample(_model: Any, prompts: Sequence[Any], num: int, config: Any, pad_token_id: int) -> torch.Tensor:
            calls.append(len(prompts))
            texts = [text_of(tokenizer.decode(prompt.input_ids)) for prompt in prompts for _ in range(num)]
            ids = [[*tokenizer(text)["input_ids"], config.eos_token_id, 5] for text in texts]  # 5: after the end
            rows = [torch.tensor(row) for row in ids]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)

        monkeypatch.setattr(inference.sampling, "sample_shared", sample)
        return calls

    return give


def by_chance(_prompt: str) -> str:
    start, length = torch.randint(0, 7, (2,)).tolist()
    return f"From {start:.1f} to {start + length + 1:.1f} seconds."


def scored(command: list[str]) -> list[Row]:
    rows, problems = read_rows(command[command.index("--output") + 1])
    assert problems == []
    return rows


def without(row: Row) -> dict[str, Any]:
    """All of a row but our keys."""
    record = row_to_record(row)
    return record | {"kwargs": {key: value for key, value in row.kwargs.items() if key not in OURS}}


# ---- a run


def test_a_run_with_the_model_sees_each_video_once(
    command: list[str], annotations: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    patches: list[int] = []
    forward = Qwen3VLVisionModel.forward

    def watch(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        patches.append(len(hidden_states))
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(Qwen3VLVisionModel, "forward", watch)
    assert main(command) is None
    per_video = 16 // 2 * (32 // 16) * (64 // 16)  # 16 frames of 32 x 64
    assert patches == [3 * per_video, 3 * per_video, per_video]  # seven labelled rows; 4 samples each, but one video
    before, after = read_rows(annotations)[0], scored(command)
    assert [without(row) for row in after] == [without(row) for row in before]
    assert after[0].kwargs["difficulty"] == 0.7 and after[0].kwargs["tags"] == ["a"]
    name = name_of(command[1])
    assert re.fullmatch(r"sft\d+/checkpoint-best@[0-9a-f]{8}", name)
    assert [row.kwargs["model_id"] for row in after] == [name, name, None, *[name] * 5]
    assert after[2].kwargs["model_iou_mean"] is None and after[2].kwargs["model_iou_std"] is None
    # untrained, the model says nothing that could be read
    assert [row.kwargs["model_iou_mean"] for row in after if row.timestamp is not None] == [0.0] * 7
    assert capsys.readouterr().out.startswith(
        f"7 of 8 rows scored by {name}\n"
        "mean IoU 0.000 (std over rows 0.000); all answers alike (zero spread): 100.0 % of rows\n"
        "  0.0 to 0.2       7  ########################################\n"
        "  0.2 to 0.4       0  \n"
    )


def test_scores_are_iou_with_the_best_window_and_stated_absence(
    command: list[str], annotations: Path, answers: Callable[..., Any]
) -> None:
    rows, _ = read_rows(annotations)
    windows = ((0.0, 2.0), (4.0, 8.0))
    rows[1] = replace(rows[1], timestamp=windows, sentence="the red square appears")
    rows[3] = replace(rows[3], timestamp=((0.0, 4.0),), sentence="the red square appears")
    write_rows(annotations, rows)
    texts = iter(
        [
            *["From 0.0 to 8.0 seconds."] * 4,
            # row 1: half of the second window; all of the first; unreadable; absence where something happens
            "From 4.0 to 6.0 seconds.", "From 0.0 to 2.0 seconds.", "no idea",
            "The event does not happen in the video.",
            *["From 0.0 to 2.0 seconds."] * 4,  # row 3
            # row 4, labelled absent
            "The event does not happen in the video.", "From 0.0 to 2.0 seconds.", "no idea",
            "The event does not happen in the video.",
            *["From 0.0 to 8.0 seconds."] * 12,
        ]
    )  # fmt: skip
    answers(lambda _prompt: next(texts))
    main(command)
    kwargs = [row.kwargs for row in scored(command)]
    assert [kwargs[index]["model_iou_mean"] for index in (1, 3, 4)] == [0.375, 0.5, 0.5]
    assert [kwargs[index]["model_iou_std"] for index in (1, 3, 4)] == [pytest.approx(0.414578), 0.0, 0.5]
    lines = [json.loads(line) for line in Path(f"{command[5]}.progress").read_text().splitlines()]
    assert {line["line"]: line["ious"] for line in lines[1:]}[2] == [0.5, 1.0, 0.0, 0.0]


def test_a_stopped_run_goes_on_to_the_same_scores(
    command: list[str], answers: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = answers(by_chance)
    main(command)
    assert calls == [3, 3, 1]
    output, progress = Path(command[5]), Path(f"{command[5]}.progress")
    whole = output.read_bytes()
    means = [row.kwargs["model_iou_mean"] for row in scored(command)]
    assert len(set(means)) > 4
    lines = progress.read_bytes().splitlines(keepends=True)
    progress.write_bytes(b"".join(lines[:4]) + lines[4][:9])  # killed while it wrote the second batch
    output.unlink()
    calls.clear()
    main(command)
    assert calls == [3, 1]
    assert output.read_bytes() == whole and progress.read_bytes() == b"".join(lines)
    calls.clear()
    main(command)  # once more: nothing is left to do
    assert calls == [] and output.read_bytes() == whole


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--temperature", "0.7"], "temperature 1.0 -> 0.7"),
        (["--seed", "1"], "seed 0 -> 1"),
        (["data.fps=1"], "question "),
    ],
)
def test_a_progress_file_of_other_settings_is_not_mixed_in(
    command: list[str], answers: Callable[..., Any], changed: list[str], message: str
) -> None:
    answers(by_chance)
    main(command)
    with pytest.raises(UserError, match=rf"scored.jsonl.progress was begun with other settings: {message}"):
        main([*command, *changed])


def test_a_file_that_is_no_progress_file_is_left_alone(command: list[str]) -> None:
    path = Path(f"{command[5]}.progress")
    path.write_text("my notes\n")
    with pytest.raises(UserError, match="is no progress file of this script"):
        main(command)
    assert path.read_text() == "my notes\n"


def test_an_unreadable_video_is_named_counted_and_gets_no_score(
    command: list[str], annotations: Path, answers: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    rows, _ = read_rows(annotations)
    rows[0] = replace(rows[0], video="gone.mp4")
    write_rows(annotations, rows)
    answers(by_chance)
    with pytest.raises(UserError, match="1 of 8 rows could not be used, more than data.max_bad_fraction=0.01 allows"):
        main(command)
    logger = logging.getLogger("vtg")
    logger.addHandler(caplog.handler)  # setup_logging() cuts it off from the root
    main([*command, "data.max_bad_fraction=0.2"])
    logger.removeHandler(caplog.handler)
    kwargs = [row.kwargs for row in scored(command)]
    assert [kwargs[0][key] for key in OURS] == [None, None, None] and kwargs[0]["difficulty"] == 0.7
    assert sum(entry["model_iou_mean"] is not None for entry in kwargs) == 6
    assert "1 of 8 rows could not be read and have no score" in caplog.messages
    assert any("left out: " in message and "gone.mp4" in message for message in caplog.messages)


# ---- before the model loads


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num_samples", "1"], r"--num_samples must be >= 2 \(one answer has no spread\), got 1"),
        (["--batch_size", "0"], "--batch_size must be >= 1, got 0"),
        (["--temperature", "0"], "--temperature must be > 0, got 0.0: greedy answers would all be the same"),
        (["--output", "ANNOTATIONS"], "--output is the annotation file itself"),
        (["data.fsp=1"], r"data.fsp is not a key \(command line\); did you mean fps\?"),
    ],
)
def test_wrong_settings(command: list[str], annotations: Path, more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main([*command, *(str(annotations) if word == "ANNOTATIONS" else word for word in more)])


def test_the_scored_rows_must_find_their_videos(command: list[str], demo_data: Path, tmp_path: Path) -> None:
    """The demo's paths are relative to its own folder."""
    command[3] = str(demo_data / "train.jsonl")
    message = f"Write to {demo_data / 'scored.jsonl'}, or give data.videos_root={demo_data} here and in training"
    with pytest.raises(UserError, match=re.escape(message)):
        main(command)
    assert list(tmp_path.glob("scored*")) == []


def test_without_a_label_there_is_nothing_to_score(command: list[str], annotations: Path) -> None:
    write_rows(annotations, [replace(row, timestamp=None) for row in read_rows(annotations)[0]])
    with pytest.raises(UserError, match="no row is labelled"):
        main(command)


def test_the_checkpoints_record_is_asked_and_overrides_lie_over_it(checkpoint: Path, command: list[str]) -> None:
    source = resolve_source(str(checkpoint))
    recorded = load_config(DataFile, [DATA_CONFIG])
    asked = question_of(source, parse_args([*command, "data.fps=1", "data.trim=pre_cut"]))
    assert asked.prompt == recorded.prompt and asked.prompt != DataFile().prompt
    assert asked.data.max_frames == 16 and (asked.data.fps, asked.data.trim) == (1.0, "pre_cut")
    assert asked.data.test[0].path == Path(command[3]) and asked.data.train == ()
    assert source.contract is not None
    assert load_config(DataFile, [], contract_as_overrides(source.contract)).data == source.contract.data


def test_the_models_name_follows_its_weights(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "checkpoint-best"
    shutil.copytree(checkpoint, other)
    assert name_of(str(other)).partition("@")[2] == name_of(str(checkpoint)).partition("@")[2]
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert name_of(str(other)).partition("@")[2] != name_of(str(checkpoint)).partition("@")[2]
    assert name_of("Qwen/Qwen3-VL-4B-Instruct") == "Qwen/Qwen3-VL-4B-Instruct"


# ---- the report


def rows_of_ious(ious: np.ndarray) -> list[Row]:
    """(N, G) IoUs of sampled answers."""
    row = Row("v.mp4", 8.0, (), "it moves", None, None, {}, "rows.jsonl", 1)
    return [with_score(replace(row, line=line), list(values), "m") for line, values in enumerate(ious)]


def test_the_drawn_rows_have_fewer_groups_without_spread_than_all_rows() -> None:
    """Rows of every difficulty, 8 answers each that are right or wrong: the easiest and the hardest are flat. Another 8
    answers decide, so that the choice does not profit from the samples it was made by."""
    generator = np.random.default_rng(0)
    chances = generator.beta(0.4, 0.4, 2000)
    first, second = (generator.random((2000, 8)) < chances[:, None] for _ in range(2))
    drawn = select_rows(rows_of_ious(first.astype(float)), SelectConfig(num_rows=200))
    fresh = rows_of_ious(second.astype(float))
    assert flat_share(fresh) > 0.4
    assert flat_share([fresh[row.line] for row in drawn]) < 0.4 * flat_share(fresh)
    heights = np.exp(-0.5 * ((np.arange(1, 9) / 8 - 0.5) / 0.2) ** 2)  # of the means there are; 0 is under min_iou
    assert flat_share(drawn) == pytest.approx(heights[-1] / heights.sum(), abs=0.01)  # flat is a mean of 1


def test_the_report_shows_all_rows_and_what_would_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ious = np.array([[0, 0], [0, 0.2], [0.4, 0.6], [0.5, 0.5], [1, 1], [1, 1], [1, 1], [0.9, 1]])
    unscored = Row("v.mp4", 8.0, None, "it moves", None, None, {}, "rows.jsonl", 9)
    write_rows(tmp_path / "scored.jsonl", [*rows_of_ious(ious), unscored])
    main(["--report", str(tmp_path / "scored.jsonl"), "data.select.num_rows=2", "data.select.std=0.05"])
    assert capsys.readouterr().out.splitlines() == [
        "8 of 9 rows scored by m",
        "mean IoU 0.631 (std over rows 0.391); all answers alike (zero spread): 62.5 % of rows",
        "  0.0 to 0.2       2  ####################",
        "  0.2 to 0.4       0  ",
        "  0.4 to 0.6       2  ####################",
        "  0.6 to 0.8       0  ",
        "  0.8 to 1.0       4  ########################################",
        "",
        "data.select draws 2 of them",
        "mean IoU 0.500 (std over rows 0.000); all answers alike (zero spread): 50.0 % of rows",
        "  0.0 to 0.2       0  ",
        "  0.2 to 0.4       0  ",
        "  0.4 to 0.6       2  ########################################",
        "  0.6 to 0.8       0  ",
        "  0.8 to 1.0       0  ",
    ]
    write_rows(tmp_path / "unscored.jsonl", [unscored])
    with pytest.raises(UserError, match="no row has a score in kwargs.model_iou_mean"):
        main(["--report", str(tmp_path / "unscored.jsonl")])


def test_nothing_to_do_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--model_path", "x"])
    assert stop.value.code == 2
    assert "give --model_path, --annotations and --output, or --report alone" in capsys.readouterr().err
