"""What SFT and RL share around transformers' Trainer: a learning rate per part of the model, greedy validation by the
project's metrics, `checkpoint-best` / `checkpoint-final` with manifest and prompt contract, advice on memory.

Stopping and going on exactly is `trainers.resumable`'s; the losses and the data of training are the two trainers' own.
"""

from __future__ import annotations

import json
import math
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from torch.utils.data import SequentialSampler
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import IntervalStrategy

from datasets.collate_fns import VideoCollator
from datasets.video_dataset import VideoTemporalDataset
from trainers.callbacks import AtTrainBegin, FaultCounter, MetricsCallback, ProgressLines, SpeedMeter
from trainers.generation import answer_rows
from trainers.interruptions import outlive_sigterm
from trainers.model import Policy
from trainers.parts import LearningRates, parameter_size, part_of
from trainers.resumable import ResumableTrainer
from utils.checkpoints import BEST, FINAL, replace_folder, rotate, saving, start_save, unfinished_of, write_manifest
from utils.clip_reader import Reads, warn_once
from utils.common import UserError, atomic_open, write_json
from utils.config import RLConfig, SFTConfig
from utils.logging_utils import get_logger, peak_memory_bytes
from utils.metrics import evaluate
from utils.prompts import PromptContract
from utils.run import Run

OUT_OF_MEMORY = (
    "CUDA ran out of memory ({reason}). What lowers it, strongest first: training.per_device_train_batch_size (raise "
    "training.gradient_accumulation_steps to keep the batch), {more}data.total_pixels or data.max_frames, "
    "training.gradient_checkpointing=true, --deepspeed configs/deepspeed/ds_zero3_offload.json, lora.r, dropping "
    "embed_tokens and lm_head from lora.modules_to_save, a smaller model. Complete checkpoints stay; go on with "
    "--resume_from_checkpoint auto"
)


@contextmanager
def advising_on_memory(more: str = "") -> Iterator[None]:
    """Around or over a function: CUDA running out of memory becomes a UserError that names the knobs that lower it.

    `more` are further ones, ending in ", ".
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(OUT_OF_MEMORY.format(reason=str(error).splitlines()[0], more=more)) from error


def rng_kept(device: torch.device) -> AbstractContextManager[None]:
    """Leaves torch's random generators, the CPU's and that of `device`, as they were."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@dataclass(frozen=True)
class TrainingSetup:
    """What a trainer needs beside TrainingArguments."""

    rates: LearningRates
    contract: PromptContract
    max_new_tokens: int
    max_bad_fraction: float
    blindness_guard: bool
    early_stopping_patience: int | None
    max_queries_per_video: int = 1
    """SFT: rows on one video that are computed together; 1 shares nothing."""
    run: Run | None = None
    """Where records go; None writes none (a dry run, a test)."""

    @classmethod
    def from_config(
        cls, config: SFTConfig | RLConfig, rates: LearningRates, contract: PromptContract, run: Run | None
    ) -> TrainingSetup:
        """The part of the configuration that the trainer reads itself."""
        training: Any = config.training
        is_sft = isinstance(config, SFTConfig)
        return cls(
            rates=rates,
            contract=contract,
            max_new_tokens=training.max_new_tokens if is_sft else training.max_completion_length,
            max_bad_fraction=config.data.max_bad_fraction,
            blindness_guard=training.blindness_guard,
            early_stopping_patience=training.early_stopping_patience,
            max_queries_per_video=training.max_queries_per_video if is_sft and training.share_video else 1,
            run=run,
        )


class RunKeeper(ResumableTrainer):
    """Base of the trainers, put before the Trainer class that trains. A subclass calls `prepare` before and `watch`
    after that class's `__init__`."""

    memory_advice: ClassVar[str] = ""
    """Further knobs that lower memory, ending in ", "."""

    # Trainer sets these without saying their types.
    data_collator: Any
    optimizer: Any

    def prepare(
        self,
        policy: Policy,
        train_dataset: Any,
        eval_dataset: VideoTemporalDataset | None,
        args: TrainingArguments,
        setup: TrainingSetup,
    ) -> None:
        """Settle the arguments and make the helpers that Trainer's `__init__` may already call."""
        self.setup = setup
        args.metric_for_best_model, args.greater_is_better = self.best_metric, True
        self.num_kept, args.save_total_limit = args.save_total_limit, None  # `rotate` does it; see there
        if eval_dataset is None:
            args.eval_strategy = IntervalStrategy.NO
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every batch has a video, so every trained parameter is used
        self.faults = FaultCounter(len(train_dataset), setup.max_bad_fraction)
        pad = policy.processor.tokenizer.pad_token_id
        self.eval_collator = VideoCollator(pad, eval_dataset.blank(), side="left") if eval_dataset is not None else None
        self.speed = SpeedMeter()
        self.reads = Reads()
        self.prepare_to_stop(setup.early_stopping_patience)

    def watch(self) -> None:
        """Add the project's callbacks in the place of Trainer's own progress output."""
        self.add_callback(self.stop)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.progress_lines = ProgressLines()
        self.add_callback(self.progress_lines)
        if self.setup.run is not None:
            self.add_callback(MetricsCallback(self.setup.run.metrics_path, str(self.args.output_dir)))
        if self.patience is not None:
            self.add_callback(self.patience)
        self.add_callback(AtTrainBegin(self.begin))  # last: it may validate, which the others record

    def at_train_begin(self) -> None:
        """Checks before the first step; the model is wrapped and placed by then."""
        self.speed.restart()

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Trainer's, with workers that SIGTERM does not end before the step is done."""
        return outlive_sigterm(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """Validation batches are left-padded prompts without answers."""
        training_collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return outlive_sigterm(super().get_eval_dataloader(eval_dataset))
        finally:
            self.data_collator = training_collator

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler:
        return SequentialSampler(eval_dataset)  # Trainer's would decode every video to group rows by length

    def count_reads(self, reads: Reads) -> None:
        """Note what was decoded for a batch, in a worker or here."""
        self.reads.add(reads)
        warn_once(reads.problems)

    # ------------------------------------------------------------------ optimizer
    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """One parameter group per part of the model and weight-decay setting, each at its own learning rate."""
        if self.optimizer is not None:
            return self.optimizer
        target = self.model if model is None else model
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, target)
        if {"params", "model", "optimizer_dict"} & set(options):
            raise UserError(
                f"training.optim={self.args.optim} builds its own parameter groups, which would drop mm_projector_lr "
                f"and head_lr; choose another, e.g. adamw_torch"
            )
        self.optimizer = optimizer_class(self.parameter_groups(target), **options)
        return self.optimizer

    def parameter_groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """`[{"params", "lr", "weight_decay", "part"}]`, only what trains, in a fixed order (resume relies on it)."""
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[str, bool], dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            key = (part_of(name), name in decayed)
            group = groups.setdefault(
                key,
                {
                    "params": [],
                    "lr": getattr(self.setup.rates, key[0]),
                    "weight_decay": self.args.weight_decay if key[1] else 0.0,
                    "part": key[0],
                },
            )
            group["params"].append(parameter)
        if not groups:
            raise UserError(
                "nothing trains: every learning rate is 0 and lora.enabled is false, or LoRA has no targets"
            )
        return [groups[key] for key in sorted(groups)]

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Trainer's own; CUDA running out of memory names the knobs that lower it, a foreign checkpoint what it is."""
        try:
            with advising_on_memory(self.memory_advice):
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except pickle.UnpicklingError as error:
            raise UserError(
                "--resume_from_checkpoint: an optimizer, scheduler or random state in it holds other objects than "
                f"tensors, which were not read ({str(error).strip().splitlines()[0][:200]}). Resume a checkpoint that "
                "this machine wrote (SECURITY.md)"
            ) from error
        finally:
            self.progress_lines.close()

    def progress(self) -> dict[str, Any]:
        """With the rows that could not be used."""
        return {**super().progress(), "faults": sorted(self.faults.rows.items())}

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Take up what `progress` gave."""
        super().restore(progress)
        self.faults.rows = dict(progress["faults"])

    # ------------------------------------------------------------------ validation
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Answer every validation row greedily and score it by `utils.metrics`. Returns `eval_mIoU`, ..."""
        dataset: Any = eval_dataset if eval_dataset is not None else self.eval_dataset
        started = time.perf_counter()
        predictions = self._answer_rows(dataset)
        samples = [dataset.scored_sample(index, text) for index, text in sorted(predictions.items())]
        scores = {**evaluate(samples), **self.further_scores(dataset, predictions)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - started
        self._save_predictions(dataset, predictions)
        self.log(dict(metrics))
        self.speed.skip(time.perf_counter() - started)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def further_scores(self, dataset: Any, predictions: Mapping[int, str]) -> dict[str, float]:
        """More than `utils.metrics` says about the validation answers, by row number. Here: nothing."""
        return {}

    def _answer_rows(self, dataset: Any) -> dict[int, str]:
        """Answer text per row number, from all processes; a faulty row is counted and answers nothing."""
        loader = self.get_eval_dataloader(dataset)
        with rng_kept(self.args.device):  # a run goes on the same whether or not it validates
            answers = answer_rows(
                self.model,
                self.processing_class,
                self.until_asked(self._progress(loader)),
                max_new_tokens=self.setup.max_new_tokens,
                bf16=self.args.bf16,
                synced_gpus=is_deepspeed_zero3_enabled(),
            )
        self.count_reads(answers.reads)
        FaultCounter(len(dataset), self.setup.max_bad_fraction).add(gather_object(answers.faults))
        return dict(gather_object(list(answers.texts.items())))

    def _progress(self, loader: Any) -> Any:
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        return tqdm(loader, desc="validation", leave=False, disable=hidden)

    def _save_predictions(self, dataset: Any, predictions: dict[int, str]) -> None:
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir) / "validation" / f"step-{self.state.global_step}.jsonl"
        with atomic_open(path) as handle:
            for index, text in sorted(predictions.items()):
                row = dataset.rows[index]
                record = {"video": row.video, "sentence": row.sentence, "timestamp": row.timestamp, "answer": text}
                record |= dataset.scored_sample(index, text)  # what the metrics and their intervals are made of
                handle.write(json.dumps(record, ensure_ascii=False) + "\n")

    # ------------------------------------------------------------------ checkpoints
    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As Trainer's; a new best is also saved as `checkpoint-best`."""
        is_new_best = super()._determine_best_metric(metrics, trial)
        self.state.best_global_step = None  # Trainer would miss its checkpoint-<step> when that is rotated away
        if is_new_best:
            self.save_named(BEST, metrics)
        return is_new_best

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        started = time.perf_counter()
        with self._saving(folder, folder, with_optimizer=True):
            super()._save_checkpoint(model, trial)
            self.save_progress(folder)
        if self.args.should_save:
            rotate(folder.parent, self.num_kept, newest=folder)
        self.speed.skip(time.perf_counter() - started)

    def save_named(self, name: str, metrics: dict[str, float] | None = None) -> Path:
        """Save loadable weights, processor and prompt contract as `<output_dir>/<name>`, replacing an older one
        whole."""
        target = Path(self.args.output_dir) / name
        unfinished = unfinished_of(target)
        with self._saving(target, unfinished, with_optimizer=False):
            self.save_model(str(unfinished), _internal_call=True)
            if self.args.should_save and metrics:
                write_json(unfinished / "metrics.json", {"step": self.state.global_step, **metrics})
        if self.args.should_save:
            replace_folder(unfinished, target)
            get_logger().info("saved %s (step %d)", target, self.state.global_step)
        self.accelerator.wait_for_everyone()
        return target

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict is not None and self.model.config.tie_word_embeddings:
            # DeepSpeed hands over every name; transformers then no longer sees that the head is the embeddings.
            state_dict = {name: value for name, value in state_dict.items() if name != "lm_head.weight"}
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.setup.contract.save(Path(output_dir or self.args.output_dir))

    @contextmanager
    def _saving(self, target: Path, folder: Path, *, with_optimizer: bool) -> Iterator[None]:
        """Around the writing of `target` into `folder`, on every rank: nothing there counts until all have written."""
        with saving(target, self._checkpoint_bytes(with_optimizer=with_optimizer)):
            if self.args.should_save:
                start_save(folder)
            self.accelerator.wait_for_everyone()
            yield
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_manifest(folder)
            self.accelerator.wait_for_everyone()

    def _checkpoint_bytes(self, *, with_optimizer: bool) -> int:
        """Estimated size of a save: the trained weights (all of them in full fine-tuning) and two fp32 Adam moments."""
        lora = hasattr(self.model, "peft_config")
        saved = [p for p in self.model.parameters() if p.requires_grad or not lora]
        weights = sum(parameter_size(p) * p.element_size() for p in saved)
        moments = sum(8 * parameter_size(p) for p in saved if p.requires_grad) if with_optimizer else 0
        return int(1.05 * (weights + moments)) + 16 * 2**20

    def finish(self) -> dict[str, float]:
        """After training: validate the last step if it was not, save `checkpoint-final`, return its metrics."""
        metrics: dict[str, float] = {}
        if self.eval_dataset is not None:
            last = [entry for entry in self.state.log_history if self.best_metric in entry]
            if last and last[-1]["step"] == self.state.global_step:
                metrics = {k: v for k, v in last[-1].items() if k.startswith("eval_")}
            else:
                metrics = self.evaluate()
                self._determine_best_metric(metrics, None)
        self.save_named(FINAL, metrics)
        return metrics

    # ------------------------------------------------------------------ logs
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's record, with every group's learning rate, throughput and peak memory beside the loss."""
        if "train_runtime" in logs and (self.stop.agreed or self.state.global_step == self._initial_global_step):
            return  # the summary comes once, when a run ends
        if "loss" in logs:
            logs.pop("learning_rate", None)
            logs |= self.learning_rates() | self.speed.read(self.accelerator.num_processes)
            logs["peak_memory_gb"] = peak_memory_bytes() / 2**30
            faults = gather_object(list(self.faults.rows.items()))  # of all processes
            logs["unreadable_videos"] = len(dict(faults))
            logs |= self.read_counts()
            if not math.isfinite(logs["loss"]):
                get_logger().warning(
                    "step %d: the loss is %s; lower the learning rates or training.max_grad_norm",
                    self.state.global_step,
                    logs["loss"],
                )
        super().log(logs, start_time)
        if "unreadable_videos" in logs:
            self.faults.add(faults)  # alike on every process: none waits for one that stopped

    def read_counts(self) -> dict[str, int]:
        """`data/decoded`, `data/cache_hits`, ...: clips of all processes since this one began, validation included.

        Collective: every process calls it.
        """
        counts = self.reads.counts
        total = self.accelerator.reduce(torch.tensor(list(counts.values()), device=self.args.device))
        return {f"data/{name}": value for name, value in zip(counts, total.tolist(), strict=True)}

    def learning_rates(self) -> dict[str, float]:
        """`learning_rate/<part>` as the scheduler has them now."""
        groups: Sequence[dict[str, Any]] = self.optimizer.param_groups if self.optimizer is not None else []
        return {f"learning_rate/{group['part']}": group["lr"] for group in groups if "part" in group}
