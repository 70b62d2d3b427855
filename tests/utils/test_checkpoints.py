"""When a checkpoint is complete, what a run may resume from, and what a full disk says."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from utils.checkpoints import (
    complete_checkpoints,
    manifest_problems,
    replace_folder,
    require_space,
    resolve_resume,
    rotate,
    saving,
    write_manifest,
)
from utils.common import UserError


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
    rotate(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 5
    rotate(tmp_path, 2)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["checkpoint-10", "checkpoint-12", "checkpoint-4", "checkpoint-best"]


def test_resume_auto_passes_over_a_half_written_checkpoint(tmp_path: Path) -> None:
    assert resolve_resume(tmp_path, "auto") is None
    good = checkpoint(tmp_path / "checkpoint-1")
    checkpoint(tmp_path / "checkpoint-2", sealed=False)
    assert resolve_resume(tmp_path, "auto") == good
    assert resolve_resume(tmp_path, str(good)) == good


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
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file data/0")],
)
def test_a_disk_that_fills_up_is_a_user_error(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(UserError, match="the disk filled up while saving"), saving(tmp_path / "c", 10):
        raise error


def test_other_errors_of_a_save_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shape mismatch"), saving(tmp_path / "c", 10):
        raise RuntimeError("shape mismatch")


def test_replace_folder_swaps_whole(tmp_path: Path) -> None:
    old, new = checkpoint(tmp_path / "checkpoint-best"), tmp_path / ".new"
    new.mkdir()
    (new / "a").write_text("new")
    replace_folder(new, old)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-best"]
    assert [path.name for path in old.iterdir()] == ["a"]
