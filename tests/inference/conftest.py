"""Evaluations that the tests of the report share: two of the same queries, with every kind of row and answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from utils.rows import Row, read_rows, write_rows
from utils.spans import Span

EVIL = 'says "<b>stop</b>" & leaves </script><script>window.hacked = 1</script><!-- {{ 7 * 7 }}'


@dataclass(frozen=True)
class EvaluationRuns:
    """Finished evaluations of one annotation file."""

    folder: Path
    annotations: Path

    @property
    def better(self) -> Path:
        """Nearly right answers."""
        return self.folder / "better"

    @property
    def worse(self) -> Path:
        """The same queries, answered worse."""
        return self.folder / "worse"


@pytest.fixture(scope="session")
def evaluation_runs(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluationRuns:
    """Queries q0 to q23 on twelve videos; never write into the folders, copy them.

    q3 has a sentence full of markup, q4 and q5 are labelled absent (q5 answered wrongly), q6 has two windows with
    scores, q7 is trimmed to 2-8 s, the video of q8 is gone, q9 cannot be parsed, q10 is answered absent, q11 is not
    labelled, q12 is answered with a time that is not a number, q13 is answered better by `worse`.
    """
    from inference.evaluate import main

    folder = tmp_path_factory.mktemp("runs")
    rows = annotated(read_rows(demo_data / "train.jsonl")[0][:24], demo_data)
    annotations = folder / "queries.jsonl"
    write_rows(annotations, rows)
    for name, shift_s in (("better", 0.1), ("worse", 0.8)):
        answers = folder / f"{name}.jsonl"
        answers.write_text("".join(json.dumps(answer_to(row, shift_s)) + "\n" for row in rows))
        flags = ["--predictions", str(answers), "--annotations", str(annotations)]
        main([*flags, "--output_dir", str(folder / name), "--by", "source"])
    return EvaluationRuns(folder, annotations)


def annotated(rows: Sequence[Row], videos: Path) -> list[Row]:
    """The rows of the fixture."""
    found = [
        replace(
            row,
            video=str(videos / row.video),
            kwargs={"qid": f"q{place}", "source": ("film", "home & more")[place % 2]},
        )
        for place, row in enumerate(rows)
    ]
    found[3] = replace(found[3], sentence=EVIL)
    found[4], found[5] = (replace(row, timestamp=()) for row in found[4:6])
    found[6] = replace(found[6], timestamp=(Span(1.0, 2.0), Span(4.0, 7.0)))
    found[7] = replace(found[7], timestamp=(Span(1.0, 3.0),), duration=6.0, video_start=2.0, video_end=8.0)
    found[8] = replace(found[8], video=str(videos / "videos" / "gone.mp4"))
    found[11] = replace(found[11], timestamp=None)
    return found


def answer_to(row: Row, shift_s: float) -> dict[str, Any]:
    """A line of a predictions file."""
    qid = row.kwargs["qid"]
    special: dict[str, Any] = {
        "q4": {"pred": []},
        "q5": {"text": "From 2.0 to 5.0 seconds."},
        "q6": {"pred": [[4.5, 7.0, 0.9 - shift_s], [1.0, 2.0, 0.5]]},
        "q9": {"text": "no idea"},
        "q10": {"text": "The event does not happen in the video."},
        "q12": {"pred": [[float("nan"), 3.0]]},
    }
    if qid in special:
        return {"qid": qid, **special[qid]}
    shift_s = 0.9 - shift_s if qid == "q13" else shift_s
    return {"qid": qid, "pred": [[start + shift_s, end + shift_s] for start, end in row.timestamp or ()]}
