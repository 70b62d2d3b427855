"""What a converter is: a reader of one benchmark's files that yields `SourceRow`s, and the little helpers they share.

Where the videos lie, how long they are, which quirks the rows have and what is done about them is
`datasets.converters.conversion`, the same for every benchmark.
"""

from __future__ import annotations

import csv
import io
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal

from utils.common import UserError

VIDEO_EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".wmv", ".3gp")
"""Under which a video may lie whose annotations give its id alone, in the order of looking."""

Window = Sequence[float]
"""`[start_s, end_s]`."""


@dataclass(frozen=True)
class SourceRow:
    """One query of a benchmark as its file has it: nothing rounded, swapped, clipped or stripped."""

    videos: tuple[str, ...]
    """Names under which the file may lie in `--videos_dir`; the first that is there is taken, else the first."""
    sentence: str
    timestamp: Sequence[Window] | None
    """Windows in seconds; None where the source gives none (a hidden test set), () where it says the event is absent"""
    split: str
    qid: str | int
    duration: float | None = None
    """Seconds; None where the source does not say: the file is asked then."""
    video_start: float | None = None
    video_end: float | None = None
    labelled_s: float | None = None
    """For a source without durations: its annotators saw the video's first so many seconds, or all of a shorter one."""
    stretch: Literal["certain", "named", "doubtful"] = "certain"
    """Whether `video_start` and `video_end` count in the file: sure, no (the file's name says that it is this stretch
    alone), or nobody can tell without the file."""
    quirks: tuple[str, ...] = ()
    """Kinds of `datasets.converters.conversion.OWN_KINDS` that only the reader of the source can know."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """What else the source says of the row; `qid`, `dataset`, `split` and `quirks` are added unless it has them."""


class Converter(ABC):
    """A reader of one benchmark. Subclass it, and name it on the command line as `package.module:Name`."""

    name: ClassVar[str]
    """Goes to `kwargs.dataset`."""
    files: ClassVar[Mapping[str, Sequence[str]]] = {}
    """By split: the names of the released files, the one to read first, then others that mean it. From these a folder
    is searched and a split is told. Empty: any one file, and `--split` is needed unless `read` knows better."""
    published: ClassVar[str] = "Nothing is known of published numbers; every row is kept as it is."
    """Under which policies published numbers are computed."""
    policies: ClassVar[Mapping[str, str]] = {}
    """By kind, where published numbers are not computed on the rows as they are."""

    @abstractmethod
    def read(self, path: Path, split: str) -> Iterator[SourceRow]:
        """Every query of the file, in its order. A KeyError, TypeError, ValueError or IndexError in here means that the
        record is not of the expected form and is reported as such."""

    def find(self, annotations: Path, split: str | None) -> tuple[Path, str]:
        """The file to read and its split. Raises UserError when there is none or several."""
        if annotations.is_dir():
            return self._find_in(annotations, split)
        if not annotations.is_file():
            raise UserError(f"--annotations {annotations}: no such file or folder")
        told = [name for name, names in self.files.items() if annotations.name in names]
        split = split or (told[0] if told else self._split_in_name(annotations.stem))
        if split is None:
            raise UserError(
                f"--annotations {annotations}: the name does not tell the split; give --split "
                f"{'|'.join(self.files) or 'train|val|test'} ({self.name} is released as {self._released()})"
            )
        if told:
            annotations = annotations.with_name(self.files[told[0]][0])
        return annotations, split

    def _find_in(self, folder: Path, split: str | None) -> tuple[Path, str]:
        there = {name: folder / names[0] for name, names in self.files.items() if (folder / names[0]).is_file()}
        chosen = {split: there[split]} if split in there else {} if split else there
        if len(chosen) == 1:
            return next((path, name) for name, path in chosen.items())
        if chosen:
            raise UserError(f"--annotations {folder}: holds {', '.join(there)}; give --split {'|'.join(there)}")
        wanted = f"of split {split} " if split else ""
        raise UserError(f"--annotations {folder}: no file {wanted}of {self.name} there; it is {self._released()}")

    def _split_in_name(self, stem: str) -> str | None:
        words = stem.lower().replace("-", "_").replace(".", "_").split("_")
        found = [word for word in words if word in {*self.files, "train", "val", "test"}]
        return found[-1] if found else None

    def _released(self) -> str:
        return ", ".join(names[0] for names in self.files.values()) or "any one file"


def names_of(video_id: str, *others: str) -> tuple[str, ...]:
    """File names of a video that the annotations give by its id.

    >>> names_of("3MSZA")[:2]
    ('3MSZA.mp4', '3MSZA.mkv')
    """
    return tuple(stem + extension for stem in (video_id, *others) for extension in VIDEO_EXTENSIONS)


def renamed(video: str) -> tuple[str, ...]:
    """File names of a video that the annotations give with an extension: as it is, or converted to another format.

    >>> renamed("a.avi")[:3]
    ('a.avi', 'a.mp4', 'a.avi.mp4')
    """
    stem, dot, extension = video.rpartition(".")
    if not dot or f".{extension.lower()}" not in {*VIDEO_EXTENSIONS, ".mts", ".m2ts", ".3g2", ".flv"}:
        return (f"{video}.mp4", video, *names_of(video)[1:])
    return tuple(dict.fromkeys((video, f"{stem}.mp4", f"{video}.mp4", *names_of(stem))))


def tails(path: str) -> tuple[str, ...]:
    """A path of somebody else's disk as names in ours: its last part, its last two parts, and so on.

    >>> tails("./data/videos/a.mp4")
    ('a.mp4', 'videos/a.mp4', 'data/videos/a.mp4')
    """
    parts = [part for part in PurePosixPath(path.replace("\\", "/")).parts if part not in ("/", ".", "..")]
    if not parts:
        raise ValueError(f"{path!r} is no path of a file")
    return tuple("/".join(parts[-num:]) for num in range(1, len(parts) + 1))


# ---- files


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark. Raises UserError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such annotation file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); is this the annotation file?") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises UserError."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}; download the file again") from None


def read_json_lines(path: Path) -> Iterator[Any]:
    """The values of a file of JSON lines, or of one JSON array. Raises UserError."""
    text = read_text(path)
    if text.lstrip()[:1] == "[":
        yield from read_json(path)
        return
    for number, line in enumerate(text.split("\n"), start=1):  # U+2028 and its like are legal inside a JSON string
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON: {error.msg}; download the file again") from None


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header. Raises UserError."""
    return list(csv.DictReader(io.StringIO(read_text(path), newline="")))


def number(value: Any) -> float:
    """A finite number from a number or its text. Raises ValueError or TypeError."""
    if isinstance(value, bool):
        raise TypeError(f"expected a number, got {value!r}")
    result = float(value)
    if not math.isfinite(result):
        raise ValueError(f"expected a finite number, got {value!r}")
    return result


def windows(values: Any) -> tuple[tuple[float, float], ...]:
    """`[[start, end], ...]` as pairs of floats, in the order of the source. Raises ValueError or TypeError."""
    return tuple((number(start), number(end)) for start, end in values)
