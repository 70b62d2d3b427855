"""Build backend (PEP 517, PEP 660) that can do one thing: `pip install -e .`.

A wheel of this project would put top-level packages called `datasets` and `utils` into site-packages, the first over
Hugging Face's package, so wheels and source archives are refused. The editable install is a start-up hook: each Python
of the environment puts the checkout on its path, at the place that `utils.attach` chooses. The metadata comes from
`pyproject.toml`. Needs nothing but the standard library, so an install downloads no build tool.
"""

from __future__ import annotations

import base64
import hashlib
import tomllib
import zipfile
from pathlib import Path
from typing import Any, NoReturn

_ROOT = Path(__file__).resolve().parents[1]

_HOOK = '''"""Puts the checkout of {name} on the path. Written by `pip install -e`, removed by `pip uninstall`."""

import importlib.util
import os

_file = {attach!r}
if os.path.isfile(_file):  # else the checkout has moved: say so on its first import, not at every start of Python
    _spec = importlib.util.spec_from_file_location("_attach_datasets", _file)
    _module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
    _module.attach()
'''


def build_editable(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """Write the editable wheel (metadata and the start-up hook) into `wheel_directory` and return its file name."""
    project = _project()
    name = project["name"].replace("-", "_")
    info = f"{name}-{project['version']}.dist-info"
    files = {
        f"{name}.pth": f"import _{name}_editable\n",
        f"_{name}_editable.py": _HOOK.format(name=project["name"], attach=str(_ROOT / "utils/attach.py")),
        f"{info}/METADATA": _metadata(project),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: editable_only\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [f"{path},{_digest(text)},{len(text.encode())}" for path, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]) + "\n"
    wheel = f"{name}-{project['version']}-py3-none-any.whl"
    with zipfile.ZipFile(Path(wheel_directory) / wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return wheel


def build_wheel(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> NoReturn:
    """Refuse: see the module docstring."""
    _refuse("a wheel")


def build_sdist(sdist_directory: str, config_settings: dict[str, Any] | None = None) -> NoReturn:
    """Refuse: see the module docstring."""
    _refuse("a source archive")


def _refuse(what: str) -> NoReturn:
    raise SystemExit(
        f"error: {_project()['name']} is for editable use only and cannot be built into {what}, which would overwrite "
        "Hugging Face's `datasets` where it is installed; use `pip install -e .` in a checkout"
    )


def _project() -> dict[str, Any]:
    return tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _metadata(project: dict[str, Any]) -> str:
    lines = [
        "Metadata-Version: 2.4",
        f"Name: {project['name']}",
        f"Version: {project['version']}",
        f"Summary: {project['description']}",
        f"License-Expression: {project['license']}",
        f"Requires-Python: {project['requires-python']}",
        *(f"Requires-Dist: {requirement}" for requirement in project["dependencies"]),
    ]
    for extra, requirements in project["optional-dependencies"].items():
        lines.append(f"Provides-Extra: {extra}")
        lines.extend(f"Requires-Dist: {_only_with(extra, requirement)}" for requirement in requirements)
    return "\n".join(lines) + "\n"


def _only_with(extra: str, requirement: str) -> str:
    """The requirement under the condition that `extra` is asked for."""
    name, _, marker = requirement.partition(";")
    condition = f"extra == '{extra}'"
    return f"{name.strip()}; ({marker.strip()}) and {condition}" if marker else f"{name.strip()}; {condition}"


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
