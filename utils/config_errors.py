"""What is wrong with a configuration, in plain words: `data.fps must be > 0, got -2 (configs/data/video_config.yaml:4)`.

Turns pydantic's errors and the broken rules of a section into `Problem`s. Where a key was written comes from
`utils.config_yaml`; what the keys mean is in `utils.config`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from utils.common import nearest
from utils.config_base import Broken, RuleError
from utils.config_yaml import Document, KeyPath, Place, Problem, dotted, shown


_TYPES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "path_type": "must be a path",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping of keys",
    "model_attributes_type": "must be a mapping of keys",
    "none_required": "must be null",
}
_LIMITS = {"greater_than": (">", "gt"), "greater_than_equal": (">=", "ge"), "less_than": ("<", "lt"), "less_than_equal": ("<=", "le")}


def problems_of(error: ValidationError, section: str, model: type[BaseModel], document: Document) -> list[tuple[KeyPath, Problem]]:
    """The mistakes that `error`, raised by `model`, found in `section`: (path of the key, problem).

    The path is `()` for a broken rule between keys.
    """
    found: dict[KeyPath, list[Mapping[str, Any]]] = {}
    problems: list[tuple[KeyPath, Problem]] = []
    for detail in error.errors():
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, RuleError):
            problems += [((), _cited(broken, document)) for broken in cause.broken]
        else:
            found.setdefault(_path(detail, section, document), []).append(detail)
    # A value that fits no arm of `list[str] | str` is reported once for each arm; the deepest path is the one to mend.
    for path in [path for path in found if not any(len(other) > len(path) == _shared(path, other) for other in found)]:
        problems.append((path, _wrong_value(path, found[path], model, document)))
    return problems


def _shared(path: KeyPath, other: KeyPath) -> int:
    return next((i for i, (a, b) in enumerate(zip(path, other, strict=False)) if a != b), min(len(path), len(other)))


def _path(detail: Mapping[str, Any], section: str, document: Document) -> KeyPath:
    """The key an error is about, as the user wrote it: pydantic's location less the union tags and wrapped single items."""
    value, path = document.values[section], [section]
    for part in detail["loc"]:
        inside = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
        if inside:
            value = value[part]
            path.append(part)
    if detail["type"] == "missing":
        path.append(detail["loc"][-1])
    return tuple(path)


def _wrong_value(path: KeyPath, details: Sequence[Mapping[str, Any]], model: type[BaseModel], document: Document) -> Problem:
    if any(detail["type"] == "extra_forbidden" for detail in details):
        return unknown_key(path, nested_keys(model, path), document)
    place = document.place(path)
    if any(detail["type"] == "missing" for detail in details):
        return Problem(f"{dotted(path)} is missing{_at([place])}", place)
    rule = " or ".join(dict.fromkeys(map(_rule, details))).replace(" or must be ", " or ")
    value = details[0]["input"]
    return Problem(f"{dotted(path)} {rule}, got {shown(value)}{_at([place])}{_remedy(details, value)}", place)


def _rule(detail: Mapping[str, Any]) -> str:
    """What the value must be, from one pydantic error."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _TYPES:
        return _TYPES[kind]
    if kind in _LIMITS:
        sign, key = _LIMITS[kind]
        return f"must be {sign} {context[key]:.15g}"
    if kind == "literal_error":
        return f"must be one of {', '.join(_choices(detail))}"
    if kind == "value_error":
        return str(context["error"])
    return str(detail["msg"])[:1].lower() + str(detail["msg"])[1:]


def _choices(detail: Mapping[str, Any]) -> list[str]:
    return re.findall(r"'([^']*)'", detail["ctx"]["expected"])


def _remedy(details: Sequence[Mapping[str, Any]], value: Any) -> str:
    kinds = {detail["type"] for detail in details}
    if "literal_error" in kinds and isinstance(value, str):
        meant = nearest(value, [choice for detail in details if detail["type"] == "literal_error" for choice in _choices(detail)])
        return f"; did you mean {meant}?" if meant else ""
    if kinds == {"string_type"} and value is not None and not isinstance(value, list | tuple):
        return "; put it in quotes"
    return ""


def unknown_key(path: KeyPath, choices: Iterable[str], document: Document, elsewhere: Iterable[str] = ()) -> Problem:
    """`path` is no key: with the nearest of `choices` (its siblings), or the section among `elsewhere` that has that very key."""
    place, name = document.place(path), str(path[-1])
    kind = "key" if len(path) > 1 else "section"
    other = next((f"{section}.{name}" for section in elsewhere), None)
    meant = other or nearest(name, choices)
    return Problem(f"{dotted(path)} is not a {kind}{_at([place])}" + (f"; did you mean {meant}?" if meant else ""), place)


def refused_key(path: KeyPath, reason: str, document: Document) -> Problem:
    """`path` is a Trainer key that this project does not take from a file, and why."""
    place = document.place(path)
    return Problem(f"{dotted(path)} cannot be set here{_at([place])}; {reason}", place)


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
    places = [document.place(tuple(key.split("."))) for key in broken.keys]
    remedy = f"; {broken.remedy}" if broken.remedy else ""
    return Problem(f"{broken.text}{_at(places)}{remedy}", next((place for place in places if place), None))


def _at(places: Iterable[Place | None]) -> str:
    """` (file:3; command line)`, or nothing for defaults."""
    known = list(dict.fromkeys(str(place) for place in places if place))
    return f" ({'; '.join(known)})" if known else ""
