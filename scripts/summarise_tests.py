"""Writes docs/testing.md from the JUnit files of a test run: date, machine, counts, seconds, what was skipped and why.

Used by `scripts/test.sh --all`: python scripts/summarise_tests.py fast.xml rest.xml docs/testing.md
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":  # run as a file: Python put this file's folder on the path instead of the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.common import atomic_open, run_command

_NUM_SLOWEST = 10


@dataclass(frozen=True)
class Case:
    """One test as run."""

    room: str
    """The folder of the test file: `tests/utils`."""
    name: str
    outcome: str
    """`passed`, `failed` or `skipped`; an expected failure counts as skipped, with its reason."""
    seconds: float
    reason: str
    """Why it was skipped, or the first line of the failure; empty when passed."""


def read_cases(paths: Iterable[Path]) -> list[Case]:
    """The tests of JUnit files."""
    return [_case(element) for path in paths for element in ElementTree.parse(path).iter("testcase")]


def _case(element: ElementTree.Element) -> Case:
    module = element.get("classname", "")
    room = "/".join(module.split(".")[:2]) if module.count(".") > 1 else module.split(".")[0]
    outcome, reason = "passed", ""
    for child in element:
        if child.tag in ("failure", "error", "skipped"):
            outcome = "skipped" if child.tag == "skipped" else "failed"
            reason = (child.get("message") or "").strip().partition("\n")[0]
    return Case(room, f"{module}::{element.get('name')}", outcome, float(element.get("time", "0")), reason)


def render(cases: list[Case], when: datetime) -> str:
    """The report as Markdown."""
    lines = [
        "# Last full test run",
        "",
        "Written by `./scripts/test.sh --all`; `./scripts/test.sh` runs the fast tests alone.",
        "",
        f"- {when:%Y-%m-%d %H:%M} UTC, {os.cpu_count()} cores, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl")),
        f"- {_counts(cases)}; their seconds add up to {sum(case.seconds for case in cases):.0f}",
        "",
        "| tests | passed | failed | skipped | seconds |",
        "| --- | ---: | ---: | ---: | ---: |",
        *_rows(cases),
    ]
    lines += _section("Failed", [f"`{case.name}`: {case.reason}" for case in cases if case.outcome == "failed"])
    reasons = Counter(case.reason for case in cases if case.outcome == "skipped")
    lines += _section("Skipped", [f"{count} x {reason}" for reason, count in reasons.most_common()])
    slowest = sorted(cases, key=lambda case: -case.seconds)[:_NUM_SLOWEST]
    lines += _section("Slowest", [f"{case.seconds:.1f} s `{case.name}`" for case in slowest])
    return "\n".join(lines) + "\n"


def _rows(cases: list[Case]) -> list[str]:
    rooms: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        rooms[case.room].append(case)
    rows = []
    for room, members in sorted(rooms.items()):
        outcomes = Counter(case.outcome for case in members)
        counts = " | ".join(str(outcomes[key]) for key in ("passed", "failed", "skipped"))
        rows.append(f"| {room} | {counts} | {sum(case.seconds for case in members):.1f} |")
    return rows


def _counts(cases: list[Case]) -> str:
    outcomes = Counter(case.outcome for case in cases)
    return ", ".join(f"{outcomes[key]} {key}" for key in ("passed", "failed", "skipped"))


def _section(title: str, items: list[str]) -> list[str]:
    return ["", f"## {title}", "", *(f"- {item}" for item in items)] if items else []


def main() -> int:
    """Read the JUnit files and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("junit", type=Path, nargs="+")
    parser.add_argument("report", type=Path)
    args = parser.parse_args()
    cases = read_cases(args.junit)
    with atomic_open(args.report) as handle:
        handle.write(render(cases, datetime.now(UTC)))
    print(f"{_counts(cases)}; written to {args.report}")
    return 0


if __name__ == "__main__":
    run_command(main)
