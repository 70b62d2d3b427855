"""The report's `index.html`: numbers as words, rows as data, all in one Jinja2 template with its style and script.

Whatever comes from annotations or answers reaches the page through Jinja2's escaping, or as JSON that the script shows
as text; a content security policy lets no other script run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2

from inference.report_compare import Comparison, Difference
from inference.report_data import Evaluation
from inference.report_figures import Picture
from utils.common import or_nan
from utils.metrics import METRICS
from utils.palette import THEMES

GENERATOR = "inference/report.py"
"""What a page of ours names as its generator: such a folder may be replaced."""
SCRIPTS = ("dom.js", "table.js", "player.js", "main.js")
CARDS = ("mIoU", "R1@0.3", "R1@0.5", "R1@0.7", "mAP")
GROUP_METRICS = ("R1@0.3", "R1@0.5", "R1@0.7", "mAP")
LOWER_IS_BETTER = ("parse_failure_rate",)
LABELS = {
    "set_IoU": "set IoU",
    "absent_accuracy": "absence recognised",
    "parse_failure_rate": "unparsable answers",
}
WAYS = {
    "duration": "Duration of the clip",
    "window_length": "Length of the labelled windows",
    "position": "Position of the first labelled window",
}
_REACHES = (5, 10, 20, 50, 100)
_FOLDER = Path(__file__).parent / "templates"


def render_page(
    evaluation: Evaluation,
    comparison: Comparison | None,
    figures: Sequence[Picture],
    rows: Sequence[Mapping[str, Any]],
    videos: Sequence[Mapping[str, Any]],
    keys: Mapping[str, Sequence[str]],
) -> str:
    """The page as text. `rows` and `videos` are `inference.report_rows`, `keys` what rows can be filtered by."""
    parts = "\n".join((_FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = f'(() => {{\n"use strict";\n{parts}\n}})();'
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    environment.filters["signed"] = signed
    entries = headline(evaluation.metrics, comparison)
    data = {"rows": rows, "videos": videos, "name": evaluation.name, "vs": comparison and comparison.theirs.name}
    return environment.get_template("report.html").render(
        generator=GENERATOR,
        style=(_FOLDER / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        palettes={name: asdict(palette) for name, palette in THEMES.items()},
        data=embedded_json(data),
        name=evaluation.name,
        metrics=evaluation.metrics,
        comparison=comparison,
        headline=entries,
        reach=_reach([entry["difference"] for entry in entries if entry["difference"]]),
        cards=CARDS,
        breakdowns=_breakdowns(evaluation.metrics),
        group_metrics=GROUP_METRICS,
        protocols=_protocols(evaluation.metrics),
        counts=[(name.removeprefix("num_").replace("_", " "), n) for name, n in evaluation.metrics["counts"].items()],
        settings=[(key, _setting(value)) for key, value in evaluation.run.items()],
        figures=figures,
        keys=keys,
    )


def embedded_json(value: Any) -> str:
    """JSON that can stand in a `<script>` element: nothing in it can end the element or open a comment.

    >>> print(embedded_json({"sentence": "</script>"}))
    {"sentence":"\\u003c/script\\u003e"}
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def headline(metrics: Mapping[str, Any], comparison: Comparison | None) -> list[dict[str, Any]]:
    """One entry for each metric that was measured: value, interval and constant answers from `metrics.json`."""
    found = []
    for name in METRICS:
        if math.isnan(or_nan(metrics["averages"][name])):
            continue
        difference = comparison.metrics.get(name) if comparison else None
        found.append(
            {
                "name": name,
                "label": LABELS.get(name, name),
                "value": metrics["averages"][name],
                "interval": metrics["intervals"][name],
                "baselines": {key: row[name] for key, row in metrics["baselines"].items()},
                "difference": difference,
                "verdict": _verdict(name, difference),
            }
        )
    return found


def _reach(differences: Sequence[Difference]) -> int:
    """How far the axis of differences goes to either side, in per cent."""
    most = max((abs(bound) for difference in differences for bound in difference.interval), default=0.0)
    return next((reach for reach in _REACHES if most <= reach), _REACHES[-1])


def _verdict(name: str, difference: Difference | None) -> str:
    if difference is None or not difference.is_clear:
        return "unclear"
    return "better" if (difference.difference > 0) != (name in LOWER_IS_BETTER) else "worse"


def _breakdowns(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """By title; those of one group say nothing new."""
    ways = metrics["breakdowns"].items()
    return {WAYS.get(way, way.removeprefix("kwargs.")): groups for way, groups in ways if len(groups) > 1}


def _protocols(metrics: Mapping[str, Any]) -> tuple[list[str], dict[str, list[float | None]]]:
    names = [name for name in METRICS if any(row[name] is not None for row in metrics["protocols"].values())]
    return names, {protocol: [row[name] for name in names] for protocol, row in metrics["protocols"].items()}


def _setting(value: Any) -> str:
    if isinstance(value, dict) and "name" in value:
        return f"{value['name']} ({str(value.get('sha256'))[:8]})"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def percent(value: float | None, digits: int = 1) -> str:
    """A number of per cent as words; a dash for one that was not measured."""
    return "–" if math.isnan(or_nan(value)) else f"{value:.{digits}f}"


def signed(value: float, digits: int = 1) -> str:
    """A difference with its sign.

    >>> signed(2.04), signed(-0.31), signed(-0.01)
    ('+2.0', '−0.3', '0.0')
    """
    rounded = round(value, digits)
    return f"{'+' if rounded > 0 else '−' if rounded < 0 else ''}{abs(rounded):.{digits}f}"
