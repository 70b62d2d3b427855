"""`scripts/export_to_hf.sh` as a user starts it: from anywhere, with a push to a hub on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from inference.export import parse_args
from tests.loopback_hub import REPO, TOKEN, Hub, running_hub
from utils.checkpoints import write_manifest
from utils.common import REPO_ROOT
from utils.config import DataFile, load_config
from utils.prompts import PromptContract

SCRIPT = REPO_ROOT / "scripts/export_to_hf.sh"


def start(cwd: Path, *flags: str, hub: Hub | None = None, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """Run the script in `cwd` with the Python of this process, logged in to `hub`."""
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment |= {"VTG_PYTHON": sys.executable, "HF_HOME": str(cwd / "hf"), "HF_HUB_DISABLE_XET": "1"}
    if hub is not None:
        environment |= {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_TOKEN": token}
    return subprocess.run([SCRIPT, *flags], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture
def checkpoint(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model as a run saves it; it has learnt nothing, which is no matter here."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "run/checkpoint-best"))
    config = load_config(DataFile, [REPO_ROOT / "configs/demo/video_config.yaml"])
    PromptContract.current(config.prompt, config.data).save(folder)
    write_manifest(folder)
    return folder


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_export_and_push(checkpoint: Path, tmp_path: Path) -> None:
    """The first commit fails, the retry goes through; the repository holds the folder, and no file or line the token.

    Then a look at the folder, and a push of the same under another name without exporting again.
    """
    flags = ("--checkpoint", "run/checkpoint-best", "--output_dir", "out/vtg", "--merge_lora", "true")
    with running_hub() as hub:
        hub.fail[f"/api/models/{REPO}/commit/main"] = [503]
        pushed = start(tmp_path, *flags, "--push_to_hub", "true", "--repo_id", "vtg", "--private", hub=hub)
    assert pushed.returncode == 0, pushed.stderr[-2000:]
    assert pushed.stdout.splitlines() == ["exported: out/vtg", f"pushed: {hub.url}/{REPO}"]
    folder = tmp_path / "out/vtg"
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.private is True and hub.commits == ["Export with Qwen3-VL-GRPO-VTG"]
    assert hub.asked.count(f"POST /api/models/{REPO}/commit/main") == 2
    assert f'model_id = "{REPO}"' in (folder / "README.md").read_text()
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert TOKEN not in pushed.stdout + pushed.stderr and TOKEN.encode() not in everything(tmp_path)


@pytest.mark.slow
def test_a_push_that_broke_off_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    """A local export; then a push that the hub refuses; then one that only uploads. A hand-edited card stays."""
    flags = ("--checkpoint", "run/checkpoint-best", "--output_dir", "out")
    assert start(tmp_path, *flags).returncode == 0
    card = tmp_path / "out/README.md"
    card.write_text(card.read_text() + "\nMy words.\n")
    written = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    with running_hub() as hub:
        push = ("--push_to_hub", "true", "--repo_id", REPO)
        hub.fail["/api/repos/create"] = [403]
        refused = start(tmp_path, *flags, *push, hub=hub)
        assert refused.returncode == 2 and "Traceback" not in refused.stderr
        assert refused.stderr.splitlines()[-1].startswith(f"error: making {REPO}: the token may not write there")
        done = start(tmp_path, *flags, *push, hub=hub)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"pushed: {hub.url}/{REPO}"]
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == written
    assert card.read_text().endswith("\nMy words.\n") and f'model_id = "{REPO}"' in card.read_text()
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert json.loads(hub.files["export.json"])["name"] == REPO


@pytest.mark.slow
def test_a_refused_token_costs_no_export(checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--checkpoint", "run/checkpoint-best", "--output_dir", "out", "--push_to_hub", "true", "--repo_id", REPO)
    with running_hub() as hub:
        hub.echo_token = True
        refused = start(tmp_path, *flags, hub=hub, token="hf_WrongOne")
    assert refused.returncode == 2 and not (tmp_path / "out").exists()
    assert "the hub refused the token" in refused.stderr.splitlines()[-1]
    assert "hf_WrongOne" not in refused.stdout + refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.slow
def test_help_and_no_flags(tmp_path: Path) -> None:
    shown = start(tmp_path, "--help")
    assert shown.returncode == 0 and "usage: export_to_hf.sh" in shown.stdout
    for flag in (
        "checkpoint",
        "output_dir",
        "merge_lora",
        "push_to_hub",
        "repo_id",
        "private",
        "dtype",
        "max_shard_size",
    ):
        assert f"--{flag}" in shown.stdout
    bare = start(tmp_path)
    assert bare.returncode == 2 and "the following arguments are required: --checkpoint, --output_dir" in bare.stderr


def test_flags_of_the_readme() -> None:
    """The command that the README shows, word by word."""
    text = (REPO_ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = [line.split() for line in text.splitlines() if line.startswith("./scripts/export_to_hf.sh")]
    assert len(commands) >= 2
    found: list[Any] = [parse_args(command[1:]) for command in commands]
    assert [(args.merge_lora, args.push_to_hub) for args in found][:1] == [(True, False)]
    assert any(args.push_to_hub and args.repo_id for args in found)
