"""The colours of every figure, on light and on dark paper.

A figure asks for a role (`truth`, `prediction`, `muted`, ...), never for a theme: nothing that draws has a branch for
dark paper.
"""

from __future__ import annotations

from dataclasses import dataclass

from utils.common import UserError, nearest

INK = "#1f2328"
MUTED = "#656d76"
FAINT = "#d8dee4"
BLUE, GREEN, VERMILION, PURPLE, AMBER = "#0072B2", "#009E73", "#D55E00", "#AA4499", "#E69F00"
"""Colours that stay apart in the common kinds of colour blindness (after Okabe and Ito, 2008)."""


@dataclass(frozen=True)
class Palette:
    """One colour for each role, as `#rrggbb`."""

    paper: str
    ink: str
    """Words that are read first."""
    muted: str
    """Words and lines that step back."""
    faint: str
    """Grid lines and borders of rows."""
    outside: str
    """What is not video."""
    truth: str
    prediction: str
    saliency: str
    cursor: str


LIGHT = Palette("#ffffff", INK, MUTED, FAINT, "#f3f4f6", GREEN, BLUE, PURPLE, VERMILION)
DARK = Palette("#0d1117", "#e6edf3", "#9198a1", "#30363d", "#161b22", "#2DBE92", "#56A8E8", "#D98BCB", "#FF8C42")
THEMES = {"light": LIGHT, "dark": DARK}


def palette_of(theme: str) -> Palette:
    """The palette called `theme`; `UserError` for any but light and dark."""
    if theme not in THEMES:
        hint = nearest(str(theme), THEMES)
        raise UserError(
            f"theme must be one of {', '.join(THEMES)}, got {theme!r}" + (f"; did you mean {hint!r}?" if hint else "")
        )
    return THEMES[theme]
