"""What ties a `training` section to the Trainer: its keys come from the installed transformers, its values go there.

A new version of transformers brings its keys along; nothing is listed by hand but the keys a section refuses, with the
reason. The sections themselves are in `utils.config_training`; training is `trainers`.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from functools import lru_cache, reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, create_model, model_serializer

from utils.config_base import ConfigError, StrictModel, as_list

if TYPE_CHECKING:
    from transformers import TrainingArguments


class TrainerSection(StrictModel):
    """Base of the `training` sections: own keys as fields, and any other key of `arguments_class` that makes sense."""

    REFUSED: ClassVar[Mapping[str, str]] = {}
    """Keys that a config may not set, with the reason and what to do instead."""
    RENAMED: ClassVar[Mapping[str, str]] = {}
    """Own keys that `arguments_class` knows by another name."""
    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Values of keys of `arguments_class` whose type says no more than that they are text."""
    _own: ClassVar[type[TrainerSection] | None] = None  # the class that `complete` extended

    @classmethod
    def arguments_class(cls) -> type[TrainingArguments]:
        """The Trainer's arguments that this section mirrors. Imports transformers, which takes seconds."""
        from transformers import TrainingArguments

        return TrainingArguments

    @classmethod
    @lru_cache
    def complete(cls) -> type[TrainerSection]:
        """This class with a field for every other key of `arguments_class` that is not refused. Imports that class."""
        arguments = cls.arguments_class()
        hints = typing.get_type_hints(arguments)
        fields = _narrowed(cls, hints)
        for field in dataclasses.fields(arguments):
            hint = yaml_type(hints[field.name], {"choices": cls.CHOICES.get(field.name), **field.metadata})
            if field.init and hint is not None and field.name not in {*cls.REFUSED, *cls.model_fields}:
                fields[field.name] = (hint, Field(default_factory=_default_of(field)))
        model: Any = create_model(f"Complete{cls.__name__}", __base__=cls, __module__=cls.__module__, **fields)
        model._own = cls
        return model

    def values(self) -> dict[str, Any]:
        """Every own key, and those of the other keys that somebody set."""
        own = type(self)._own or type(self)
        names = [name for name in type(self).model_fields if name in own.model_fields or name in self.model_fields_set]
        return {name: getattr(self, name) for name in names}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TrainerSection) and self.values() == other.values()

    def __reduce__(self) -> tuple[Any, ...]:  # a class made at run time cannot be pickled by name
        own = type(self)._own or type(self)
        return _restore, (own, own is not type(self), self.__dict__, self.model_fields_set)

    @model_serializer(mode="wrap")
    def _dump_values(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        kept = self.values()
        return {name: value for name, value in handler(self).items() if name in kept}

    def trainer_values(self) -> dict[str, Any]:
        """`values` under the Trainer's names, and what is always set. Sections with further such keys add to this."""
        values = {self.RENAMED.get(name, name): value for name, value in self.values().items()}
        if values["warmup_steps"] is None:
            values["warmup_steps"] = values["warmup_ratio"]  # below 1 it is a share of the run
        return {**values, "remove_unused_columns": False}

    def to_training_arguments(
        self, output_dir: str | Path, deepspeed: str | Path | None = None, **extra: Any
    ) -> TrainingArguments:
        """The Trainer's arguments: what the config set, this project's defaults, then `extra` over both.

        Own keys that the Trainer does not know stay here. Raises ConfigError, naming the keys, when `arguments_class`
        refuses a value, when the DeepSpeed file is missing or builds its own optimizer, and when the package of a
        tracker in `report_to` is not installed.
        """
        kind = self.arguments_class()
        known = {field.name for field in dataclasses.fields(kind) if field.init}
        if unknown := set(extra) - known:
            raise TypeError(f"{kind.__name__} has no {sorted(unknown)}")
        arguments = {**_to_trainer(self.trainer_values(), known), "output_dir": str(output_dir), **extra}
        if deepspeed is not None:
            arguments["deepspeed"] = check_deepspeed(Path(deepspeed))
        check_trackers(arguments.get("report_to") or ())
        try:
            return kind(**arguments)
        except (ValueError, TypeError, FileNotFoundError) as error:
            raise ConfigError([self._refusal(str(error), arguments)]) from error

    def _refusal(self, message: str, arguments: Mapping[str, Any]) -> str:
        """The Trainer's own message with the keys it is about: those it names, else those whose value it quotes."""
        own = {theirs: ours for ours, theirs in self.RENAMED.items()}
        words = set(re.findall(r"\w+", message))
        fields = dataclasses.fields(self.arguments_class())
        named = [field.name for field in fields if field.init and field.name in words]
        quoted = [name for name, value in arguments.items() if isinstance(value, str) and value and value in message]
        keys = ", ".join(f"training.{own.get(name, name)}" for name in sorted(named) or quoted)
        text = f"the Trainer refuses the value ({' '.join(message.split())}); change it in the config"
        return f"{keys or 'the section training'}: {text}"


def _restore(own: type[TrainerSection], complete: bool, values: dict[str, Any], written: set[str]) -> TrainerSection:
    return (own.complete() if complete else own).model_construct(written, **values)


def _default_of(field: dataclasses.Field[Any]) -> Any:
    """A factory of the field's default."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory
    return lambda: field.default.value if isinstance(field.default, enum.Enum) else field.default


def _narrowed(cls: type[TrainerSection], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Own fields whose values only the installed transformers knows, narrowed to them."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    places = ("all", "none", *sorted(INTEGRATION_TO_CALLBACK))
    report_to = Annotated[tuple[Literal[places], ...], Field(strict=False), BeforeValidator(as_list)]  # type: ignore[valid-type]
    narrowed: dict[str, Any] = {"report_to": report_to} if "report_to" in cls.model_fields else {}
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
        members = Literal[tuple(member.value for arm in enums for member in arm)]  # type: ignore[valid-type]
        arms = (members, *(arm for arm in arms if arm not in (*enums, str)))
    plain = [arm for arm in map(_plain, arms) if arm is not None]
    return reduce(or_, plain) if any(arm is not type(None) for arm in plain) else None


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
    """Values in the Trainer's types, without the keys it does not know. Which it knows differs between versions."""
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = old.replace("gradient", "activation")
        if old in values and new in known:  # 5.17 has the old name alone, 5.23 deprecates it
            values[new] = values.pop(old)
    return {name: _trainer_value(value) for name, value in values.items() if name in known}


def _trainer_value(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def check_trackers(names: Iterable[str]) -> None:
    """Raise ConfigError when a tracker that `report_to` names is not installed: Trainer would, minutes later."""
    from transformers.integrations import get_available_reporting_integrations

    known = {"all", "none", "flyte", *get_available_reporting_integrations()}  # transformers cannot tell for flyte
    if missing := sorted(set(names) - known):
        text = f"training.report_to: no package for {', '.join(missing)} is installed here"
        raise ConfigError([f"{text}; pip install it, or take it out (the JSONL file has all numbers)"])


def check_deepspeed(path: Path) -> str:
    """`path` as text, if it is a DeepSpeed file this project can use. Raises ConfigError otherwise.

    An optimizer or scheduler block would replace the parameter groups with their own learning rates, and under offload
    accelerate silently trains with another optimizer, whatever `training.optim` and `adam_beta2` say. Modules that a
    file names would be imported, and a file of settings runs no code.
    """
    try:
        blocks = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        text = f"--deepspeed {path} cannot be read ({error.strerror}); configs/deepspeed/ holds two files"
        raise ConfigError([text]) from error
    except ValueError as error:
        raise ConfigError([f"--deepspeed {path} is not valid JSON ({error})"]) from error
    if not isinstance(blocks, dict):
        raise ConfigError([f"--deepspeed {path} must hold a mapping, got {type(blocks).__name__}"])
    if own := [name for name in ("optimizer", "scheduler") if name in blocks]:
        text = "the learning rates come from the config, one for each group of weights"
        raise ConfigError([f"--deepspeed {path} must not hold the block {' or '.join(own)}: {text}; remove it"])
    zero = blocks.get("zero_optimization")
    offloads = isinstance(zero, dict) and (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    if offloads and blocks.get("zero_force_ds_cpu_optimizer", True):
        text = "accelerate would replace training.optim by DeepSpeed's CPU Adam with default betas"
        raise ConfigError(
            [f'--deepspeed {path} offloads the optimizer: {text}; add "zero_force_ds_cpu_optimizer": false']
        )
    autocast = blocks.get("torch_autocast")
    if isinstance(autocast, dict) and autocast.get("lower_precision_safe_modules"):
        key = "torch_autocast.lower_precision_safe_modules"
        raise ConfigError([f"--deepspeed {path} must not hold {key}: DeepSpeed imports what it names; remove it"])
    return str(path)
