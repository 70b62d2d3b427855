"""The benchmarks' command line: each command has a module, and help costs no import of torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench import main, parse_args
from utils.common import REPO_ROOT

GRPO = ["grpo", "--prompt_tokens", "150", "--generations", "2", "--completion_tokens", "4"]
INFERENCE = ["inference", "--prompt_tokens", "150", "--queries", "2"]
SFT = ["sft", "--prompt_tokens", "150", "--queries", "2"]


@pytest.mark.parametrize("argv", [GRPO, ["grpo_curve"], SFT, INFERENCE], ids=lambda argv: argv[0])
def test_a_command_hands_its_options_to_its_module(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(f"scripts.benchmarks.{argv[0]}.run", found.append)
    main(argv)
    assert found == [parse_args(argv)] and found[0].command == argv[0]


def test_every_module_that_measures_has_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    modules = [path for path in (REPO_ROOT / "scripts/benchmarks").glob("[!_]*.py") if "def run(" in path.read_text()]
    assert {path.stem for path in modules} >= {"grpo", "grpo_curve", "sft", "inference"}
    for path in modules:
        with pytest.raises(SystemExit, match="0"):
            parse_args([path.stem, "--help"])
        assert f"{path.stem} [-h]" in capsys.readouterr().out


def test_options_of_old_commands() -> None:
    options = vars(parse_args([*GRPO, "--prompts", "2", "--size", "4b", "--device", "cuda", "--repeats", "5"]))
    assert options == {
        "command": "grpo", "prompt_tokens": 150, "generations": 2, "completion_tokens": 4, "prompts": 2, "size": "4b",
        "device": "cuda", "repeats": 5, "json": None,
    }  # fmt: skip
    curve = vars(parse_args(["grpo_curve"]))
    assert curve == {
        "command": "grpo_curve", "out": Path("docs/images/grpo_sharing.png"), "sweep": "both", "repeats": 2,
    }  # fmt: skip


@pytest.mark.parametrize(("size", "options", "vision"), [
    ("tiny", [], "trained"), ("4b", [], "frozen"), ("tiny", ["--vision", "frozen"], "frozen"),
    ("2b", ["--vision", "trained"], "trained"),
])  # fmt: skip
def test_vision_of_sft(size: str, options: list[str], vision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = []
    monkeypatch.setattr("scripts.benchmarks.sft.run_cell", cells.append)
    monkeypatch.setattr("scripts.benchmarks.sft.table", lambda record: "")
    main([*SFT, "--size", size, *options])
    assert [(cell.size, cell.vision, cell.queries, cell.videos) for cell in cells] == [(size, vision, 2, 1)]


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(REPO_ROOT / "scripts/bench.py"), *SFT[:-1], "1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1] == "error: --queries must be >= 2, got 1"


def test_help_is_quick(tmp_path: Path) -> None:
    """It imports neither torch nor transformers, wherever it is called."""
    script = REPO_ROOT / "scripts/bench.py"
    command = [sys.executable, "-X", "importtime", str(script), "sft", "--help"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "--answer_tokens" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "utils.common" in imported and not {"torch", "transformers", "scripts.benchmarks"} & imported
