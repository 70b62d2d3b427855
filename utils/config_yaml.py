"""YAML text and command-line overrides as plain values plus the place each key was written (contract 5).

Reads the YAML 1.2 core rules rather than PyYAML's YAML 1.1: `2e-5` is a number, and `no`, `on` and `1:30` are text.
What the keys mean is left to `utils.config`, the wording of the errors about their values to `utils.config_errors`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

KeyPath = tuple[str | int, ...]
"""`("data", "train", 0, "path")` is `data.train[0].path`; integers count list items from 0."""


class Place(NamedTuple):
    """Where a key was written: a file and a line counted from 1, or the command line."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


COMMAND_LINE = Place("command line")


class Problem(NamedTuple):
    """One mistake in plain words, and the place to sort it by (None when it has none)."""

    text: str
    place: Place | None = None


@dataclass
class Document:
    """The values of one or more sources, where each key was written, and what was wrong with the writing itself."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    complete: bool = True
    """False when a source could not be read: then what it would have said is not known."""

    def place(self, path: KeyPath) -> Place | None:
        """The place of `path`, or of the nearest key that holds it; None for a value nobody wrote (a default)."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return None


def dotted(path: KeyPath) -> str:
    """A key path as the user writes it.

    >>> dotted(("data", "train", 0, "path"))
    'data.train[0].path'
    """
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


# The YAML 1.2 core schema (https://yaml.org/spec/1.2.2/#103-core-schema). The same table reads and writes, so that the
# text "2e-5" is quoted when written and stays text when read back.
_RESOLVERS = (
    ("null", r"(?:~|null|Null|NULL|)$", "~nN\0"),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"(?:[-+]?[0-9]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    ("float", r"[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$", "-+.0123456789"),
    ("float", r"\.(?:nan|NaN|NAN)$", "."),
)


class _Loader(yaml.SafeLoader):
    """Composes nodes by the YAML 1.2 core rules."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back unchanged."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indent list items under their key, as in the shipped files."""
        super().increase_indent(flow, False)

    def text(self, value: str) -> yaml.ScalarNode:
        """Text, in double quotes where it breaks lines: PyYAML's other styles lose some kinds of line break."""
        style = '"' if re.search("[\n\r\x85\u2028\u2029]", value) else None
        return self.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _Dumper.text)


for _class in (_Loader, _Dumper):
    for _name, _pattern, _first in _RESOLVERS:
        for _character in _first:
            _resolvers = _class.yaml_implicit_resolvers.setdefault(_character.replace("\0", ""), [])
            _resolvers.append((f"tag:yaml.org,2002:{_name}", re.compile(_pattern)))


def to_yaml(value: Any) -> str:
    """`value` (mappings, lists and scalars) as YAML text that `parse_yaml` reads back to an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def parse_yaml(text: str, file: str) -> tuple[Any, Document]:
    """The value of a YAML text (None when there is none), with its places and problems in a Document without values.

    `file` is the name cited in places. Duplicate keys, tags, aliases to themselves and wrong syntax are problems.
    """
    document = Document()
    try:
        node = yaml.compose(text, Loader=_Loader)
        value = None if node is None else _Builder(file, document).build(node, ())
        value = None if value is _UNUSABLE else value
    except yaml.YAMLError as error:
        value, document.complete = None, False
        document.problems.append(_syntax_problem(error, text, file))
    return value, document


def _syntax_problem(error: yaml.YAMLError, text: str, file: str) -> Problem:
    """A YAML syntax error with the line it stands on."""
    line, reason = 1, str(error).splitlines()[0]
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        line, reason = error.problem_mark.line + 1, str(error.problem)
    elif isinstance(error, yaml.reader.ReaderError):
        line, reason = text.count("\n", 0, error.position) + 1, f"character {error.character!r}: {error.reason}"
    place = Place(file, line)
    return Problem(f"not valid YAML: {reason} ({place}); check the indentation, the colons and the quotes there", place)


_SCALARS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str")}
_UNUSABLE = object()  # in place of a value that a problem was noted about


def _under(path: KeyPath) -> str:
    return f"under {dotted(path)}" if path else "at the top"


class _Builder:
    """Turns a tree of YAML nodes into values, keeping the line of every key."""

    def __init__(self, file: str, document: Document) -> None:
        self.file = file
        self.document = document
        self.open: list[yaml.Node] = []

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        """The value of `node`; notes its place, unless its key did so already."""
        self.document.places.setdefault(path, self.place(node))
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, path)
        if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            return self.refuse_tag(node, path)
        if any(node is parent for parent in self.open):
            return self.complain(self.document.places[path], f"{dotted(path)} holds itself by an alias")
        self.open.append(node)
        value = self.mapping(node, path) if isinstance(node, yaml.MappingNode) else self.sequence(node, path)
        self.open.pop()
        return value

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        """A mapping; of a key written twice the first value is kept, and both lines are named."""
        value: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.complain(self.place(key_node), f"a key {_under(path)} is not a plain word")
                continue
            key, here = key_node.value, (*path, key_node.value)
            if key_node.tag not in _SCALARS:
                self.refuse_tag(key_node, here)
                continue
            if key in value:
                first = self.document.places[here]
                text = f"{dotted(here)} is written twice, first at {first}"
                self.complain(self.place(key_node), text, "; keep one of them")
                continue
            self.document.places[here] = self.place(key_node)
            value[key] = self.build(value_node, here)
        return {key: item for key, item in value.items() if item is not _UNUSABLE}

    def sequence(self, node: yaml.Node, path: KeyPath) -> list[Any]:
        """A list."""
        items = [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        return [item for item in items if item is not _UNUSABLE]

    def scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        """Null, true/false, a number or text."""
        match node.tag.removeprefix("tag:yaml.org,2002:"):
            case "null":
                return None
            case "bool":
                return node.value.lower() == "true"
            case "int":
                return int(node.value, 16 if node.value.startswith("0x") else 10)
            case "float":
                return float(re.sub(r"\.(?=inf|nan)", "", node.value.lower()))
            case "str":
                return node.value
        return self.refuse_tag(node, path)

    def refuse_tag(self, node: yaml.Node, path: KeyPath) -> Any:
        """Note a tag that is none of the kinds above, `!!python/object` among them."""
        text = f"{dotted(path) or 'the file'} has the tag {node.tag}, which is not used here"
        return self.complain(self.place(node), text, "; remove the tag")

    def place(self, node: yaml.Node) -> Place:
        """The line of `node`; a value on the command line has no line worth naming."""
        return COMMAND_LINE if self.file == COMMAND_LINE.file else Place(self.file, node.start_mark.line + 1)

    def complain(self, place: Place, text: str, remedy: str = "") -> Any:
        """Note a problem, and give the value to leave out."""
        self.document.problems.append(Problem(f"{text} ({place}){remedy}", place))
        return _UNUSABLE


def read_file(path: Path, sections: Sequence[str]) -> Document:
    """The sections of one YAML file. A file that cannot be read or holds no mapping is a problem, not an exception."""
    wanted = f"it must hold {'some of the sections' if len(sections) > 1 else 'the section'} {', '.join(sections)}"
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: some editors put a byte-order mark first
    except FileNotFoundError:
        return _failed(f"{path} does not exist; give the path of a YAML file: {wanted}", path)
    except UnicodeDecodeError as error:
        return _failed(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8", path)
    except OSError as error:
        return _failed(f"{path} cannot be read ({error.strerror}); give the path of a readable YAML file", path)
    value, document = parse_yaml(text, str(path))
    if isinstance(value, dict):
        document.values = value
    elif value is None and not document.problems:
        return _failed(f"{path} is empty; {wanted}", path)
    elif value is not None:
        return _failed(f"{path} is not a mapping but {shown(value)}; {wanted}", path)
    return document


def _failed(text: str, path: Path) -> Document:
    return Document(problems=[Problem(text, Place(str(path)))], complete=False)


def merge(documents: Sequence[Document]) -> Document:
    """One document of several files. A section in two of them is a problem that names both lines."""
    merged = Document()
    for document in documents:
        merged.problems += document.problems
        merged.complete &= document.complete
        for section, value in document.values.items():
            place = document.places[(section,)]
            if section in merged.values:
                first = merged.places[(section,)]
                text = f"{section} is in two files, {first} and {place}; keep the section in one of them"
                merged.problems.append(Problem(text, place))
                continue
            merged.values[section] = value
            merged.places |= {path: at for path, at in document.places.items() if path[:1] == (section,)}
    return merged


def apply_overrides(document: Document, overrides: Sequence[str]) -> None:
    """Lay `section.key=value` words from the command line over `document`; of two for one key the later wins."""
    for override in overrides:
        document.problems += [Problem(text, COMMAND_LINE) for text in _apply(document, override)]


def _apply(document: Document, override: str) -> Iterator[str]:
    """Apply one override; yields what is wrong with it, and then changes nothing."""
    name, equals, text = override.partition("=")
    path = tuple(name.strip().split("."))
    if not equals or len(path) < 2 or not all(path):
        yield f"{shown(override)} is not an override (command line); write section.key=value, as in training.seed=1"
        return
    value, parsed = parse_yaml(text, COMMAND_LINE.file)
    if parsed.problems:
        yield f"{name}={text} is not valid YAML (command line); put text with special characters in quotes of its own"
    elif value is None and not text.strip():
        yield f"{name} has no value (command line); write {name}=null for none"
    elif (holder := _holder(document.values, path)) is None:
        outer = name.rpartition(".")[0]
        yield (
            f"{name} cannot be set alone (command line): what holds it is not a mapping; "
            f"give the whole value, {outer}=..."
        )
    else:
        holder[path[-1]] = value
        _move_places(document, path, parsed.places)


def _holder(values: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any] | None:
    """The mapping that holds the last key of `path`, made where it is missing; None when something else is there."""
    for key in path[:-1]:
        if values.get(key) is None:
            values[key] = {}
        if not isinstance(values[key], dict):
            return None
        values = values[key]
    return values


def _move_places(document: Document, path: KeyPath, inner: Mapping[KeyPath, Place]) -> None:
    """Let `path` and what is below it be cited as written on the command line."""
    for old in [key for key in document.places if key[: len(path)] == path]:
        del document.places[old]
    document.places |= {(*path, *key): place for key, place in inner.items()}
    for length in range(1, len(path)):
        document.places.setdefault(path[:length], COMMAND_LINE)


def shown(value: Any) -> str:
    """A short form of a value for an error message: text in quotes, long ones cut, mappings and lists by kind.

    >>> shown("abc"), shown(True), shown(None), shown({"a": 1})
    ("'abc'", 'true', 'null', 'a mapping')
    """
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict):
        return "a mapping"
    text = f"[{', '.join(map(shown, value))}]" if isinstance(value, list | tuple) else repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."
