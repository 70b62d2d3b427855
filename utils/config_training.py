"""The `training` section of SFT, and the keys that every `training` section has.

Beside this project's own keys stands every `transformers.TrainingArguments` key that makes sense; those come from the
installed transformers (`utils.config_trainer`). GRPO's section is in `utils.config_rl`. Reading files is
`utils.config`; training is `trainers`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from utils.config_base import Broken, Names
from utils.config_trainer import TrainerSection

_HUB = "training publishes nothing: upload a finished checkpoint folder with `hf upload`"
_VALIDATION = "validation generates answers in batches of training.per_device_eval_batch_size and scores them itself"
_ALWAYS = "the entry script always trains, and validates when data.val is given"


def refusals(best_metric: str, launcher: str) -> dict[str, str]:
    """The TrainingArguments keys that no section takes, with the reason and what to do instead.

    `best_metric` decides `checkpoint-best`; `launcher` starts the run on several GPUs.
    """
    best = f"checkpoint-best is always kept by {best_metric}"
    return {
        "output_dir": "give the folder on the command line: --output_dir FOLDER",
        "deepspeed": "give the file on the command line: --deepspeed configs/deepspeed/ds_zero2.json",
        "resume_from_checkpoint": "give it on the command line: --resume_from_checkpoint",
        "local_rank": f"torchrun sets it: start with {launcher} --num_gpus N",
        "do_train": _ALWAYS,
        "do_eval": _ALWAYS,
        "do_predict": "predict with inference/video_infer.py on a checkpoint",
        "enable_jit_checkpoint": "SIGTERM always saves a checkpoint and stops the run",
        "remove_unused_columns": "it would drop the video tensors, so it is always false",
        "prediction_loss_only": _VALIDATION,
        "include_for_metrics": _VALIDATION,
        "batch_eval_metrics": _VALIDATION,
        "eval_do_concat_batches": _VALIDATION,
        "eval_use_gather_object": _VALIDATION,
        "eval_accumulation_steps": _VALIDATION,
        "load_best_model_at_end": best,
        "metric_for_best_model": best,
        "greater_is_better": best,
        "use_cache": "a forward pass of training never reads a key/value cache, and generation always does",
        "activation_checkpointing": "set training.gradient_checkpointing",
        "activation_checkpointing_kwargs": "set training.gradient_checkpointing_kwargs",
        "parallelism_config": f"it is a Python object; for more GPUs use {launcher} --num_gpus N --deepspeed FILE",
        **dict.fromkeys(("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"), _HUB),
        **dict.fromkeys(("hub_always_push", "hub_revision"), _HUB),
    }


def _whole_or_share(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("must be a whole number of updates, or a share of the run below 1")
    return value


Updates = Annotated[int | float, Field(gt=0), AfterValidator(_whole_or_share)]
"""A number of optimizer updates, or below 1 a share of all updates of the run."""


class LearningKeys(TrainerSection):
    """What trains, in which batches and at which rates, and when that is logged, validated and saved."""

    learning_rate: float = Field(1e-4, ge=0)
    """Peak learning rate of the language LoRA, or of the language weights in full fine-tuning. 0 freezes them."""
    mm_projector_lr: float = Field(1e-5, ge=0)
    """Peak learning rate of the merger and the deepstack mergers (vision to language model). 0 freezes them."""
    vision_tower_lr: float = Field(0.0, ge=0)
    """Peak learning rate of the vision blocks. 0 freezes them, and saves their gradients and optimizer states."""
    head_lr: float = Field(1e-4, ge=0)
    """Peak learning rate of the token embeddings and the output head."""
    per_device_train_batch_size: int = Field(2, ge=1)
    """Rows (a video and a query) in one forward pass on each GPU."""
    per_device_eval_batch_size: int = Field(4, ge=1)
    """Videos generated for at once on each GPU in validation."""
    gradient_accumulation_steps: int = Field(8, ge=1)
    """Forward passes to one optimizer update: an update sees this x per_device_train_batch_size x GPUs videos."""
    num_train_epochs: float = Field(3.0, gt=0)
    """Passes over the training rows."""
    max_steps: int = Field(-1, ge=-1)
    """Stop after this many updates; -1 means num_train_epochs decides."""
    bf16: bool = True
    """Compute in bfloat16. Needs an Ampere or newer GPU, or use_cpu."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: about a third slower, and much less memory."""
    lr_scheduler_type: str = "cosine"
    """Shape of the learning rate over the run, one of transformers' schedulers."""
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    """Share of all updates over which the learning rates rise from 0. Not used when warmup_steps is set."""
    warmup_steps: int | None = Field(None, ge=0)
    """The same as a number of updates; null leaves it to warmup_ratio."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients with a longer norm are scaled down to it. 0 switches that off."""
    logging_steps: Updates = 10
    """Updates between two lines of loss, learning rates and speed; below 1 a share of the run."""
    eval_strategy: Literal["no", "steps", "epoch"] = "steps"
    """When to validate: every eval_steps, after every epoch, or never (then there is no checkpoint-best)."""
    eval_steps: Updates = 200
    """Updates between two validations; below 1 a share of the run."""
    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    """When to save a checkpoint to resume from: every save_steps, after every epoch, or never."""
    save_steps: Updates = 200
    """Updates between two checkpoints; below 1 a share of the run."""
    save_total_limit: int | None = Field(3, ge=1)
    """Checkpoints to keep for resuming, besides checkpoint-best and checkpoint-final; null keeps all."""
    max_eval_samples: int | None = Field(500, ge=1)
    """Validation rows answered in each validation (the same ones every time); null takes all."""

    def rules(self) -> Iterable[Broken]:
        """Something trains."""
        rates = ("learning_rate", "mm_projector_lr", "vision_tower_lr", "head_lr")
        if not any(getattr(self, rate) for rate in rates):
            keys = tuple(f"training.{rate}" for rate in rates)
            yield Broken(keys, f"{', '.join(keys)} are all 0, so nothing would train", "raise one of them")


class RecordKeys(TrainerSection):
    """Data workers, seed, where a run's numbers go, and the check before it starts."""

    dataloader_num_workers: int = Field(4, ge=0)
    """Processes that decode videos on each GPU's side; 0 decodes in the training process."""
    seed: int = Field(42, ge=0)
    """Seed of data order, initialisation and dropout."""
    report_to: Names = ("tensorboard",)
    """Where the numbers go besides the JSONL file: tensorboard, wandb, ...; none or [] for nowhere."""
    metrics_dir: Annotated[Path, Field(strict=False)] = Path("outputs/metrics")
    """Folder of the JSONL metrics and the PNG curves."""
    logging_dir: Annotated[Path, Field(strict=False)] = Path("outputs/logs")
    """Folder of TensorBoard's event files."""
    run_name: str | None = None
    """Name of the run in file names, TensorBoard and W&B; null takes the output folder's."""
    blindness_guard: bool = True
    """Check once at the start that zeroed pixels change the answer's log-probabilities; a blind model is an error."""


class _SFTKeys(TrainerSection):
    """What only SFT has."""

    max_new_tokens: int = Field(64, ge=1)
    """Tokens to generate for an answer in validation. With prompt.thinking 512 or more, or the answer is cut off."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after this many validations without a better eval/mIoU; null never stops early."""
    group_by_length: bool = True
    """Put rows of similar length into one batch, which wastes less padding. Not used with share_video, whose batches
    have no padding."""
    share_video: bool = False
    """Compute the rows of a batch that ask about the same video as one sequence, the video once: the same loss and
    gradients for less. Rows of a video are then drawn side by side."""
    max_queries_per_video: int = Field(8, ge=2)
    """With share_video: at most so many rows of a video side by side; those beyond come elsewhere in the epoch."""


def stopping_rule(patience: int | None, eval_strategy: str) -> Iterable[Broken]:
    """Early stopping has validations to go by."""
    if patience and eval_strategy == "no":
        text = "training.early_stopping_patience needs validations, and training.eval_strategy is no"
        keys = ("training.early_stopping_patience", "training.eval_strategy")
        yield Broken(keys, text, "set training.eval_strategy: steps, or the patience to null")


class SFTTrainingConfig(RecordKeys, _SFTKeys, LearningKeys):  # pydantic lists the last base's keys first
    """How SFT trains. Any other TrainingArguments key may be written beside these, but for the `REFUSED` ones."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        **refusals("eval/mIoU", "scripts/sft.sh"),
        "label_names": "the labels are always in `labels`",
        "label_smoothing_factor": "the loss is plain cross-entropy on the answer's tokens",
        "train_sampling_strategy": "set training.group_by_length",
        "length_column_name": "lengths come from the rows themselves; set training.group_by_length",
    }

    def rules(self) -> Iterable[Broken]:
        """Something trains, early stopping has validations to go by, and batches can share a video."""
        yield from super().rules()
        yield from stopping_rule(self.early_stopping_patience, self.eval_strategy)
        if self.share_video and self.per_device_train_batch_size < 2:
            keys = ("training.share_video", "training.per_device_train_batch_size")
            text = "training.share_video shares a video within a batch, and training.per_device_train_batch_size is 1"
            yield Broken(keys, text, "raise it to the rows of a video, and lower gradient_accumulation_steps")

    def trainer_values(self) -> dict[str, Any]:
        """With the order of rows and the name of the labels."""
        order = "group_by_length" if self.group_by_length else "random"
        return {**super().trainer_values(), "train_sampling_strategy": order, "label_names": ["labels"]}
