"""The one parser of answers and the one temporal IoU (contract 1): rewards, metrics, inference and export all use these.

How an answer is read:

1. Its last complete `<answer>...</answer>`; without one, what follows the last `</think>`; else the whole text.
2. The first grammar of `_GRAMMARS` that finds a window gives all windows, in written order:
   JSON objects by key, clock times (`1:05 - 1:12.5`), ranges with a unit (`3.2s - 7.9s`, `2 to 2.5 min`), labelled
   times (`Start: 3.0, End: 7`), plain ranges (`3 to 7`, `3 - 7`, `[3, 7]`, `between 3 and 7`).
3. Without a window, a sentence that says the event is absent gives `[]`; anything else gives None.

What is decided where an answer is doubtful: a unit on one side of a range holds for the other (`2 to 2.5 min`); a unit of
the last of several joined ranges holds for those before it. Times are never paired because they stand near each other:
something has to join or label them. Percentages, and fractions said to be "of the video", need the duration; frame
numbers, counts (`2 to 3 people`), decimal commas and dates give nothing. A range whose clause denies it
(`does not happen from 3 to 7 s`) is no window. Nothing is swapped, clipped or rounded: a reversed window stays as written.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterator
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
    answer = _plain_text(_answer_part(text))
    length = _positive(duration)
    for grammar in _GRAMMARS:
        spans = grammar(answer, length)
        if spans is not None:
            return spans
    return [] if _says_absent(answer) else None


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
    return intersection / hull if math.isfinite(hull) else 0.0


def _window(value: Any) -> Span | None:
    try:
        start, end = (float(bound) for bound in value)
    except (TypeError, ValueError, OverflowError):
        return None
    return Span(start, end) if math.isfinite(start) and math.isfinite(end) and end > start else None


def _positive(duration: Any) -> float | None:
    try:
        value = float(duration)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) and value > 0 else None


# ---------------------------------------------------------------------------------------------- what is read
_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"), "-")
_OTHER_CHARS = {ord("\u2192"): "->", ord("\u301c"): "~", ord("\u2019"): "'", ord("*"): "", ord("`"): ""}


def _answer_part(text: str) -> str:
    close = text.rfind("</answer>")
    while close != -1:
        start = text.rfind("<answer>", 0, close)
        if start != -1:
            return text[start + len("<answer>") : close]
        close = -1
    return text.rsplit("</think>", 1)[-1]


def _plain_text(text: str) -> str:
    """Full-width digits, the many dashes and markdown emphasis as plain characters."""
    return unicodedata.normalize("NFKC", text.translate(_DASHES)).translate(_DASHES).translate(_OTHER_CHARS)


# ---------------------------------------------------------------------------------------------- times in a text
# A sign counts unless it joins two numbers: after a digit, a letter or a closing bracket the dash is a separator.
_SIGN = r"(?:(?<![\w.)\]>%\"'])(?<!\d\s)[-+])?"
# Thousands have commas, but not between brackets: [100,200] is a pair.
_DIGITS = r"(?:(?<![\[(\d])\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\])\d,])|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
_GAP = r"[ \t\r\n\u00a0]{0,3}"
_HOURS = r"(?:hours?|hrs?|h)(?![A-Za-z])"
_MINUTES = r"(?:minutes?|mins?|m)(?![A-Za-z])"
_SECONDS = r"(?:seconds?|secs?|s)(?![A-Za-z])"
_JOIN = rf"{_GAP}(?:,|and\b)?{_GAP}"

_TIME = re.compile(
    rf"""
    (?<![\w.])(?P<sign>{_SIGN})(?<![A-Za-z_])
    (?:
      (?P<clock>(?:(?P<ch>\d{{1,4}}):)?(?P<cm>\d{{1,4}}):(?P<cs>\d{{2}}(?:\.\d+|,\d{{3}}(?!\d))?))(?![\d:]|\.\d)
        (?:{_GAP}(?:{_SECONDS}|{_MINUTES}))?
    | (?P<compound>
        (?P<h>{_DIGITS}){_GAP}{_HOURS}(?:{_JOIN}(?P<hm>{_DIGITS}){_GAP}{_MINUTES})?(?:{_JOIN}(?P<hs>{_DIGITS}){_GAP}{_SECONDS})?
      | (?P<m>{_DIGITS}){_GAP}{_MINUTES}{_JOIN}(?P<ms>{_DIGITS}){_GAP}{_SECONDS}
      )
    | (?P<number>{_DIGITS})(?![\d:]|\.\d)
        (?:{_GAP}(?:
            (?P<percent>%|percent\b|per{_GAP}cent\b)
          | (?P<unit>(?:milliseconds?|millisecs?|msecs?|ms)(?![A-Za-z])|{_SECONDS}|minutes?\b|mins?\b)
        ) | (?P<attached>m(?![A-Za-z])))?
      (?!\w)
    )
    """,
    re.VERBOSE | re.IGNORECASE,
)
_FRAME_BEFORE = re.compile(r"\bframes?[ ]?(?:indices|index|ids?|numbers?|no\.?|#)?[ :=#(\[]{0,3}$", re.IGNORECASE)
_FRAME_AFTER = re.compile(r"[ ]?(?:-?th|-?st|-?nd|-?rd)?[ -]?frames?\b", re.IGNORECASE)
_LOOK = 48
"""Characters looked at before, between and after times: enough for the words that join them, and bounded."""


class _Time(NamedTuple):
    value: float
    """Seconds; for "plain", "percent" and "frame" the bare number."""
    kind: str
    """clock, unit, plain, percent or frame."""
    scale: float
    """Seconds per unit of the number as written."""
    begin: int
    stop: int


def _times(text: str) -> list[_Time]:
    return [_read_time(text, match) for match in _TIME.finditer(text)]


def _read_time(text: str, match: re.Match[str]) -> _Time:
    group = match.groupdict()
    sign = -1.0 if group["sign"] == "-" else 1.0
    kind, value, scale = "plain", 0.0, 1.0
    if group["clock"]:
        seconds = _number(group["cs"].replace(",", "."))
        minutes = _number(group["cm"])
        in_range = seconds < 60 and (group["ch"] is None or minutes < 60)
        kind, value = "clock", 3600 * _number(group["ch"]) + 60 * minutes + seconds if in_range else math.nan
    elif group["compound"]:
        hours, minutes = _number(group["h"]), _number(group["hm"] or group["m"])
        kind, value = "unit", 3600 * hours + 60 * minutes + _number(group["hs"] or group["ms"])
    else:
        unit = (group["unit"] or group["attached"] or "").lower()
        scale = 0.001 if unit.startswith(("ms", "milli")) else 60.0 if unit.startswith("m") else 1.0
        kind = "percent" if group["percent"] else "unit" if unit else "plain"
        number = _number(group["number"])
        # Dividing keeps 1500 ms at exactly 1.5 s, which multiplying by 0.001 need not.
        value = number / 1000 if scale == 0.001 else number * scale
    before = text[max(0, match.start() - _LOOK) : match.start()]
    if kind == "plain" and (_FRAME_BEFORE.search(before) or _FRAME_AFTER.match(text, match.end())):
        kind = "frame"
    return _Time(sign * value, kind, scale, match.start(), match.end())


def _number(text: str | None) -> float:
    return float(text.replace(",", "")) if text else 0.0


# ---------------------------------------------------------------------------------------------- ranges
_ABOUT = r"(?:about|around|approximately|approx\.?|roughly|nearly|almost|the|time|t\s?=|~)"
_JOINS = re.compile(
    rf"""[\s>"')\]]{{0,4}},?\s?(?:(?:up[ ])?to|until|till|through|thru|-{{1,3}}>?|=>|~|\.{{2,3}})\s?(?:{_ABOUT}\s?){{0,2}}"""
    r"""[\s<"'(\[]{0,4}""",
    re.IGNORECASE,
)
_AND = re.compile(rf"""[\s>"')]{{0,3}}and\s?(?:{_ABOUT}\s?){{0,2}}[\s<"'(]{{0,3}}""", re.IGNORECASE)
_COMMA = re.compile(r"\s{0,3},\s{0,3}")
_BETWEEN = re.compile(rf"""\bbetween\s{{1,3}}(?:{_ABOUT}\s?){{0,2}}[<"'(]?$""", re.IGNORECASE)
_FROM = re.compile(rf"""\b(?:from|between|at|during|in|is|:)\s{{0,3}}(?:{_ABOUT}\s?){{0,2}}[<"'(\[]?$""", re.IGNORECASE)
_CONNECTS = re.compile(
    r"""[\s)\]>.]{0,3}(?:,|;|and|or|then|&|also|again|\s){1,6}(?:from|between|at)?[\s(\[<]{0,3}""", re.IGNORECASE
)
_OF_VIDEO = re.compile(
    r"\s{0,2}(?:\(?(?:normali[sz]ed|relative)|of\s(?:the\s|its\s)?(?:whole\s|total\s|full\s|entire\s)?"
    r"(?:video|clip|duration|length|footage))",
    re.IGNORECASE,
)
_NEXT_WORD = re.compile(r"[\s\"')\]>]{0,3}([A-Za-z]+)")
_FUNCTION_WORDS = frozenset(
    "in of is are was were and or the a an as at on when where while during with then for from to by it this that which "
    "he she they i so but because after before within until since if inside between also again has have".split()
)
_DENIES = re.compile(
    r"(?:\bnot\b|n't\b|\bnever\b|\bno\b|\bcannot\b|\bwithout\b|\bneither\b)[^.;!?]{0,60}$"
    r"|\bno\s(?:such\s)?(?:event|moment|segment|match)",
    re.IGNORECASE,
)
_CLAUSE_BREAK = re.compile(
    r"[;!?\n]|\.(?!\d)|,\s(?:it|but|rather|instead)\b|\bbut\b|\binstead\b|\brather\b", re.IGNORECASE
)


class _Range(NamedTuple):
    span: Span
    kind: str
    begin: int
    stop: int


def _ranges(text: str, duration: float | None) -> list[_Range]:
    """Every range that words or signs join, plain ones included; a unit reaches back over joined ranges."""
    times = _times(text)
    found: list[_Range] = []
    index = 0
    while index + 1 < len(times):
        first, second = times[index], times[index + 1]
        joined = _is_joined(text, first, second) and not _is_chain(text, times, index)
        window = _resolve(text, first, second, duration) if joined else None
        if window is not None and not _is_denied(text, first.begin):
            found.append(window)
        index += 2 if joined else 1
    for position in range(len(found) - 2, -1, -1):
        here, after = found[position], found[position + 1]
        if here.kind == "plain" and after.kind == "unit" and _CONNECTS.fullmatch(text[here.stop : after.begin][:_LOOK]):
            found[position] = here._replace(kind="unit")
    return found


def _is_joined(text: str, first: _Time, second: _Time) -> bool:
    gap = text[first.stop : second.begin]
    if len(gap) > _LOOK:
        return False
    if _JOINS.fullmatch(gap):
        return True
    before = text[max(0, first.begin - _LOOK) : first.begin]
    if _AND.fullmatch(gap):
        return bool(_BETWEEN.search(before))
    if not _COMMA.fullmatch(gap):
        return False
    opens = before.rstrip()[-1:] in ("[", "(")
    return opens and text[second.stop : second.stop + 4].lstrip()[:1] in ("]", ")")


def _is_chain(text: str, times: list[_Time], index: int) -> bool:
    """Whether a third number hangs on with a dash (a date, a part number) or by a decimal comma."""
    first, second = times[index], times[index + 1]
    if index and re.fullmatch(r"\s?[-/]\s?", text[times[index - 1].stop : first.begin][:4] or "x"):
        return True
    if index + 2 < len(times) and re.fullmatch(r"\s?[-/]\s?", text[second.stop : times[index + 2].begin][:4] or "x"):
        return True
    before, after = text[max(0, first.begin - 2) : first.begin], text[second.stop : second.stop + 2]
    return bool(re.match(r",\d", after) or re.search(r"\d,$", before))


def _resolve(text: str, first: _Time, second: _Time, duration: float | None) -> _Range | None:
    """The two times in seconds, units shared; None when they are not times or cannot be."""
    kinds = {first.kind, second.kind}
    if "frame" in kinds or (kinds == {"plain"} and not _may_be_seconds(text, first, second)):
        return None
    kind = next(k for k in ("clock", "percent", "unit", "plain") if k in kinds)
    start, end = first.value, second.value
    if kind == "unit":
        start = start * second.scale if first.kind == "plain" else start
        end = end * first.scale if second.kind == "plain" else end
    is_fraction = kind == "plain" and max(start, end) <= 1 and _OF_VIDEO.match(text, second.stop) is not None
    if kind == "percent" or is_fraction:
        if duration is None or not kinds <= {"percent", "plain"}:
            return None
        whole = 100.0 if kind == "percent" else 1.0
        start, end, kind = start / whole * duration, end / whole * duration, "unit"
    if not (math.isfinite(start) and math.isfinite(end)):
        return None
    return _Range(Span(start, end), kind, first.begin, second.stop)


def _may_be_seconds(text: str, first: _Time, second: _Time) -> bool:
    """Whether a range without unit reads as time: not when a noun follows (`2 to 3 people`), unless "from" precedes."""
    following = _NEXT_WORD.match(text, second.stop)
    if following is None or following.group(1).lower() in _FUNCTION_WORDS:
        return True
    return _FROM.search(text[max(0, first.begin - _LOOK) : first.begin]) is not None


def _is_denied(text: str, begin: int) -> bool:
    clause = _CLAUSE_BREAK.split(text[max(0, begin - 160) : begin])[-1] or ""
    return _DENIES.search(clause) is not None


def _ranges_of(*kinds: str) -> Callable[[str, float | None], list[Span] | None]:
    def grammar(text: str, duration: float | None) -> list[Span] | None:
        spans = [found.span for found in _ranges(text, duration) if found.kind in kinds]
        return spans or None

    return grammar


# ---------------------------------------------------------------------------------------------- labelled times
_LABEL_TAIL = (
    r"""(?:[\s_-]?(?:time|timestamp|point|second|sec|s|ing|ed|t))?(?:[\s_-]?(?:time|timestamp))?["'\])]?\s?"""
    r"""(?:[:=]|is|at|of|on|from|->|\s){0,3}\s?(?:about|around|approximately|roughly|time|t\s?=|~|the|\s){0,3}[<"'(\[]?$"""
)
_START_LABEL = re.compile(rf"(?<![A-Za-z])(?:starts?|begins?|beginning|onset){_LABEL_TAIL}", re.IGNORECASE)
_END_LABEL = re.compile(rf"(?<![A-Za-z])(?:ends?|stops?|finish(?:es)?|offset){_LABEL_TAIL}", re.IGNORECASE)


def _labelled(text: str, duration: float | None) -> list[Span] | None:
    """`Start: 3.0, End: 7`, `begins at 3 s and ends at 7 s`: each start with the end that follows it."""
    spans: list[Span] = []
    start: _Time | None = None
    for time in _times(text):
        before = text[max(0, time.begin - _LOOK) : time.begin]
        if time.kind in ("percent", "frame") or not math.isfinite(time.value):
            continue
        if _START_LABEL.search(before):
            start = None if _is_denied(text, time.begin) else time
        elif start is not None and _END_LABEL.search(before):
            first = start.value * (time.scale if start.kind == "plain" else 1.0)
            last = time.value * (start.scale if time.kind == "plain" else 1.0)
            spans.append(Span(first, last))
            start = None
    return spans or None


# ---------------------------------------------------------------------------------------------- JSON
_START_KEYS = ("start_time", "start", "start_s", "begin", "from")
_END_KEYS = ("end_time", "end", "end_s", "stop", "to")
_WINDOW_KEYS = (
    "time", "times", "timestamp", "timestamps", "segment", "segments", "span", "spans", "window", "windows",
    "interval", "intervals", "time_range", "answer", "event", "events",
)  # fmt: skip
_MAX_OBJECTS = 64
_DECODER = json.JSONDecoder()


def _json(text: str, duration: float | None) -> list[Span] | None:
    """Windows of every JSON object in the text that has one by key; `{"segments": []}` says absent."""
    spans: list[Span] = []
    said = False
    position = 0
    for _ in range(_MAX_OBJECTS):
        position = text.find("{", position)
        if position == -1:
            break
        try:
            value, position = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError):
            position += 1
            continue
        windows = _windows_in(value, duration, depth=0)
        if windows is not None:
            said = True
            spans += windows
    return spans if said else None


def _windows_in(value: Any, duration: float | None, depth: int) -> list[Span] | None:
    if depth > 8:
        return None
    if isinstance(value, dict):
        keys = {str(key).strip().lower(): item for key, item in value.items()}
        start, end = (next((keys[k] for k in names if k in keys), None) for names in (_START_KEYS, _END_KEYS))
        if start is not None and end is not None:
            window = Span(_scalar(start), _scalar(end))
            return [window] if all(map(math.isfinite, window)) else None
        return next(
            (found for k in _WINDOW_KEYS if k in keys and (found := _listed(keys[k], duration, depth)) is not None),
            None,
        )
    return _listed(value, duration, depth)


def _listed(value: Any, duration: float | None, depth: int) -> list[Span] | None:
    """Windows in the value of a key: a pair, a list of windows (empty: absent), an object, or text."""
    if isinstance(value, str):
        return parse_spans(value, duration) if "{" not in value else None
    if isinstance(value, dict):
        return _windows_in(value, duration, depth + 1)
    if not isinstance(value, list):
        return None
    if len(value) == 2 and all(math.isfinite(_scalar(item)) for item in value):
        return [Span(_scalar(value[0]), _scalar(value[1]))]
    parts = [_listed(item, duration, depth + 1) if depth < 8 else None for item in value]
    return None if any(not part for part in parts) else [span for part in parts for span in part or ()]


def _scalar(value: Any) -> float:
    """Seconds of a JSON value (a number, `"7.9s"`, `"0:12"`); nan for anything else."""
    if isinstance(value, bool):
        return math.nan
    if isinstance(value, int | float):
        try:
            return float(value)
        except OverflowError:
            return math.nan
    if isinstance(value, str):
        text = _plain_text(value).strip(" <>\"'")
        match = _TIME.fullmatch(text)
        time = _read_time(text, match) if match else None
        return time.value if time and time.kind in ("clock", "unit", "plain") else math.nan
    return math.nan


_GRAMMARS: tuple[Callable[[str, float | None], list[Span] | None], ...] = (
    _json,
    _ranges_of("clock"),
    _ranges_of("unit"),
    _labelled,
    _ranges_of("plain"),
)


# ---------------------------------------------------------------------------------------------- absence
_HAPPENS = (
    r"(?:happen|occur|appear|exist|present|take place|takes place|taking place|shown?|found|find|seen?|visible|depict|"
    r"feature|contain|include|observed|in (?:the|this) (?:video|clip|footage))"
)
_THINGS = (
    r"(?:event|moment|segment|clip|action|scene|activity|window|interval|match|occurrence|instance|part|portion|time|evidence|"
    r"sign)"
)
_ABSENT = re.compile(
    rf"(?:\bnot|n't|\bnever|\bcannot)\s(?:[\w-]+\s){{0,3}}?{_HAPPENS}"
    rf"|\bno\s(?:[\w-]+\s){{0,2}}?{_THINGS}"
    r"|\b(?:is|are|was|were)\sabsent\b"
    r"|^\W{0,3}(?:none|n/a|absent|never)\W{0,3}$",
    re.IGNORECASE,
)


def _says_absent(text: str) -> bool:
    """Whether the text says that the event is not in the video, and names no time at all."""
    lengths = re.compile(r"-(?:second|minute|hour|s\b)", re.IGNORECASE)
    named = any(not lengths.match(text, time.stop) for time in _iter_times(text))
    return not named and _ABSENT.search(text) is not None


def _iter_times(text: str) -> Iterator[_Time]:
    return (_read_time(text, match) for match in _TIME.finditer(text))
