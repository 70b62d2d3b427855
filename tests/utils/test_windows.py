"""Average precision and IoU of sets: by hand, against an independent computation, and on degenerate windows."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from utils.spans import Span
from utils.windows import AP_THRESHOLDS, average_precisions, covered_s, merged, set_iou


def spans(*windows: tuple[float, float]) -> list[Span]:
    return [Span(*window) for window in windows]


def test_thresholds_are_the_ten_of_qvhighlights() -> None:
    assert AP_THRESHOLDS == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


@pytest.mark.parametrize(
    ("ranked", "expected"),
    [
        (spans((0, 10), (20, 30)), 1.0),  # both found, best first
        (spans((40, 50), (0, 10), (20, 30)), 2 / 3),  # 1/2 and 2/3 at the hits, the envelope lifts the first to 2/3
        (spans((0, 10), (40, 50), (20, 30)), 5 / 6),  # 1 and 2/3
        (spans((0, 10)), 0.5),  # half of the windows found
        (spans((0, 10), (0, 10), (0, 10)), 0.5),  # found once; again is wrong, and nothing is found after it
        (spans((0, 10), (0, 10), (20, 30)), 5 / 6),
        (spans((40, 50)), 0.0),
        ([], 0.0),
    ],
)
def test_worked_examples(ranked: list[Span], expected: float) -> None:
    assert average_precisions(ranked, spans((0, 10), (20, 30))) == pytest.approx([expected] * 10, abs=1e-15)


def test_a_threshold_that_is_just_met_counts() -> None:
    met, missed = average_precisions(spans((0, 7.5)), spans((0, 10))), average_precisions(spans((0, 7.49)), [(0, 10)])  # type: ignore[list-item]
    assert met == [1.0] * 6 + [0.0] * 4
    assert missed == [1.0] * 5 + [0.0] * 5


def test_a_prediction_takes_the_free_window_it_fits_best() -> None:
    labelled = spans((0, 10), (0, 12))
    assert average_precisions(spans((0, 10), (0, 10)), labelled)[6:8] == [1.0, 0.5]  # 0.8: 10/12 is enough; 0.85: not
    # of two equal fits the later window is taken, which leaves the earlier one to the second prediction
    assert average_precisions(spans((0, 10), (0, 5)), spans((0, 5), (5, 10)))[0] == 1.0
    assert average_precisions(spans((0, 10), (5, 10)), spans((0, 5), (5, 10)))[0] == 0.5


def reference(ranked: list[Span], labelled: list[Span]) -> list[float]:
    """As `standalone_eval` of moment_detr describes it: arrays over ranks, sentinels at both ends of the curve."""
    result = []
    for threshold in np.linspace(0.5, 0.95, 10).round(2):
        taken: set[int] = set()
        correct = []
        for start, end in ranked:
            order = np.argsort([overlap(start, end, *window) for window in labelled], kind="stable")[::-1]
            fits = [i for i in order if overlap(start, end, *labelled[i]) >= threshold and i not in taken]
            taken |= set(fits[:1])
            correct.append(bool(fits))
        hits = np.cumsum(correct)
        precision = np.concatenate([[0], hits / np.arange(1, len(correct) + 1), [0]])
        recall = np.concatenate([[0], hits / len(labelled), [1]])
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        steps = np.flatnonzero(np.diff(recall)) + 1
        result.append(float(((recall[steps] - recall[steps - 1]) * envelope[steps]).sum()))
    return result


def overlap(a: float, b: float, c: float, d: float) -> float:
    both = max(0.0, min(b, d) - max(a, c))
    return both / ((b - a) + (d - c) - both)


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_curve_of_moment_detr(seed: int) -> None:
    """On windows of whole two seconds, as QVHighlights has them: full of ties."""
    generator = random.Random(seed)
    window = lambda: (lambda s: Span(s, s + 2 * generator.randint(1, 6)))(2 * generator.randint(0, 20))  # noqa: E731
    values = set()
    for _ in range(200):
        ranked = [window() for _ in range(generator.randint(1, 10))]
        labelled = sorted({window() for _ in range(generator.randint(1, 4))})
        ours = average_precisions(ranked, labelled)
        assert ours == pytest.approx(reference(ranked, labelled), abs=1e-12)
        values |= set(ours)
    assert len(values) > 8


BAD = [(math.nan, 5.0), (5.0, math.nan), (math.inf, 9.0), (0.0, math.inf), (5.0, 5.0), (9.0, 1.0)]


@pytest.mark.parametrize("bad", BAD)
def test_degenerate_windows_take_their_place_and_find_nothing(bad: tuple[float, float]) -> None:
    good = Span(0, 10)
    assert average_precisions([Span(*bad)], [good]) == [0.0] * 10
    assert average_precisions([Span(*bad), good], [good]) == [0.5] * 10  # a wrong first answer
    assert average_precisions([good], [good, Span(*bad)]) == [0.5] * 10  # a window nobody can find
    assert average_precisions([Span(*bad)], [Span(*bad)]) == [0.0] * 10
    assert set_iou([Span(*bad)], [good]) == set_iou([good], [Span(*bad)]) == set_iou([Span(*bad)], [Span(*bad)]) == 0.0
    assert set_iou([Span(*bad), good], [good]) == 1.0  # it covers nothing, so it takes nothing away


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (spans((0, 4), (6, 8)), spans((0, 8)), 0.75),
        (spans((0, 4), (2, 6)), spans((0, 6)), 1.0),  # what overlaps counts once
        (spans((0, 4), (4, 8)), spans((2, 6)), 0.5),
        (spans((0, 2)), spans((4, 6)), 0.0),
        (spans((0, 2), (10, 12)), spans((1, 3), (11, 13)), 1 / 3),
        ([], spans((0, 2)), 0.0),
        ([], [], 0.0),
    ],
)
def test_set_iou(ours: list[Span], theirs: list[Span], expected: float) -> None:
    assert set_iou(ours, theirs) == pytest.approx(expected, abs=1e-15)
    assert set_iou(ours[::-1], theirs[::-1]) == set_iou(ours, theirs) == set_iou(theirs, ours)


def test_set_iou_of_the_longest_windows() -> None:
    assert set_iou(spans((-1.7e308, 1.7e308)), spans((0, 1.7e308))) == 0.5


def test_what_windows_cover() -> None:
    assert merged(spans((5, 6), (0, 2), (1, 3), (3, 4))) == spans((0, 4), (5, 6))
    assert covered_s(spans((5, 6), (0, 2), (1, 3))) == 4.0
