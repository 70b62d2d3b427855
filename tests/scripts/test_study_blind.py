"""The study of priors: zeroed pixels and nothing else, in training, validation and test; its table and its verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from datasets.collate_fns import VideoCollator
from datasets.pixels import pixel_values
from datasets.video_dataset import VideoTemporalDataset
from scripts.study_blind import BLIND, SEEING, BlindCollator, judge, main, report
from trainers.model import load_processor, resolve_source
from utils.checkpoints import BEST
from utils.common import REPO_ROOT, UserError
from utils.config import SFTConfig, load_config

CONFIGS = [REPO_ROOT / "configs/demo/sft_config.yaml", REPO_ROOT / "configs/demo/video_config.yaml"]


@pytest.fixture
def overrides(tiny_model: Path, demo_data: Path, tmp_path: Path) -> list[str]:
    """Two steps on a tiny set."""
    return [
        f"model.name_or_path={tiny_model}",
        *(f"data.{split}={demo_data / split}.jsonl" for split in ("train", "val", "test")),
        "data.cache_dir=null",
        "training.per_device_train_batch_size=4",
        "training.max_eval_samples=4",
        "training.max_steps=2",
        "training.dataloader_num_workers=0",
        "training.logging_steps=1",
        "training.report_to=none",
        "training.disable_tqdm=true",
    ]


@pytest.fixture
def command(overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line of such a run; what it sets in the environment is undone."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")
    files = ["--config", str(CONFIGS[0]), "--data_config", str(CONFIGS[1]), "--output_dir", str(tmp_path / "study")]
    return [*files, *overrides]


# ---- the collator


@pytest.mark.parametrize(("with_answer", "side"), [(True, "right"), (False, "left")])
def test_the_collator_zeroes_the_pixels_and_nothing_else(overrides: list[str], with_answer: bool, side: str) -> None:
    config = load_config(SFTConfig, CONFIGS, overrides)
    processor = load_processor(resolve_source(config.model.name_or_path))
    dataset = VideoTemporalDataset(config.data, processor, config.prompt, with_answer=with_answer)
    plain = VideoCollator(processor.tokenizer.pad_token_id, dataset.blank(), side=side)
    samples: list[Any] = [dataset[0], {"index": 1, "fault": "gone"}, dataset[2]]
    seeing, blind = plain(samples), BlindCollator(plain)(samples)
    assert list(seeing) == list(blind) and ("labels" in blind) == with_answer
    for key, value in seeing.items():
        if key == "pixels":
            seen, zeroed = pixel_values(value), pixel_values(blind[key])
            assert seen.abs().max() > 0.1 and torch.equal(zeroed, torch.zeros_like(seen))
            assert zeroed.dtype == seen.dtype
        elif isinstance(value, torch.Tensor):
            assert torch.equal(blind[key], value), key
        else:
            assert blind[key] == value, key


# ---- a run


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, float]]:
    """What comes to the model's eye: whether it trained, and the largest pixel."""
    largest: list[tuple[bool, float]] = []
    forward = Qwen3VLVisionModel.forward

    def watch(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        largest.append((self.training, float(hidden_states.abs().max())))
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(Qwen3VLVisionModel, "forward", watch)
    return largest


def test_a_run_shows_no_pixel_and_writes_its_table(
    command: list[str], seen: list[tuple[bool, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    # two steps of training, then the validation of the last one and the test split, a batch each
    assert seen == [(True, 0.0)] * 2 + [(False, 0.0)] * 2
    shown = capsys.readouterr().out
    table = json.loads((tmp_path / "study" / "table.json").read_text())
    constant, blind = table["rows"]
    assert constant.startswith("best constant answer (") and blind == BLIND
    assert table["rows"][constant]["mIoU"] > 30 > table["rows"][BLIND]["mIoU"]
    low, high = table["mIoU_intervals"][BLIND]
    assert low <= table["rows"][BLIND]["mIoU"] <= high
    assert f"{BLIND}, mIoU: 95 % bootstrap interval {low:.1f} to {high:.1f}" in shown
    assert table["num_queries"] == table["rows"][BLIND]["num_samples"]
    assert table["blind_at_or_below_constant"] is True and shown.splitlines()[-1] == table["verdict"]
    assert table["verdict"].endswith("; 100 % of the blind model's answers could not be read")
    saved = yaml.safe_load((tmp_path / "study" / "sft" / "config.yaml").read_text())
    assert saved["training"]["blindness_guard"] is False
    assert (tmp_path / "study" / "metrics" / "sft.jsonl").is_file()  # beside the demo's own


def test_comparing_asks_the_other_model_with_its_pixels(
    command: list[str], seen: list[tuple[bool, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(command) == 0
    first = json.loads((tmp_path / "study" / "table.json").read_text())
    seen.clear()
    assert main([*command, "--compare", str(tmp_path / "study" / "sft" / BEST)]) == 0
    largest = [pixel for _, pixel in seen]
    assert largest[:-1] == [0.0] * (len(largest) - 1) and largest[-1] > 0.1  # the compared model comes last
    assert not any(trained for trained, _ in seen)  # what is trained already is not trained again
    again = json.loads((tmp_path / "study" / "table.json").read_text())
    assert list(again["rows"])[2] == SEEING and again["rows"][BLIND] == pytest.approx(first["rows"][BLIND], nan_ok=True)


def test_a_wrong_checkpoint_is_said_before_the_training(command: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        main([*command, "--compare", str(tmp_path / "none")])
    assert not (tmp_path / "study").exists()


# ---- the verdict


@pytest.mark.parametrize(
    ("blind", "is_at_or_below", "says"),
    [
        ((28.0, 34.0), True, "no more is learnt than one constant answer gives"),
        ((30.0, 38.0), True, "no more is learnt"),
        ((33.0, 39.5), False, "undecided"),
        ((39.0, 45.0), False, "the blind model beats every constant answer"),
    ],
)
def test_verdict(blind: tuple[float, float], is_at_or_below: bool, says: str) -> None:
    found, words = judge(blind, (31.0, 38.0))
    assert found is is_at_or_below and says in words
    assert (
        words.startswith("verdict: ") and f"mIoU {blind[0]:.1f} to {blind[1]:.1f}" in words and "31.0 to 38.0" in words
    )


def test_the_difference_is_taken_row_by_row() -> None:
    def rows(pred: list[list[float]] | None) -> list[dict[str, Any]]:
        return [{"qid": number, "gt": [[2.0, 6.0]], "pred": pred, "duration": 8.0} for number in range(5)]

    table = report({"constant": rows([[0.0, 8.0]]), BLIND: rows([[2.0, 5.0]]), SEEING: rows(None)})
    assert table["blind_minus_constant"] == pytest.approx((25.0, 25.0))
    assert {name: row["mIoU"] for name, row in table["rows"].items()} == {"constant": 50.0, BLIND: 75.0, SEEING: 0.0}
    assert table["blind_at_or_below_constant"] is False and "could not be read" not in table["verdict"]
