"""The best constant answer: found, on shares of the duration, whatever the order of the rows."""

from __future__ import annotations

import random

import pytest

from utils.metrics import best_constant_predictions, evaluate
from utils.spans import Span


def test_it_is_found_in_shares_of_the_duration() -> None:
    samples = [
        {"qid": 0, "gt": [[10, 20]], "pred": None, "duration": 40},
        {"qid": 1, "gt": [[0, 1], [25, 50]], "pred": [], "duration": 100},  # the better of two windows counts
        {"qid": 2, "gt": [], "pred": [], "duration": 8},
    ]
    answered, window = best_constant_predictions(samples)
    assert window == Span(0.25, 0.5)
    assert [row["pred"] for row in answered] == [[[10.0, 20.0]], [[25.0, 50.0]], [[2.0, 4.0]]]
    assert evaluate(answered)["mIoU"] == 100.0 and samples[0]["pred"] is None


def test_it_beats_every_other_window_of_the_grid_in_any_order() -> None:
    generator = random.Random(3)
    samples = []
    for qid in range(60):
        start, length = generator.uniform(0, 40), generator.uniform(1, 30)
        samples.append({"qid": qid, "gt": [[start, start + length]], "pred": None, "duration": 60.0})
    answered, best = best_constant_predictions(samples, steps=8)
    scores = {
        (a / 8, b / 8): evaluate([{**row, "pred": [[a * 7.5, b * 7.5]]} for row in samples])["mIoU"]
        for a in range(8)
        for b in range(a + 1, 9)
    }
    assert scores[tuple(best)] == max(scores.values()) == pytest.approx(evaluate(answered)["mIoU"], abs=1e-9)
    assert best_constant_predictions(generator.sample(samples, 60), steps=8)[1] == best


def test_without_labels_and_with_empty_ones() -> None:
    assert best_constant_predictions([])[1] == Span(0.0, 1.0)
    empty = [{"qid": 0, "gt": [[5, 5]], "pred": None, "duration": 10}]
    assert evaluate(best_constant_predictions(empty)[0])["mIoU"] == 0.0
