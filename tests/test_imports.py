"""The folder called datasets: Hugging Face's package and ours under one name, wherever Python is started.

Each case runs in a process of its own, in one of two throw-away environments that see the packages of this one: `plain`
has them only, `editable` has the project installed besides.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import textwrap
import venv
from pathlib import Path

import nbclient
import nbformat
import pytest
from _pytest.mark import ParameterSet

from utils.attach import attach
from utils.common import REPO_ROOT

LOCAL = str(REPO_ROOT / "datasets")

CHECK = """
import datasets
from datasets.video_dataset import VideoTemporalDataset

assert callable(datasets.load_dataset)
assert VideoTemporalDataset.__module__ == "datasets.video_dataset"
assert datasets.__path__[1:] == [LOCAL] and datasets.__path__[0] != LOCAL, datasets.__path__
"""
"""Both halves are there: first Hugging Face's folder, then ours, once."""

CHECK_TRL = "from trl import GRPOTrainer"

ATTACH_LATE = """
sys.path.append(ROOT)
from utils.attach import attach
attach()
"""
"""What a notebook or script elsewhere does where the project is not installed."""

CHECK_WORKERS = """
from torch.utils.data import DataLoader

for start in ("fork", "spawn"):  # the class travels by name: a spawned worker has nothing but sys.path to find it by
    loader = DataLoader([VideoTemporalDataset], collate_fn=repr, num_workers=1, multiprocessing_context=start)
    assert list(loader) == ["[<class 'datasets.video_dataset.VideoTemporalDataset'>]"], start
"""


def make_environment(folder: Path) -> Path:
    """A virtual environment that sees the packages of this one, but not its `.pth` files: no editable install."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    get_site = [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    site = subprocess.run(get_site, check=True, capture_output=True, text=True).stdout.strip()
    Path(site, "zz_packages.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment without the project."""
    return make_environment(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def editable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment where `pip install -e .` was run."""
    python = make_environment(tmp_path_factory.mktemp("editable"))
    install = ["-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([sys.executable, *install, "--editable", REPO_ROOT], check=True)
    return python


@pytest.fixture
def python(request: pytest.FixtureRequest) -> Path:
    """The environment that the test names: `plain` or `editable`."""
    return request.getfixturevalue(request.param)


def run(command: list[str | Path], cwd: Path) -> str:
    """Run in `cwd`, as from a fresh shell, and return standard output; a failure shows standard error."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def run_code(python: Path, cwd: Path, root: Path, *code: str) -> None:
    """Run pieces of code in one process started in `cwd`; they know the checkout as ROOT and its folder as LOCAL."""
    names = ["import sys", f"ROOT = {str(root)!r}", f"LOCAL = {str(root / 'datasets')!r}"]
    run([python, "-c", "\n".join([*names, *code])], cwd)


# --- attach() ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A root with the two files that matter and one module, `datasets.light`, that costs nothing to import."""
    root = tmp_path / "checkout"
    for name in ("utils/__init__.py", "utils/attach.py", "datasets/__init__.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text((REPO_ROOT / name).read_text())
    (root / "datasets" / "light.py").write_text("def path():\n    import datasets\n\n    return datasets.__path__\n")
    return root


CHECK_LIGHT = """
import datasets, multiprocessing
from concurrent.futures import ProcessPoolExecutor
from datasets.light import path

assert callable(datasets.load_dataset)
assert datasets.__path__[1:] == [LOCAL] and datasets.__path__[0] != LOCAL, datasets.__path__
with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
    assert pool.submit(path).result() == datasets.__path__
"""


def test_attach_again_changes_nothing() -> None:
    import datasets

    before = list(datasets.__path__), list(sys.path)
    attach()
    assert (list(datasets.__path__), list(sys.path)) == before
    assert before[0].count(LOCAL) == 1


def test_trl_finds_hugging_face_in_this_process() -> None:
    from trl import GRPOTrainer

    assert GRPOTrainer.__module__ == "trl.trainer.grpo_trainer"


def test_attach_is_light(plain: Path, tmp_path: Path) -> None:
    heavy = "heavy = {'datasets', 'torch', 'numpy', 'transformers'} & set(sys.modules)"
    run_code(plain, tmp_path, REPO_ROOT, ATTACH_LATE, heavy, "assert not heavy, heavy")


@pytest.mark.parametrize("before", ["", "import datasets", "import datasets.features"])
def test_root_last_on_the_path(before: str, plain: Path, tmp_path: Path, checkout: Path) -> None:
    """Whatever was imported before, and for workers too: `attach()` moves the root to where they find it."""
    run_code(plain, tmp_path, checkout, before, ATTACH_LATE, CHECK_LIGHT, "attach()", CHECK_LIGHT)


def test_folders_of_these_names_beside_a_script(plain: Path, tmp_path: Path, checkout: Path) -> None:
    """A data folder called datasets does no harm to us, and our folder none to a program with `utils` of its own."""
    (tmp_path / "datasets").mkdir()
    run_code(plain, tmp_path, checkout, ATTACH_LATE, CHECK_LIGHT)
    (tmp_path / "utils.py").write_text("")
    run_code(plain, tmp_path, checkout, "import utils", "sys.path.insert(0, ROOT)", CHECK_LIGHT)


def test_another_checkout_is_installed(editable: Path, checkout: Path) -> None:
    """The folder one works in wins over the installed one, whose modules never get mixed in."""
    run_code(editable, checkout, checkout, CHECK_LIGHT)


def test_hugging_face_missing(tmp_path: Path) -> None:
    venv.create(tmp_path, with_pip=False, symlinks=True)
    command = [tmp_path / "bin" / "python", "-c", "import datasets"]
    result = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "ModuleNotFoundError: Hugging Face's `datasets` is not installed; run ./env/install.sh" in result.stderr


# --- from the root and from elsewhere, with and without the install ---------------------------------------------------


def test_from_the_root_without_install(plain: Path) -> None:
    run_code(plain, REPO_ROOT, REPO_ROOT, CHECK, CHECK_WORKERS)


def test_from_elsewhere_with_install(editable: Path, tmp_path: Path) -> None:
    run_code(editable, tmp_path, REPO_ROOT, CHECK, CHECK_WORKERS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trl_first", "place", "python"),
    [
        (True, "root", "plain"),
        (False, "root", "plain"),
        (True, "root", "editable"),
        (True, "elsewhere", "plain"),
        (True, "elsewhere", "editable"),
    ],
    indirect=["python"],
)
def test_with_trl(trl_first: bool, place: str, python: Path, tmp_path: Path) -> None:
    find_root = ATTACH_LATE if place == "elsewhere" and "plain" in str(python) else ""
    code = [CHECK_TRL, find_root, CHECK] if trl_first else [find_root, CHECK, CHECK_TRL]
    run_code(python, REPO_ROOT if place == "root" else tmp_path, REPO_ROOT, *code)


def test_installed_packages_are_those_of_the_checkout(editable: Path, tmp_path: Path) -> None:
    code = "import utils, trainers, inference; print(utils.__file__, trainers.__file__, inference.__file__)"
    files = run([editable, "-c", code], tmp_path).split()
    assert files == [str(REPO_ROOT / name / "__init__.py") for name in ("utils", "trainers", "inference")]


def test_install_adds_no_package_to_site_packages(editable: Path) -> None:
    site = next(editable.parents[1].glob("lib/python*/site-packages"))
    assert sorted(path.name for path in site.iterdir() if path.name != "__pycache__") == [
        "_qwen3_vl_grpo_vtg_editable.py",
        "qwen3_vl_grpo_vtg-0.1.0.dist-info",
        "qwen3_vl_grpo_vtg.pth",
        "zz_packages.pth",
    ]


# --- every `python X` -------------------------------------------------------------------------------------------------


def entry_files() -> list[str]:
    """Files that can be run, relative to the root: `train_sft.py`, `scripts/make_demo_data.py`, ..."""
    rooms = [".", "scripts", "inference", "utils", "datasets", "trainers", "rewards"]
    files = sorted(path for room in rooms for path in (REPO_ROOT / room).glob("*.py"))
    return [str(path.relative_to(REPO_ROOT)) for path in files if _runs_as_main(path)]


def _runs_as_main(path: Path) -> bool:
    tests = [node.test for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.If)]
    calls = "run_command(" in path.read_text()
    return calls and any(ast.unparse(test) == "__name__ == '__main__'" for test in tests)


def entry_cases() -> list[ParameterSet]:
    """Each entry, marked slow if it imports a room that imports torch: that takes seconds, four times."""
    heavy = re.compile(r"^(from|import) (datasets|trainers|inference)\b", re.MULTILINE)
    return [
        pytest.param(entry, marks=pytest.mark.slow if heavy.search((REPO_ROOT / entry).read_text()) else ())
        for entry in entry_files()
    ]


@pytest.mark.parametrize("python", ["plain", "editable"], indirect=True)
@pytest.mark.parametrize("place", ["root", "elsewhere"])
@pytest.mark.parametrize("entry", entry_cases())
def test_entry_runs(entry: str, place: str, python: Path, tmp_path: Path) -> None:
    """`--help` gets past all imports. Rooms of plain modules are run by name (`python -m utils.data_validation`)."""
    by_name = entry.startswith(("utils/", "datasets/", "trainers/", "rewards/"))
    if by_name and place == "elsewhere" and "plain" in str(python):
        pytest.skip("`python -m` needs the root as working directory, or the install")
    command = ["-m", entry.removesuffix(".py").replace("/", ".")] if by_name else [REPO_ROOT / entry]
    assert "usage:" in run([python, *command, "--help"], REPO_ROOT if place == "root" else tmp_path)


# --- torchrun and notebooks -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("python", ["plain", "editable"], indirect=True)
def test_under_torchrun(python: Path, tmp_path: Path) -> None:
    """Two processes each see both halves and a worker of theirs does; `plain` gets the root as `train_sft.py` does."""
    script = tmp_path / "script.py"
    path = f"sys.path.insert(0, {str(REPO_ROOT)!r})" if "plain" in str(python) else ""  # as in train_sft.py's folder
    body = f"import sys\nLOCAL = {LOCAL!r}\n{path}\n{CHECK_TRL}\n{CHECK}\n"
    main = f"""
        if __name__ == "__main__":
            import torch.distributed as dist

            dist.init_process_group("gloo")
        {textwrap.indent(CHECK_WORKERS, "    " * 3)}
            ranks = [None, None]
            dist.all_gather_object(ranks, (dist.get_rank(), VideoTemporalDataset.__module__))
            if dist.get_rank() == 0:
                print(ranks)
            dist.destroy_process_group()
        """
    script.write_text(body + textwrap.dedent(main))
    output = run([python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script], tmp_path)
    assert output.strip() == "[(0, 'datasets.video_dataset'), (1, 'datasets.video_dataset')]"


@pytest.mark.slow
@pytest.mark.parametrize("python", ["plain", "editable"], indirect=True)
def test_in_a_notebook(python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook in a folder of its own; without the install it names the root and calls `attach()`."""
    kernel = tmp_path / "kernels" / "vtg" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": argv, "display_name": "vtg", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    names = f"import sys\nROOT = {str(REPO_ROOT)!r}\nLOCAL = {LOCAL!r}"
    cells = [names, ATTACH_LATE if "plain" in str(python) else "", CHECK, CHECK_WORKERS, "'done'"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, kernel_name="vtg", resources=resources, timeout=120).execute()
    assert notebook.cells[-1].outputs[0]["data"]["text/plain"] == "'done'"
