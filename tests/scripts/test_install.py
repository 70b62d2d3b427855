"""Setting up: what env/install.sh would install on which machine, its stamp, the metadata, and scripts/test.sh.

`python3.11` is a stand-in here: it makes an environment whose Python writes down the calls of pip and hands everything
else to the real one. A real installation takes minutes and 6 GB.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from utils.common import REPO_ROOT

INDEX = "https://download.pytorch.org/whl"

FAKE_PYTHON = """#!/bin/sh
case "$*" in
    "-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
    "-m pip --version") ;;
    "-m pip install --help") echo " raw " ;;
    "-m pip list "*) printf 'torch==2.6.0+cu124\\ntorchvision==0.21.0+cu124\\n' ;;
    "-m pip "*)
        echo "$@" >>"$CALLS"
        env | grep -E '^(PYTHONPATH|VIRTUAL_ENV|PIP_)' >"$CALLS.env"
        case "$*" in *"${FAIL_ON:-no such call}"*) echo "ERROR: no space left"; exit 1 ;; esac ;;
    "- "*) cat >/dev/null; if [ -n "$BROKEN_TORCH" ]; then echo "$BROKEN_TORCH" >&2; exit 1; fi ;;
    *) exec REAL "$@" ;;
esac
"""

NVIDIA_SMI = """#!/bin/sh
echo 'Sat Nov 21 10:00:00 2026'
echo '| NVIDIA-SMI 550.54.15    Driver Version: 550.54.15    CUDA Version: VERSION     |'
"""


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class Machine:
    """A copy of what install.sh reads, and a PATH with stand-ins in front."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"
        self.bin = folder / "bin"
        self.calls = folder / "calls"
        shutil.copytree(REPO_ROOT / "env", self.root / "env", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(REPO_ROOT / "pyproject.toml", self.root)
        write_program(self.bin / "python3.11", FAKE_PYTHON.replace("REAL", sys.executable))
        self.stamp = self.root / ".venv" / "vtg_installed"

    def install(self, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run install.sh from another folder, without the settings of this process that would lead it elsewhere."""
        leave_out = ("VTG_PYTHON", "CONDA_DEFAULT_ENV", "CUDA_VISIBLE_DEVICES")
        env = {key: value for key, value in os.environ.items() if key not in leave_out}
        env |= {"PATH": f"{self.bin}{os.pathsep}/usr/bin{os.pathsep}/bin", "CALLS": str(self.calls)} | environment
        command = [self.root / "env" / "install.sh", *options]
        return subprocess.run(command, cwd=self.bin, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)

    def driver(self, cuda: str) -> None:
        """Put in a GPU whose driver runs this CUDA version at most."""
        write_program(self.bin / "nvidia-smi", NVIDIA_SMI.replace("VERSION", cuda))

    def pip_calls(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# --- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "arguments"),
    [
        ("11.8", f"--index-url {INDEX}/cu118 torch>=2.6,<2.8 torchvision"),
        ("12.2", f"--index-url {INDEX}/cu124 torch>=2.6,<2.7 torchvision"),
        ("12.4", f"--index-url {INDEX}/cu124 torch>=2.6,<2.7 torchvision"),
        ("12.6", f"--index-url {INDEX}/cu126 torch>=2.6,<2.8 torchvision"),
        ("12.8", f"--index-url {INDEX}/cu128 torch>=2.6,<2.11 torchvision"),
        ("12.10", f"--index-url {INDEX}/cu128 torch>=2.6,<2.11 torchvision"),
        ("13.0", "torch>=2.6 torchvision"),
        ("13.2", "torch>=2.6 torchvision"),
        (None, "torch>=2.6 torchvision"),
    ],
)
def test_torch_build_follows_the_driver(machine: Machine, cuda: str | None, arguments: str) -> None:
    if cuda:
        machine.driver(cuda)
    result = machine.install("--print_plan")
    assert result.returncode == 0, result.stderr
    plan = [re.sub(r"\\(.)", r"\1", line.strip()) for line in result.stdout.splitlines()]
    prefix = machine.root / ".venv"
    pip = f"{prefix}/bin/python -m pip install"
    assert plan == [
        f"{machine.bin}/python3.11 -m venv --clear {prefix}",
        f"{pip} --upgrade pip",
        f"{pip} {arguments}",
        f"{pip} --constraint {prefix}/vtg_constraints.txt -r env/requirements.txt -e .[dev]",
    ]
    assert not prefix.exists() and machine.pip_calls() == []


def test_new_words_of_nvidia_smi(machine: Machine) -> None:
    write_program(machine.bin / "nvidia-smi", NVIDIA_SMI.replace("CUDA Version: VERSION", "CUDA UMD Version: 12.8"))
    assert f"{INDEX}/cu128" in machine.install("--print_plan").stdout


def test_own_index_for_torch(machine: Machine) -> None:
    machine.driver("12.4")
    plan = machine.install("--print_plan", "--torch_index", "https://mirror.example/cu124").stdout
    assert "--index-url https://mirror.example/cu124 torch" in plan and INDEX not in plan


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (NVIDIA_SMI.replace("VERSION", "11.4"), "driver runs CUDA 11.4 at most, too old for torch 2.6"),
        ("#!/bin/sh\necho 'could not communicate with the NVIDIA driver.'\nexit 9\n", "could not communicate"),
        ("#!/bin/sh\necho 'something else'\n", "names no CUDA version"),
    ],
    ids=["too old", "no driver", "no version"],
)
def test_gpu_that_cannot_be_used_stops(machine: Machine, script: str, error: str) -> None:
    write_program(machine.bin / "nvidia-smi", script)
    result = machine.install("--print_plan")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and error in result.stderr and "CUDA_VISIBLE_DEVICES=" in result.stderr
    asked = machine.install("--print_plan", CUDA_VISIBLE_DEVICES="")
    assert asked.returncode == 0 and "pip install torch" in asked.stdout


def test_tool_without_a_gpu_is_quiet(machine: Machine) -> None:
    write_program(machine.bin / "nvidia-smi", "#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    result = machine.install("--print_plan")
    assert result.returncode == 0 and "no GPU" in result.stderr and INDEX not in result.stdout


def test_conda(machine: Machine) -> None:
    write_program(machine.bin / "conda", '#!/bin/sh\n[ "$1" = info ] && echo /opt/forge || exit 1\n')
    result = machine.install("--conda", "--print_plan", "--print_python")
    lines = (result.stderr + result.stdout).splitlines()
    assert "conda create --yes --quiet --name vtg_env python=3.11 pip " in lines
    assert result.stdout.splitlines()[-1] == "/opt/forge/envs/vtg_env/bin/python"


def test_conda_missing(machine: Machine) -> None:
    result = machine.install("--conda")
    error = "error: --conda needs conda on PATH; install Miniforge, or leave --conda out\n"
    assert (result.returncode, result.stderr) == (2, error)


def test_python_too_old(machine: Machine) -> None:
    for name in ("3.11", "3.12", "3.13", "3.14", "3", ""):
        write_program(machine.bin / f"python{name}", "#!/bin/sh\nexit 1\n")
    result = machine.install()
    assert result.returncode == 2 and "error: no Python 3.11 or newer on PATH" in result.stderr


def test_python_without_venv(machine: Machine) -> None:
    for name in ("3.11", "3.12", "3.13", "3.14", "3", ""):
        write_program(machine.bin / f"python{name}", '#!/bin/sh\ncase "$2" in *ensurepip*) exit 1 ;; esac\n')
    result = machine.install()
    assert result.returncode == 2 and "cannot make virtual environments; install its venv package" in result.stderr


def test_options(machine: Machine) -> None:
    shown = machine.install("--help").stdout
    source = (REPO_ROOT / "env" / "install.sh").read_text()
    accepted = {option.replace("-", "_") for option in re.findall(r"^ +(--[a-z-]+)(?: \| -h)?\)", source, re.MULTILINE)}
    assert accepted == {option.replace("-", "_") for option in re.findall(r"^  (--[a-z_-]+)", shown, re.MULTILINE)}
    wrong = machine.install("--pritn_plan")
    assert wrong.returncode == 2 and "unknown option --pritn_plan" in wrong.stderr


# --- the stamp --------------------------------------------------------------------------------------------------------


def test_second_run_does_nothing(machine: Machine) -> None:
    first = machine.install("--print_python")
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"{machine.root}/.venv/bin/python\n"
    assert len(machine.pip_calls()) == 3
    again = machine.install("--print_python")
    assert (again.returncode, again.stdout, again.stderr) == (0, first.stdout, "")
    assert len(machine.pip_calls()) == 3


@pytest.mark.parametrize("step", ["torchvision", "requirements.txt"])
def test_interrupted_installation_goes_on(machine: Machine, step: str) -> None:
    failed = machine.install(FAIL_ON=step)
    assert failed.returncode == 2 and "no space left" in failed.stderr and "run the same command again" in failed.stderr
    assert not machine.stamp.exists()
    before = len(machine.pip_calls())
    assert machine.install().returncode == 0 and machine.stamp.exists()
    assert len(machine.pip_calls()) == before + 3


def test_changed_dependencies_are_installed_and_a_failure_leaves_no_stamp(machine: Machine) -> None:
    machine.install()
    with (machine.root / "pyproject.toml").open("a") as file:
        file.write("# another dependency\n")
    assert machine.install(FAIL_ON="requirements.txt").returncode == 2
    assert not machine.stamp.exists()
    assert machine.install().returncode == 0
    assert len(machine.pip_calls()) == 9


def test_a_new_driver_is_noticed_and_a_missing_gpu_is_not(machine: Machine) -> None:
    machine.install()
    machine.driver("12.4")
    assert machine.install().returncode == 0
    assert f"{INDEX}/cu124" in machine.pip_calls()[4]
    assert machine.install(CUDA_VISIBLE_DEVICES="").stderr == ""
    assert len(machine.pip_calls()) == 6


def test_moved_checkout_gets_a_new_environment(machine: Machine) -> None:
    machine.install()
    (machine.root / ".venv" / "old").write_text("")
    machine.root = machine.root.rename(machine.root.with_name("moved"))
    assert machine.install().returncode == 0
    assert f"root: {machine.root}\n" in (machine.root / ".venv" / "vtg_installed").read_text()


def test_the_environment_of_another_checkout_is_left_alone(machine: Machine, tmp_path: Path) -> None:
    machine.install()
    environment = machine.root / ".venv"
    before = sorted(path.name for path in environment.iterdir())
    machine.root = Path(shutil.copytree(machine.root, tmp_path / "second", ignore=shutil.ignore_patterns(".venv")))
    (machine.root / ".venv").symlink_to(environment)
    result = machine.install()
    assert result.returncode == 2 and "belongs to another checkout" in result.stderr
    assert sorted(path.name for path in environment.iterdir()) == before


def test_torch_that_cannot_use_the_gpu_is_refused(machine: Machine) -> None:
    result = machine.install(BROKEN_TORCH="a GPU is there and torch cannot use it")
    assert result.returncode == 2 and "torch cannot use it" in result.stderr
    assert not machine.stamp.exists()


def test_torch_is_pinned_for_the_rest(machine: Machine) -> None:
    machine.install()
    constraints = (machine.root / ".venv" / "vtg_constraints.txt").read_text()
    assert constraints == "torch==2.6.0+cu124\ntorchvision==0.21.0+cu124\n"


def test_nothing_leaks_in_but_the_settings_of_pip(machine: Machine) -> None:
    machine.install(PYTHONPATH="/elsewhere", VIRTUAL_ENV="/other", PIP_TARGET="/t", PIP_INDEX_URL="https://i.example")
    seen = Path(f"{machine.calls}.env").read_text().splitlines()
    assert "PIP_INDEX_URL=https://i.example" in seen and "PIP_USER=0" in seen
    assert [line for line in seen if line.startswith(("PYTHONPATH", "VIRTUAL_ENV", "PIP_TARGET"))] == []


def test_flash_attn_may_fail(machine: Machine) -> None:
    write_program(machine.bin / "python3.11", FAKE_PYTHON.replace("REAL", f"{sys.executable} -S"))
    result = machine.install("--with-flash-attn", FAIL_ON="flash-attn")
    assert result.returncode == 0 and machine.stamp.exists()
    assert "flash-attn could not be built" in result.stderr.splitlines()[-1]


def test_own_python_is_taken_as_it_is(machine: Machine) -> None:
    result = machine.install("--print_python", VTG_PYTHON=sys.executable)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{sys.executable}\n", "")
    assert machine.install(VTG_PYTHON="/no/python").returncode == 2
    assert machine.pip_calls() == []


def test_the_plan_with_an_own_python_is_to_install_nothing(machine: Machine) -> None:
    result = machine.install("--print_plan", "--print_python", VTG_PYTHON=sys.executable)
    said = f"VTG_PYTHON={sys.executable} is used as it is; nothing will be installed\n"
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{sys.executable}\n", said)
    assert machine.pip_calls() == [] and not machine.stamp.exists()


# --- metadata ---------------------------------------------------------------------------------------------------------


def test_requirements_hold_nothing_but_the_project() -> None:
    """So the list in pyproject.toml is the only one, and the two cannot drift apart."""
    lines = (REPO_ROOT / "env" / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == ["-e ."]
    assert lines[-1] == "-e ."


def test_every_dependency_says_why() -> None:
    text = (REPO_ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        assert re.search(rf'^    "{re.escape(requirement)}",  # \S', text, re.MULTILINE), requirement


NO_IMPORT_STATEMENT = {
    "accelerate": "used by Trainer",
    "decord": "imported by name when it is the backend",
    "deepspeed": "used by Trainer, with --deepspeed",
    "qwen-vl-utils": "imported by name when it is the backend",
    "tensorboard": "used by Trainer, for its logs",
    "torchvision": "used by the processor",
}


def test_dependencies_are_those_the_code_imports() -> None:
    project = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[^\w-]", item)[0] for item in project["dependencies"]}
    rooms = ["utils", "datasets", "trainers", "rewards", "inference", "scripts", "."]
    files = [path for room in rooms for path in (REPO_ROOT / room).glob("*.py")]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    modules = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    packages = importlib.metadata.packages_distributions()
    imported = {packages[module][0].lower().replace("_", "-") for module in modules if module in packages}
    for_contributors = {re.split(r"[^\w-]", item)[0] for item in project["optional-dependencies"]["dev"]}
    assert imported - declared == {"nbclient", "nbformat"} <= for_contributors  # scripts/run_notebook.py
    assert declared - imported <= set(NO_IMPORT_STATEMENT)


def test_editable_wheel_requires_what_pyproject_says(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("editable_only", REPO_ROOT / "env" / "editable_only.py")
    assert spec and spec.loader
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    wheel = zipfile.ZipFile(tmp_path / backend.build_editable(str(tmp_path)))
    metadata = wheel.read("qwen3_vl_grpo_vtg-0.1.0.dist-info/METADATA").decode().splitlines()
    project = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text())["project"]
    dev = [f"{item}; extra == 'dev'" for item in project["optional-dependencies"]["dev"]]
    required = [line.removeprefix("Requires-Dist: ") for line in metadata if line.startswith("Requires-Dist: ")]
    assert required == [*project["dependencies"], *dev]
    assert {name.split("/")[0] for name in wheel.namelist()} == {
        "_qwen3_vl_grpo_vtg_editable.py",
        "qwen3_vl_grpo_vtg.pth",
        "qwen3_vl_grpo_vtg-0.1.0.dist-info",
    }
    on_linux = "a>=1; sys_platform == 'linux'"
    assert backend._only_with("dev", on_linux) == "a>=1; (sys_platform == 'linux') and extra == 'dev'"


def test_wheel_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, REPO_ROOT]
    result = subprocess.run(command, capture_output=True, text=True)
    reason = "error: qwen3-vl-grpo-vtg is for editable use only and cannot be built into a wheel"
    assert result.returncode == 1 and reason in result.stdout + result.stderr
    assert list(tmp_path.iterdir()) == []


# --- scripts/test.sh --------------------------------------------------------------------------------------------------


def run_tests(
    tmp_path: Path, script: str, *arguments: str, fails: str = "no such call", path: str = os.environ["PATH"]
) -> tuple[int, list[str], str]:
    """Status, calls of Python and output of a script, started in another folder with a Python that only records."""
    python = tmp_path / "python"
    calls = tmp_path / "calls"
    write_program(python, f'#!/bin/sh\necho "$@" >>"{calls}"\ncase "$*" in *"{fails}"*) exit 1 ;; esac\n')
    environment = os.environ | {"VTG_PYTHON": str(python), "PATH": path}
    command = [REPO_ROOT / script, *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    return result.returncode, calls.read_text().splitlines()[1:], result.stdout


SLOW = "slow or gpu or multiprocess or browser"
FAST = f"-m pytest -m not ({SLOW})"
SPREAD = "-n logical --maxprocesses 8 --dist loadfile"


def path_with(tmp_path: Path, **programs: str) -> str:
    """PATH with these scripts, and without the machine's own chromium and apt-get."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for program in (file for place in os.environ["PATH"].split(":") if place for file in Path(place).glob("*")):
        if program.name not in ("chromium", "apt-get", *programs) and not os.path.lexists(folder / program.name):
            (folder / program.name).symlink_to(program)
    for name, text in programs.items():
        write_program(folder / name.replace("_", "-"), f"#!/bin/sh\n{text}\n")
    return str(folder)


CI_CALLS = ["-m ruff check", "-m mypy", f"{FAST} {SPREAD}", f"{FAST} -m browser tests/inference"]


@pytest.mark.parametrize(
    ("programs", "said"),
    [
        ({"chromium": "exit 1"}, []),
        ({"apt_get": 'echo "$*" >>apt_calls', "id": "echo 0"}, ["installing"]),
        ({"apt_get": 'echo "$*" >>apt_calls', "id": "echo 1000"}, ["installing", "are skipped"]),
        ({"apt_get": "exit 100", "id": "echo 0"}, ["installing", "are skipped"]),
        ({"id": "echo 0"}, ["installing", "are skipped"]),
    ],
    ids=["there", "installed", "not root", "apt fails", "no apt"],
)
def test_check_of_a_change(programs: dict[str, str], said: list[str], tmp_path: Path) -> None:
    """The fast suite and the tests in a browser, whether or not there is one."""
    programs = {name: text.replace("apt_calls", f"{tmp_path}/apt") for name, text in programs.items()}
    status, calls, output = run_tests(tmp_path, ".ci/run", path=path_with(tmp_path, **programs))
    assert (status, [call for call in calls if call.startswith("-m")]) == (0, CI_CALLS)
    assert [words for words in ("installing", "are skipped") if words in output] == said
    installed = (tmp_path / "apt").read_text().splitlines() if (tmp_path / "apt").exists() else []
    assert installed == (["update", "install -y --no-install-recommends chromium"] if said == ["installing"] else [])


def test_check_stops_at_the_fast_suite(tmp_path: Path) -> None:
    path = path_with(tmp_path, chromium="exit 1")
    status, calls, _ = run_tests(tmp_path, ".ci/run", fails="mypy", path=path)
    assert status == 1 and not any("browser tests" in call for call in calls)


def test_arguments_go_to_pytest(tmp_path: Path) -> None:
    assert run_tests(tmp_path, "scripts/test.sh", "tests/utils", "-k", "spans")[1] == [f"{FAST} tests/utils -k spans"]


def test_all_writes_a_report(tmp_path: Path) -> None:
    status, calls, _ = run_tests(tmp_path, "scripts/test.sh", "--all")
    assert status == 0 and calls[:2] == ["-m ruff check", "-m mypy"]
    assert re.fullmatch(rf"{re.escape(FAST)} --junitxml \S+/fast.xml {SPREAD}", calls[2])
    assert re.fullmatch(rf"-m pytest -m {SLOW} --junitxml \S+/rest.xml", calls[3])
    assert re.fullmatch(r"scripts/summarise_tests.py \S+/fast.xml \S+/rest.xml docs/testing.md", calls[4])
    some = run_tests(tmp_path, "scripts/test.sh", "--all", "tests/utils")[1]
    assert re.fullmatch(r"-m pytest --junitxml \S+/all.xml tests/utils", some[-2])
    assert re.fullmatch(r"scripts/summarise_tests.py \S+/all.xml docs/testing.md", some[-1])


def test_one_failing_step_fails_the_run_and_hides_no_other(tmp_path: Path) -> None:
    status, calls, output = run_tests(tmp_path, "scripts/test.sh", fails="mypy")
    assert status == 1 and len(calls) == 3 and output.splitlines()[-1] == "failed: mypy"


def test_report_of_a_run(tmp_path: Path) -> None:
    suite = tmp_path / "test_suite.py"
    suite.write_text(
        "import pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no CUDA device')\ndef test_skipped(): pass\n"
        "@pytest.mark.skip(reason='no CUDA device')\ndef test_skipped_too(): pass\n"
    )
    options = ["--rootdir", tmp_path, "-c", os.devnull, "-p", "no:cacheprovider", "--junitxml", tmp_path / "junit.xml"]
    subprocess.run([sys.executable, "-m", "pytest", suite, *options], cwd=tmp_path, capture_output=True)
    command = [sys.executable, REPO_ROOT / "scripts/summarise_tests.py", "junit.xml", "testing.md"]
    summary = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert summary == "1 passed, 1 failed, 2 skipped; written to testing.md\n"
    report = (tmp_path / "testing.md").read_text()
    assert "- 1 passed, 1 failed, 2 skipped; their seconds add up to 0" in report
    assert "| test_suite | 1 | 1 | 2 |" in report
    assert "- `test_suite::test_fails`: assert 1 == 2" in report
    assert "- 2 x no CUDA device" in report
