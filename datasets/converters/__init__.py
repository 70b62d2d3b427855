"""Public benchmarks and other trainers' files as this project's rows. The registry: one dict, users' own beside it.

One file reads one benchmark (its docstring shows a record), `conversion.py` does the rest for all of them,
`conversations.py` also writes rows for other trainers. The command is `scripts/convert_dataset.py`.
"""

from __future__ import annotations

from datasets.converters.activitynet_captions import ActivityNetCaptions
from datasets.converters.base import Converter, SourceRow
from datasets.converters.charades_sta import CharadesSTA
from datasets.converters.conversations import Conversations
from datasets.converters.didemo import DiDeMo
from datasets.converters.nextgqa import NExTGQA
from datasets.converters.own_rows import OwnRows
from datasets.converters.qvhighlights import QVHighlights
from datasets.converters.tacos import TACoS
from datasets.converters.timelens import TimeLens
from datasets.converters.timer1_train import TimeR1Train
from datasets.converters.tvgbench import TVGBench
from utils.common import UserError, load_named, nearest

__all__ = ["CONVERTERS", "Converter", "SourceRow", "find_converter"]

CONVERTERS: dict[str, type[Converter]] = {
    converter.name: converter
    for converter in (
        CharadesSTA,
        ActivityNetCaptions,
        QVHighlights,
        TACoS,
        DiDeMo,
        NExTGQA,
        TVGBench,
        TimeR1Train,
        TimeLens,
        Conversations,
        OwnRows,
    )
}
"""Every converter by the name that `--dataset` takes."""


def find_converter(name: str) -> Converter:
    """The converter called `name`, or the one that `package.module:Name` names. Raises UserError with the choices."""
    if ":" in name:
        kind = load_named(name, "--dataset")
        if not isinstance(kind, type) or not issubclass(kind, Converter):
            raise UserError(f"--dataset {name}: must be a subclass of datasets.converters.Converter, got {kind!r}")
        if not isinstance(getattr(kind, "name", None), str):
            raise UserError(f"--dataset {name}: needs a class attribute `name`, which goes to kwargs.dataset")
        return kind()
    if name not in CONVERTERS:
        close = nearest(name, CONVERTERS)
        hint = f"did you mean {close}? Choose" if close else "choose"
        raise UserError(
            f"--dataset {name}: no such data set; {hint} from {', '.join(CONVERTERS)}, or give your own as "
            "package.module:Name"
        )
    return CONVERTERS[name]()
