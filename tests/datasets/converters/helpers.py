"""Small files in the form of each benchmark, written for these tests, and how they are converted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from scripts.convert_dataset import main
from utils.common import REPO_ROOT
from utils.data_validation import KINDS, Options, validate

ANNOTATIONS = Path(os.environ.get("VTG_ANNOTATIONS", REPO_ROOT.parent / "shared" / "annotations"))
"""The released files of the benchmarks; they keep their own terms and are no part of the project."""

JsonObject = dict[str, Any]


def released(name: str) -> Path:
    """A released file or folder; the test is skipped where it is not there."""
    path = ANNOTATIONS / name
    if not path.exists():
        pytest.skip(f"the released annotations are not there: {path} (VTG_ANNOTATIONS names their folder)")
    return path


def run(dataset: str, annotations: Path, out: Path, *options: str) -> tuple[list[JsonObject], JsonObject]:
    """The command; the rows and the report that it wrote."""
    report = out.with_suffix(".report.json")
    videos = [] if "--videos_dir" in options else ["--videos_dir", str(out.parent / "videos")]
    given = ["--dataset", dataset, "--annotations", str(annotations), "--output", str(out), "--report", str(report)]
    main([*given, *videos, *options])
    return read(out), json.loads(report.read_text())


def read(path: Path) -> list[JsonObject]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def save(path: Path, value: Any) -> Path:
    """A JSON file, one of JSON lines (a list, to a .jsonl), or text as it stands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, str):
        path.write_text(value)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(item) + "\n" for item in value))
    else:
        path.write_text(json.dumps(value))
    return path


def quirks(rows: list[JsonObject]) -> list[list[str]]:
    return [row["kwargs"]["quirks"] for row in rows]


def validated(path: Path, **options: Any) -> dict[str, int]:
    """Rows by kind of problem, as the validator reports them for a written file."""
    return validate([path], options=Options(**options)).counts


def known_to_validator(counts: dict[str, int]) -> dict[str, int]:
    return {kind: count for kind, count in counts.items() if kind in KINDS and count}
