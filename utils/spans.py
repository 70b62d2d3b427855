"""The one parser of answers and the one temporal IoU (contract 1), for rewards, metrics, inference and export.

How an answer is read:

1. Its last complete `<answer>...</answer>`; without one, what follows the last `</think>`; else the whole text.
2. JSON objects, by key. An object that holds no window is set aside: its numbers are never read as prose.
3. The first of these that finds a window gives all windows, in written order: clock times (`1:05 - 1:12.5`), ranges
   with a unit (`3.2s - 7.9s`, `2 to 2.5 min`), labelled times (`Start: 3.0, End: 7`), plain ranges (`3 to 7`,
   `3 - 7`, `[3, 7]`, `between 3 and 7`).
4. Without a window, a sentence that says the event is absent gives `[]`; anything else gives None.

What is decided where an answer is doubtful: something has to join or label two times, nearness never does. A unit on
one side of a range holds for the other, and for the ranges listed beside it. A plain range must read as a time: not
`2 to 3 people`, `steps 1 to 3`, `bbox [10, 20]`, `score: 3-7`, frame numbers, dates, sums, decimal commas. Lengths
(`lasts 5 to 8 seconds`) and ranges that are denied (`does not happen from 3 to 7 s`) are no windows. Percentages, and
fractions said to be "of the video", need the duration. Nothing is swapped, clipped or rounded: a reversed window stays.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Set
from typing import Any, NamedTuple

__all__ = ["Span", "parse_spans", "temporal_iou"]


class Span(NamedTuple):
    """A window of time in seconds."""

    start: float
    end: float


def parse_spans(text: str, duration: float | None = None) -> list[Span] | None:
    """Every window that `text` states, in seconds and in written order.

    `duration` (seconds) is needed only for answers in percent or in fractions of the video.
    Returns `[]` when the text says the event is absent and None when nothing can be read. Never raises.

    >>> parse_spans("From 3.2 to 7.9 seconds.")
    [Span(start=3.2, end=7.9)]
    >>> parse_spans("<think>about 2 to 4</think><answer>0:12 - 1:05</answer>")
    [Span(start=12.0, end=65.0)]
    >>> parse_spans("The event does not happen in the video.")
    []
    >>> parse_spans("at 3.2 seconds") is None
    True
    >>> parse_spans("25% to 75%", duration=40)
    [Span(start=10.0, end=30.0)]
    """
    if not isinstance(text, str):
        return None
    length = _positive(duration)
    spans, prose = _read_json(_plain_text(_answer_part(text)), length)
    if spans is not None:
        return spans
    prose = prose.translate(_QUOTES)
    times = _times(prose, length)
    ranges = _ranges(prose, times, length)
    return (
        _spans_of(ranges, "clock")
        or _spans_of(ranges, "unit")
        or _labelled(prose, times)
        or _spans_of(ranges, "plain")
        or ([] if _says_absent(prose) else None)
    )


def temporal_iou(pred: Any, gt: Any) -> float:
    """Intersection over union of two windows `(start, end)` in seconds, as float64 in [0, 1].

    0 for a window that is not finite or does not end after it starts, and for anything that is no window. Never raises.

    >>> temporal_iou((0, 4), (2, 6))
    0.3333333333333333
    """
    a, b = _window(pred), _window(gt)
    if a is None or b is None:
        return 0.0
    intersection = min(a.end, b.end) - max(a.start, b.start)
    if intersection <= 0:
        return 0.0
    # The union of overlapping windows is their hull; unlike a sum of lengths it cannot round below the intersection.
    hull = max(a.end, b.end) - min(a.start, b.start)
    if math.isinf(hull):  # only when it is longer than the largest float: the ratio is the same on a smaller scale
        return temporal_iou((a.start / 4, a.end / 4), (b.start / 4, b.end / 4))
    return intersection / hull


def _window(value: Any) -> Span | None:
    if isinstance(value, bytes | bytearray | Mapping | Set):  # these iterate too, over something else than two bounds
        return None
    try:
        start, end = value
        if not (math.isfinite(start) and math.isfinite(end)):  # refuses text, which float() would take
            return None
        window = Span(float(start), float(end))
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several numbers
        return None
    return window if window.end > window.start else None


def _positive(duration: Any) -> float | None:
    try:
        value = float(duration)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return value if math.isfinite(value) and value > 0 else None


# ---------------------------------------------------------------------------------------------- what is read
_ANSWER_TAG = re.compile(r"<(/?)answer\s*>", re.IGNORECASE)
_THINK_END = re.compile(r"</think\s*>", re.IGNORECASE)
_CHARS = {
    **{0xFF01 + i: chr(0x21 + i) for i in range(94)},  # full-width forms
    **dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe58\ufe63"), "-"),
    **dict.fromkeys(map(ord, "\u2014\u2015"), " - "),  # an em dash never is a sign
    **dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff`"), ""),
    **dict.fromkeys(map(ord, "\u301c\u223c"), "~"),
    **{0x2192: "->", 0x2026: "...", 0x2019: "'"},
}
_QUOTES = dict.fromkeys(map(ord, "\u201c\u201d\u201e\u00ab\u00bb"), '"')
_EMPHASIS = re.compile(r"(?<![\d*])\*++|(?<!\*)\*++(?!\d)")  # 3*4 is no emphasis


def _answer_part(text: str) -> str:
    answer: str | None = None
    opened: int | None = None
    for tag in _ANSWER_TAG.finditer(text):
        if not tag[1]:
            opened = tag.end()
        elif opened is not None:
            answer, opened = text[opened : tag.start()], None
    if answer is not None:
        return answer
    thought = 0
    for tag in _THINK_END.finditer(text):
        thought = tag.end()
    return text[thought:]


def _plain_text(text: str) -> str:
    """One kind of digit, dash and space, no markdown emphasis, no blank lines."""
    plain = _EMPHASIS.sub("", text.translate(_CHARS))
    lines = (" ".join(line.split()) for line in plain.splitlines())
    return "\n".join(line for line in lines if line)


# ---------------------------------------------------------------------------------------------- times in a text
# A sign counts unless it joins two numbers: after a word, a digit, a closing bracket or a dash it is a separator.
_SIGN = r"""(?:(?<![\w.)\]>%"'-])[-+])?"""
_THOUSANDS = r"\d{1,3}(?:,\d{3}){1,5}(?:\.\d++)?(?!,?\d)"
# [100,200] is a pair, not a hundred thousand.
_NUMBER = rf"(?:(?<![\[(]){_THOUSANDS}|{_THOUSANDS}(?![\])])|\d++(?:\.\d++)?|(?<!\.)\.\d++)(?:e[-+]?\d{{1,3}}+)?"
_HOURS = r"(?:hours?|hrs?|h)(?![a-z])"
_MINUTES = r"(?:minutes?|mins?\.?|m)(?![a-z])"
_SECONDS = r"(?:seconds?|secs?\.?|s)(?![a-z])"
_MILLISECONDS = r"(?:milliseconds?|millisecs?|msecs?|ms)(?![a-z])"
_THEN = r"[ ]?(?:,|and\b)?[ ]?"
_BEFORE_UNIT = r"""[ ]?(?:[)\]>"']{1,2}[ ]?)?(?:\(|in[ ])?"""

_TIME = re.compile(
    rf"""
    (?<!\w)(?<!\w[.:'/\u2032\u2044])(?P<sign>{_SIGN})
    (?:
      (?P<clock>(?:(?P<ch>\d{{1,4}}):)?(?P<cm>\d{{1,4}}):(?P<cs>\d{{2}}(?:\.\d++|,\d{{3}}(?!\d))?))(?!:?\d|\.\d|/\d)
        (?:[ ]?(?:{_SECONDS}|{_MINUTES}))?(?![ ]?(?:{_HOURS}|[ap]\.?m\b))
    | (?P<number>{_NUMBER})(?!\.?\d|[:'/\u2032\u2044]\d|[\u00b0$\u20ac\u00a3\u00a5^])
        (?:
          [ ]?{_HOURS}{_THEN}(?P<hm>{_NUMBER})[ ]?{_MINUTES}(?:{_THEN}(?P<hs>{_NUMBER})[ ]?{_SECONDS})?
        | [ ]?{_MINUTES}{_THEN}(?P<ms>{_NUMBER})[ ]?{_SECONDS}
        | {_BEFORE_UNIT}(?P<unit>%|per[ ]?cent\b|{_MILLISECONDS}|{_SECONDS}|minutes?\b|mins?\b\.?|{_HOURS})
        | (?P<attached>m(?![a-z]))
        )?
    )(?!\w)
    """,
    re.VERBOSE | re.IGNORECASE,
)
_LOOK = 48
"""Characters looked at before, between and after times: enough for the words that join them, and bounded."""


class _Unit(NamedTuple):
    """Seconds per number, as a fraction: 1500 ms / 1000 is exactly 1.5 s, 1500 * 0.001 need not be."""

    factor: float
    divisor: float = 1.0

    def seconds(self, number: float) -> float:
        return number * self.factor / self.divisor


_SECOND = _Unit(1.0)


class _Time(NamedTuple):
    value: float
    """Seconds, or the bare number when it is plain; nan when it cannot be told (`1:75`, percent without duration)."""
    kind: str
    """clock, unit, percent or plain."""
    unit: _Unit | None
    """The unit that a plain number beside it takes; None when there is none (`1:05`, `1 min 5 s`)."""
    begin: int
    stop: int

    def beside(self, other: _Time) -> float:
        """Seconds of this time in a range with `other`. Zero is zero in every unit."""
        if self.kind != "plain" or self.value == 0:
            return self.value
        return other.unit.seconds(self.value) if other.unit else math.nan


def _times(text: str, duration: float | None) -> list[_Time]:
    times: list[_Time] = []
    for match in _TIME.finditer(text):
        time = _read_time(match, duration)
        # "3.2 -7.9" and "3s -7s" are ranges; after a negative time the sign stays.
        if match["sign"] and times and times[-1].value >= 0 and text[times[-1].stop : time.begin] == " ":
            time = time._replace(value=abs(time.value), begin=time.begin + 1)
        times.append(time)
    return times


def _read_time(match: re.Match[str], duration: float | None) -> _Time:
    unit: _Unit | None = None
    if match["clock"]:
        kind, value = "clock", _clock(match)
    elif match["hm"]:
        kind, value = "unit", 3600 * _float(match["number"]) + 60 * _float(match["hm"]) + _float(match["hs"])
    elif match["ms"]:
        kind, value = "unit", 60 * _float(match["number"]) + _float(match["ms"])
    else:
        kind, unit = _unit((match["unit"] or match["attached"] or "").lower(), duration)
        value = unit.seconds(_float(match["number"]))
    return _Time(-value if match["sign"] == "-" else value, kind, unit, match.start(), match.end())


def _clock(match: re.Match[str]) -> float:
    minutes, seconds = _float(match["cm"]), float(match["cs"].replace(",", "."))
    if seconds >= 60 or (match["ch"] and minutes >= 60):
        return math.nan
    return 3600 * _float(match["ch"]) + 60 * minutes + seconds


def _unit(name: str, duration: float | None) -> tuple[str, _Unit]:
    if name.startswith(("%", "per")):
        return "percent", _Unit(duration or math.nan, 100.0)
    if name.startswith(("ms", "milli")):
        return "unit", _Unit(1.0, 1000.0)
    return "unit" if name else "plain", _Unit({"m": 60.0, "h": 3600.0}.get(name[:1], 1.0))


def _float(text: str | None) -> float:
    return float(text.replace(",", "")) if text else 0.0


# ---------------------------------------------------------------------------------------------- ranges
_ABOUT = r"(?:about|around|approximately|approx\.?|roughly|nearly|almost|exactly|the|time|seconds?|t[ ]?=|~)"
_CLOSERS, _OPENERS = r"""[>"')\]]{0,2}""", rf"""(?:{_ABOUT} ?){{0,2}}[<"'(\[]{{0,2}}"""
_TO = r"(?:(?:up |through |on )?to|until|till|through|thru)\b ?[:=]?"
_JOINS = re.compile(rf"{_CLOSERS},?(?:\s?{_TO}| ?(?:-{{1,3}}>?|=>|~|\.{{2,3}}))\s?{_OPENERS}", re.IGNORECASE)
_AND = re.compile(rf"{_CLOSERS}\sand\s{_OPENERS}", re.IGNORECASE)
_BETWEEN = re.compile(rf"\bbetween\s{_OPENERS}$", re.IGNORECASE)
_COMMA = re.compile(r"""["']?\s?,\s?["']?""")
_OPENING = re.compile(r"""[\[(] ?["']?$""")
_CLOSING = re.compile(r"""["']? ?[\])]""")
_CONNECTS = re.compile(
    r"""[)\]>"'.]{0,2}(?:[,;& ]|\n(?:[-\u2022]|\d{1,2}[.)])?|and|or|then|also|again)*"""
    r"""(?:from|between|at)?[ (\[<"']{0,3}""",
    re.IGNORECASE,
)


class _Range(NamedTuple):
    first: _Time
    second: _Time
    kind: str
    """clock, unit (percent and fractions too) or plain."""
    unit: _Unit | None
    """Of its plain numbers, and of plain ranges listed beside it."""

    @property
    def span(self) -> Span:
        lender = self.second._replace(unit=self.unit)
        return Span(self.first.beside(lender), self.second.beside(lender))


def _spans_of(ranges: list[_Range], kind: str) -> list[Span]:
    return [found.span for found in ranges if found.kind == kind and all(map(math.isfinite, found.span))]


def _ranges(text: str, times: list[_Time], duration: float | None) -> list[_Range]:
    """Every range that words or signs join, plain ones included."""
    found = [_resolve(text, first, second, duration) for first, second in _joined_pairs(text, times)]
    ranges = [item for item in found if item is not None and not _is_denied(text, item.first.begin)]
    for order in (range(len(ranges) - 1, 0, -1), range(1, len(ranges))):  # a unit reaches back over a list, then on
        for index in order:
            _share_unit(text, ranges, index)
    return ranges


def _share_unit(text: str, ranges: list[_Range], index: int) -> None:
    before, after = ranges[index - 1], ranges[index]
    kinds = {before.kind, after.kind}
    gap = text[before.second.stop : after.first.begin]
    if kinds == {"plain", "unit"} and len(gap) <= _LOOK and _CONNECTS.fullmatch(gap):
        giver = before if before.kind == "unit" else after
        ranges[index - 1] = before._replace(kind="unit", unit=giver.unit if before.kind == "plain" else before.unit)
        ranges[index] = after._replace(kind="unit", unit=giver.unit if after.kind == "plain" else after.unit)


def _joined_pairs(text: str, times: list[_Time]) -> list[tuple[_Time, _Time]]:
    """Neighbours that are joined to each other alone: three in a row are a date, a part number or a sum."""
    pairs: list[tuple[_Time, _Time]] = []
    index = 0
    while index + 1 < len(times):
        if _is_bracketed(text, times[index], times[index + 1]):
            pairs.append((times[index], times[index + 1]))
            index += 2
            continue
        run = [times[index]]
        while index + len(run) < len(times) and _is_joined(text, run[-1], times[index + len(run)]):
            run.append(times[index + len(run)])
        index += len(run)
        if len(run) == 3 and run[0].kind == "plain" != run[1].kind == run[2].kind:
            run = run[1:]  # "Scene 2 - 0:12 to 0:20": the number is a name
        if len(run) == 2 and not _is_broken(text, *run):
            pairs.append((run[0], run[1]))
    return pairs


def _before(text: str, time: _Time) -> str:
    return text[max(0, time.begin - _LOOK) : time.begin]


def _is_bracketed(text: str, first: _Time, second: _Time) -> bool:
    """`[3, 7]`, `("0:03", "0:07")`; the closing bracket may stand before the unit, inside the second time."""
    if second.begin - first.stop > 8 or not _COMMA.fullmatch(text, first.stop, second.begin):
        return False
    closed = _CLOSING.match(text, second.stop) or re.search(r"[\])]", text[second.begin : second.stop])
    return closed is not None and _OPENING.search(_before(text, first)) is not None


def _is_joined(text: str, first: _Time, second: _Time) -> bool:
    if second.begin - first.stop > _LOOK:
        return False
    if _JOINS.fullmatch(text, first.stop, second.begin):
        return True
    return bool(_AND.fullmatch(text, first.stop, second.begin) and _BETWEEN.search(_before(text, first)))


_DECIMAL_COMMA_AFTER = re.compile(r"(?<=\d),\d")
_DECIMAL_COMMA_BEFORE = re.compile(r"(?<![\d.])\d+,$")
_OPERATOR_AFTER = re.compile(r"[ )\]]{0,2}(?:=(?!>)|[*+/^\u00d7])")
_OPERATOR_BEFORE = re.compile(r"\d[ )]{0,2}[*+/^\u00d7][ (]{0,2}$")


def _is_broken(text: str, first: _Time, second: _Time) -> bool:
    """Whether the two numbers are parts of longer ones (`3,2 to 7,9`) or of a sum (`7.9 - 3.2 = 4.7`)."""
    before = _before(text, first)
    if _OPERATOR_AFTER.match(text, second.stop) or _OPERATOR_BEFORE.search(before):
        return True
    return _has_decimal_comma(text, first) or _has_decimal_comma(text, second)


def _has_decimal_comma(text: str, time: _Time) -> bool:
    written = text[time.begin : time.stop]
    if time.kind == "clock" or "." in written:
        return False
    return bool(_DECIMAL_COMMA_AFTER.match(text, time.stop) or _DECIMAL_COMMA_BEFORE.search(_before(text, time)))


# ---------------------------------------------------------------------------------------------- what a range means
_AFTER = r"""[ "')\]>]{0,3}"""
_NEXT_WORD = re.compile(rf"{_AFTER}-?([A-Za-z]+)")
_LAST_WORD = re.compile(r"(\w+)(\W*)$")
_ABOUT_TAIL = re.compile(rf"(?:\b{_ABOUT}[ ]?){{1,2}}$", re.IGNORECASE)
# Words that may follow a plain range (nothing that can be counted), and words that may stand before one.
_FOLLOWERS = frozenset(
    "in of is are was were and or the a an as at on when where while during with then for from to by it this that "
    "which he she they i we you someone somebody there these those his her their its so but because after before "
    "within until since if inside into through between also again has have who whose approximately roughly mark "
    "respectively inclusive shows contains".split()
)
_LEADERS = frozenset(
    "from between at during in around within over is are was were be and or then to so also again not just only likely "
    "say estimate think believe guess happens happen happened occurs occur occurred appears spans place visible seen "
    "shown found located boxed time times timestamp timestamps seconds sec secs s interval intervals segment segments "
    "window windows span spans range ranges period answer answers output response result video".split()
)
_OTHER_THINGS = re.compile(
    r"\b(?:steps?|pages?|lines?|scores?|confidence|prob\w*|b?box(?:es)?|bbox_\w+|points?|positions?|coord\w*|counts?|ages?|"
    r"resolution|size|ratio|speed|ids?|chapters?|questions?|weight|height|width|distance|temperature|number)"
    r"""(?:["']? ?[:=]| (?:is|are|was|were)\b)[ "'(\[<{]*$""",
    re.IGNORECASE,
)
_FRAMES = re.compile(
    r"""frames?(?P<words>(?:["']?[ _:](?:from|between|range|ind(?:ex|ices)|ids?|numbers?|no|is|are))*)[ :=#"'(\[]*$""",
    re.IGNORECASE,
)
_LENGTH_BEFORE = re.compile(
    rf"\b(?:an?|for|last(?:s|ed|ing)?|takes?|taking|took|every|first|next|another)\s(?:{_ABOUT} ?){{0,2}}$",
    re.IGNORECASE,
)
_LENGTH_AFTER = re.compile(
    rf"{_AFTER}-?(?:long|later|ago|apart|each|in (?:length|duration)|(?:before|from|until) the end)\b", re.IGNORECASE
)
_FRACTION_WORD = r"(?:normali[sz]ed|relative|fractions?|proportions?)"
_FRACTION_BEFORE = re.compile(rf"\b{_FRACTION_WORD}\b[^.;\n]{{0,24}}$", re.IGNORECASE)
_FRACTION_AFTER = re.compile(rf"{_AFTER}\(?(?:as )?(?:an? |the )?{_FRACTION_WORD}\b", re.IGNORECASE)
_OF_VIDEO = re.compile(
    rf"{_AFTER}of (?:the |its )?(?:whole |total |full |entire )?(?:video|clip|duration|length|footage|way)\b",
    re.IGNORECASE,
)


def _resolve(text: str, first: _Time, second: _Time, duration: float | None) -> _Range | None:
    """The range of two joined times; None when it is none of time."""
    kinds = (first.kind, second.kind)
    before = _before(text, first)
    frames = _FRAMES.search(before) if first.kind == "plain" else None
    if frames and (kinds == ("plain", "plain") or not frames["words"]):  # but "enters the frame from 3 to 7 seconds"
        return None
    if "clock" in kinds:
        # A plain number beside a clock time has no unit: `0:12 to 20` is left unread.
        return _Range(first, second, "clock", None)
    if _LENGTH_BEFORE.search(before) or _LENGTH_AFTER.match(text, second.stop):
        return None
    if "unit" not in kinds and not _reads_as_time(text, before, second.stop):
        return None
    if kinds != ("plain", "plain"):
        return _Range(first, second, "unit", (first if second.kind == "plain" else second).unit)
    fraction = _fraction(text, first, second, duration)
    return _Range(first, second, "unit" if fraction else "plain", fraction or _SECOND)


def _reads_as_time(text: str, before: str, stop: int) -> bool:
    """Whether the words around a range without unit let it be one of time."""
    following = _NEXT_WORD.match(text, stop)
    if following and (_is_counted(following[1]) or following[1].lower().startswith("frame")):
        return False
    before = _ABOUT_TAIL.sub("", before)
    leading = _LAST_WORD.search(before)
    if leading is None:
        return True
    if _OTHER_THINGS.search(before):
        return False
    word, marks = leading.groups()
    if not marks.strip(" \"'([<{"):
        return word.lower() in _LEADERS
    return marks != "-"


def _is_counted(word: str) -> bool:
    """Whether the word after a number is what it counts; a capital letter begins a caption (`3 - 7 A man sits`)."""
    return word.islower() and word not in _FOLLOWERS


def _fraction(text: str, first: _Time, second: _Time, duration: float | None) -> _Unit | None:
    """The unit of numbers marked as fractions of the video (nan when it cannot be told), or None without a mark."""
    is_fraction = max(first.value, second.value) <= 1
    if _FRACTION_AFTER.match(text, second.stop) or _FRACTION_BEFORE.search(_before(text, first)):
        return _Unit(duration or math.nan if is_fraction else math.nan)
    return _Unit(duration or math.nan) if is_fraction and _OF_VIDEO.match(text, second.stop) else None


# ---------------------------------------------------------------------------------------------- labelled times
_LABEL = re.compile(
    r"""(?<![a-z])(?<!frame[ _-])(?:(?P<start>start(?:s|ed|ing)?|begin(?:s|ning)?|began|onset)"""
    r"""|end(?:s|ed|ing)?|stop(?:s|ped|ping)?|finish(?:es|ed|ing)?|conclud(?:es?|ed|ing)|offset|until|till)"""
    r"""(?:[ _-]?(?:time ?stamp|time|point|seconds?|secs?|s|in)){0,3}(?: \((?:s|secs?|seconds?)\))?["'>)\]]{0,2}"""
    rf"""\s?(?:[:=]|->|- |is\b|was\b|of\b|from\b)?\s?(?:at|on)?\s?{_OPENERS}(?=[-+]?\.?\d)""",
    re.IGNORECASE,
)
_MAX_LABEL_GAP = 240
"""Characters from a labelled start to its end: further apart they speak of different things."""


def _labelled(text: str, times: list[_Time]) -> list[Span]:
    """`Start: 3.0, End: 7`, `begins at 3 s and ends at 7 s`: each start with the end that follows it."""
    labels = {label.end(): "s" if label["start"] else "e" for label in _LABEL.finditer(text)}
    labelled = [(labels[time.begin], time) for time in times if time.begin in labels and _is_labelled(text, time)]
    if re.fullmatch("(?:es)+", "".join(label for label, _ in labelled)):
        return []  # "End: 7, Start: 3, End: 12, Start: 10": pairing on would mix two windows
    spans: list[Span] = []
    for (label, first), (next_label, second) in zip(labelled, labelled[1:], strict=False):
        is_near = second.begin - first.stop <= _MAX_LABEL_GAP
        if label == "s" and next_label == "e" and is_near and not _is_denied(text, first.begin):
            spans.append(Span(first.beside(second), second.beside(first)))
    return [span for span in spans if all(map(math.isfinite, span))]


def _is_labelled(text: str, time: _Time) -> bool:
    following = _NEXT_WORD.match(text, time.stop)
    return not _has_decimal_comma(text, time) and not (following and following[1].lower().startswith("frame"))


# ---------------------------------------------------------------------------------------------- JSON
_WORD_START = re.compile(r"(?<=[a-z])(?=[A-Z])|[\s-]+")
_IN_UNIT = r"(?:_(?:in_)?(?P<unit>ms|milliseconds?|s|secs?|seconds?|mins?|minutes?|hours?|percent|frames?))?"
_BOUND_KEY = re.compile(
    rf"(?:t_|time_)?(?:(?P<start>start|begin|from)|end|stop|finish|to)(?:_?time(?:stamp)?)?{_IN_UNIT}"
)
_WINDOW_KEY = re.compile(
    rf"(?:times?|(?:time_?)?(?:stamp|span|segment|window|interval|range|moment)s?|answers?){_IN_UNIT}"
)
_MAX_DEPTH = 8
_MAX_FAILURES = 64
"""Opening braces that start no JSON: each may cost a look at the whole text."""
_DECODER = json.JSONDecoder(strict=False)


def _read_json(text: str, duration: float | None) -> tuple[list[Span] | None, str]:
    """Windows of every JSON object in the text (`{"segments": []}` gives none: absent), and the text without them."""
    spans: list[Span] | None = None
    prose: list[str] = []
    read, failures, position = 0, 0, text.find("{")
    while position != -1 and failures < _MAX_FAILURES:
        try:
            value, stop = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError):
            failures += 1
            stop = position + 1
        else:
            prose.append(text[read:position])
            read = stop
            windows = _windows_in(value, duration)
            spans = spans if windows is None else (spans or []) + windows
        position = text.find("{", stop)
    return spans, " ".join([*prose, text[read:]])


def _windows_in(value: Any, duration: float | None, unit: str = "", depth: int = 0) -> list[Span] | None:
    """Windows in the value of a key for windows: an object, a pair, a list of windows (empty: absent), or text."""
    if depth > _MAX_DEPTH:
        return None
    if isinstance(value, str):
        return parse_spans(f"{value} {unit}" if value[-1:].isdigit() else value, duration) if "{" not in value else None
    if isinstance(value, dict):
        return _windows_in_object(value, duration, depth)
    if not isinstance(value, list):
        return None
    pair = _json_span(value, (unit, unit), duration) if len(value) == 2 else None
    if pair is not None:
        return [pair]
    return _merged([_windows_in(item, duration, unit, depth + 1) for item in value]) if value else []


def _windows_in_object(value: dict[str, Any], duration: float | None, depth: int) -> list[Span] | None:
    keys = {_WORD_START.sub("_", key.strip()).lower(): item for key, item in value.items()}
    unit = next((keys[name] for name in ("unit", "units") if isinstance(keys.get(name), str)), "")
    bounds: dict[bool, tuple[Any, str]] = {}
    for key, item in keys.items():
        if match := _BOUND_KEY.fullmatch(key):
            bounds.setdefault(match["start"] is None, (item, match["unit"] or unit))
    if len(bounds) == 2:
        span = _json_span((bounds[False][0], bounds[True][0]), (bounds[False][1], bounds[True][1]), duration)
        return None if span is None else [span]
    for key, item in keys.items():
        match = _WINDOW_KEY.fullmatch(key)
        windows = _windows_in(item, duration, match["unit"] or unit, depth + 1) if match else None
        if windows is not None:
            return windows
    nested = [item for key, item in keys.items() if "frame" not in key]
    return _merged([_windows_in_nested(item, duration, depth + 1) for item in nested])


def _windows_in_nested(value: Any, duration: float | None, depth: int) -> list[Span] | None:
    """Windows of the objects under a key that says nothing of time: its bare numbers and texts are not read."""
    if depth > _MAX_DEPTH:
        return None
    if isinstance(value, dict):
        return _windows_in_object(value, duration, depth)
    if isinstance(value, list):
        return _merged([_windows_in_nested(item, duration, depth + 1) for item in value])
    return None


def _merged(parts: list[list[Span] | None]) -> list[Span] | None:
    read = [part for part in parts if part is not None]
    return [span for part in read for span in part] if read else None


def _json_span(values: Any, units: tuple[str, str], duration: float | None) -> Span | None:
    first, second = (_json_time(value, unit, duration) for value, unit in zip(values, units, strict=True))
    if first is None or second is None:
        return None
    span = Span(first.beside(second), second.beside(first))
    return span if all(map(math.isfinite, span)) else None


def _json_time(value: Any, unit: str, duration: float | None) -> _Time | None:
    """The time in a JSON value: a number in `unit` (seconds when empty), `"7.9s"`, `"0:12"`, `"25%"`."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    text = value.strip(" <>\"'") if isinstance(value, str) else repr(value)
    match = _TIME.fullmatch(text)
    if match is not None and unit and text[-1:].isdigit() and not match["clock"]:
        match = _TIME.fullmatch(f"{text} {unit}")
    return None if match is None else _read_time(match, duration)


# ---------------------------------------------------------------------------------------------- denial and absence
_NOT = r"(?:\b(?:not|never|cannot|nor)|n't)\b"
_ADVERBS = r"(?: (?:ever|actually|really|be|been|being|seem to|appear to|get|explicitly|even|anywhere))*"
_HAPPENS = (
    r"(?:happen(?:s|ed|ing)?|occur(?:s|red|ring)?|appear(?:s|ed|ing)?|exists?|present|tak(?:e|es|ing) place|shown|"
    r"found|seen|visible|depicted|featured|captured|contained|included|observed|detected|identified|there)"
)
_SHOWS = (
    r"(?:show|contain|include|depict|feature|have|capture|display|find|see|locate|detect|identify|observe|spot)"
    r"(?:s|ed|ing)?"
)
_THINGS = (
    r"(?:(?:such|matching|relevant|related|corresponding|suitable|similar|described|specified|target|visual) )*"
    r"(?:events?|moments?|segments?|clips?|actions?|scenes?|activit(?:y|ies)|windows?|intervals?|match(?:es)?|"
    r"occurrences?|instances?|evidence|signs?)"
)
_THERE_IS_NO = r"\bthere(?: is|'s| are| was| were) no\b"
_UNLESS_AFFIRMED = r"(?:(?!\b(?:happens|occurs|appears|begins|starts|takes|is|are|was|were)\b)[^.;!?])*"
_QUOTED = re.compile(r'"[^"\n]{0,240}"')
_NEGATIVE = re.compile(r"\b(?:no|nor|not|never|cannot)\b|n't\b", re.IGNORECASE)
_CLAUSE_BREAK = re.compile(
    r"[;!?\n]|\.(?!\d)|, (?:it|he|she|they)\b"
    r"|\b(?:but|instead|rather|however|though|although|until|then|except)\b",
    re.IGNORECASE,
)
_DENIES = re.compile(
    rf"(?:{_NOT}{_ADVERBS} (?:{_HAPPENS}|{_SHOWS})\b|\bno {_THINGS}\b|{_THERE_IS_NO}){_UNLESS_AFFIRMED}$"
    rf"|{_NOT}{_ADVERBS}(?: (?:from|between|at|in|during|for|within|about|around|the))*[ <\"'(\[]*$",
    re.IGNORECASE,
)

_IN_VIDEO = (
    r"(?: (?:in|within|during|throughout|on|from) (?:any(?: part)? of )?"
    r"(?:(?:the|this|that|these|your) (?:[\w-]+ ){0,3}?)?(?:videos?|clips?|footage|recording|sequence|frames|scenes?))"
)
_AT_ALL = r"(?: (?:anywhere|at all|at any (?:point|time|moment)))?"
_CLAUSE_END = r"""(?= ?(?:[.,;:!?)"\n<]|$|(?:because|since|as|so|and|or|therefore|thus|given)\b))"""
# What a video does not show or a reader cannot find: a thing, not its time, and without a word that limits it.
_OBJECT = (
    r"(?! (?:when|whether|how|where|(?:the|this|your|any) (?:video|clip)s?\b"
    r"|(?:[\w-]+ ){0,2}(?:exact|precise|specific|clear|clearly|timestamps?|times?|start|end|enough|only|just)\b))"
    r"(?:(?! (?:until|till|before|after|except|other than)\b)[^.,;!?\n]){0,160}"
)
_RELATION = r"(?: (?:is|are|was|were|that|which|where|when|of|with|match\w*|found|like|showing|could|can|exists?)\b)"
_ABSENT = re.compile(
    rf"{_NOT}{_ADVERBS} {_HAPPENS}{_AT_ALL}{_IN_VIDEO}?{_AT_ALL}{_CLAUSE_END}"
    rf"|{_NOT}{_ADVERBS}{_IN_VIDEO}{_AT_ALL}{_CLAUSE_END}"
    rf"|(?:{_NOT}|\bunable to|\bfail(?:s|ed)? to){_ADVERBS} {_SHOWS}\b{_OBJECT}{_CLAUSE_END}"
    rf"|(?:\bno|{_NOT}(?: match)? any) {_THINGS}(?:{_RELATION}|{_IN_VIDEO}?{_CLAUSE_END})"
    rf"|{_THERE_IS_NO} [^.,;!?\n]{{1,160}}{_IN_VIDEO}{_AT_ALL}{_CLAUSE_END}"
    rf"|\b(?:is|are|was|were|event|action|moment) (?:completely |entirely )?absent{_IN_VIDEO}?{_CLAUSE_END}",
    re.IGNORECASE,
)
_ABSENT_ALONE = re.compile(
    r"\W{0,3}(?:none|n/a|absent|never|not (?:found|present|applicable|shown|visible))\W{0,3}|(?:json\n)?\[ ?\]\.?",
    re.IGNORECASE,
)
_HEDGE = re.compile(r"\b(?:if|whether|unless|unsure|might|may|maybe|perhaps|possibly)\b", re.IGNORECASE)
_LENGTH_OF_VIDEO = re.compile(
    r"[- ]?(?:(?:seconds?|minutes?|hours?|secs?|mins?|s)[- ])?(?:long )?(?:of )?(?:video|clip|footage|recording)\b",
    re.IGNORECASE,
)


def _is_denied(text: str, begin: int) -> bool:
    """Whether the clause before a window says that nothing happens there."""
    before = text[max(0, begin - 160) : begin]
    if not _NEGATIVE.search(before):
        return False
    before = _QUOTED.sub("", before)
    return _DENIES.search(_CLAUSE_BREAK.split(before)[-1]) is not None


def _says_absent(text: str) -> bool:
    """Whether the text says that the event is not in the video, and names no time."""
    if _ABSENT_ALONE.fullmatch(text):
        return True
    unquoted = _QUOTED.sub("it", text)
    if _names_time(unquoted):
        return False
    for match in _ABSENT.finditer(unquoted):
        before = unquoted[max(0, match.start() - 160) : match.start()]
        if not _HEDGE.search(_CLAUSE_BREAK.split(before)[-1]):
            return True
    return False


def _names_time(text: str) -> bool:
    """Whether a number stands there that is neither a count (`2 cups`) nor the length of the video."""
    for time in _times(text, None):
        following = _NEXT_WORD.match(text, time.stop)
        counts = time.kind == "plain" and following and _is_counted(following[1])
        if not (counts or _LENGTH_OF_VIDEO.match(text, time.stop)):
            return True
    return False
