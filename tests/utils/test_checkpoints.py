"""When a checkpoint is complete, what a run may resume from, and what a full disk says."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

from utils import checkpoints
from utils.checkpoints import (
    complete_checkpoints,
    manifest_problems,
    passed_over,
    recover,
    replace_folder,
    require_space,
    resolve_resume,
    rotate,
    saving,
    start_save,
    write_manifest,
)
from utils.common import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def checkpoint(folder: Path, *, sealed: bool = True, state: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"12345")
    if state:
        (folder / "trainer_state.json").write_text("{}")
    if sealed:
        write_manifest(folder)
    return folder


def test_manifest_tells_what_is_wrong(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "checkpoint-2")
    assert manifest_problems(folder) == []
    (folder / "model.safetensors").write_bytes(b"123")
    (folder / "trainer_state.json").unlink()
    assert manifest_problems(folder) == ["model.safetensors has 3 bytes, not 5", "trainer_state.json is missing"]
    (folder / "manifest.json").write_text("{")
    assert manifest_problems(folder) == ["manifest.json cannot be read"]
    assert manifest_problems(tmp_path / "nowhere") == ["manifest.json is missing"]


def test_complete_checkpoints_in_order_of_steps(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        checkpoint(tmp_path / f"checkpoint-{step}")
    checkpoint(tmp_path / "checkpoint-200", sealed=False)
    checkpoint(tmp_path / "checkpoint-best", state=False)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]


def test_rotation_keeps_the_newest_complete_ones_and_the_named_ones(tmp_path: Path) -> None:
    for name in ("checkpoint-best", "checkpoint-2", "checkpoint-4", "checkpoint-10"):
        checkpoint(tmp_path / name)
    checkpoint(tmp_path / "checkpoint-12", sealed=False)
    rotate(tmp_path, None, newest=tmp_path / "checkpoint-10")
    assert len(list(tmp_path.iterdir())) == 5
    rotate(tmp_path, 2, newest=tmp_path / "checkpoint-10")
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-12", "checkpoint-4", "checkpoint-best"]
    rotate(tmp_path, 1, newest=tmp_path / "checkpoint-10")
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-12", "checkpoint-best"]


def test_rotation_removes_nothing_later_than_what_was_just_saved(tmp_path: Path) -> None:
    """The run went on from checkpoint-2 though there was a checkpoint-100."""
    for step in (2, 4, 100):
        checkpoint(tmp_path / f"checkpoint-{step}")
    rotate(tmp_path, 1, newest=tmp_path / "checkpoint-4")
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-4"]


def test_rotation_cut_off_looks_like_no_half_written_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (2, 4):
        checkpoint(tmp_path / f"checkpoint-{step}")

    def killed(folder: Path, **_: object) -> None:
        (folder / "manifest.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        rotate(tmp_path, 1, newest=tmp_path / "checkpoint-4")
    assert names(tmp_path) == [".checkpoint-2.removed", "checkpoint-4"]
    assert not any("checkpoint-2" in line for line in passed_over(tmp_path, None))
    rotate(tmp_path, 1, newest=tmp_path / "checkpoint-4")
    assert names(tmp_path) == ["checkpoint-4"]


def test_resume_auto_passes_over_a_half_written_checkpoint(tmp_path: Path) -> None:
    assert resolve_resume(tmp_path, "auto") is None
    good = checkpoint(tmp_path / "checkpoint-1")
    checkpoint(tmp_path / "checkpoint-2", sealed=False)
    assert resolve_resume(tmp_path, "auto") == good
    assert resolve_resume(tmp_path, str(good)) == good


def test_what_is_passed_over_is_named(tmp_path: Path) -> None:
    good = checkpoint(tmp_path / "checkpoint-20")
    checkpoint(tmp_path / "checkpoint-10", sealed=False)  # earlier than where the run goes on: of no interest
    checkpoint(tmp_path / "checkpoint-40", sealed=False)
    cut = checkpoint(tmp_path / "checkpoint-60")
    (cut / "model.safetensors").write_bytes(b"1")
    first, second = passed_over(tmp_path, good)
    assert first.startswith(f"{tmp_path / 'checkpoint-40'} is passed over, going on from checkpoint-20")
    assert "manifest.json is missing" in first
    assert "checkpoint-60" in second and "model.safetensors has 1 bytes, not 5" in second
    assert "starting from the beginning" in passed_over(tmp_path, None)[0]


def test_a_later_complete_checkpoint_is_named_too(tmp_path: Path) -> None:
    for step in (2, 4):
        checkpoint(tmp_path / f"checkpoint-{step}")
    [line] = passed_over(tmp_path, tmp_path / "checkpoint-2")
    assert "checkpoint-4 is complete and later than where this run starts (going on from checkpoint-2)" in line
    assert passed_over(tmp_path, tmp_path / "checkpoint-4") == []


def test_a_checkpoint_that_is_written_again_does_not_count_meanwhile(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "checkpoint-4")
    (folder / "mine.txt").write_text("a note")
    start_save(folder)
    assert complete_checkpoints(tmp_path) == []
    assert names(folder) == ["mine.txt", "model.safetensors", "trainer_state.json"]
    start_save(tmp_path / "checkpoint-6")
    assert not (tmp_path / "checkpoint-6").exists()


def test_half_a_manifest_beside_the_files_is_none_of_them(tmp_path: Path) -> None:
    """A kill between the writing of the manifest and its renaming, then a whole save into the same folder."""
    folder = checkpoint(tmp_path / "checkpoint-4", sealed=False)
    (folder / ".manifest.json.77.tmp").write_text('{"fi')
    write_manifest(folder)
    (folder / ".manifest.json.77.tmp").unlink()
    assert manifest_problems(folder) == []


def test_earlier_run_needs_a_decision_and_an_unfinished_one_does_not(tmp_path: Path) -> None:
    checkpoint(tmp_path / "a" / "checkpoint-1", sealed=False)
    assert resolve_resume(tmp_path / "a", None) is None
    checkpoint(tmp_path / "a" / "checkpoint-final", state=False)
    with pytest.raises(UserError, match=r"checkpoint-final.*--resume_from_checkpoint auto.*another --output_dir"):
        resolve_resume(tmp_path / "a", None)


def test_named_resume_must_be_complete_and_hold_the_state(tmp_path: Path) -> None:
    broken = checkpoint(tmp_path / "checkpoint-3", sealed=False)
    checkpoint(tmp_path / "checkpoint-2")
    with pytest.raises(UserError, match=r"manifest.json is missing; complete ones here: checkpoint-2"):
        resolve_resume(tmp_path, str(broken))
    weights = checkpoint(tmp_path / "checkpoint-best", state=False)
    with pytest.raises(UserError, match="no optimizer and trainer state"):
        resolve_resume(tmp_path, str(weights))


def test_no_space_names_path_and_need(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path}.*needed.*free.*--resume_from_checkpoint auto"):
        require_space(tmp_path / "checkpoint-1", 10**18)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("PytorchStreamWriter failed writing file data/0"),
        RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534"),  # torch.save, seen
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),  # seen
    ],
)
def test_a_disk_that_fills_up_is_a_user_error(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(UserError, match="the disk filled up while saving"), saving(tmp_path / "c", 10):
        raise error


def test_other_errors_of_a_save_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shape mismatch"), saving(tmp_path / "c", 10):
        raise RuntimeError("shape mismatch")


# ---------------------------------------------------------------------------------------------- kills while replacing
def written(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_text(text)
    write_manifest(folder)
    return folder


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_while_replacing_loses_no_checkpoint(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the first rename, between the two, and before the old one is deleted: the finished save counts."""
    best, new = written(tmp_path / "checkpoint-best", "old"), written(tmp_path / ".checkpoint-best.unfinished", "new")
    plain, left = Path.rename, [renames]

    def rename(self: Path, target: Path) -> Path:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return plain(self, target)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", rename)
        if renames == 2:
            patch.setattr(checkpoints, "_sync_names", killed)
        replace_folder(new, best)
    assert best.exists() == (renames != 1)
    notes = recover(tmp_path)
    assert (best / "model.safetensors").read_text() == "new" and manifest_problems(best) == []
    assert notes == ([] if renames == 2 else ["put checkpoint-best in its place: the process was killed just before"])
    assert recover(tmp_path) == []


def test_an_old_checkpoint_without_its_successor_comes_back(tmp_path: Path) -> None:
    written(tmp_path / ".checkpoint-best.old", "old")
    (tmp_path / ".checkpoint-best.unfinished").mkdir()
    assert recover(tmp_path) == ["put checkpoint-best back: the process was killed while replacing it"]
    assert (tmp_path / "checkpoint-best/model.safetensors").read_text() == "old"
    with pytest.raises(UserError, match="nothing was changed"):
        resolve_resume(tmp_path, None)


def test_recovery_touches_nothing_it_does_not_know_to_be_whole(tmp_path: Path) -> None:
    written(tmp_path / "checkpoint-best", "new")
    written(tmp_path / ".checkpoint-best.old", "old")
    for name in (".checkpoint-final.unfinished", ".mine.old", ".checkpoint-final.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").touch()
    (tmp_path / ".notes.old").write_text("a file")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    assert recover(tmp_path) == [] and recover(tmp_path / "nowhere") == []
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_replacing_deletes_the_only_copy_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that starts over a folder where only the old copy is left."""
    old, new = written(tmp_path / ".checkpoint-best.old", "old"), written(tmp_path / ".new", "new")
    seen: list[bool] = []
    plain = shutil.rmtree
    monkeypatch.setattr(
        shutil,
        "rmtree",
        lambda folder, **options: (seen.append((tmp_path / "checkpoint-best").exists()), plain(folder, **options)),
    )
    replace_folder(new, tmp_path / "checkpoint-best")
    assert seen == [True] and not old.exists()


def test_replace_folder_swaps_whole(tmp_path: Path) -> None:
    old, new = checkpoint(tmp_path / "checkpoint-best"), tmp_path / ".new"
    new.mkdir()
    (new / "a").write_text("new")
    replace_folder(new, old)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-best"]
    assert [path.name for path in old.iterdir()] == ["a"]
