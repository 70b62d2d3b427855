"""When a checkpoint counts as complete, and where a run's checkpoints lie. Knows files, not models.

A checkpoint folder is complete when its `manifest.json` (file names and sizes, written last) agrees with what is there.
Hidden folders are steps on the way: `.NAME.unfinished` is being written, `.NAME.old` waits for its successor to be in
place, `.NAME.removed` is being deleted. `recover` saves from them what a killed process left whole; the rest goes when
the next save comes by.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from utils.common import UserError, write_json
from utils.logging_utils import human_bytes

MANIFEST_FILE = "manifest.json"
BEST, FINAL = "checkpoint-best", "checkpoint-final"
_STEP_FOLDER = re.compile(r"checkpoint-(\d+)")
_RESUME = "start the same command with --resume_from_checkpoint auto"
_DISK_FULL_WORDS = ("no space left", "disk quota", "failed writing file", "enospc", "unexpected pos")
"""As writers report a full disk, the last one of torch.save."""


def _files(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE and not (path.name[0] == "." and path.suffix == ".tmp")
    }


def start_save(folder: Path) -> None:
    """Before `folder` is written again: its manifest goes, so that a save cut off does not count. What a killed save
    left in a hidden folder goes as well. Call it on one rank, first."""
    if folder.name.startswith("."):
        shutil.rmtree(folder, ignore_errors=True)
    (folder / MANIFEST_FILE).unlink(missing_ok=True)


def write_manifest(folder: Path) -> None:
    """Sync every file of `folder` to disk, then list their sizes in `manifest.json`. Call it last, on one rank."""
    for name in _files(folder):
        with open(folder / name, "rb") as handle:
            os.fsync(handle.fileno())
    write_json(folder / MANIFEST_FILE, {"files": _files(folder)})
    for path in (folder, folder.parent):
        _sync_names(path)


def _sync_names(folder: Path) -> None:
    """Make the names in `folder` outlast a power cut, where the system lets a folder be synced."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def manifest_problems(folder: Path) -> list[str]:
    """Why `folder` is not a complete checkpoint, in plain words; empty when it is."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return [f"{MANIFEST_FILE} is missing"]
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["files"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        return [f"{MANIFEST_FILE} cannot be read"]
    found = _files(folder)
    return [
        f"{name} has {found[name]} bytes, not {size}" if name in found else f"{name} is missing"
        for name, size in listed.items()
        if found.get(name) != size
    ]


def step_of(folder: Path) -> int:
    """The training step in a `checkpoint-<step>` name, -1 for any other folder."""
    match = _STEP_FOLDER.fullmatch(folder.name)
    return int(match.group(1)) if match else -1


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Complete `checkpoint-<step>` folders of a run, oldest step first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and step_of(path) >= 0]
    return sorted((path for path in folders if not manifest_problems(path)), key=step_of)


def rotate(output_dir: Path, keep: int | None, newest: Path) -> None:
    """Remove the oldest complete `checkpoint-<step>` folders before `newest`, the one just saved, so that `keep` are
    left with it (None keeps all).

    The best and the final checkpoint are no such folders. Later steps than the newest stay: the run went on from an
    earlier checkpoint, and they are of a run that somebody may still want. Trainer's own rotation goes by modification
    time over every `checkpoint-*`, `checkpoint-best` included, before the new one is sealed.
    """
    if keep is not None:
        earlier = [folder for folder in complete_checkpoints(output_dir) if step_of(folder) < step_of(newest)]
        for folder in earlier[: max(0, len(earlier) + 1 - max(keep, 1))]:
            folder.rename(_hidden(folder, "removed"))  # a kill meanwhile must not leave what looks like half a save
    for folder in output_dir.glob(".checkpoint-*.removed"):
        shutil.rmtree(folder, ignore_errors=True)


def _hidden(folder: Path, ending: str) -> Path:
    return folder.with_name(f".{folder.name}.{ending}")


def unfinished_of(folder: Path) -> Path:
    """Where `folder` is written before it takes its place (`replace_folder`)."""
    return _hidden(folder, "unfinished")


def recover(output_dir: Path) -> list[str]:
    """Put in place what a killed process left whole in hidden folders; returns what was done, in words. Call it on one
    rank, before anything else reads or writes the folder.

    A finished save takes its place, and a checkpoint whose successor never came goes back to its own.
    """
    done = []
    for hidden in sorted(output_dir.glob(".*.unfinished")):
        if not manifest_problems(hidden):
            target = hidden.with_name(hidden.name.removeprefix(".").removesuffix(".unfinished"))
            replace_folder(hidden, target)
            done.append(f"put {target.name} in its place: the process was killed just before")
    for hidden in sorted(output_dir.glob(".*.old")):
        target = hidden.with_name(hidden.name.removeprefix(".").removesuffix(".old"))
        if not target.exists() and not manifest_problems(hidden):
            hidden.rename(target)
            done.append(f"put {target.name} back: the process was killed while replacing it")
    return done


def passed_over(output_dir: Path, chosen: Path | None) -> list[str]:
    """One line, to warn of it, for each later `checkpoint-<step>` than the one a run goes on from, None for none."""
    later = [path for path in output_dir.glob("checkpoint-*") if step_of(path) > (step_of(chosen) if chosen else -1)]
    start = f"going on from {chosen.name}" if chosen else "starting from the beginning"
    lines = []
    for folder in sorted((path for path in later if path.is_dir()), key=step_of):
        if problems := manifest_problems(folder):
            lines.append(
                f"{folder} is passed over, {start}: it is not complete ({'; '.join(problems[:3])}), as when a save is "
                "cut off. The run writes it again when it comes there; until then it may be deleted"
            )
        else:
            lines.append(
                f"{folder} is complete and later than where this run starts ({start}); it stays, and "
                "--resume_from_checkpoint auto would take it"
            )
    return lines


def resolve_resume(output_dir: Path, resume: str | None) -> Path | None:
    """The checkpoint folder to go on from, or None for a fresh start.

    `resume` is a folder, or "auto" (the newest complete checkpoint of `output_dir`; none yet = fresh start), or None.
    Raises UserError for a folder that is no complete checkpoint, and when None would train over an earlier run.
    """
    done = complete_checkpoints(output_dir)
    finished = [output_dir / name for name in (BEST, FINAL) if not manifest_problems(output_dir / name)]
    if resume is None:
        if done or finished:
            raise UserError(
                f"{output_dir} holds complete checkpoints of an earlier run ({(done + finished)[-1].name}). Add "
                "--resume_from_checkpoint auto to go on with it, or choose another --output_dir; nothing was changed"
            )
        return None
    if resume == "auto":
        return done[-1] if done else None
    folder = Path(resume)
    if problems := manifest_problems(folder):
        others = f"; complete ones here: {', '.join(path.name for path in done)}" if done else ""
        raise UserError(
            f"--resume_from_checkpoint {folder} is not a complete checkpoint: {'; '.join(problems[:3])}{others}"
        )
    if not (folder / "trainer_state.json").is_file():
        raise UserError(
            f"--resume_from_checkpoint {folder} holds weights but no optimizer and trainer state. Name a "
            f"checkpoint-<step> "
            f"folder, or 'auto'; to start a new run from these weights use model.name_or_path={folder}"
        )
    return folder


def require_space(folder: Path, needed_bytes: int, then: str = _RESUME) -> None:
    """Raise UserError when the disk that holds `folder` has less than `needed_bytes` free; `then` ends its remedy."""
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise UserError(
            f"not enough disk space to save {folder}: about {human_bytes(needed_bytes)} needed, {human_bytes(free)} "
            f"free. "
            f"Earlier checkpoints are untouched; free some space (or choose another --output_dir), then {then}"
        )


@contextmanager
def saving(folder: Path, needed_bytes: int, then: str = _RESUME) -> Iterator[None]:
    """Guard a save into `folder`: check the space first, and turn a disk that fills up meanwhile into a UserError.

    Writers report a full disk in different classes, so the words count.
    """
    require_space(folder, needed_bytes, then)
    try:
        yield
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and not any(word in str(error).lower() for word in _DISK_FULL_WORDS):
            raise
        raise UserError(
            f"the disk filled up while saving {folder} (about {human_bytes(needed_bytes)} needed). The folder is "
            f"incomplete "
            f"and will be passed over; earlier checkpoints are untouched. Free some space, then {then}"
        ) from error


def replace_folder(new: Path, target: Path) -> None:
    """Put the finished folder `new` in the place of `target`; the old `target` goes only once the new one is in
    place."""
    old = _hidden(target, "old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)  # else it is the only one there is: a kill came between the two renames
        target.rename(old)
    new.rename(target)
    _sync_names(target.parent)
    shutil.rmtree(old, ignore_errors=True)
