"""The `training` section: this project's own keys, and every `transformers.TrainingArguments` key that makes sense beside them.

The second kind is read from the installed transformers, so a new version brings its keys along; nothing is listed by hand
but the keys that are refused, with the reason. Reading files is `utils.config`; training is `trainers`.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, Union

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, create_model, model_serializer

from utils.config_base import Broken, ConfigError, Names, StrictModel

if TYPE_CHECKING:
    from transformers import TrainingArguments

_HUB = "training publishes nothing: upload a finished checkpoint folder with `hf upload`"
_BEST = "checkpoint-best is always kept by eval/mIoU"
_VALIDATION = "validation generates answers in batches of training.per_device_eval_batch_size and scores them itself"
_ALWAYS = "the entry script always trains, and validates when data.val is given"

REFUSED: Mapping[str, str] = {
    "output_dir": "give the folder on the command line: --output_dir FOLDER",
    "deepspeed": "give the file on the command line: --deepspeed configs/deepspeed/ds_zero2.json",
    "resume_from_checkpoint": "give it on the command line: --resume_from_checkpoint",
    "local_rank": "torchrun sets it: start with scripts/sft.sh --num_gpus N",
    "do_train": _ALWAYS,
    "do_eval": _ALWAYS,
    "do_predict": "predict with inference/video_infer.py on a checkpoint",
    "remove_unused_columns": "it would drop the video tensors, so it is always false",
    "label_names": "the labels are always in `labels`",
    "prediction_loss_only": _VALIDATION,
    "include_for_metrics": _VALIDATION,
    "batch_eval_metrics": _VALIDATION,
    "eval_do_concat_batches": _VALIDATION,
    "eval_use_gather_object": _VALIDATION,
    "eval_accumulation_steps": _VALIDATION,
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "label_smoothing_factor": "the loss is plain cross-entropy on the answer's tokens",
    "use_cache": "a forward pass of training never reads a key/value cache, and generation always does",
    "train_sampling_strategy": "set training.group_by_length",
    "length_column_name": "lengths come from the rows themselves; set training.group_by_length",
    "activation_checkpointing": "set training.gradient_checkpointing",
    "activation_checkpointing_kwargs": "set training.gradient_checkpointing_kwargs",
    "parallelism_config": "it is a Python object; for more GPUs use scripts/sft.sh --num_gpus N --deepspeed FILE",
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"), _HUB),
    **dict.fromkeys(("hub_always_push", "hub_revision"), _HUB),
}
"""TrainingArguments keys that a config may not set, with the reason and what to do instead."""


def _whole_or_share(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("must be a whole number of updates, or a share of the run below 1")
    return value


Updates = Annotated[int | float, Field(gt=0), AfterValidator(_whole_or_share)]
"""A number of optimizer updates, or below 1 a share of all updates of the run."""


class SFTTrainingConfig(StrictModel):
    """How SFT trains. Any other TrainingArguments key may be written beside these, but for the `REFUSED` ones."""

    REFUSED: ClassVar[Mapping[str, str]] = REFUSED
    _own: ClassVar[type[SFTTrainingConfig] | None] = None  # the class that `complete` extended

    learning_rate: float = Field(1e-4, ge=0)
    """Peak learning rate of the language LoRA, or of the language weights in full fine-tuning. 0 freezes them."""
    mm_projector_lr: float = Field(1e-5, ge=0)
    """Peak learning rate of the merger and the deepstack mergers (vision features into the language model). 0 freezes them."""
    vision_tower_lr: float = Field(0.0, ge=0)
    """Peak learning rate of the vision blocks. 0 freezes them, which also saves their gradients and optimizer states."""
    head_lr: float = Field(1e-4, ge=0)
    """Peak learning rate of the token embeddings and the output head."""
    per_device_train_batch_size: int = Field(2, ge=1)
    """Videos in one forward pass on each GPU."""
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
    max_new_tokens: int = Field(64, ge=1)
    """Tokens to generate for an answer in validation. With prompt.thinking 512 or more, or the answer is cut off."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after this many validations without a better eval/mIoU; null never stops early."""
    group_by_length: bool = True
    """Put rows of similar length into one batch, which wastes less padding."""
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

    def rules(self) -> Iterable[Broken]:
        """Something trains, and early stopping has validations to go by."""
        rates = ("learning_rate", "mm_projector_lr", "vision_tower_lr", "head_lr")
        if not any(getattr(self, rate) for rate in rates):
            keys = tuple(f"training.{rate}" for rate in rates)
            yield Broken(keys, f"{', '.join(keys)} are all 0, so nothing would train", "raise one of them")
        if self.early_stopping_patience and self.eval_strategy == "no":
            text = "training.early_stopping_patience needs validations, and training.eval_strategy is no"
            keys = ("training.early_stopping_patience", "training.eval_strategy")
            yield Broken(keys, text, "set training.eval_strategy: steps, or the patience to null")

    @classmethod
    def arguments_class(cls) -> type[TrainingArguments]:
        """The Trainer's own arguments that this section mirrors. Imports transformers, which takes seconds."""
        from transformers import TrainingArguments

        return TrainingArguments

    @classmethod
    @lru_cache
    def complete(cls) -> type[Self]:
        """This class with a field for every other TrainingArguments key that is not refused. Imports transformers."""
        arguments = cls.arguments_class()
        hints = typing.get_type_hints(arguments)
        extra = {}
        for field in dataclasses.fields(arguments):
            hint = yaml_type(hints[field.name], field.metadata)
            if field.init and hint is not None and field.name not in {*cls.REFUSED, *cls.model_fields}:
                extra[field.name] = (hint, Field(default_factory=_default_of(field)))
        model: Any = create_model(f"Complete{cls.__name__}", __base__=cls, __module__=cls.__module__, **_choices(cls, hints), **extra)
        model._own = cls
        return model

    def values(self) -> dict[str, Any]:
        """Every own key, and those of the other keys that somebody set."""
        own = type(self)._own or type(self)
        names = [name for name in type(self).model_fields if name in own.model_fields or name in self.model_fields_set]
        return {name: getattr(self, name) for name in names}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SFTTrainingConfig) and self.values() == other.values()

    def __reduce__(self) -> tuple[Any, ...]:  # a class made at run time cannot be pickled by name
        return _restore, (type(self)._own or type(self), type(self)._own is not None, self.values())

    @model_serializer(mode="wrap")
    def _dump_values(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        kept = self.values()
        return {name: value for name, value in handler(self).items() if name in kept}

    def to_training_arguments(self, output_dir: str | Path, deepspeed: str | Path | None = None, **extra: Any) -> TrainingArguments:
        """The Trainer's arguments: what the config set, this project's defaults, then `extra` over both.

        Own keys that the Trainer does not know stay here. Raises ConfigError, naming the keys, when TrainingArguments refuses
        a value, and when the DeepSpeed file is missing or builds its own optimizer.
        """
        kind = self.arguments_class()
        known = {field.name for field in dataclasses.fields(kind) if field.init}
        if unknown := set(extra) - known:
            raise TypeError(f"{kind.__name__} has no {sorted(unknown)}")
        arguments = {**_to_trainer(self.values(), known), "output_dir": str(output_dir), **extra}
        if deepspeed is not None:
            arguments["deepspeed"] = check_deepspeed(Path(deepspeed))
        try:
            return kind(**arguments)
        except (ValueError, TypeError, FileNotFoundError) as error:
            raise ConfigError([_refusal(str(error), arguments, known)]) from error


def _restore(own: type[SFTTrainingConfig], complete: bool, values: dict[str, Any]) -> SFTTrainingConfig:
    return (own.complete() if complete else own)(**values)


def _default_of(field: dataclasses.Field[Any]) -> Any:
    """A factory of the field's default."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory
    return lambda: field.default.value if isinstance(field.default, enum.Enum) else field.default


def _choices(cls: type[SFTTrainingConfig], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Own fields whose values only the installed transformers knows, narrowed to them."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    places = ("all", "none", *sorted(INTEGRATION_TO_CALLBACK))
    narrowed = {"report_to": Annotated[tuple[Literal[places], ...], *Names.__metadata__]}  # type: ignore[valid-type]
    for name, field in cls.model_fields.items():
        if field.annotation is str and name in hints:
            narrowed[name] = yaml_type(hints[name], {})
    return {name: (hint, cls.model_fields[name].default) for name, hint in narrowed.items()}


def yaml_type(hint: Any, metadata: Mapping[str, Any]) -> Any:
    """The part of a TrainingArguments type hint that YAML can express; None when there is none.

    Enumerations and `choices` become literals, so that a misspelt value is refused when the file is read.

    >>> yaml_type(int | None, {}) == Union[int, None]
    True
    """
    arms = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    if metadata.get("choices"):
        literal = Literal[tuple(map(str, metadata["choices"]))]  # type: ignore[valid-type]
        return literal | None if type(None) in arms else literal  # type: ignore[operator]
    enums = [arm for arm in arms if isinstance(arm, type) and issubclass(arm, enum.Enum)]
    if enums:  # `SchedulerType | str`: text is only another way to write a member
        arms = (Literal[tuple(item.value for arm in enums for item in arm)], *(a for a in arms if a not in (*enums, str)))  # type: ignore[assignment]
    plain = [arm for arm in map(_plain, arms) if arm is not None]
    return Union[tuple(plain)] if any(arm is not type(None) for arm in plain) else None


def _plain(arm: Any) -> Any:
    """One arm of a type hint if YAML can express it: scalars, literals, mappings, lists of such; else None."""
    origin = typing.get_origin(arm)
    if origin is list:
        inner = yaml_type(typing.get_args(arm)[0], {})
        return list[inner] if inner is not None else None  # type: ignore[valid-type]
    if arm in (str, int, float, bool, type(None)) or origin is Literal:
        return arm
    return dict[str, Any] if (origin or arm) is dict else None


def _to_trainer(values: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Own keys in the Trainer's names and types. Which names it has differs between versions of transformers."""
    steps = values["warmup_steps"]
    values["warmup_steps"] = values["warmup_ratio"] if steps is None else steps  # below 1 it is a share of the run
    values["train_sampling_strategy"] = "group_by_length" if values["group_by_length"] else "random"
    values |= {"remove_unused_columns": False, "label_names": ["labels"]}
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = old.replace("gradient", "activation")
        if old in values and new in known:  # since transformers 5.2x the old name is deprecated
            values[new] = values.pop(old)
    return {name: _trainer_value(value) for name, value in values.items() if name in known}


def _trainer_value(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _refusal(message: str, arguments: Mapping[str, Any], known: Iterable[str]) -> str:
    """TrainingArguments' own message with the keys it is about: those it names, else those whose value it quotes."""
    words = set(re.findall(r"\w+", message))
    named = [name for name in sorted(known) if name in words]
    quoted = [name for name, value in arguments.items() if isinstance(value, str) and value and value in message]
    keys = ", ".join(f"training.{name}" for name in named or quoted) or "the section training"
    return f"{keys}: the Trainer refuses the value ({' '.join(message.split())}); change it in the config"


def check_deepspeed(path: Path) -> str:
    """`path` as text, if it is a DeepSpeed file this project can use. Raises ConfigError otherwise.

    An optimizer or scheduler block would replace the parameter groups with their own learning rates.
    """
    try:
        blocks = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"--deepspeed {path} cannot be read ({error.strerror}); configs/deepspeed/ holds two files"]) from error
    except ValueError as error:
        raise ConfigError([f"--deepspeed {path} is not valid JSON ({error})"]) from error
    if not isinstance(blocks, dict):
        raise ConfigError([f"--deepspeed {path} must hold a mapping, got {type(blocks).__name__}"])
    if own := [name for name in ("optimizer", "scheduler") if name in blocks]:
        text = "the learning rates come from the config, one for each group of weights"
        raise ConfigError([f"--deepspeed {path} must not hold the block {' or '.join(own)}: {text}; remove it"])
    return str(path)
