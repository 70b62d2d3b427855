"""Values worked out by hand for the rewards of one window, and what their parameters do."""

import math

import pytest

from rewards import BoundaryDistance, GeneralizedIoU, ShapedIoU, TemporalIoU, TimestampIoU
from utils.common import UserError


def test_the_example_of_the_readme():
    values = TemporalIoU(scale=1.0).compute_from_text(predictions=["0.25 to 0.75"], ground_truths=[(0.3, 0.7)])
    assert values.tolist() == pytest.approx([0.8], abs=1e-12)


def test_the_first_window_counts_against_the_best_label():
    text = "From 1.0 to 3.0 seconds and from 20.0 to 30.0 seconds."
    assert TemporalIoU().compute_from_text([text], [[(20, 30), (1, 5)]]).tolist() == [0.5]


def test_timestamp_iou_never_goes_negative_nor_back_up():
    """Time-R1's own product is negative, or positive again, for errors longer than the video."""
    texts = ["From 0.0 to 100.0 seconds.", "From -50.0 to 100.0 seconds.", "From 0.0 to 10.0 seconds."]
    values = TimestampIoU().compute_from_text(texts, [(5, 10)] * 3, [20, 20, 20]).tolist()
    assert values == [0.0, 0.0, 0.5 * 0.75]


def test_timestamp_iou_needs_durations():
    with pytest.raises(UserError, match=r"`timestamp_iou` needs the duration of every row.*`duration`"):
        TimestampIoU().compute_from_text(["0 to 1"], [(0, 1)])
    with pytest.raises(UserError, match="`timestamp_iou` needs the duration of every row"):
        TimestampIoU()(completions=["0 to 1", "0 to 1"], timestamp=[[0, 1], [0, 1]], duration=[5.0, None])


def test_generalized_iou():
    texts = ["From 0.0 to 2.0 seconds.", "From 1.0 to 2.0 seconds.", "From 2.0 to 4.0 seconds."]
    values = GeneralizedIoU(scale=2).compute_from_text(texts, [(2, 4), (2.5, 4), (2, 4)]).tolist()
    assert values == [1.0, pytest.approx(1 - 0.5 / 3), 2.0]  # touching; a gap of 0.5 in a hull of 3; exact


def test_shaped_iou_is_tempsamps_curve_up_to_an_affine_map():
    def curve(x, t=0.8, a=0.01, b=1.0):
        return t + a * math.log(1 + x - t) if x >= t else t - (math.exp(b * (t - x)) - 1) / (math.exp(b) - 1)

    ends = [0.5, 3.0, 7.9, 8.0, 9.5, 10.0]
    values = ShapedIoU().compute_from_text([f"From 0 to {end} s" for end in ends], [(0, 10)] * 6).tolist()
    assert values == pytest.approx([(curve(end / 10) - curve(0)) / (curve(1) - curve(0)) for end in ends], abs=1e-12)
    assert curve(0) == pytest.approx(0.086764, abs=1e-6) and curve(1) == pytest.approx(0.801823, abs=1e-6)


def test_boundary_distance():
    texts = ["From 4.0 to 8.0 seconds.", "From 2.0 to 8.0 seconds.", "From 10.0 to 14.0 seconds."]
    values = BoundaryDistance(tolerance_s=2).compute_from_text(texts, [(4, 8)] * 3).tolist()
    assert values == pytest.approx([1, 1 / 1.5, 1 / 4])


@pytest.mark.parametrize("scale", [0, -1, math.nan, math.inf, "1", True, None])
def test_bad_scales_are_refused(scale):
    with pytest.raises(UserError, match=r"temporal_iou\.scale must be a number above 0"):
        TemporalIoU(scale=scale)


def test_bad_parameters_are_refused():
    with pytest.raises(UserError, match=r"boundary_distance\.tolerance_s must be a number above 0, got 0"):
        BoundaryDistance(tolerance_s=0)
    with pytest.raises(UserError, match=r"shaped_iou\.threshold must lie between 0 and 1, got 1"):
        ShapedIoU(threshold=1)
    with pytest.raises(UserError, match=r"shaped_iou\.steepness must be"):
        ShapedIoU(steepness=-1)
