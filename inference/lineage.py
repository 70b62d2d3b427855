"""How a checkpoint came to be, as far as the folders still tell: its runs, its base model, how it was validated.

The facts of a model card; `inference.model_card` puts them into words. What is not on record is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.merging import ORIGIN_FILE
from trainers.model import ADAPTER_CONFIG, resolve_source
from utils.checkpoints import step_of
from utils.common import UserError, or_nan
from utils.config import RLConfig, SFTConfig, load_config
from utils.logging_utils import get_logger
from utils.metrics import METRICS, baseline_predictions, evaluate, evaluate_intervals

QWEN3_VL, QWEN3_VL_LICENCE = "Qwen/Qwen3-VL-", "apache-2.0"
BASELINES = {"whole_video": "whole video", "centre": "centre half"}


@dataclass(frozen=True)
class TrainedRun:
    """One training run on the way."""

    stage: str
    """`SFT` or `GRPO`."""
    config: SFTConfig | RLConfig


@dataclass(frozen=True)
class Lineage:
    """From the base model to a checkpoint."""

    runs: tuple[TrainedRun, ...]
    """First to last; only those whose `config.yaml` still lies beside their checkpoint."""
    base: str
    """Where the path back ends: a hub name, or a folder of which nothing more is known."""
    is_on_hub: bool
    """Whether `base` is a hub name."""

    @property
    def base_name(self) -> str:
        """The base as others may read it: a folder by its last name, since the path is this machine's."""
        return self.base if self.is_on_hub else Path(self.base).name


def trace(checkpoint: Path) -> Lineage:
    """Follow `checkpoint` back: by the run that made it, else by the adapter's or the merge's own record."""
    runs: list[TrainedRun] = []
    seen: set[Path] = set()
    place = str(checkpoint)
    while (folder := Path(place).expanduser().resolve()).is_dir() and folder not in seen:
        seen.add(folder)
        run = read_run(folder.parent)
        earlier = run.config.model.name_or_path if run else _made_from(folder)
        if earlier is None:
            break
        if run:
            runs.append(run)
        place = earlier
    return Lineage(tuple(reversed(runs)), place, is_hub_name(place))


def read_run(folder: Path) -> TrainedRun | None:
    """The run whose output folder is `folder`; None where no configuration of one is found or can be read."""
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    try:
        is_rl = any(line.startswith("rewards:") for line in path.read_text(encoding="utf-8").splitlines())
        config: Any = load_config(RLConfig if is_rl else SFTConfig, [path])
    except (UserError, UnicodeDecodeError, OSError) as error:
        get_logger().warning("%s cannot be read, so the model card says nothing of that run: %s", path, error)
        return None
    return TrainedRun("GRPO" if is_rl else "SFT", config)


def _made_from(folder: Path) -> str | None:
    for name, key in ((ADAPTER_CONFIG, "base_model_name_or_path"), (ORIGIN_FILE, "adapter")):
        if (folder / name).is_file():
            return str(json.loads((folder / name).read_text(encoding="utf-8"))[key])
    return None


def is_hub_name(name: str) -> bool:
    """Whether `name` can be a model on the hub (`owner/name`) and is no path here."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        return "/" in name and not Path(name).is_dir() and resolve_source(name).base == name
    except (HFValidationError, UserError):
        return False


def base_licence(lineage: Lineage) -> str:
    """The licence of the base model as the hub spells it: by its card, where that is at hand; `other` if unknown."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    if lineage.is_on_hub and lineage.base.startswith(QWEN3_VL):
        return QWEN3_VL_LICENCE
    card = (
        try_to_load_from_cache(lineage.base, "README.md")
        if lineage.is_on_hub
        else Path(lineage.base).expanduser() / "README.md"
    )
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return "other"
    licence = ModelCard.load(card, ignore_metadata_errors=True).data.license
    return licence if isinstance(licence, str) else "other"


# ---------------------------------------------------------------------------------------------- validation
@dataclass(frozen=True)
class Validation:
    """How the checkpoint did on `data.val` during training, in percent."""

    step: int
    scores: Mapping[str, float]
    """The averages of `utils.metrics` and `num_samples`."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """95 % bootstrap intervals; empty where the answers of that step are not on record."""
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The same metrics of answers that need no video."""


def read_validation(checkpoint: Path) -> Validation | None:
    """The validation of the step that `checkpoint` was saved at; None when there was none.

    Scores come from the checkpoint's `metrics.json`, intervals from the run's `validation/step-<N>.jsonl`, which has to
    give the same scores: a run that was started anew may have left others.
    """
    saved = _read_metrics(checkpoint / "metrics.json")
    step = int(saved["step"]) if saved else step_of(checkpoint)
    samples = _read_samples(checkpoint.parent / "validation" / f"step-{step}.jsonl")
    scores = {name: or_nan(saved.get(f"eval_{name}")) for name in (*METRICS, "num_samples")} if saved else {}
    if samples and scores and abs(evaluate(samples)["mIoU"] - scores["mIoU"]) > 1e-6:
        get_logger().warning("validation/step-%d.jsonl is of another run than %s: no intervals", step, checkpoint)
        samples = []
    if not samples:
        return Validation(step, scores) if scores else None
    baselines = {kind: evaluate(baseline_predictions(samples, kind)) for kind in ("whole_video", "centre")}
    return Validation(step, scores or evaluate(samples), evaluate_intervals(samples), baselines)


def _read_metrics(path: Path) -> dict[str, Any]:
    """`metrics.json` of a checkpoint that was validated; empty otherwise."""
    if not path.is_file():
        return {}
    metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return metrics if {"eval_mIoU", "eval_num_samples"} <= set(metrics) else {}  # older runs have fewer averages


def _read_samples(path: Path) -> list[dict[str, Any]]:
    """What `utils.metrics` takes, of every answer; empty where the file is missing, or older than these keys."""
    if not path.is_file():
        return []
    samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return samples if all({"qid", "gt", "pred", "duration"} <= set(sample) for sample in samples) else []
