"""A Trainer that may be stopped or killed at any moment, and goes on as if it had not been.

Beside what transformers' Trainer restores (weights, optimizer, scheduler, random generators, the place in the data):
all processes stop after one step, a validation that was cut off is made up for, a log record that was half filled is
filled, a run that is over is not trained further. Signals are `trainers.interruptions`'; what a checkpoint holds and
when it counts is `trainers.run_keeper`'s and `utils.checkpoints`'.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_utils import IntervalStrategy

from trainers.interruptions import PROGRESS_FILE, StopOnSignal, ValidationStopped
from utils.common import UserError, or_nan, write_json
from utils.logging_utils import get_logger


class ResumableTrainer(Trainer):
    """Base of `RunKeeper`, which adds the callbacks made here, calls `begin` when training begins, and saves."""

    best_metric: ClassVar[str] = "eval_mIoU"
    """The validation metric that decides `checkpoint-best`; higher is better."""

    # Trainer sets these without saying their types.
    control: Any
    _tr_loss: Any

    def prepare_to_stop(self, patience: int | None) -> None:
        """Make what `train` needs; `patience` is the number of validations without a better one that end the run."""
        self.stop = StopOnSignal(self._largest, self.may_stop)
        self.patience = EarlyStoppingCallback(early_stopping_patience=patience) if patience is not None else None
        self._resumed_from: Path | None = None
        self._may_break_off = False

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Trainer's own; the signals are given back however it ends."""
        self._resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        self._require_one_start()
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.stop.restore()

    # ------------------------------------------------------------------ stopping
    @property
    def exit_status(self) -> int:
        """0 after a whole training; as shells count signals 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.stop.agreed if self.stop.agreed else 0

    def may_stop(self) -> bool:
        """Whether a checkpoint of now would hold all that the run needs to go on exactly."""
        return True

    def _largest(self, number: int) -> int:
        if self.accelerator.num_processes == 1:
            return number
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())

    def until_asked(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches of a validation, until the run is to stop: it may take longer than a scheduler waits."""
        for batch in batches:
            if self._may_break_off and self.may_stop() and self.stop.asked():
                raise ValidationStopped
            yield batch

    def _unless_stopped(self, validate: Callable[[], None]) -> bool:
        """Call what may validate; False if the run was asked to stop in the middle of that."""
        self._may_break_off = True
        try:
            validate()
        except ValidationStopped:
            self.control.should_training_stop = True
            return False
        finally:
            self._may_break_off = False
        return True

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kw: Any
    ) -> None:
        """Trainer's; a validation that is broken off leaves a checkpoint, and waits for the resumed run."""
        trainers_own = partial(super()._maybe_log_save_evaluate, tr_loss, grad_norm, model, trial, *args, **kw)
        if not self._unless_stopped(trainers_own) and self.stop.saved_step != self.state.global_step:
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    # ------------------------------------------------------------------ going on
    def _require_one_start(self) -> None:
        """All processes go on from one checkpoint: those that do not see the same files would wait for ever."""
        starts = gather_object([str(self._resumed_from)])
        if len(set(starts)) > 1:
            raise UserError(
                f"the processes would go on from different checkpoints ({', '.join(sorted(set(starts)))}): "
                "--output_dir must be a folder that all nodes share"
            )

    def at_train_begin(self) -> None:
        """Checks before the first step; the model is wrapped and placed by then."""

    def begin(self) -> None:
        """When training begins: take up what the checkpoint holds, check, make up for a validation cut off."""
        if self._resumed_from is not None:
            self._restore(self._resumed_from / PROGRESS_FILE)
        if self._is_over():
            get_logger().info("step %d of %d: nothing is left to train", self.state.global_step, self.state.max_steps)
            return
        self.at_train_begin()
        if self._validation_is_due():
            self._unless_stopped(self._validate_what_was_due)

    def _is_over(self) -> bool:
        patience = self.patience
        stopped_early = patience and patience.early_stopping_patience_counter >= patience.early_stopping_patience
        return bool(stopped_early) or self.state.global_step >= self.state.max_steps

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's, unless the run is over: resuming a finished run would train one step more."""
        if self._is_over() or self.control.should_training_stop:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _validation_is_due(self) -> bool:
        """Whether this step's validation is missing: the run was stopped before it, or killed in it."""
        args, step, epoch = self.args, self.state.global_step, self.state.epoch or 0.0
        if any(entry["step"] == step and self.best_metric in entry for entry in self.state.log_history):
            return False
        if step == 0 or args.eval_strategy == IntervalStrategy.NO:
            return False
        if args.eval_strategy == IntervalStrategy.EPOCH:
            return abs(epoch - round(epoch)) < 1e-6 and args.eval_delay <= epoch
        return step % self.state.eval_steps == 0 and args.eval_delay <= step

    def _validate_what_was_due(self) -> None:
        metrics = self._evaluate(None, None)
        self._determine_best_metric(metrics, None)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Trainer's, about what is missing; a head that is tied to the embeddings is not."""
        tied = {"lm_head.weight"} if self.model.config.tie_word_embeddings else set()
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    # ------------------------------------------------------------------ half-filled records
    def progress(self) -> dict[str, Any]:
        """What this process has counted and not yet logged."""
        return {"loss": float(self._tr_loss)}

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Take up what `progress` gave."""
        self._tr_loss = torch.full_like(self._tr_loss, or_nan(progress["loss"]))

    def save_progress(self, folder: Path) -> None:
        """Write what `begin` takes up into a checkpoint; every process calls it."""
        processes = gather_object([self.progress()])
        if self.args.should_save:
            used = self.patience.early_stopping_patience_counter if self.patience is not None else 0
            shared = {"logged_step": self._globalstep_last_logged, "patience_used": used}
            write_json(folder / PROGRESS_FILE, {**shared, "processes": processes})

    def _restore(self, path: Path) -> None:
        if not path.is_file():
            return  # saved by an older release
        saved = json.loads(path.read_text(encoding="utf-8"))
        if self.patience is not None:
            self.patience.early_stopping_patience_counter = saved["patience_used"]
        processes = saved["processes"]
        if len(processes) != self.accelerator.num_processes:
            get_logger().warning(
                "%s was saved by %d process(es), and %d go on: not as the uninterrupted run would have",
                path.parent, len(processes), self.accelerator.num_processes,
            )  # fmt: skip
            return
        self.restore(processes[self.accelerator.process_index])
        self._globalstep_last_logged = saved["logged_step"]
        # The summary of a run counts the steps since its start; the first record will hold earlier ones too.
        self._total_loss_scalar -= sum(or_nan(process["loss"]) for process in processes) / len(processes)
