"""Lets the local folder `datasets/` live beside Hugging Face's package of the same name.

`trl`, `transformers` and `accelerate` import Hugging Face's `datasets`, so the name has to mean that package, with our
folder as an extension of it: `datasets.load_dataset` and `datasets.video_dataset` both work. `attach()` sees to that,
whatever is first on the path. This file is the one place that edits `sys.path`, with one exception: a script below the
root that is run as a file (`python inference/video_infer.py`) cannot find this file before it has put the root on the
path, so it starts with

    if __name__ == "__main__":
        sys.path[0] = str(Path(__file__).resolve().parents[1])

(Python had put the script's own folder there.) Only the standard library is imported: every process pays for it.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from types import ModuleType

_ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
_LOCAL = os.path.join(_ROOT, "datasets")


def attach() -> None:
    """Make the modules of the local `datasets/` importable from Hugging Face's `datasets`; can be called at any time.

    An imported `datasets` gets the local folder appended to its `__path__`. One that is not imported yet stays so (that
    takes a second): the root is put in front of Hugging Face's copy on `sys.path`, so that `datasets/__init__.py` is
    the one that runs, and calls this function again. Worker processes inherit `sys.path`, however they are started.

    Raises:
        ModuleNotFoundError: `datasets` is being imported and Hugging Face's package is not installed.
    """
    _put_root_before_hugging_face()
    module = sys.modules.get("datasets")
    if module is None:
        return
    if _is_local(module.__spec__):
        module = _load_hugging_face()
    if _LOCAL not in module.__path__:
        module.__path__.append(_LOCAL)


def _put_root_before_hugging_face() -> None:
    for index, entry in enumerate(sys.path):
        if _is_root(entry):
            return
        # "" is the working directory: it can be the root now and something else later, so it never counts as the root
        spec = PathFinder.find_spec("datasets", [entry])
        if spec is not None and spec.origin is not None:  # a plain folder without `__init__.py` has no origin
            sys.path.insert(index, _ROOT)
            return
    sys.path.append(_ROOT)


def _load_hugging_face() -> ModuleType:
    elsewhere = [entry for entry in sys.path if not _is_checkout(entry)]
    spec = PathFinder.find_spec("datasets", elsewhere)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError("Hugging Face's `datasets` is not installed; run ./env/install.sh", name="datasets")
    module = module_from_spec(spec)
    sys.modules["datasets"] = module  # the import in progress returns what stands here when `datasets/__init__.py` ends
    spec.loader.exec_module(module)
    return module


def _is_local(spec: ModuleSpec | None) -> bool:
    return spec is not None and spec.origin is not None and os.path.dirname(os.path.realpath(spec.origin)) == _LOCAL


def _is_checkout(entry: str) -> bool:
    """Whether a path entry is a copy of this project: a second one may be installed in the environment."""
    return os.path.isfile(os.path.join(entry, "utils", "attach.py"))


def _is_root(entry: str) -> bool:
    return entry != "" and os.path.realpath(entry) == _ROOT
