"""Reading a section, and what is wrong with it in plain words: `data.fps must be > 0, got -2 (configs/data/x.yaml:4)`.

Turns pydantic's errors and the broken rules of a section into `Problem`s, all of them, not the first. Where a key was
written comes from `utils.config_yaml`; what the keys mean is in `utils.config`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, RootModel, ValidationError

from utils.common import nearest
from utils.config_base import Broken, RuleError, StrictModel
from utils.config_trainer import TrainerSection
from utils.config_yaml import Document, KeyPath, Place, Problem, dotted, shown

Detail = Mapping[str, Any]
"""One of pydantic's errors: `loc`, `type`, `msg`, `input` and for some types `ctx`."""

SectionModel = type[StrictModel] | type[RootModel[Any]]
"""The model of a section; a RootModel of a mapping where the keys are the user's to choose."""

_TYPES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "path_type": "must be a path",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping of keys",
    "model_attributes_type": "must be a mapping of keys",
    "none_required": "must be null",
}
_LIMITS = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}


class Finding(NamedTuple):
    """A problem, and the keys (`section.key`) to leave out so that the rest of the section can be looked at too."""

    keys: tuple[str, ...]
    problem: Problem


def read_section(name: str, models: Mapping[str, SectionModel], document: Document, found: list[Finding]) -> Any:
    """Section `name` of `document`: a StrictModel, or a plain mapping where the keys are free.

    What is wrong is added to `found`, and has its default in the section returned (a free key is left out).
    """
    model, written = models[name], document.values.get(name)
    if not isinstance(written, dict | None):
        place = document.place((name,))
        text = f"{name} must be a mapping of keys, got {shown(written)}{_at([place])}"
        found.append(Finding((), Problem(text, place)))
    values = dict(written) if isinstance(written, dict) else {}
    for key in [key for key in values if key not in _keys(model, values)]:
        del values[key]
        found.append(Finding((f"{name}.{key}",), _no_such_key((name, key), models, document)))
    while True:
        try:
            section = model.model_validate(values)
            return section.root if isinstance(section, RootModel) else section
        except ValidationError as error:
            wrong = findings(error, name, model, document)
            found += [finding for finding in wrong if spoilt(found).isdisjoint(finding.keys)]
            # Without the wrong keys the next round sees the rules between the others, which pydantic asks for last.
            keys = {key for finding in wrong for key in finding.keys}
            rest = {key: value for key, value in values.items() if f"{name}.{key}" not in keys}
            values = rest if len(rest) < len(values) else {}


def _keys(model: SectionModel, written: Iterable[str] = ()) -> Iterable[str]:
    """The keys a section may have: whatever is `written` where they are free."""
    return written if issubclass(model, RootModel) else model.model_fields


def spoilt(found: Iterable[Finding]) -> set[str]:
    """The keys something is already said about; a rule that concerns one of them says nothing new."""
    return {key for finding in found for key in finding.keys}


def in_order(found: Iterable[Finding], files: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The texts, each once, by file and line; then the command line, then what has no place."""
    names = [os.fspath(file) for file in files]

    def rank(problem: Problem) -> tuple[int, int]:
        if problem.place is None:
            return len(names) + 1, 0
        return names.index(problem.place.file) if problem.place.file in names else len(names), problem.place.line or 0

    return list(dict.fromkeys(problem.text for problem in sorted((finding.problem for finding in found), key=rank)))


def findings(error: ValidationError, section: str, model: type[BaseModel], document: Document) -> list[Finding]:
    """What `error`, raised by `model`, found wrong in `section`: values first, or the broken rules between keys."""
    details: dict[KeyPath, list[Detail]] = {}
    found: list[Finding] = []
    for detail in error.errors():
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, RuleError):
            found += [Finding(broken.keys, _cited(broken, document)) for broken in cause.broken]
        else:
            details.setdefault(_path(detail, section, document), []).append(detail)
    for path in details:
        # A value that fits no arm of `list[str] | str` is reported once for each arm; the deepest is the one to mend.
        if not any(other != path and other[: len(path)] == path for other in details):
            found.append(Finding((dotted(path[:2]),), _wrong_value(path, details[path], model, document)))
    return found


def _path(detail: Detail, section: str, document: Document) -> KeyPath:
    """The key an error is about, as the user wrote it: pydantic's location less union tags and wrapped single items."""
    value, path = document.values[section], [section]
    for part in detail["loc"]:
        inside = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
        if inside:
            value = value[part]
            path.append(part)
    if detail["type"] == "missing":
        path.append(detail["loc"][-1])
    return tuple(path)


def _wrong_value(path: KeyPath, details: Sequence[Detail], model: type[BaseModel], document: Document) -> Problem:
    """The value of one key that fits none of the types it may have."""
    if any(detail["type"] == "extra_forbidden" for detail in details):
        return unknown_key(path, nested_keys(model, path), document)
    place = document.place(path)
    if any(detail["type"] == "missing" for detail in details):
        return Problem(f"{dotted(path)} is missing{_at([place])}", place)
    rule = " or ".join(dict.fromkeys(map(_rule, details))).replace(" or must be ", " or ")
    value = details[0]["input"]
    return Problem(f"{dotted(path)} {rule}, got {shown(value)}{_at([place])}{_remedy(details, value)}", place)


def _rule(detail: Detail) -> str:
    """What the value must be, from one pydantic error."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _TYPES:
        return _TYPES[kind]
    if kind in _LIMITS:
        (limit,) = context.values()
        return f"must be {_LIMITS[kind]} {limit:.15g}"
    if kind == "literal_error":
        return f"must be one of {', '.join(_choices(detail))}"
    if kind == "value_error":
        return str(context["error"])
    return str(detail["msg"])[:1].lower() + str(detail["msg"])[1:]


def _choices(detail: Detail) -> list[str]:
    return re.findall(r"'([^']*)'", detail["ctx"]["expected"])


def _remedy(details: Sequence[Detail], value: Any) -> str:
    kinds = {detail["type"] for detail in details}
    if "literal_error" in kinds and isinstance(value, str):
        literals = [detail for detail in details if detail["type"] == "literal_error"]
        meant = nearest(value, [choice for detail in literals for choice in _choices(detail)])
        return f"; did you mean {meant}?" if meant else ""
    if kinds == {"string_type"} and value is not None and not isinstance(value, list | tuple):
        return "; put it in quotes"
    return ""


def _no_such_key(path: tuple[str, str], models: Mapping[str, SectionModel], document: Document) -> Problem:
    """Why `path` is not a key: refused on purpose, a key of another section, or misspelt."""
    section, key = path
    model = models[section]
    if issubclass(model, TrainerSection) and key in model.REFUSED:
        place = document.place(path)
        return Problem(f"{dotted(path)} cannot be set here{_at([place])}; {model.REFUSED[key]}", place)
    elsewhere = [name for name, other in models.items() if key in _keys(other)]
    return unknown_key(path, model.model_fields, document, elsewhere)


def unknown_key(path: KeyPath, choices: Iterable[str], document: Document, elsewhere: Iterable[str] = ()) -> Problem:
    """`path` is no key: names the section of `elsewhere` that has that very key, or the nearest of `choices`."""
    place, name = document.place(path), str(path[-1])
    kind = "key" if len(path) > 1 else "section"
    other = next((f"{section}.{name}" for section in elsewhere), None)
    meant = other or nearest(name, choices)
    hint = f"; did you mean {meant}?" if meant else ""
    return Problem(f"{dotted(path)} is not a {kind}{_at([place])}{hint}", place)


def nested_keys(model: type[BaseModel], path: KeyPath) -> list[str]:
    """The keys allowed beside the last part of `path` (a path that starts with the section of `model`)."""
    models: list[type[BaseModel]] = [model]
    for part in path[1:-1]:
        if isinstance(part, str):
            models = [inner for outer in models for inner in _models_in(outer.model_fields[part].annotation)]
    return [name for inner in models for name in inner.model_fields]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models named in a type such as `tuple[AnnotationSource, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def _cited(broken: Broken, document: Document) -> Problem:
    """A broken rule with the places of its keys; keys left at their default have none."""
    places = [document.places.get(tuple(key.split("."))) for key in broken.keys]
    remedy = f"; {broken.remedy}" if broken.remedy else ""
    return Problem(f"{broken.text}{_at(places)}{remedy}", next((place for place in places if place), None))


def _at(places: Iterable[Place | None]) -> str:
    """` (file:3; command line)`, or nothing for defaults."""
    known = list(dict.fromkeys(str(place) for place in places if place))
    return f" ({'; '.join(known)})" if known else ""
