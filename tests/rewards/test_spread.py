"""The share of groups that teach nothing."""

import math

import pytest
import torch

from rewards import zero_spread_share
from utils.common import UserError


def test_share():
    assert zero_spread_share([0.0] * 8, 4) == 1.0
    assert zero_spread_share([0.0, 0.1] * 4, 4) == 0.0
    assert zero_spread_share([0.3] * 4 + [0.3, 0.3, 0.3, 0.4] + [1.0] * 4, 4) == pytest.approx(2 / 3)
    assert zero_spread_share(torch.tensor([0.5, 0.5, 0.2, 0.2]), 2) == 1.0


def test_rounding_is_no_spread():
    assert zero_spread_share([0.1 + 0.2, 0.3], 2) == 1.0


def test_groups_follow_each_other():
    assert zero_spread_share([1.0, 1.0, 0.0, 0.0], 2) == 1.0
    assert zero_spread_share([1.0, 0.0, 1.0, 0.0], 2) == 0.0


def test_nothing_measured():
    assert math.isnan(zero_spread_share([], 4))


@pytest.mark.parametrize(("values", "size"), [([1.0] * 6, 4), ([1.0], 0), (torch.ones(2, 2), 2)])
def test_broken_groups(values, size):
    with pytest.raises(UserError, match="takes whole groups"):
        zero_spread_share(values, size)


def test_nan():
    with pytest.raises(UserError, match="takes finite rewards"):
        zero_spread_share([1.0, math.nan], 2)
