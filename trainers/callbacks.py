"""What the trainers watch and count beside the loss: faults, speed, the metrics file. Shared by SFT and RL."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainingArguments

from utils.common import UserError
from utils.logging_utils import MetricsWriter, get_logger


class FaultCounter:
    """Names and counts rows that could not be used; stops the run past a fraction of all rows (contract 10)."""

    def __init__(self, num_rows: int, max_fraction: float) -> None:
        self.num_rows = num_rows
        self.max_fraction = max_fraction
        self.rows: dict[int, str] = {}

    def add(self, faults: list[tuple[int, str]]) -> None:
        """Note `[(row number, reason)]`; a row counts once. Raises UserError past the limit."""
        for index, reason in faults:
            if index not in self.rows:
                self.rows[index] = reason
                get_logger().warning("left out: %s", reason)
        if len(self.rows) > self.max_fraction * self.num_rows:
            raise UserError(
                f"{len(self.rows)} of {self.num_rows} rows could not be used, more than "
                f"data.max_bad_fraction={self.max_fraction:g} allows. The last: {list(self.rows.values())[-1]}. Run "
                f"python -m "
                "utils.data_validation --probe_videos on the annotation file, mend or drop those rows, or raise the "
                "limit"
            )


class SpeedMeter:
    """Samples and tokens per second of training time (validation and saving left out)."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin a new interval now."""
        self.samples = self.tokens = 0
        self.since = time.perf_counter()

    def add(self, samples: int, tokens: int) -> None:
        """Count one micro-batch."""
        self.samples += samples
        self.tokens += tokens

    def skip(self, seconds: float) -> None:
        """Leave `seconds` that were not training out of the interval."""
        self.since += seconds

    def read(self, num_processes: int) -> dict[str, float]:
        """Rates since the last reading over all processes (assumed alike), then begin anew."""
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        rates = {
            "samples_per_second": self.samples * num_processes / elapsed,
            "tokens_per_second": self.tokens * num_processes / elapsed,
        }
        self.restart()
        return rates


class AtTrainBegin(TrainerCallback):
    """Calls a function once the model is wrapped and placed, before the first step."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Call it."""
        self.action()


class ProgressLines(ProgressCallback):
    """Trainer's progress bar, with one short line for each record instead of a dictionary."""

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """As Trainer's, unless bars are off; a resumed run's bar starts where it left."""
        if state.is_world_process_zero and not args.disable_tqdm:
            self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")
        self.current_step = state.global_step

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Leave the bar, however training ended: what is said next has a line of its own."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write one line above the bar."""
        if state.is_world_process_zero and (line := progress_line(logs or {})):
            text = f"step {state.global_step}/{state.max_steps}  {line}"
            if self.training_bar is not None:
                self.training_bar.write(text, file=sys.stderr)
            else:
                get_logger().info(text)


def progress_line(logs: Mapping[str, float | None]) -> str:
    """What a person follows: rewards (GRPO), loss, language rate and speed of a training record, the metrics of a
    validation."""
    if "loss" in logs:
        shown = [*_rollout_words(logs), f"loss {logs['loss']:.4f}"]
        if "learning_rate/language" in logs:
            shown.append(f"lr {logs['learning_rate/language']:.2e}")
        return "  ".join([*shown, f"{logs.get('samples_per_second', 0.0):.1f} samples/s"])
    if "eval_mIoU" in logs:
        return f"validation: {_validation_words(logs)}"
    return ""


def _rollout_words(logs: Mapping[str, float | None]) -> list[str]:
    """What the completions of a GRPO record earned; nothing for SFT. TRL gives None for the mean of no value."""
    parts = {name: key for key in logs if (name := _between(key, "rewards/", "/mean"))}
    flat, cut_off = logs.get("frac_reward_zero_std"), logs.get("completions/clipped_ratio")
    values = [("reward", "reward", ".3f")]
    values += [(name, key, ".3f") for name, key in parts.items() if len(parts) > 1]
    values += [("spread", "reward_std", ".3f"), ("KL", "kl", ".4f"), ("length", "completions/mean_length", ".0f")]
    words = [f"{name} {logs[key]:{digits}}" for name, key, digits in values if logs.get(key) is not None]
    if cut_off:
        words.append(f"cut off {100 * cut_off:.0f} %")
    if flat:
        words.append(f"groups without spread {100 * flat:.0f} %")
    return words


def _validation_words(logs: Mapping[str, Any]) -> str:
    words = [f"reward {logs['eval_reward']:.3f}"] if "eval_reward" in logs else []
    words.append(f"mIoU {logs['eval_mIoU']:.1f}")
    words += [f"R1@{t} {logs[f'eval_R1@{t}']:.1f}" for t in ("0.3", "0.5", "0.7")]
    words.append(f"unreadable answers {logs['eval_parse_failure_rate']:.1f} %")
    return "  ".join([*words, f"({logs['eval_num_samples']} queries, {logs['eval_runtime']:.0f} s)"])


class MetricsCallback(TrainerCallback):
    """Appends every log record to the run's metrics JSONL under slash names (`train/loss`, `eval/mIoU`)."""

    def __init__(self, path: Path, run: str) -> None:
        self.path = path
        self.run = run
        self.writer: MetricsWriter | None = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the file; after a resume, later records of the same step supersede earlier ones."""
        self.writer = MetricsWriter(self.path, self.run)
        self.writer.resume(state.global_step)

    def on_log(
        self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:  # noqa: E501
        """Write one record."""
        if self.writer is not None and logs:
            self.writer.write(state.global_step, slash_names(logs))


def slash_names(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Trainer's flat keys as stable slash names: `loss` -> `train/loss`, `eval_mIoU` -> `eval/mIoU`.

    Its summary of the whole run (`train_loss`, `train_runtime`, ...) goes to `run/`: `train/loss` is one step's.
    What was decoded keeps its names (`data/decoded`, `data/cache_hits`, ...).
    What completions earn goes to `reward/`, the sum as `reward/total`, the share of groups that teach nothing as
    `reward/zero_spread`; each component under its name, as `reward/temporal_iou`, `reward/temporal_iou_std`, ...
    """
    return {_slash_name(key): value for key, value in logs.items()}


_REWARD_NAMES = {
    "reward": "reward/total",
    "reward_std": "reward/total_std",
    "frac_reward_zero_std": "reward/zero_spread",
}
"""TRL's names of what the weighted sum of the rewards did."""


def _slash_name(key: str) -> str:
    if key in _REWARD_NAMES:
        return _REWARD_NAMES[key]
    if key.startswith("data/"):
        return key
    for ending, short in (("/mean", ""), ("/std", "_std"), ("/zero_spread", "_zero_spread")):
        if name := _between(key, "rewards/", ending):
            return f"reward/{name}{short}"
    for prefix, room in (("eval_rewards/", "eval/reward/"), ("eval_", "eval/"), ("train_", "run/")):
        if key.startswith(prefix):
            return room + key.removeprefix(prefix)
    return f"train/{key}"


def _between(key: str, start: str, end: str) -> str:
    """What stands between `start` and `end`; "" for a key that does not begin and end so.

    >>> _between("rewards/temporal_iou/mean", "rewards/", "/mean")
    'temporal_iou'
    """
    return key[len(start) : -len(end)] if key.startswith(start) and key.endswith(end) else ""
