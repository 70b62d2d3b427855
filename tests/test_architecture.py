"""The arrows between the folders, what may be imported lightly, and where `sys.path` may be edited."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from utils.common import REPO_ROOT

PACKAGES = [name for name in ("utils", "datasets", "trainers", "rewards", "inference") if (REPO_ROOT / name).is_dir()]

PATH_EDIT = "sys.path[0] = str(Path(__file__).resolve().parents[1])"
"""The one line by which a script below the root finds it (utils/attach.py says why)."""


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the arrows of the tree in `folder`, in a process where `datasets` is not imported as Hugging Face's."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the packages and of the contracts."""
    for name in PACKAGES:
        shutil.copytree(REPO_ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO_ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_arrows_point_down() -> None:
    result = lint_imports(REPO_ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_copy_of_the_tree_passes(tree: Path) -> None:
    """Else the planted violations below prove nothing."""
    result = lint_imports(tree)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("where", "line", "broken"),
    [
        ("utils", "import datasets.video_dataset", "utils.planted -> datasets.video_dataset"),
        ("utils", "import trainers.model", "utils.planted -> trainers.model"),
        ("datasets", "import trainers.model", "datasets.planted -> trainers.model"),
        ("datasets", "from inference import video_infer", "datasets.planted -> inference.video_infer"),
        ("trainers", "import inference.video_infer", "trainers.planted -> inference.video_infer"),
        ("inference", "from trainers.sft_trainer import VideoSFTTrainer", "inference.planted -> trainers.sft_trainer"),
        ("inference", "import train_sft", "inference.planted -> train_sft"),
        ("trainers", "from scripts import make_demo_data", "trainers.planted -> scripts"),
    ],
)
def test_planted_violation_is_found(tree: Path, where: str, line: str, broken: str) -> None:
    (tree / where / "planted.py").write_text(f"def late():\n    {line}\n")
    result = lint_imports(tree)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"{broken} (l.2)" in result.stdout


@pytest.mark.parametrize("module", ["generation", "model"])
def test_planted_violation_inside_trainers_is_found(tree: Path, module: str) -> None:
    with (tree / "trainers" / f"{module}.py").open("a") as file:
        file.write("\n\ndef late():\n    import trainers.sft_trainer\n")
    result = lint_imports(tree)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"trainers.{module} -> trainers.sft_trainer" in result.stdout


def test_every_package_has_an_init() -> None:
    """A folder without one is merged with every folder of that name on the path."""
    folders = {path.parent for name in PACKAGES for path in (REPO_ROOT / name).rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ([f"utils.{path.stem}" for path in sorted((REPO_ROOT / "utils").glob("[!_]*.py"))], {"torch", "transformers"}),
        (["trainers", "inference"], {"torch", "transformers", "numpy", "datasets"}),
    ],
    ids=["utils", "packages"],
)
def test_light_imports(modules: list[str], heavy: set[str]) -> None:
    code = f"import sys, {', '.join(modules)}; print(*sorted({heavy!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO_ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr


def test_path_is_edited_in_the_documented_way() -> None:
    rooms = [*PACKAGES, "scripts", "scripts/benchmarks", "."]
    files = [path for room in rooms for path in (REPO_ROOT / room).glob("*.py")]
    edit = re.compile(r"^(\s*)(sys\.path(?:\[.*\]\s*=|\.(?:insert|append|extend)\().*?)(?:\s*#.*)?$", re.MULTILINE)
    found = {
        f"{path.relative_to(REPO_ROOT)}: {line}"
        for path in files
        if path != REPO_ROOT / "utils" / "attach.py"
        for indent, line in edit.findall(path.read_text())
        if not (indent == "    " and line == PATH_EDIT)
    }
    assert found == set()
