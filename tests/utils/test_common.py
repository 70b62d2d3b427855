"""The world of one process that no launcher started."""

from __future__ import annotations

import os
import socket

import pytest

from utils.common import UserError, settle_world

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
