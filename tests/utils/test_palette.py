"""Colours on light and dark paper: told from the paper and from each other."""

from __future__ import annotations

import itertools
from dataclasses import asdict

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from utils.common import UserError
from utils.palette import DARK, LIGHT, palette_of


def luminance(colour):
    """Relative luminance (WCAG 2)."""
    parts = np.array(to_rgb(colour))
    linear = np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(first, second):
    lighter, darker = sorted((luminance(first), luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_a_theme_by_its_name():
    assert palette_of("light") is LIGHT and palette_of("dark") is DARK
    with pytest.raises(UserError, match=r"theme must be one of light, dark, got 'drak'; did you mean 'dark'\?"):
        palette_of("drak")


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_words_and_bars_stand_out_from_the_paper(palette):
    assert contrast(palette.ink, palette.paper) > 12
    assert contrast(palette.muted, palette.paper) > 4.5
    bars = {role: contrast(colour, palette.paper) for role, colour in asdict(palette).items()}
    assert min(bars[role] for role in ("truth", "prediction", "saliency", "cursor")) > 3


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_roles_have_colours_of_their_own(palette):
    colours = [to_rgb(getattr(palette, role)) for role in ("truth", "prediction", "saliency", "cursor", "ink", "paper")]
    apart = [np.abs(np.subtract(one, other)).max() for one, other in itertools.combinations(colours, 2)]
    assert min(apart) > 0.2
