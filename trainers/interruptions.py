"""What lets a run be stopped at any moment and go on as if it had not been: the signals that ask for it, data workers
that live through them, and what a checkpoint holds beside Trainer's own files.

When a checkpoint is complete is `utils.checkpoints`'; saving and going on are `trainers.run_keeper`'s.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from utils.logging_utils import get_logger

PROGRESS_FILE = "progress.json"
"""In a checkpoint: what the next log record has so far, and counts; `RunKeeper.progress`."""
_SAME_CTRL_C_S = 1.0
"""A terminal and a launcher may both send one Ctrl-C; what comes sooner after the first is no second."""


class ValidationStopped(Exception):
    """A validation was broken off since the run is to stop."""


class StopOnSignal(TrainerCallback):
    """First Ctrl-C or SIGTERM: finish the step, save a checkpoint, stop, on every process after the same step.

    A second Ctrl-C stops at once. A second SIGTERM does not: a scheduler and the launcher may both send one.

    Args:
        largest: the largest of a whole number over all processes; collective.
        may_stop: whether a run can go on exactly from a checkpoint of now; alike on all processes.
    """

    def __init__(self, largest: Callable[[int], int], may_stop: Callable[[], bool]) -> None:
        self.received = 0
        """The signal that reached this process, 0 for none."""
        self.agreed = 0
        """The signal that all processes stop for, 0 for none."""
        self._largest, self._may_stop = largest, may_stop
        self._previous: dict[int, Any] = {}
        self._pid = os.getpid()
        self._since = 0.0
        self.saved_step = -1
        """The step of the last `checkpoint-<step>`."""

    def asked(self) -> bool:
        """Whether the run is to stop. Collective: every process asks at the same places."""
        self.agreed = self.agreed or self._largest(self.received)
        return bool(self.agreed)

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Install the handler (signals reach the main thread only)."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a forked data worker, which Ctrl-C reaches as well: it must live until the step is done
        if not self.received:
            self.received, self._since = number, time.monotonic()
            again = " (Ctrl-C again stops at once)" if number == signal.SIGINT else ""
            with suppress(RuntimeError):  # the signal may have come in the middle of another line
                get_logger().warning("interrupted: finishing this step and saving a checkpoint%s", again)
        elif number == signal.SIGINT and time.monotonic() - self._since > _SAME_CTRL_C_S:
            raise KeyboardInterrupt

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop once asked to; a validation that is due waits for the resumed run."""
        if self._may_stop() and self.asked():
            control.should_save, control.should_evaluate, control.should_training_stop = True, False, True

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Asked during a validation or a save: this checkpoint is the one to go on from."""
        self.saved_step = state.global_step
        if self._may_stop() and self.asked():
            control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer ends an epoch that was broken off like any other: no validation then, and no second save."""
        if self.agreed:
            control.should_evaluate = False
            control.should_save = control.should_save and self.saved_step != state.global_step

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the signals back, and say how to go on."""
        self.restore()
        if self.asked():
            get_logger().warning(
                "stopped at step %d of %d; the same command with --resume_from_checkpoint auto goes on from there",
                state.global_step, state.max_steps,
            )  # fmt: skip

    def restore(self) -> None:
        """Give the signals back to whom they belonged."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def outlive_sigterm(loader: DataLoader) -> DataLoader:
    """Let SIGTERM from anyone but their parent pass by the data workers of `loader`, which is returned.

    A scheduler and torchrun send it to a whole process group, and the step in hand needs its data. torch's own handler
    lets a worker die then, and the run with it.
    """
    inner: Any = loader.__dict__.get("base_dataloader", loader)  # accelerate wraps the one that starts the workers
    inner.worker_init_fn = partial(_init_worker, inner.worker_init_fn)
    return loader


def _init_worker(init: Callable[[int], None] | None, worker_id: int) -> None:
    if init is not None:
        init(worker_id)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """Take SIGTERMs from the queue: the parent's ends this process, also one that hangs in a decoder."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
