"""The notebook of docs/, run as a user runs it: in the folder it lies in, where the demo has run and where not."""

from __future__ import annotations

import ast
import json
import sys
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from inference.video_infer import VideoTemporalInference
from scripts.run_notebook import executed
from utils.common import REPO_ROOT
from utils.metrics import METRICS, evaluate
from utils.video import probe_video

NOTEBOOK = REPO_ROOT / "docs" / "quickstart.ipynb"
ROOMS = ("train_sft.py", "configs", "utils", "datasets", "trainers", "rewards", "inference", "scripts")
Execute = Callable[[], nbformat.NotebookNode]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A root with the files of this one and no outputs, and a copy of the notebook in its docs/."""
    for name in ROOMS:
        (tmp_path / name).symlink_to(REPO_ROOT / name)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / NOTEBOOK.name).write_bytes(NOTEBOOK.read_bytes())
    return tmp_path


@pytest.fixture
def execute(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Execute:
    """Runs the copy with the Python of this process, in docs/."""
    kernel = checkout / "kernels" / "vtg" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": argv, "display_name": "vtg", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(checkout))
    monkeypatch.delenv("PYTHONPATH", raising=False)

    return lambda: executed(checkout / "docs" / NOTEBOOK.name, kernel="vtg")


def printed(notebook: nbformat.NotebookNode) -> str:
    """All that the cells printed."""
    return "".join(o.text for o in outputs(notebook, "stream") if o.name == "stdout")


def values(notebook: nbformat.NotebookNode, kind: str) -> list[str]:
    """The last expressions of the cells that have this kind of picture or text."""
    return [output.data[kind] for output in outputs(notebook, "execute_result") if kind in output.data]


def outputs(notebook: nbformat.NotebookNode, kind: str) -> list[Any]:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [output for cell in cells for output in cell.outputs if output.output_type == kind]


def check_evaluation(folder: Path, text: str, num_queries: int) -> dict[str, Any]:
    """The averages are those of the stored answers, and what is printed is the averages; gives metrics.json."""
    metrics = json.loads((folder / "metrics.json").read_text())
    stored = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    expected = evaluate(stored)
    assert metrics["counts"]["num_samples"] == len(stored) == num_queries
    assert [metrics["averages"][name] for name in METRICS if name != "absent_accuracy"] == [
        expected[name] for name in METRICS if name != "absent_accuracy"
    ]
    assert f"protocol default; {num_queries} samples" in text
    for protocol in ("default", "moment_detr", "timelens", "time_r1"):
        assert f"{protocol:12} mIoU {metrics['protocols'][protocol]['mIoU']:6.2f}" in text
    return metrics


def test_where_the_demo_has_run(checkout: Path, execute: Execute, answering_model: Path) -> None:
    """Its model answers in windows, each the one that `predict` gives here; all pictures are of them."""
    demo = checkout / "outputs/demo/sft/checkpoint-best"
    demo.parent.mkdir(parents=True)
    demo.symlink_to(answering_model)
    notebook = execute()
    text, output = printed(notebook), checkout / "outputs/quickstart"
    about, result = values(notebook, "text/plain")[:2]
    assert about.startswith("'outputs/demo/sft/checkpoint-best, trained; ")
    found = ast.literal_eval(result)
    here = VideoTemporalInference(answering_model).predict(checkout / found["video"], found["query"])
    assert found["segments"] == here["segments"] != [] and found["raw_text"] == here["raw_text"]
    assert f"\n{Path(found['video']).name:12} {found['query']:32} {here['start_time']:.1f}-" in text
    assert "\n8 of 8 answers are those of one by one\n" in text
    pictures = [b64decode(picture) for picture in values(notebook, "image/png")]
    assert pictures == [(output / name).read_bytes() for name in ("timeline.png", "queries.png", "worst.png")]
    assert len(set(pictures)) == 3
    assert probe_video(output / "timeline.mp4").duration_s == pytest.approx(here["clip"][1], abs=0.2)
    metrics = check_evaluation(output / "eval/sft-checkpoint-best", text, num_queries=200)
    assert metrics["averages"]["mIoU"] > 0 and metrics["averages"]["parse_failure_rate"] == 0


@pytest.mark.slow
def test_where_it_has_not(checkout: Path, execute: Execute) -> None:
    """A random model's answers cannot be read: said, drawn and counted as what they are."""
    notebook = execute()
    about, result = values(notebook, "text/plain")[:2]
    assert about.startswith("'outputs/quickstart/tiny_model, untrained: ./scripts/demo.sh trains one; ")
    assert ast.literal_eval(result)["parsed"] is False and len(values(notebook, "image/png")) == 3
    metrics = check_evaluation(
        checkout / "outputs/quickstart/eval/quickstart-tiny_model", printed(notebook), num_queries=200
    )
    assert metrics["averages"]["mIoU"] == 0 and metrics["averages"]["parse_failure_rate"] == 100


def test_what_is_in_git() -> None:
    """It has been run from top to bottom (by scripts/run_notebook.py), is small, and says nothing of that machine."""
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not outputs(notebook, "error") and len(values(notebook, "image/png")) == 3
    assert values(notebook, "text/plain")[0].startswith("'outputs/demo/sft/checkpoint-best, trained; ")
    assert "\n8 of 8 answers are those of one by one\n" in printed(notebook)
    assert NOTEBOOK.stat().st_size < 300_000
    text = NOTEBOOK.read_text()
    assert not [place for place in (str(REPO_ROOT), str(Path.home()), "/tmp/", "/root/", "/home/") if place in text]
