"""The world of one process that no launcher started, and writing into places that cannot be written to."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from utils.common import UserError, atomic_open, settle_world, write_json

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.setenv(name, "")  # so that it is put back, whatever is set meanwhile
        monkeypatch.delenv(name)


def test_a_process_alone_is_a_world_of_one() -> None:
    settle_world()
    port = int(os.environ["MASTER_PORT"])
    assert [os.environ[name] for name in NAMES] == ["0", "0", "1", "127.0.0.1", str(port)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))  # it is free


def test_a_launcher_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")  # one launcher a node, as scripts/slurm starts them
    settle_world()
    assert "RANK" not in os.environ and "MASTER_PORT" not in os.environ


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_several_without_torchrun_are_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    settle_world()
    for name in NAMES:
        monkeypatch.delenv(name)
    monkeypatch.setenv(variable, "8")
    with pytest.raises(UserError, match=rf"8 processes were started without torchrun \({variable}\).*scripts/sft\.sh"):
        settle_world()
    assert "WORLD_SIZE" not in os.environ


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/a\.json cannot be written: .*Choose another place"):
        write_json(tmp_path / "file" / "a.json", {})
    with pytest.raises(UserError, match=r"cannot be written: File name too long"):
        write_json(tmp_path / ("n" * 300), {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_stays_an_error_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run_command` and the savers know it by its number."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.mkdir", full)
    with pytest.raises(OSError, match="No space left") as caught, atomic_open(tmp_path / "a"):
        pass
    assert caught.value.errno == errno.ENOSPC
