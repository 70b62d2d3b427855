"""Each protocol against a few lines that score the same predictions as its project does, written anew from its code."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from utils.common import UserError
from utils.metrics import METRICS, SET_METRICS, evaluate, evaluate_intervals, sample_scores
from utils.protocols import PROTOCOLS
from utils.spans import Span
from utils.windows import average_precisions

Sample = dict[str, Any]


def sample(gt: Any, pred: Any, qid: Any = 0, duration: float = 60.0) -> Sample:
    return {"qid": qid, "gt": gt, "pred": pred, "duration": duration}


def drawn(seed: int, *, scores: bool, times: Callable[[random.Random], float]) -> list[Sample]:
    """300 queries of one window each, with failures, absences and answers of up to twelve windows."""
    generator = random.Random(seed)

    def window() -> list[float]:
        start = times(generator)
        return [start, start + max(1.0, times(generator) / 4), *([generator.choice([0.1, 0.5, 0.9])] if scores else [])]

    def answer() -> Any:
        kind = generator.random()
        return None if kind < 0.1 else [] if kind < 0.15 else [window() for _ in range(generator.randint(1, 12))]

    return [sample([window()[:2]], answer(), qid) for qid in range(300)]


def whole_seconds(generator: random.Random) -> float:
    return float(generator.randint(0, 20))


def tenths(generator: random.Random) -> float:
    return generator.randint(0, 200) / 10


def hull_iou(a: Any, b: Any) -> float:
    return max(0.0, min(a[1], b[1]) - max(a[0], b[0])) / (max(a[1], b[1]) - min(a[0], b[0]))


def hits(ious: list[float], threshold: float, above: bool = False) -> float:
    return 100 * sum(iou > threshold if above else iou >= threshold for iou in ious) / len(ious)


@pytest.mark.parametrize("seed", range(3))
def test_time_r1(seed: int) -> None:
    samples = drawn(seed, scores=False, times=whole_seconds)
    ious = [hull_iou(row["pred"][-1], row["gt"][0]) if row["pred"] else 0.0 for row in samples]
    found, ours = evaluate(samples, "time_r1"), evaluate(samples)
    assert found["mIoU"] == pytest.approx(100 * sum(ious) / 300, abs=1e-9)
    for m in (0.3, 0.5, 0.7):
        assert found[f"R1@{m}"] == pytest.approx(hits(ious, m, above=True), abs=1e-9)
    assert hits(ious, 0.5, above=True) < hits(ious, 0.5)  # some answers just meet it
    assert found["mIoU"] != ours["mIoU"] and found["parse_failure_rate"] == ours["parse_failure_rate"]
    assert all(math.isnan(found[name]) for name in SET_METRICS)


@pytest.mark.parametrize("seed", range(3))
def test_timelens(seed: int) -> None:
    samples = drawn(seed, scores=False, times=tenths)
    ious = []
    for row in samples:
        start, end = row["pred"][0] if row["pred"] else (row["duration"] + 10, row["duration"] + 20)
        rounded = (round(start / 1.0) * 1.0, round(end / 1.0) * 1.0)
        ious.append(hull_iou(rounded, row["gt"][0]) if rounded[0] < rounded[1] else 0.0)
    found = evaluate(samples, "timelens")
    assert found["mIoU"] == pytest.approx(100 * sum(ious) / 300, abs=1e-9)
    for m in (0.3, 0.5, 0.7):
        assert found[f"R1@{m}"] == pytest.approx(hits(ious, m), abs=1e-9)
    assert found["mIoU"] != evaluate(samples)["mIoU"]
    assert all(math.isnan(found[name]) for name in SET_METRICS)


def test_timelens_rounds_halves_to_even_and_drops_what_becomes_empty() -> None:
    assert sample_scores(sample([[2, 4]], [[2.5, 4.5]]), "timelens")["mIoU"] == 1.0
    assert sample_scores(sample([[2.5, 4.5]], [[2.5, 4.5]]), "timelens")["mIoU"] == 0.6  # labels stay
    assert sample_scores(sample([[3, 3.4]], [[2.6, 3.4]]), "timelens")["mIoU"] == 0.0
    assert sample_scores(sample([[3, 9]], [[math.nan, math.inf]]), "timelens")["mIoU"] == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_moment_detr(seed: int) -> None:
    samples = drawn(seed, scores=True, times=whole_seconds)
    first = [hull_iou(row["pred"][0], row["gt"][0]) if row["pred"] else 0.0 for row in samples]
    precisions = []
    for row in samples:
        if row["pred"]:
            ten = sorted(row["pred"][:10], key=lambda window: -window[2])
            precisions.append(average_precisions([Span(*window[:2]) for window in ten], [Span(*row["gt"][0])]))
    by_threshold = [sum(column) / len(precisions) for column in zip(*precisions, strict=True)]
    found, ours = evaluate(samples, "moment_detr"), evaluate(samples)
    for m in (0.5, 0.7):
        assert found[f"R1@{m}"] == float(f"{hits(first, m):.2f}")
    assert found["mAP@0.5"] == float(f"{100 * by_threshold[0]:.2f}")
    assert found["mAP@0.75"] == float(f"{100 * by_threshold[5]:.2f}")
    assert found["mAP"] == float(f"{100 * sum(by_threshold) / 10:.2f}")
    assert 0 < len(precisions) < 300 and found["mAP"] > ours["mAP"]  # failures are not in its denominator


def test_windows_with_scores_rank_by_them() -> None:
    row = sample([[0, 10]], [[20, 30, 0.1], [0, 10, 0.9], [40, 50, 0.9]])
    best, as_written = sample_scores(row), sample_scores(row, "moment_detr")
    assert (best["mIoU"], best["mAP"]) == (1.0, 1.0)  # of equal scores the first
    assert (as_written["mIoU"], as_written["mAP"]) == (0.0, 1.0)
    assert sample_scores(row, "time_r1")["mIoU"] == 1.0
    plain = {**row, "pred": [window[:2] for window in row["pred"]]}
    assert [sample_scores(plain, name)["mIoU"] for name in PROTOCOLS] == [0.0] * 4
    assert sample_scores(sample([[0, 10]], [[20, 30], [0, 10]]), "time_r1")["mIoU"] == 1.0  # the last as written


def test_ten_windows_count_and_a_score_of_nan_is_last() -> None:
    wrong = [[20, 30, 0.5]] * 9
    assert sample_scores(sample([[0, 10]], [*wrong, [0, 10, 0.1]]))["mAP"] == pytest.approx(0.1)
    assert sample_scores(sample([[0, 10]], [*wrong, [20, 30, 0.5], [0, 10, 0.1]]))["mAP"] == 0.0
    late = sample([[0, 10]], [*wrong, [20, 30, 0.5], [0, 10, 0.9]])
    assert (sample_scores(late)["mAP"], sample_scores(late, "moment_detr")["mAP"]) == (1.0, 0.0)
    assert sample_scores(sample([[0, 10]], [[20, 30, math.nan], [0, 10, 0.1]]))["mIoU"] == 1.0


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_on_degenerate_input(protocol: str) -> None:
    empty = evaluate([], protocol)
    assert all(math.isnan(empty[name]) for name in METRICS)
    odd = [
        sample([], [], 0), sample([], [[1, 2]], 1), sample([], None, 2), sample([[5, 5]], [[5, 5]], 3),
        sample([[1, 9]], [[9, 1], [math.nan, 3], [2, math.inf]], 4), sample([[1, 9]], [], 5), sample([[1, 9]], None, 6),
    ]  # fmt: skip
    found = evaluate(odd, protocol)
    assert found["absent_accuracy"] == pytest.approx(100 / 3, abs=0.01)
    assert found["mIoU"] == found["R1@0.3"] == 0.0 and found["num_grounded"] == 4
    assert set(found) == set(empty)
    one = evaluate([sample([[0, 10]], [[0, 10]])], protocol)
    assert one["mIoU"] == one["R1@0.7"] == 100.0


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_order_of_samples_never_matters(protocol: str) -> None:
    samples = drawn(5, scores=True, times=tenths)  # three scores only: full of ties
    shuffled = random.Random(1).sample(samples, len(samples))
    ours, theirs = evaluate(samples, protocol), evaluate(shuffled, protocol)
    assert {name: repr(value) for name, value in ours.items()} == {name: repr(value) for name, value in theirs.items()}
    intervals = [evaluate_intervals(rows, protocol=protocol, num_resamples=40) for rows in (samples, shuffled)]
    assert repr(intervals[0]) == repr(intervals[1])


def test_an_interval_of_map_is_that_of_a_mean_over_queries() -> None:
    samples = drawn(6, scores=False, times=tenths)
    low, high = evaluate_intervals(samples)["mAP"]
    values = [100 * sample_scores(row)["mAP"] for row in samples]
    mean = sum(values) / 300
    error = 1.96 * (sum((value - mean) ** 2 for value in values) / 300) ** 0.5 / 300**0.5
    assert (low, high) == (pytest.approx(mean - error, abs=0.5), pytest.approx(mean + error, abs=0.5))
    assert error > 1.0


def test_scores_on_some_windows_only_are_refused() -> None:
    with pytest.raises(UserError, match="'q7': some windows of pred have a score and others have none"):
        evaluate([sample([[0, 1]], [[0, 1, 0.5], [2, 3]], "q7")])


def test_an_unknown_protocol_lists_the_choices() -> None:
    with pytest.raises(UserError, match="default, moment_detr, timelens, time_r1; did you mean time_r1"):
        evaluate([], "timer1")
