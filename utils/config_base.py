"""What every section of a configuration is made of: the strict model, rules between keys, and the error of a bad file.

The sections are in `utils.config` and `utils.config_training`; the wording of their errors in `utils.config_errors`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from utils.common import UserError


class ConfigError(UserError):
    """Every mistake of a configuration at once, one a line; `problems` holds the lines."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class Broken(NamedTuple):
    """A rule between keys that does not hold."""

    keys: tuple[str, ...]
    """The keys concerned, in full (`data.min_frames`); their places are cited in this order."""
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.text}; {self.remedy}" if self.remedy else self.text


class RuleError(ValueError):
    """Raised inside a model when rules between its keys do not hold; pydantic carries it to `utils.config_errors`."""

    def __init__(self, broken: Sequence[Broken]) -> None:
        super().__init__("; ".join(map(str, broken)))
        self.broken = tuple(broken)


class StrictModel(BaseModel):
    """A frozen model that refuses unknown keys and values of another type (`"2"` or `true` is no number)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    def rules(self) -> Iterable[Broken]:
        """The rules between keys that do not hold; asked once every single value is fine."""
        return ()

    @model_validator(mode="after")
    def _keep_rules(self) -> Self:
        if broken := list(self.rules()):
            raise RuleError(broken)
        return self


def as_list(value: Any) -> Any:
    """A single text stands for a list of one."""
    return [value] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], Field(strict=False), BeforeValidator(as_list)]
"""A list of names; in YAML a single name will do."""
