"""Recall, precision and F1 of covered time."""

import pytest
import torch

from rewards import SegmentOverlap
from rewards.segment_overlap import union
from utils.common import UserError
from utils.spans import Span

TEXT = "From 0.0 to 6.0 seconds, from 4.0 to 8.0 seconds and from 20.0 to 22.0 seconds."  # 10 s
LABEL = [(6, 12), (21, 31)]  # 16 s, of which 2 + 1 are found


@pytest.mark.parametrize(("mode", "value"), [("recall", 3 / 16), ("precision", 3 / 10), ("f1", 6 / 26)])
def test_over_all_windows(mode, value):
    assert SegmentOverlap(mode=mode).compute_from_text([TEXT], [LABEL]).tolist() == pytest.approx([value])


def test_recall_cannot_pass_one_by_repetition():
    text = "From 0.0 to 6.0 seconds and from 0.0 to 6.0 seconds and from 1.0 to 5.0 seconds."
    for mode in ("recall", "precision", "f1"):
        assert SegmentOverlap(mode=mode).compute_from_text([text], [(0, 6)]).tolist() == [1.0]


def test_tensors():
    pred, gt = torch.tensor([[2.0, 6.0], [0.0, 1.0]]), torch.tensor([[4.0, 12.0], [5.0, 6.0]])
    assert SegmentOverlap("recall", scale=2.0)(pred, gt).tolist() == [0.5, 0.0]


def test_lengths_beyond_the_largest_float():
    spans = [Span(-1.7e308, 1.7e308)]
    assert union(spans)[0].end - union(spans)[0].start == pytest.approx(8.5e307)
    assert SegmentOverlap("recall").compute_from_text(["-1.7e308 to 1.7e308"], [(0, 5)]).tolist() == [1.0]


def test_unknown_mode():
    with pytest.raises(UserError, match=r"segment_overlap\.mode must be one of recall, precision, f1, got 'iou'"):
        SegmentOverlap(mode="iou")
