"""What a record is called in the metrics file, and how it reads on the screen."""

from __future__ import annotations

from typing import Any

import pytest

from trainers.callbacks import progress_line, slash_names

SFT = {"loss": 1.25, "learning_rate/language": 2e-5, "samples_per_second": 3.14}
GRPO: dict[str, Any] = SFT | {
    "loss": -0.0014,
    "reward": 0.6123,
    "reward_std": 0.2,
    "frac_reward_zero_std": 0.0,
    "kl": 0.0031,
    "rewards/temporal_iou/mean": 0.6123,
    "rewards/temporal_iou/std": 0.2,
    "rewards/temporal_iou/zero_spread": 0.0,
    "completions/mean_length": 13.6,
    "completions/clipped_ratio": 0.0,
}
EVAL: dict[str, Any] = {
    "eval_mIoU": 40.62,
    **{f"eval_R1@{t}": 10.0 for t in ("0.3", "0.5", "0.7")},
    "eval_parse_failure_rate": 1.5,
    "eval_num_samples": 64,
    "eval_runtime": 2.4,
}
SPEED = "lr 2.00e-05  3.1 samples/s"


def test_a_record_of_sft() -> None:
    assert progress_line(SFT) == f"loss 1.2500  {SPEED}"
    assert progress_line({"loss": 1.25}) == "loss 1.2500  0.0 samples/s"
    assert progress_line({"train_runtime": 3.0}) == ""


def test_a_record_of_grpo_begins_with_the_reward() -> None:
    assert progress_line(GRPO) == f"reward 0.612  spread 0.200  KL 0.0031  length 14  loss -0.0014  {SPEED}"


def test_what_goes_wrong_is_shown_only_then() -> None:
    line = progress_line(GRPO | {"frac_reward_zero_std": 0.25, "completions/clipped_ratio": 0.031})
    assert "length 14  cut off 3 %  groups without spread 25 %  loss" in line


def test_several_rewards_are_shown_one_by_one() -> None:
    line = progress_line(GRPO | {"rewards/format/mean": 0.95})
    assert line.startswith("reward 0.612  temporal_iou 0.612  format 0.950  spread 0.200")


def test_without_a_reference_or_any_usable_row() -> None:
    """No kl_coef: no KL. TRL records None for the mean of nothing, when no video of a batch could be read."""
    record = {key: None if "reward" in key else value for key, value in GRPO.items() if key != "kl"}
    assert progress_line(record) == f"length 14  loss -0.0014  {SPEED}"


def test_a_validation() -> None:
    tail = "mIoU 40.6  R1@0.3 10.0  R1@0.5 10.0  R1@0.7 10.0  unreadable answers 1.5 %  (64 queries, 2 s)"
    assert progress_line(EVAL) == f"validation: {tail}"
    assert progress_line(EVAL | {"eval_reward": 0.4062}) == f"validation: reward 0.406  {tail}"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("loss", "train/loss"),
        ("learning_rate/language", "train/learning_rate/language"),
        ("train_loss", "run/loss"),
        ("train_samples_per_second", "run/samples_per_second"),
        ("eval_mIoU", "eval/mIoU"),
        ("reward", "reward/total"),
        ("reward_std", "reward/total_std"),
        ("frac_reward_zero_std", "reward/zero_spread"),
        ("rewards/temporal_iou/mean", "reward/temporal_iou"),
        ("rewards/temporal_iou/std", "reward/temporal_iou_std"),
        ("rewards/temporal_iou/zero_spread", "reward/temporal_iou_zero_spread"),
        ("rewards/my.module:Mine/mean", "reward/my.module:Mine"),
        ("eval_reward", "eval/reward"),
        ("eval_rewards/temporal_iou", "eval/reward/temporal_iou"),
        ("kl", "train/kl"),
        ("completions/mean_length", "train/completions/mean_length"),
    ],
)
def test_slash_names(key: str, name: str) -> None:
    assert slash_names({key: 1.0}) == {name: 1.0}


def test_no_two_keys_share_a_name() -> None:
    assert len(slash_names(GRPO | EVAL | {"eval_reward": 1.0})) == len(GRPO) + len(EVAL) + 1
