"""Which files count as weights, and as pickle. That a pickle is refused unread is in tests/test_security.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from utils.common import REPO_ROOT, UserError
from utils.weight_files import pickled_weights, refuse_own_code, require_safetensors


@pytest.mark.parametrize(
    ("files", "pickled"),
    [
        ([], []),
        (["model.safetensors"], []),
        (["model.safetensors", "pytorch_model.bin"], []),
        (["pytorch_model.bin"], ["pytorch_model.bin"]),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], ["pytorch_model.bin.index.json"]),
        (["model.safetensors", "adapter_model.bin"], ["adapter_model.bin"]),
        (["adapter_model.safetensors", "adapter_model.bin"], []),
        (["adapter_model.safetensors", "optimizer.pt", "training_args.bin"], []),
    ],
)
def test_pickled_weights(files: list[str], pickled: list[str], tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).touch()
    assert pickled_weights(tmp_path) == pickled
    require_safetensors(tmp_path, allow_pickle=True)
    if pickled:
        with pytest.raises(UserError, match=f"{tmp_path} holds weights as pickle .{pickled[0]}"):
            require_safetensors(tmp_path, allow_pickle=False)
    else:
        require_safetensors(tmp_path, allow_pickle=False)


def test_parts_of_an_index(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    parts = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    index.write_text(json.dumps({"weight_map": parts}))
    assert pickled_weights(tmp_path) == []
    index.write_text(json.dumps({"weight_map": parts | {"c": "part.bin", "d": "part.bin"}}))
    assert pickled_weights(tmp_path) == ["part.bin"]
    for broken in ("[]", "{", '{"weight_map": null}'):
        index.write_text(broken)
        with pytest.raises(UserError, match="model.safetensors.index.json is no index of weights"):
            pickled_weights(tmp_path)


def test_where_the_code_of_a_plug_in_lies(tmp_path: Path) -> None:
    refuse_own_code("utils.rows:Row", tmp_path)
    refuse_own_code("json:loads", tmp_path)
    refuse_own_code("no_such_package.tower:build", tmp_path)
    with pytest.raises(UserError, match=r"names the vision encoder utils\.rows:Row, whose code lies in"):
        refuse_own_code("utils.rows:Row", REPO_ROOT / "utils")
    for content in ("ckpts", "data", "outputs"):
        with pytest.raises(UserError, match="a checkpoint may not bring code along"):
            refuse_own_code(f"{content}.evil:build", tmp_path)
