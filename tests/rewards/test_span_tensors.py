"""The vectorised IoU is the scalar one, to the last bit."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.span_tensors import is_window, span_giou, span_iou
from utils.spans import temporal_iou

LARGEST = 1.7976931348623157e308
numbers = st.one_of(st.floats(), st.floats(0, 100), st.sampled_from([0.0, 5e-324, LARGEST, -LARGEST, math.inf]))
spans = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6)


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


@settings(max_examples=300, deadline=None)
@given(left=spans, right=spans)
def test_agrees_with_the_scalar(left, right):
    matrix = span_iou(tensor(left)[:, None], tensor(right)[None])
    assert matrix.tolist() == [[temporal_iou(pred, gt) for gt in right] for pred in left]


@settings(max_examples=200, deadline=None)
@given(left=spans, right=spans)
def test_generalised_iou_extends_it(left, right):
    pred, gt = tensor(left)[:, None], tensor(right)[None]
    giou, iou = span_giou(pred, gt), span_iou(pred, gt)
    assert ((giou >= -1) & (giou <= 1)).all()
    assert torch.equal(giou.clamp_min(0), iou)
    assert torch.equal(giou == -1, giou == -1) and (giou[~(is_window(pred) & is_window(gt))] == -1).all()


def test_values():
    pred = tensor([(0, 4), (0, 4), (0, 2), (-2, 3), (4, 0), (math.nan, 3)])
    gt = tensor([(2, 6), (0, 4), (6, 10), (-1, 1), (0, 4), (0, 3)])
    assert span_iou(pred, gt).tolist() == [1 / 3, 1.0, 0.0, 0.4, 0.0, 0.0]
    assert span_giou(pred, gt).tolist() == [1 / 3, 1.0, -0.4, 0.4, -1.0, -1.0]


def test_float32_is_computed_in_float64():
    assert span_iou(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 3.0]])).tolist() == [1 / 3]
