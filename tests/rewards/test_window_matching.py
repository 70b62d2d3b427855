"""The best pairing of answered and labelled windows."""

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import TemporalIoU, WindowMatching
from utils.spans import temporal_iou

spans = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 15)).map(lambda pair: (float(pair[0]), float(sum(pair)))),
    min_size=1,
    max_size=4,
)


def say(pred):
    return " and ".join(f"from {start} to {end} seconds" for start, end in pred)


@settings(max_examples=150, deadline=None)
@given(pred=spans, gt=spans)
def test_no_pairing_is_better(pred, gt):
    """Against all pairings, one by one."""
    few, many = sorted((pred, gt), key=len)
    best = max(sum(map(temporal_iou, few, chosen)) for chosen in permutations(many, len(few)))
    value = WindowMatching().compute_from_text([say(pred)], [gt]).item()
    assert value == pytest.approx(2 * best / (len(pred) + len(gt)), abs=1e-12)


def test_a_greedy_pairing_would_be_worse():
    text, label = say([(0.0, 6.0), (4.0, 9.0)]), [(3, 6), (0, 2)]
    # greedy takes 0-6 with 3-6 (1/2) and is left with nothing; the best is 0-6 with 0-2 and 4-9 with 3-6
    assert WindowMatching().compute_from_text([text], [label]).item() == pytest.approx(2 * (1 / 3 + 2 / 6) / 4)


def test_too_many_and_too_few_windows_cost():
    right = [(0.0, 10.0), (20.0, 30.0)]
    cases = [right, right[:1], [*right, (50.0, 60.0)], [right[0]] * 2]
    values = WindowMatching().compute_from_text([say(pred) for pred in cases], [right] * 4).tolist()
    assert values == pytest.approx([1, 2 / 3, 4 / 5, 1 / 2])


def test_one_window_is_the_iou():
    texts, labels = [say([(0.0, 4.0)]), say([(3.0, 4.0)])], [(2, 6), (3, 5)]
    values = WindowMatching(scale=3).compute_from_text(texts, labels)
    assert torch.equal(values, TemporalIoU(scale=3).compute_from_text(texts, labels))


def test_a_reversed_window_counts_as_one_too_many():
    assert WindowMatching().compute_from_text([say([(9.0, 3.0), (1.0, 2.0)])], [(1, 2)]).item() == pytest.approx(2 / 3)
