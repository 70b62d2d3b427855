"""Annotation rows to model inputs, as an extension of Hugging Face's `datasets`.

Importing this package yields Hugging Face's, with this folder appended to its `__path__` (see `utils.attach`), so this
file is left as soon as it has run.
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """What Hugging Face's package offers, as far as type checkers need to know."""


# By file and not by name: a program in the same environment may have a `utils` of its own.
_file = Path(__file__).resolve().parents[1] / "utils" / "attach.py"
_spec = importlib.util.spec_from_file_location("_attach_datasets", _file)
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
_module.attach()
