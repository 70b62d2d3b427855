"""What is shown when a process of torchrun fails: its own line where it gave one, torchrun's stack where it did not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from scripts import torchrun
from utils.common import REPO_ROOT


def failing(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    """Let torchrun end as it does when a process ended with `status`."""

    def run_main() -> None:
        raise ChildFailedError("train_sft.py", {1: ProcessFailure(1, 4711, status, "<N/A>")})

    monkeypatch.setattr(torchrun.run, "main", run_main)


@pytest.mark.parametrize("status", [2, 130, 143])
def test_a_process_that_gave_its_reason_is_not_talked_over(
    status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, status)
    assert torchrun.main() == 1
    assert capsys.readouterr().err == f"process 1 ended with status {status}; the reason stands above\n"


@pytest.mark.parametrize("status", [1, -9])
def test_a_crash_keeps_its_stack(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, status)
    with pytest.raises(ChildFailedError):
        torchrun.main()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_mistake_on_two_processes_is_one_line(tmp_path: Path) -> None:
    """As a user meets it: the shipped configuration where there are no annotations."""
    command = [str(REPO_ROOT / "scripts/sft.sh"), "--num_gpus", "2"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "error: data.train names data/annotations/train.jsonl" in ended.stderr
    assert ended.stderr.splitlines()[-1].endswith("ended with status 2; the reason stands above")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.multiprocess
def test_processes_start_and_end_as_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os\nopen(os.environ['RANK'], 'w').write(os.environ['WORLD_SIZE'])\n")
    command = [sys.executable, str(REPO_ROOT / "scripts/torchrun.py"), "--standalone", "--nproc_per_node", "2", script]
    assert subprocess.run(command, cwd=tmp_path, timeout=300).returncode == 0
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2", "2"]
