"""Runs that are told to stop, in this process: what they leave, and that the resumed run is the uninterrupted one.
Processes that are killed are in tests/test_interruptions.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from datasets.samplers import EpochSampler
from trainers import resumable
from trainers.interruptions import PROGRESS_FILE, StopOnSignal, outlive_sigterm
from trainers.rl_trainer import VideoGRPOTrainer
from trainers.rollout_log import ROLLOUTS_FILE, SUPERSEDED_FILE, append_records, read_records, supersede
from trainers.run_keeper import RunKeeper
from trainers.sft_trainer import VideoSFTTrainer
from utils.checkpoints import complete_checkpoints, manifest_problems, write_manifest
from utils.common import UserError, finite_or_null
from utils.config import RLConfig, SFTConfig
from utils.logging_utils import read_metrics

ConfigWith = Callable[..., SFTConfig]
TrainerFor = Callable[..., VideoSFTTrainer]

TIMED = ("per_second", "memory", "time", "step_time", "data/")
LORA = ("lora.enabled=true", "lora.r=4", "lora.lora_alpha=8", "lora.lora_dropout=0.1")


class AtStep(TrainerCallback):
    """Does something when a step begins."""

    def __init__(self, step: int, action: Callable[[], Any]) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.action()


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def figures(trainer: RunKeeper) -> dict[int, dict[str, Any]]:
    """Every figure of every step that is not about time."""
    steps: dict[int, dict[str, Any]] = {}
    for entry in trainer.state.log_history:
        kept = {key: value for key, value in entry.items() if not any(part in key for part in TIMED)}
        if "train_loss" not in entry:
            steps.setdefault(entry["step"], {}).update(finite_or_null(kept))  # no NaN equals another
    return steps


def assert_same(resumed: RunKeeper, whole: RunKeeper) -> None:
    assert figures(resumed) == figures(whole)
    theirs = dict(whole.model.named_parameters())
    assert all(torch.equal(value, theirs[name]) for name, value in resumed.model.named_parameters())


def resume(build: Callable[..., Any], config: Any, folder: Path) -> Any:
    """The trainer that goes on from the newest complete checkpoint of `folder`, after it has."""
    trainer = build(config, folder, "auto")
    trainer.train(resume_from_checkpoint=str(complete_checkpoints(folder)[-1]))
    return trainer


# ---------------------------------------------------------------------------------------------- being asked to stop
STEPS = (
    *LORA,
    "training.run_name=null",
    "training.max_steps=6",
    "training.logging_steps=3",
    "training.eval_strategy=steps",
    "training.eval_steps=2",
    "training.max_eval_samples=4",
    "training.per_device_eval_batch_size=2",
    "training.save_strategy=steps",
    "training.save_steps=6",
)


@pytest.fixture
def whole(config_with: ConfigWith, trainer_for: TrainerFor, tmp_path: Path) -> VideoSFTTrainer:
    trainer = trainer_for(config_with(*STEPS), tmp_path / "whole")
    trainer.train()
    return trainer


def test_sigterm_saves_and_the_resumed_run_is_the_same(
    whole: VideoSFTTrainer, config_with: ConfigWith, trainer_for: TrainerFor, tmp_path: Path
) -> None:
    """After step 4 a validation is due, and the record of steps 4 to 6 holds one step: both come in the resumed run."""
    config = config_with(*STEPS)
    trainer = trainer_for(config, tmp_path / "cut")
    before = signal.getsignal(signal.SIGTERM)
    trainer.add_callback(AtStep(4, sigterm))
    trainer.train()
    assert trainer.exit_status == 143 and signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in complete_checkpoints(tmp_path / "cut")] == ["checkpoint-4"]
    assert [path.name for path in (tmp_path / "cut/validation").iterdir()] == ["step-2.jsonl"]
    resumed = resume(trainer_for, config, tmp_path / "cut")
    assert resumed.exit_status == 0
    assert_same(resumed, whole)
    assert {2, 4, 6} == {entry["step"] for entry in resumed.state.log_history if "eval_mIoU" in entry}
    cut, uncut = (read_metrics(tmp_path / "metrics" / f"{name}.jsonl") for name in ("cut", "whole"))
    assert [record["step"] for record in cut] == [record["step"] for record in uncut] == [2, 3, 4, 6]
    assert [record.get("train/loss") for record in cut] == [record.get("train/loss") for record in uncut]
    assert cut[-1]["run/loss"] == pytest.approx(sum(losses_of(trainer_for, config, tmp_path)[4:]) / 2)


def losses_of(trainer_for: TrainerFor, config: SFTConfig, tmp_path: Path) -> list[float]:
    """Loss of every step."""
    training = config.training.model_copy(update={"logging_steps": 1, "eval_strategy": "no", "save_strategy": "no"})
    trainer = trainer_for(config.model_copy(update={"training": training}), tmp_path / "each")
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_validation_is_broken_off_and_made_up_for(
    whole: VideoSFTTrainer, config_with: ConfigWith, trainer_for: TrainerFor, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """SIGTERM in the first batch of the validation after step 2: the second is not answered."""
    config = config_with(*STEPS)
    trainer = trainer_for(config, tmp_path / "cut")
    answered: list[int] = []
    plain = trainer.eval_collator

    def collate(samples: list[Any]) -> Any:
        answered.extend(sample["index"] for sample in samples)
        sigterm()
        return plain(samples)

    trainer.eval_collator = collate  # type: ignore[assignment]
    trainer.train()
    assert trainer.exit_status == 143 and trainer.state.global_step == 2
    assert len(answered) < 4 + 1 and not list((tmp_path / "cut").glob("validation/*"))
    assert [path.name for path in complete_checkpoints(tmp_path / "cut")] == ["checkpoint-2"]
    resumed = resume(trainer_for, config, tmp_path / "cut")
    assert_same(resumed, whole)
    for step in (2, 4, 6):
        name = f"validation/step-{step}.jsonl"
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_asked_while_it_saves_it_stops_with_that_checkpoint(
    config_with: ConfigWith, trainer_for: TrainerFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(config_with(*STEPS, "training.save_steps=2"), tmp_path / "cut")
    plain = trainer.save_progress
    monkeypatch.setattr(trainer, "save_progress", lambda folder: (sigterm(), plain(folder)))
    trainer.train()
    assert trainer.exit_status == 143 and trainer.state.global_step == 2
    assert manifest_problems(tmp_path / "cut/checkpoint-2") == []


def test_an_epoch_broken_off_is_neither_validated_nor_saved_twice(
    config_with: ConfigWith, trainer_for: TrainerFor, tmp_path: Path
) -> None:
    """12 steps an epoch; told to stop in step 2, and in step 12, where the epoch's validation is due."""
    epochs = (*LORA, "training.max_steps=-1", "training.num_train_epochs=2", "training.eval_strategy=epoch",
              "training.save_strategy=epoch", "training.max_eval_samples=2", "training.logging_steps=1")  # fmt: skip
    config = config_with(*epochs)
    first = trainer_for(config, tmp_path / "cut")
    saved: list[int] = []
    first.add_callback(AtStep(2, sigterm))
    plain = first._save_checkpoint
    first._save_checkpoint = lambda model, trial: (saved.append(first.state.global_step), plain(model, trial))  # type: ignore
    first.train()
    assert saved == [2] and not (tmp_path / "cut/validation").exists()
    second = trainer_for(config, tmp_path / "cut", "auto")
    second.add_callback(AtStep(12, sigterm))
    second.train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-2"))
    assert not (tmp_path / "cut/validation").exists() and second.state.epoch == 1.0
    third = resume(trainer_for, config, tmp_path / "cut")
    assert sorted(path.name for path in (tmp_path / "cut/validation").iterdir()) == ["step-12.jsonl", "step-24.jsonl"]
    assert sorted(figures(third)) == list(range(1, 25))


def test_the_second_signal() -> None:
    """A scheduler and torchrun may both send SIGTERM; only Ctrl-C again, after a while, means at once."""
    stop = StopOnSignal(lambda number: number, lambda: True)
    stop._handle(signal.SIGTERM, None)
    stop._handle(signal.SIGTERM, None)
    stop._handle(signal.SIGINT, None)  # in the same second: a terminal's, and the launcher's copy of it
    assert stop.received == signal.SIGTERM and stop.asked()
    stop._since -= 2
    stop._handle(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        stop._handle(signal.SIGINT, None)


def test_a_process_that_got_no_signal_stops_with_the_others() -> None:
    class Control:
        should_save = should_evaluate = should_training_stop = False

    for may_stop in (False, True):
        others = StopOnSignal(lambda number: max(number, signal.SIGTERM), lambda may_stop=may_stop: may_stop)
        control = Control()
        others.on_step_end(None, None, control)  # type: ignore[arg-type]
        assert control.should_training_stop == control.should_save == may_stop
        assert others.agreed == (signal.SIGTERM if may_stop else 0)


def test_an_error_stands_on_a_line_below_the_bar(
    config_with: ConfigWith, trainer_for: TrainerFor, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise UserError("the disk filled up")

    trainer = trainer_for(config_with("training.disable_tqdm=false"))
    trainer.add_callback(AtStep(2, fail))
    with pytest.raises(UserError):
        trainer.train()
    said = capsys.readouterr().err
    assert "training:  25%" in said and said.endswith("\n")


# ---------------------------------------------------------------------------------------------- going on
def test_resuming_a_finished_run_trains_no_step(
    config_with: ConfigWith, trainer_for: TrainerFor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint of the last step is there, checkpoint-final is not: the run was killed between the two."""
    config = config_with(*LORA, "training.max_steps=2", "training.save_strategy=steps", "training.save_steps=2",
                         "training.eval_strategy=steps", "training.eval_steps=2", "training.run_name=null")  # fmt: skip
    whole = trainer_for(config, tmp_path / "run")
    whole.train()
    records = read_metrics(tmp_path / "metrics/run.jsonl")
    resumed = resume(trainer_for, config, tmp_path / "run")
    assert resumed.state.global_step == 2 and "step 2 of 2: nothing is left to train" in capsys.readouterr().err
    assert_same(resumed, whole)
    assert read_metrics(tmp_path / "metrics/run.jsonl") == records  # the summary of the run too
    assert resumed.finish()["eval_mIoU"] == records[-1]["eval/mIoU"]
    assert manifest_problems(tmp_path / "run/checkpoint-final") == []
    assert [path.name for path in complete_checkpoints(tmp_path / "run")] == ["checkpoint-2"]


@pytest.mark.parametrize("grouped", ["true", "false"])
def test_resume_in_the_second_epoch_reads_the_rows_in_its_order(
    grouped: str, config_with: ConfigWith, trainer_for: TrainerFor, tmp_path: Path
) -> None:
    """3 steps an epoch."""
    config = config_with(*LORA, "training.max_steps=6", "training.save_strategy=steps", "training.save_steps=4",
                         "training.per_device_train_batch_size=16", f"training.group_by_length={grouped}")  # fmt: skip
    whole = trainer_for(config, tmp_path / "run")
    whole.train()
    shutil.rmtree(tmp_path / "run/checkpoint-6")
    assert_same(resume(trainer_for, config, tmp_path / "run"), whole)


def test_the_order_of_rows_is_a_function_of_seed_and_epoch() -> None:
    epoch = 0
    plain = EpochSampler(10, seed=3, epoch=lambda: epoch)
    grouped = EpochSampler(10, seed=3, epoch=lambda: epoch, lengths=[1, 9] * 5, batch_size=5)
    first = [list(plain), list(grouped)]
    torch.manual_seed(99)
    assert [list(plain), list(grouped)] == first
    assert first[0] == torch.randperm(10, generator=torch.Generator().manual_seed(3)).tolist()
    assert all(sorted(order) == list(range(10)) for order in first)
    generator = torch.Generator().manual_seed(3)
    assert first[1] == get_length_grouped_indices([1, 9] * 5, 5, generator=generator)  # as transformers groups them
    assert len(plain) == len(grouped) == 10
    epoch = 1
    assert list(plain) != first[0] and list(grouped) != first[1]


def test_early_stopping_counts_on(config_with: ConfigWith, trainer_for: TrainerFor, tmp_path: Path) -> None:
    """No validation is better than the first: with patience 2 the run ends after the third, resumed or not."""
    config = config_with("training.max_steps=9", "training.eval_strategy=steps", "training.eval_steps=1",
                         "training.save_strategy=steps", "training.save_steps=1", "training.max_eval_samples=2",
                         "training.early_stopping_patience=2", "training.learning_rate=1e-9",
                         "training.head_lr=0", "training.mm_projector_lr=0", "training.vision_tower_lr=0")  # fmt: skip
    trainer_for(config, tmp_path / "run").train()
    assert [path.name for path in complete_checkpoints(tmp_path / "run")] == [f"checkpoint-{n}" for n in (1, 2, 3)]
    again = resume(trainer_for, config, tmp_path / "run")
    assert again.state.global_step == 3
    shutil.rmtree(tmp_path / "run/checkpoint-3")
    assert resume(trainer_for, config, tmp_path / "run").state.global_step == 3


def test_faults_count_on_and_other_processes_are_warned_of(
    config_with: ConfigWith, trainer_for: TrainerFor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_with(*LORA, "training.max_steps=2", "training.save_strategy=steps", "training.save_steps=1",
                         "data.max_bad_fraction=0.5")  # fmt: skip
    trainer = trainer_for(config, tmp_path / "run")
    trainer.add_callback(AtStep(1, lambda: trainer.faults.add([(7, "no such video")])))
    trainer.train()
    shutil.rmtree(tmp_path / "run/checkpoint-2")
    assert resume(trainer_for, config, tmp_path / "run").faults.rows == {7: "no such video"}
    shutil.rmtree(tmp_path / "run/checkpoint-2")
    path = tmp_path / "run/checkpoint-1" / PROGRESS_FILE
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"processes": saved["processes"] * 2}))
    write_manifest(path.parent)
    assert resume(trainer_for, config, tmp_path / "run").faults.rows == {}
    assert "was saved by 2 process(es), and 1 go on" in capsys.readouterr().err


def test_a_best_checkpoint_cut_off_leaves_the_one_before(
    config_with: ConfigWith, trainer_for: TrainerFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(config_with())
    best = trainer.save_named("checkpoint-best", {"eval_mIoU": 1.0})
    plain = trainer.save_model

    def full(folder: str, **options: Any) -> None:
        plain(folder, **options)
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch, pytest.raises(UserError, match=rf"while saving {best} \(about .* needed\)"):
        patch.setattr(trainer, "save_model", full)
        trainer.save_named("checkpoint-best", {"eval_mIoU": 2.0})
    assert manifest_problems(best) == [] and json.loads((best / "metrics.json").read_text())["eval_mIoU"] == 1.0
    hidden = tmp_path / "run/.checkpoint-best.unfinished"
    (hidden / "of-another-shape.safetensors").write_bytes(b"half")
    trainer.save_named("checkpoint-best", {"eval_mIoU": 2.0})
    assert manifest_problems(best) == [] and json.loads((best / "metrics.json").read_text())["eval_mIoU"] == 2.0
    assert not hidden.exists() and not (best / "of-another-shape.safetensors").exists()


def test_processes_that_see_other_checkpoints_are_refused(
    config_with: ConfigWith, trainer_for: TrainerFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(config_with())
    monkeypatch.setattr(resumable, "gather_object", lambda mine: [*mine, "run/checkpoint-2"])
    with pytest.raises(UserError, match=r"different checkpoints \(None, run/checkpoint-2\).*all nodes share"):
        trainer.train()


# ---------------------------------------------------------------------------------------------- GRPO
def test_grpo_stops_between_generations_and_goes_on_the_same(
    rl_config_with: Callable[..., RLConfig], rl_trainer_for: Callable[..., VideoGRPOTrainer], tmp_path: Path
) -> None:
    """Each batch of completions feeds two updates: told to stop in step 3, it stops after step 4. Records hold three
    steps each, so the one of steps 4 to 6 is begun by one run and ended by the next."""
    config = rl_config_with("training.num_iterations=2", "training.max_steps=8", "training.logging_steps=3",
                            "training.eval_strategy=steps", "training.eval_steps=4", "training.max_eval_samples=2",
                            "training.kl_coef=0.01")  # fmt: skip
    whole = rl_trainer_for(config, tmp_path / "whole")
    whole.train()
    cut = rl_trainer_for(config, tmp_path / "cut")
    cut.add_callback(AtStep(3, sigterm))
    cut.train()
    assert cut.exit_status == 143 and cut.state.global_step == 4
    append_records(tmp_path / "cut" / ROLLOUTS_FILE, [{"step": 4, "row": 0}])  # of a step that is sampled again
    resumed = resume(rl_trainer_for, config, tmp_path / "cut")
    assert_same(resumed, whole)
    assert set(figures(whole)[6]) >= {"loss", "reward", "kl", "completions/mean_length"}
    files = [(tmp_path / name / ROLLOUTS_FILE).read_text() for name in ("whole", "cut")]
    assert files[0] == files[1]
    assert (tmp_path / "cut" / SUPERSEDED_FILE).read_text() == '{"step": 4, "row": 0}\n'


# ---------------------------------------------------------------------------------------------- the record of rollouts
def test_records_of_steps_to_come_again_are_moved_away(tmp_path: Path) -> None:
    path = tmp_path / ROLLOUTS_FILE
    supersede(path, 0)
    assert not list(tmp_path.iterdir())
    append_records(path, [{"step": step, "row": row} for step in range(4) for row in range(2)])
    with open(path, "ab") as handle:
        handle.write(b'{"step": 4, "ro')
    assert len(read_records(path)) == 8
    supersede(path, 2)
    append_records(path, [{"step": 2, "row": 0, "again": True}])
    assert [(r["step"], r["row"]) for r in read_records(path)] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    moved = (tmp_path / SUPERSEDED_FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in moved[:-1]] == [2, 2, 3, 3] and moved[-1] == '{"step": 4, "ro'
    supersede(path, 9)
    assert len(read_records(path)) == 5 and len((tmp_path / SUPERSEDED_FILE).read_text().splitlines()) == 5


def test_a_glued_line_is_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / ROLLOUTS_FILE
    path.write_text('{"step": 0, "row": 0}\n{"step": 1, "r{"step": 1, "row": 0}\n{"step": 2, "row": 0}\n')
    assert [record["step"] for record in read_records(path)] == [0, 2]
    assert f"{path}:2 is half a record" in caplog.text
    supersede(path, 2)
    assert [record["step"] for record in read_records(path)] == [0]
    path.write_text('{"no": "record"}\n')
    with pytest.raises(UserError, match="rollouts.jsonl:1 is no rollout record"):
        read_records(path)


def test_a_text_with_odd_line_ends_is_one_record(tmp_path: Path) -> None:
    path, text = tmp_path / ROLLOUTS_FILE, "a\u2028b\x85c\x0cd\r\ne"
    append_records(path, [{"step": 0, "row": 0, "text": text}])
    assert [record["text"] for record in read_records(path)] == [text]


# ---------------------------------------------------------------------------------------------- data workers
class Pids(Dataset[int]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        return os.getpid()


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs Linux's sigwaitinfo")
def test_sigterm_of_others_passes_data_workers_by() -> None:
    batches = iter(outlive_sigterm(DataLoader(Pids(), batch_size=1, num_workers=1, prefetch_factor=1)))
    worker = int(next(batches))
    assert worker != os.getpid()
    subprocess.run(["kill", "-TERM", str(worker)], check=True)
    assert [int(pid) for pid in batches] == [worker] * 5


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs Linux's sigwaitinfo")
def test_a_parents_sigterm_ends_its_data_workers() -> None:
    batches: Any = iter(outlive_sigterm(DataLoader(Pids(), batch_size=1, num_workers=1, persistent_workers=True)))
    next(batches)
    [worker] = batches._workers
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
