"""Which files of a model folder hold weights, and what in it could run code (SECURITY.md). Knows files, not models.

A pickle names functions to call, so reading one can run code; safetensors holds numbers alone. Where a folder has no
safetensors, transformers and peft read its pickle; here that must be asked for.
"""

from __future__ import annotations

import json
from importlib.machinery import PathFinder
from pathlib import Path

from utils.common import REPO_ROOT, UserError

PICKLE_KEY = "model.allow_pickle"
_SAFE = ".safetensors"
_CONVERT = {
    "pytorch_model": "from transformers import Qwen3VLForConditionalGeneration as M; "
    "M.from_pretrained({folder!r}).save_pretrained({folder!r})",
    "adapter_model": "import torch; from safetensors.torch import save_file; "
    "save_file(torch.load({file!r}, weights_only=True), {safe!r}, metadata=dict(format='pt'))",
}
"""Python that writes safetensors beside a pickle; both readers take tensors from it and call nothing it names."""
_CONTENT_FOLDERS = ("ckpts", "data", "outputs")
"""Folders of the checkout that hold what was downloaded or made, never code."""


def pickled_weights(folder: Path) -> list[str]:
    """Names of the files in `folder` that weights would be read from as pickle: those that no safetensors stand beside,
    and parts of another kind that a safetensors index names."""
    return [
        *_pickled(folder, safe="model", pickled="pytorch_model"),
        *_pickled(folder, safe="adapter_model", pickled="adapter_model"),
    ]


def _pickled(folder: Path, *, safe: str, pickled: str) -> list[str]:
    if (folder / f"{safe}{_SAFE}").is_file():
        return []
    index = folder / f"{safe}{_SAFE}.index.json"
    if index.is_file():
        return sorted(name for name in _parts(index) if not name.endswith(_SAFE))
    return [name for name in (f"{pickled}.bin", f"{pickled}.bin.index.json") if (folder / name).is_file()]


def _parts(index: Path) -> set[str]:
    try:
        return set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of weights ({error}); copy the model again") from error


def require_safetensors(folder: Path, *, allow_pickle: bool) -> None:
    """Raise UserError when weights in `folder` would be read as pickle, unless `allow_pickle`.

    A folder without weights passes: that is for its reader to say.
    """
    names = [] if allow_pickle else pickled_weights(folder)
    if names:
        raise UserError(
            f"{folder} holds weights as pickle ({', '.join(names[:3])}) and not as safetensors. A pickle can run code "
            f"when it is read, so it is refused. Convert it once: {_conversion(folder, names[0])} -- or allow it, if "
            f"you trust its author: {PICKLE_KEY}=true (in inference allow_pickle=True, --allow_pickle)"
        )


def _conversion(folder: Path, name: str) -> str:
    kind = "adapter_model" if name.startswith("adapter_model") else "pytorch_model"
    file = folder / name
    code = _CONVERT[kind].format(folder=str(folder), file=str(file), safe=str(file.with_suffix(_SAFE)))
    return f'python -c "{code}"'


def refuse_own_code(plug_in: str, folder: Path) -> None:
    """Raise UserError when the `package.module:name` that a checkpoint names comes from the checkpoint itself.

    Its module must not lie in `folder`, nor in the checkout's folders for downloads. Nothing is imported to find out.
    """
    forbidden = [folder.resolve(), *(REPO_ROOT / name for name in _CONTENT_FOLDERS)]
    for place in _places(plug_in.partition(":")[0]):
        if any(place.is_relative_to(root) for root in forbidden):
            raise UserError(
                f"{folder} names the vision encoder {plug_in}, whose code lies in {place}: a checkpoint may not bring "
                "code along. Read it, and put it into a package of your own if you trust it"
            )


def _places(module: str) -> list[Path]:
    """Where Python would find a module and the packages around it, as far as they can be found."""
    places: list[Path] = []
    search: list[str] | None = None
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:end]), search)
        if spec is None:
            break
        search = list(spec.submodule_search_locations or [])
        places += [Path(place).resolve() for place in (spec.origin, *search) if place]
    return places
