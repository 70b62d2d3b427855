"""What an evaluation found, as `metrics.json` and as a table for the terminal.

Every part of it is `utils.metrics` on some of the samples: all of them, those of a bin of durations, window lengths,
positions or a key of `kwargs`, and all of them with a constant answer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from utils.common import UserError, nearest
from utils.logging_utils import get_logger
from utils.metrics import METRICS, baseline_predictions, best_constant_predictions, evaluate, evaluate_intervals
from utils.spans import Span
from utils.windows import covered_s, merged

Sample = Mapping[str, Any]

DURATION_EDGES_S = (30, 60, 120, 300, 600, 1800)
LENGTH_EDGES_S = (2, 5, 10, 30, 60, 150)
"""Windows of up to 10 s, 30 s and 150 s are the short, middle and long ones of QVHighlights."""
POSITION_EDGES = (0.2, 0.4, 0.6, 0.8)
NUM_QUANTILES, MAX_GROUPS = 5, 50
BIN_METRICS = ("mIoU", "R1@0.5")
"""Get an interval in every bin."""
ALWAYS_BY = "difficulty"
"""The key of kwargs that is broken down by wherever rows have it."""
NONE = "(none)"
"""The group of rows without the key."""
_FIRST_NUMBER = re.compile(r"(?:over )?(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?=[-\s]|$)")


def summarise(samples: Sequence[Sample], protocol: str, by: Sequence[str] = ()) -> dict[str, Any]:
    """Averages, 95 % intervals, counts, baselines and breakdowns of `samples`, in percent, ready for JSON.

    A sample also holds `kwargs`, its row's; `by` names keys of it to break down by, beside `difficulty`, which is
    always shown where rows have it. Raises UserError for a key that no row has or that has too many values.
    """
    scores = evaluate(samples, protocol)
    return {
        "protocol": protocol,
        "averages": {name: scores[name] for name in METRICS},
        "intervals": evaluate_intervals(samples, protocol=protocol),
        "counts": {name: value for name, value in scores.items() if name not in METRICS},
        "baselines": baselines(samples, protocol),
        "breakdowns": breakdowns(samples, protocol, by),
    }


def baselines(samples: Sequence[Sample], protocol: str) -> dict[str, Any]:
    """The averages of constant answers. `best_constant` is searched on these rows, and says which window it is."""
    constant, window = best_constant_predictions(samples)
    answers = {
        "whole_video": baseline_predictions(samples, "whole_video"),
        "centre": baseline_predictions(samples, "centre"),
        "best_constant": constant,
    }
    scored = {name: evaluate(rows, protocol) for name, rows in answers.items()}
    found: dict[str, Any] = {name: {key: row[key] for key in METRICS} for name, row in scored.items()}
    found["best_constant"]["window"] = list(window)
    return found


# ---------------------------------------------------------------------------------------------- breakdowns
def breakdowns(samples: Sequence[Sample], protocol: str, by: Sequence[str]) -> dict[str, Any]:
    """Per way to divide the samples, per group in order: its averages, counts and the intervals of `BIN_METRICS`."""
    ways: dict[str, Callable[[Sample], str | None]] = {
        "duration": lambda sample: _bin(sample["duration"], DURATION_EDGES_S, "s"),
        "window_length": lambda sample: _bin(_labelled_s(sample), LENGTH_EDGES_S, "s") if sample["gt"] else None,
        "position": lambda sample: _position(sample) if sample["gt"] else None,
    }
    ways |= {f"kwargs.{key}": _grouping(samples, key) for key in by}
    if f"kwargs.{ALWAYS_BY}" not in ways and any(_value(sample, ALWAYS_BY) is not None for sample in samples):
        try:
            ways[f"kwargs.{ALWAYS_BY}"] = _grouping(samples, ALWAYS_BY)
        except UserError as error:  # nobody asked for it, so it must not cost the result
            get_logger().warning("not broken down by %s: %s", ALWAYS_BY, error)
    return {name: _divided(samples, group_of, protocol) for name, group_of in ways.items()}


def check_keys(kwargs: Sequence[Mapping[str, Any]], by: Iterable[str]) -> None:
    """Raise UserError for a key that `summarise` would refuse; `kwargs` holds every row's."""
    for key in by:
        _grouping([{"kwargs": row} for row in kwargs], key)


def _divided(samples: Sequence[Sample], group_of: Callable[[Sample], str | None], protocol: str) -> dict[str, Any]:
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        if (group := group_of(sample)) is not None:
            groups.setdefault(group, []).append(sample)
    return {
        group: evaluate(groups[group], protocol)
        | {"intervals": evaluate_intervals(groups[group], names=BIN_METRICS, protocol=protocol)}
        for group in sorted(groups, key=_in_order)
    }


def _bin(value: float, edges: Sequence[float], unit: str) -> str:
    """The bin of `value`, its upper edge included.

    >>> _bin(30, (30, 60), "s"), _bin(30.1, (30, 60), "s"), _bin(99, (30, 60), "s")
    ('0-30 s', '30-60 s', 'over 60 s')
    """
    for low, high in zip((0, *edges), edges, strict=False):
        if value <= high:
            return f"{low:g}-{high:g} {unit}"
    return f"over {edges[-1]:g} {unit}"


def _in_order(group: str) -> tuple[int, float, str]:
    """Groups by their first number, those of words by name, `(none)` last."""
    number = _FIRST_NUMBER.match(group)
    if number is None:
        return (2 if group == NONE else 1, 0.0, group)
    return (0, float(number[1]) + (1e-9 if group.startswith("over ") else 0.0), group)


def _labelled_s(sample: Sample) -> float:
    """Seconds that the row's labelled windows cover together."""
    return covered_s(Span(*window) for window in sample["gt"])


def _position(sample: Sample) -> str:
    """Where the middle of the first labelled window lies in the video."""
    first = (merged(Span(*window) for window in sample["gt"]) or [Span(*sample["gt"][0])])[0]
    share = (first.start + first.end) / 2 / sample["duration"]
    return _bin(100 * min(share, 1.0), [100 * edge for edge in (*POSITION_EDGES, 1.0)], "%")


def _grouping(samples: Sequence[Sample], key: str) -> Callable[[Sample], str | None]:
    """How rows are told apart by `kwargs[key]`: by value, or many numbers by quantiles. Raises UserError for a key
    that no row has, and for one with more than `MAX_GROUPS` values that are no numbers."""
    values = [_value(sample, key) for sample in samples]
    given = [value for value in values if value is not None]
    if not given:
        known = sorted({name for sample in samples for name in sample["kwargs"]})
        match = nearest(key, known)
        hint = f"did you mean {match}? They have" if match else "they have"
        raise UserError(f"--by {key}: no row has it in kwargs; {hint} {', '.join(known[:20]) or 'no keys at all'}")
    words = {word_of(value) for value in given}
    if len(words) > NUM_QUANTILES * 2 and all(_is_number(value) for value in given):
        edges = sorted({float(edge) for edge in np.quantile(given, np.arange(1, NUM_QUANTILES + 1) / NUM_QUANTILES)})
        return lambda sample: _quantile(_value(sample, key), min(given), edges)
    if len(words) > MAX_GROUPS:
        raise UserError(f"--by {key}: {len(words)} different values, more than {MAX_GROUPS}; choose a coarser key")
    return lambda sample: word_of(_value(sample, key))


def _quantile(value: Any, least: float, edges: Sequence[float]) -> str:
    if value is None:
        return NONE
    bins = list(zip((least, *edges), edges, strict=False))
    low, high = next(((low, high) for low, high in bins if value <= high), bins[-1])
    return f"{low:.3g}{'-' if low >= 0 else ' to '}{high:.3g}"


def _value(sample: Sample, key: str) -> Any:
    """The sample's value; None for NaN and infinity, which belong to no bin."""
    value = sample["kwargs"].get(key)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def word_of(value: Any) -> str:
    """The name of the group that a value of `kwargs` puts its row in."""
    if value is None:
        return NONE
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


# ---------------------------------------------------------------------------------------------- the table
def render(found: Mapping[str, Any]) -> str:
    """`summarise`'s result (with further counts) as text for a terminal, in percent."""
    counts = ", ".join(f"{value} {name.removeprefix('num_')}" for name, value in found["counts"].items() if value)
    head = f"protocol {found['protocol']}; {counts.replace('_', ' ')}"
    return "\n\n".join([head, _headline(found), *_breakdown_tables(found["breakdowns"])])


def _headline(found: Mapping[str, Any]) -> str:
    start, end = found["baselines"]["best_constant"]["window"]
    columns = {
        "whole_video": "whole video",
        "centre": "middle half",
        "best_constant": f"best constant ({100 * start:.0f}-{100 * end:.0f} %)",
    }
    rows = [["metric, %", "value", "95 % interval", *columns.values()]]
    for name in METRICS:
        value, interval = found["averages"][name], found["intervals"][name]
        if not math.isnan(value):
            others = [_percent(found["baselines"][column][name]) for column in columns]
            rows.append([name, _percent(value), f"{interval[0]:.1f} to {interval[1]:.1f}", *others])
    return _table(rows)


def _breakdown_tables(parts: Mapping[str, Any]) -> Iterable[str]:
    names = ("mIoU", "R1@0.3", "R1@0.5", "R1@0.7", "mAP")
    for way, groups in parts.items():
        if len(groups) < 2:
            continue  # one group is the table above
        rows = [[f"by {way}", "queries", *names, "mIoU 95 %"]]
        for group, row in groups.items():
            low, high = row["intervals"]["mIoU"]
            interval = "-" if math.isnan(low) else f"{low:.1f} to {high:.1f}"
            rows.append([group, str(row["num_samples"]), *(_percent(row[name]) for name in names), interval])
        yield _table(rows)


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
