"""Words of the timeline: lines of a given width, and times in the clock that suits the length of the video."""

from __future__ import annotations

import unicodedata
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.text import Text

from utils.spans import Span


def format_window(window: Span, span_s: float) -> str:
    """`window` as text, in the clock that suits a picture of `span_s` seconds.

    >>> format_window(Span(3.0, 9.25), 8), format_window(Span(-3.0, 9.2), 40), format_window(Span(65.0, 3600.0), 7200)
    ('3.00 – 9.25 s', '−3.0 – 9.2 s', '0:01:05 – 1:00:00')
    >>> format_window(Span(6.0, 6.0), 40)
    '6.0 s (empty)'
    """
    digits = 2 if span_s < 10 else 0 if span_s >= 3600 and window.end - window.start >= 2 else 1
    unit = " s" if span_s < 60 else ""
    if window.start == window.end:
        return f"{format_time(window.start, span_s, digits)}{unit} (empty)"
    return f"{format_time(window.start, span_s, digits)} – {format_time(window.end, span_s, digits)}{unit}"


def format_time(seconds: float, span_s: float, digits: int) -> str:
    """`12.5`, `3:05` or `1:02:03`, by the length of the picture in seconds, with `digits` decimals."""
    if not abs(seconds) < 1e7:  # a model may answer anything, and a hundred digits would fill the page
        return f"{seconds:.3g}"
    sign, value = ("−" if seconds < 0 else ""), round(abs(seconds), digits)
    if span_s < 60:
        return f"{sign}{value:.{digits}f}"
    minutes, rest = divmod(value, 60)
    tail = f"{rest:0{3 + digits if digits else 2}.{digits}f}"
    if span_s < 3600:
        return f"{sign}{minutes:.0f}:{tail}"
    return f"{sign}{minutes // 60:.0f}:{minutes % 60:02.0f}:{tail}"


def wrap(text: str, width: int, max_lines: int) -> list[str]:
    """Lines of at most `width` columns (a wide character takes two), cut off with an ellipsis after `max_lines`."""
    lines = [""]
    for word in text.split():
        for piece in _pieces(word, width):
            joined = f"{lines[-1]} {piece}".strip()
            if _columns(joined) <= width:
                lines[-1] = joined
            else:
                lines.append(piece)
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], shorten(" ".join(lines[max_lines - 1 :]), width)]
    return [line for line in lines if line]


def _pieces(word: str, width: int) -> list[str]:
    """`word`, cut where it is wider than a line (a text without spaces is one word)."""
    pieces = [""]
    for character in word:
        if _columns(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces


def shorten(text: str, width: int) -> str:
    """`text` in at most `width` columns, cut off with an ellipsis."""
    if _columns(text) <= width:
        return text
    while text and _columns(text) > width - 1:
        text = text[:-1]
    return text.rstrip() + "…"


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def fit(text: Text, inches: float) -> None:
    """Shrink `text` to `inches`: columns are counted, and capital letters are wider than the rest."""
    figure = text.get_figure(root=True)
    assert figure is not None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # said once, when the picture is saved
        width = text.get_window_extent().width / figure.dpi
    if width > inches:
        text.set_fontsize(float(text.get_fontsize()) * inches / width)
