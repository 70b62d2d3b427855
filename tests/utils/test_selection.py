"""Rows drawn by difficulty: their scores follow the Gaussian, not Gaussian times histogram; a choice, in order, by
seed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from datasets.video_dataset import VideoTemporalDataset
from utils.common import UserError
from utils.config import AnnotationSource, DataConfig, SelectConfig
from utils.rows import Row, read_rows
from utils.selection import draw, inclusion_chances, select_rows


def row(line: int, score: Any, **kwargs: Any) -> Row:
    return Row("v.mp4", 8.0, (), "it moves", None, None, {"model_iou_mean": score, **kwargs}, "rows.jsonl", line)


def rows_of(scores: Any) -> list[Row]:
    return [row(line, None if score is None else float(score)) for line, score in enumerate(scores, start=1)]


def scores_of(rows: list[Row]) -> np.ndarray:
    return np.array([row.kwargs["model_iou_mean"] for row in rows])


def is_subsequence(part: list[Row], whole: list[Row]) -> bool:
    lines = [row.line for row in part]
    return lines == sorted(set(lines)) and all(whole[line - 1] is row for line, row in zip(lines, part, strict=True))


SCORES = st.lists(st.none() | st.floats(0, 1), min_size=1, max_size=60)
SELECT = st.builds(
    SelectConfig,
    mean=st.floats(-0.5, 1.5),
    std=st.floats(1e-3, 3),
    min_iou=st.floats(0, 0.5),
    num_rows=st.none() | st.integers(1, 20),
    seed=st.integers(0, 2**31),
)


# ---- properties


@given(SCORES, SELECT)
def test_a_choice_in_order_above_min_iou_by_seed(scores: list[float | None], select: SelectConfig) -> None:
    rows = rows_of(scores)
    eligible = [score for score in scores if score is not None and score >= select.min_iou]
    assume(len(eligible) >= (select.num_rows or 1))
    try:
        drawn = select_rows(rows, select)
    except UserError as error:
        assert select.num_rows is None and "draws none" in str(error)
        return
    assert is_subsequence(drawn, rows)
    assert scores_of(drawn).min() >= select.min_iou
    assert len(drawn) == select.num_rows or (select.num_rows is None and 1 <= len(drawn) <= len(eligible))
    assert select_rows(rows_of(scores), select) == drawn


@given(st.lists(st.floats(0, 1), min_size=1, max_size=80), SELECT)
def test_chances_are_probabilities_that_add_up(scores: list[float], select: SelectConfig) -> None:
    assume(len(scores) >= (select.num_rows or 1))
    chances = inclusion_chances(np.array(scores), select)
    assert (chances > 0).all() and (chances <= 1).all()
    if select.num_rows is not None:
        assert chances.sum() == pytest.approx(select.num_rows, rel=1e-6)


@given(st.integers(0, 10**6))
def test_another_seed_draws_others(seed: int) -> None:
    rows = rows_of(np.linspace(0, 1, 400))
    first = select_rows(rows, SelectConfig(num_rows=100, seed=seed))
    other = select_rows(rows, SelectConfig(num_rows=100, seed=seed + 1))
    assert first != other and len(set(row.line for row in first) & set(row.line for row in other)) < 80


# ---- what is drawn follows the Gaussian


def skewed(num: int = 6000) -> np.ndarray:
    """Most rows are easy, as after a good fine-tuning: scores of density 3 s^2, and a tenth all right."""
    generator = np.random.default_rng(3)
    scores = generator.random(num) ** (1 / 3)
    scores[: num // 10] = 1.0
    return generator.permutation(scores)


@pytest.mark.parametrize("select", [SelectConfig(num_rows=150), SelectConfig()], ids=["num_rows", "by chance"])
def test_drawn_scores_follow_the_gaussian_where_plain_weighting_does_not(select: SelectConfig) -> None:
    scores = skewed()
    drawn = scores_of(select_rows(rows_of(scores), select))
    assert drawn.mean() == pytest.approx(0.5, abs=0.05) and drawn.std() == pytest.approx(0.2, abs=0.04)
    eligible = scores[scores >= select.min_iou]
    heights = np.exp(-0.5 * ((eligible - 0.5) / 0.2) ** 2)
    plain = np.random.default_rng(0).choice(eligible, len(drawn), replace=False, p=heights / heights.sum())
    assert plain.mean() > 0.6  # Gaussian times histogram


def test_drawn_histogram_is_the_gaussians() -> None:
    drawn = np.concatenate([scores_of(select_rows(rows_of(skewed()), SelectConfig(num_rows=150, seed=seed)))
                            for seed in range(20)])  # fmt: skip
    edges = np.array([0.1, 0.3, 0.5, 0.7, 0.9])  # one and two standard deviations
    share = np.histogram(drawn, edges)[0] / np.histogram(drawn, [0.1, 0.9])[0]
    assert share == pytest.approx([0.1424, 0.3576, 0.3576, 0.1424], abs=0.03)


def test_evenly_spread_scores_are_kept_about_with_the_gaussians_height() -> None:
    scores = np.linspace(0, 1, 2001)
    chances = inclusion_chances(scores, SelectConfig(mean=0.5, std=0.2, min_iou=0))
    heights = np.exp(-0.5 * ((scores - 0.5) / 0.2) ** 2)
    top = np.exp(-0.5 * 0.32**2)  # a quarter of a Gaussian lies within 0.32 standard deviations
    inner = slice(100, -100)  # the bins at either end are half empty
    assert np.abs(chances - np.minimum(heights / top, 1))[inner].max() < 0.03


def test_chances_are_met_over_many_seeds() -> None:
    scores = np.array([0.5] * 40 + [0.3] * 4 + [0.7] * 2)
    select = SelectConfig(num_rows=6)
    expected = inclusion_chances(scores, select)
    counts = np.zeros(len(scores))
    for seed in range(3000):
        counts[draw(scores, SelectConfig(num_rows=6, seed=seed))] += 1
    assert counts.sum() == 6 * 3000
    assert counts / 3000 == pytest.approx(expected, abs=0.04)
    # of each score as many as the Gaussian says: 1 to 0.607 to 0.607
    assert [expected[:40].sum(), expected[40:44].sum(), expected[44:].sum()] == pytest.approx(
        [2.71, 1.645, 1.645], 1e-3
    )


def test_a_thin_bin_is_drawn_whole_and_the_rest_shares() -> None:
    scores = np.array([0.5] + [0.9] * 99)
    chances = inclusion_chances(scores, SelectConfig(num_rows=50))
    assert chances[0] == 1 and chances[1:] == pytest.approx(49 / 99)
    assert inclusion_chances(scores, SelectConfig(num_rows=100)) == pytest.approx(1)


def test_scores_far_from_the_gaussian_still_fill_num_rows() -> None:
    assert len(select_rows(rows_of([0.2, 0.9, 1.0]), SelectConfig(mean=50, std=1e-3, num_rows=2))) == 2


# ---- rows without a score


def test_rows_without_a_score_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    rows = [row(1, None), row(2, 0.5), row(3, 0.01), row(4, 1), row(5, 0.5, difficulty=9)]
    with caplog.at_level(logging.INFO, logger="vtg"):
        drawn = select_rows(rows, SelectConfig(num_rows=3))
    assert [row.line for row in drawn] == [2, 4, 5]
    assert caplog.messages == [
        "data.select: 3 of 5 rows drawn, model_iou_mean 0.67 on average with std 0.24 (asked for: 0.5, 0.2); "
        "left out: 1 without a score, 1 under min_iou=0.05"
    ]


def test_a_users_own_key_can_be_the_score() -> None:
    rows = [row(line, None, difficulty=line) for line in range(1, 6)]
    drawn = select_rows(rows, SelectConfig(by="difficulty", mean=3, std=0.1, num_rows=1))
    assert [row.line for row in drawn] == [3]


@pytest.mark.parametrize(
    ("rows", "select", "message"),
    [
        ([row(1, None)], {}, "no row of rows.jsonl has a number in kwargs.model_iou_mean (data.select.by) (numbers it "
         "has: none). Scores are made by: python scripts/score_difficulty.py --model_path CHECKPOINT --annotations "
         "rows.jsonl --output rows.scored.jsonl, and data.train=rows.scored.jsonl then reads them"),
        ([row(1, 0.5)], {"by": "model_iou"}, "did you mean model_iou_mean?"),
        ([row(7, "0.5")], {}, "rows.jsonl:7: kwargs.model_iou_mean must be a number to select by, got '0.5'"),
        ([row(7, True)], {}, "must be a number to select by, got True"),
        (rows_of([0.1, 0.6]), {"num_rows": 3}, "2 of 2 scored rows have model_iou_mean >= data.select.min_iou=0.05 "
         "(the highest has 0.6), too few for data.select.num_rows=3; lower min_iou or num_rows"),
        (rows_of([0.0, 0.01]), {}, "0 of 2 scored rows have model_iou_mean >= data.select.min_iou=0.05"),
    ],
)  # fmt: skip
def test_what_cannot_be_selected_is_said(rows: list[Row], select: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        select_rows(rows, SelectConfig(**select))
    assert message in str(error.value)


# ---- in a data set


def test_a_data_set_applies_it_to_the_training_rows_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    base = {"video": "v.mp4", "duration": 8.0, "timestamp": [1, 2], "sentence": "it moves"}
    records = [base | {"kwargs": {"model_iou_mean": score}} for score in (0.5, 1.0, 0.0, 0.52)]
    records.append(base | {"timestamp": None, "kwargs": {"model_iou_mean": 0.5}})  # not labelled
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = (AnnotationSource(path=path),)
    data = DataConfig(train=source, val=source, test=source, select=SelectConfig(num_rows=2, std=0.05))
    assert [row.line for row in VideoTemporalDataset(data, None).rows] == [1, 4]
    for split in ("val", "test"):
        assert [row.line for row in VideoTemporalDataset(data, None, split=split).rows] == [1, 2, 3, 4]
    unscored = data.model_copy(update={"select": SelectConfig(by="difficulty")})
    with pytest.raises(UserError, match=rf"no row of {path} has a number in kwargs.difficulty"):
        VideoTemporalDataset(unscored, None)
    assert read_rows(path)[0][0].kwargs == {"model_iou_mean": 0.5}
