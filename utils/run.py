"""The start of a run: command line, folder, log, and the record of what it ran with. Shared by SFT and RL."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.checkpoints import passed_over, recover, resolve_resume
from utils.common import REPO_ROOT, UserError, seed_everything, write_json
from utils.config import ConfigT, StrictModel, load_config, save_config
from utils.config_yaml import parse_yaml
from utils.logging_utils import environment_versions, get_logger, git_revision, is_rank_zero, setup_logging
from utils.weight_files import require_safetensors


def training_parser(description: str | None, *, sections: str, starts_from: str) -> argparse.ArgumentParser:
    """The command line of an entry script. `sections` are those of its --config, `starts_from` what --model_path is."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help=f"YAML with {sections}; or the record of a run")
    parser.add_argument("--data_config", type=Path, help="YAML with data and prompt, where --config has none")
    parser.add_argument("--output_dir", type=Path, required=True, help="the run's folder, e.g. outputs/sft, outputs/rl")
    parser.add_argument("--model_path", help=f"{starts_from}; short for model.name_or_path=...")
    parser.add_argument("--deepspeed", help="DeepSpeed JSON, e.g. configs/deepspeed/ds_zero2.json")
    parser.add_argument("--resume_from_checkpoint", nargs="?", const="auto", help="a checkpoint-<step> folder, or auto")
    parser.add_argument(
        "--dry_run", action="store_true", help="load and check everything, show the plan, train nothing"
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="configuration overrides")
    return parser


def training_config(cls: type[ConfigT], args: argparse.Namespace) -> ConfigT:
    """The configuration that `args` of `training_parser` ask for. Raises ConfigError with every mistake."""
    overrides = [*args.overrides, *([f"model.name_or_path={args.model_path}"] if args.model_path else [])]
    return load_config(cls, [path for path in (args.config, args.data_config) if path], overrides)


@dataclass(frozen=True)
class Run:
    """Where a run writes, and what it goes on from."""

    output_dir: Path
    name: str
    resume_from: Path | None
    metrics_path: Path
    """JSONL of every logged record, `<metrics_dir>/<name>.jsonl`."""
    curves_path: Path


def start_run(output_dir: Path, config: Any, resume: str | None) -> Run:
    """Claim `output_dir`, start the log, seed everything and save what the run is made of.

    Writes `config.yaml` (resolved), `environment.json` (versions, git revision) and `log.txt`; nothing is ever deleted.
    What a killed run left is put in place or passed over, with a warning.
    `config` is the whole typed configuration with a `training` section (seed, run_name, metrics_dir, logging_dir).

    Raises UserError when the folder holds a finished run and `resume` is not given, when it or one of the folders for
    metrics and logs cannot be written, and for a checkpoint whose weights are pickle (`model.allow_pickle`).
    """
    _end_with_launcher()
    recovered = recover(output_dir) if is_rank_zero() else []
    resume_from = resolve_resume(output_dir, resume)
    if resume_from:
        require_safetensors(resume_from, allow_pickle=config.model.allow_pickle)
    training = config.training
    _claim(output_dir, "--output_dir")
    _claim(training.metrics_dir, "training.metrics_dir")
    if {"tensorboard", "all"} & set(training.report_to):
        _claim(training.logging_dir, "training.logging_dir")
    setup_logging(output_dir)
    name = training.run_name or output_dir.resolve().name
    # Trainer's TensorBoard callback takes its folder from the environment only.
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(training.logging_dir) / name))
    if is_rank_zero():
        for line in [*recovered, *passed_over(output_dir, resume_from)]:
            get_logger().warning("%s", line)
        _record(output_dir, config, resume_from)
    seed_everything(training.seed)
    return Run(
        output_dir=output_dir,
        name=name,
        resume_from=resume_from,
        metrics_path=Path(training.metrics_dir) / f"{name}.jsonl",
        curves_path=Path(training.metrics_dir) / f"{name}.png",
    )


def _claim(folder: Path, key: str) -> None:
    """Make `folder`, which `key` names. Raises UserError when it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key} {folder} cannot be made a folder: {error.strerror}. Choose another") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{key} {folder} is not writable; choose another or change its permissions")


def _end_with_launcher() -> None:
    """A process of torchrun dies with it: one that outlived it would go on writing into the run's folder."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        set_signal_of_parents_death = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
        ctypes.CDLL(None).prctl(set_signal_of_parents_death, signal.SIGKILL)


def _record(output_dir: Path, config: StrictModel, resume_from: Path | None) -> None:
    saved = output_dir / "config.yaml"
    if resume_from and saved.is_file():
        _warn_if_changed(saved, config)
    save_config(config, saved)
    revision = git_revision(REPO_ROOT)
    write_json(
        output_dir / "environment.json",
        {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "git": revision, "versions": environment_versions()},
    )
    if resume_from:
        get_logger().info("going on from %s", resume_from)


def _warn_if_changed(saved: Path, config: StrictModel) -> None:
    """Name the keys that differ from the run being resumed: the losses that follow are then not the same run's."""
    value, document = parse_yaml(saved.read_text(encoding="utf-8"), str(saved))
    if document.problems:
        raise UserError(f"the record of the run cannot be read: {document.problems[0].text}, or move the file away")
    earlier = _flat(value or {})
    now = _flat(config.model_dump(mode="json"))
    changed = sorted(key for key in earlier.keys() | now.keys() if earlier.get(key) != now.get(key))
    if changed:
        saved.replace(saved.with_name(f"config.before-{time.strftime('%Y%m%d-%H%M%S')}.yaml"))
        get_logger().warning("resuming with other settings than before: %s", ", ".join(changed))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value for name, sub in tree.items() for key, value in _flat(sub, f"{prefix}.{name}".lstrip(".")).items()
    }
