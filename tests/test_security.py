"""What SECURITY.md promises: every attack is refused with a reason, and its code, which would make a file, never ran.

Each attack is first shown to work on a reader that does not guard against it.
"""

from __future__ import annotations

import ast
import importlib
import json
import pickle
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, dynamic_module_utils

from datasets.video_dataset import VideoTemporalDataset
from inference.video_infer import VideoTemporalInference
from trainers.merging import merge
from trainers.model import load_base, load_for_inference, load_policy, load_processor, resolve_source
from trainers.parts import LearningRates
from utils.checkpoints import write_manifest
from utils.common import REPO_ROOT, UserError
from utils.config import (
    AnnotationSource,
    ConfigError,
    DataConfig,
    DataFile,
    LoraConfig,
    ModelConfig,
    RLConfig,
    SFTConfig,
    load_config,
)
from utils.data_validation import main as validate_main
from utils.prompts import PromptContract
from utils.rows import load_annotations, read_rows
from utils.run import start_run
from utils.weight_files import pickled_weights, refuse_own_code

RATES = LearningRates(language=1e-4, mm_projector=0.0, vision_tower=0.0, head=0.0)
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj",), modules_to_save=())


class Attack:
    """Makes `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """The file that an attack would make; it is not there when the test ends."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


def save_attack(path: Path, marker: Path) -> None:
    """Write a pickle that makes `marker` when it is read without a guard, which is tried."""
    torch.save({"weight": Attack(marker)}, path)
    torch.load(path, weights_only=False)
    assert marker.exists(), "the attack does not work, so refusing it proves nothing"
    marker.unlink()


def model_config(name: Path | str, **settings: Any) -> ModelConfig:
    return ModelConfig(name_or_path=str(name), torch_dtype="float32", attn_implementation="sdpa", **settings)


def with_pickle(model: Path, folder: Path, save: Callable[[Path], None] | None = None) -> Path:
    """A copy of a model or adapter whose weights are a pickle: its own, or what `save` writes."""
    shutil.copytree(model, folder)
    safe = next(path for path in folder.glob("*.safetensors"))
    name = "adapter_model.bin" if safe.stem == "adapter_model" else "pytorch_model.bin"
    if save is None:
        torch.save(load_file(safe), folder / name)
    else:
        save(folder / name)
    safe.unlink()
    return folder


# ---- weights

REFUSED = (
    r"holds weights as pickle \({name}\) and not as safetensors\. .*Convert it once: python -c .*allow_pickle=true"
)


@pytest.mark.parametrize("reader", ["base", "policy", "inference", "engine"])
def test_a_pickle_of_weights_is_refused_unread(reader: str, tiny_model: Path, tmp_path: Path, marker: Path) -> None:
    folder = with_pickle(tiny_model, tmp_path / "m", lambda path: save_attack(path, marker))
    readers: dict[str, Callable[[], Any]] = {
        "base": lambda: load_base(str(folder), model_config(folder), dtype=torch.float32),
        "policy": lambda: load_policy(model_config(folder), LORA, RATES),
        "inference": lambda: load_for_inference(str(folder), need_contract=False),
        "engine": lambda: VideoTemporalInference(folder),
    }
    with pytest.raises(UserError, match=REFUSED.format(name="pytorch_model.bin")):
        readers[reader]()


def test_an_adapters_pickle_is_refused_unread(answering_adapter: Path, tmp_path: Path, marker: Path) -> None:
    folder = with_pickle(answering_adapter, tmp_path / "a", lambda path: save_attack(path, marker))
    source = resolve_source(str(folder))
    for read in (
        lambda: load_policy(model_config(folder), LORA, RATES),
        lambda: load_for_inference(str(folder)),
        lambda: merge(source, model_config(folder), tmp_path / "merged"),
    ):
        with pytest.raises(UserError, match=REFUSED.format(name="adapter_model.bin")):
            read()
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match="no adapter_model.safetensors; copy the checkpoint again"):
        load_for_inference(str(folder))  # PEFT would look for it on the hub


def test_allowed_pickle_is_read_and_still_runs_nothing(
    tiny_model: Path, answering_adapter: Path, tmp_path: Path, marker: Path
) -> None:
    honest = with_pickle(tiny_model, tmp_path / "honest")
    model = load_base(str(honest), model_config(honest, allow_pickle=True), dtype=torch.float32)
    wanted = load_base(str(tiny_model), model_config(tiny_model), dtype=torch.float32).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    adapter = with_pickle(answering_adapter, tmp_path / "adapter")
    loaded = load_for_inference(str(adapter), allow_pickle=True).model.state_dict()
    assert torch.equal(
        loaded["base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_B.default.weight"],
        load_file(answering_adapter / "adapter_model.safetensors")[
            "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_B.weight"
        ],
    )
    for model_folder in (tiny_model, answering_adapter):
        folder = tmp_path / f"attack_{model_folder.name}"
        with_pickle(model_folder, folder, lambda path: save_attack(path, marker))
        with pytest.raises(UserError, match="Weights only load failed"):
            load_for_inference(str(folder), need_contract=False, allow_pickle=True)


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_the_command_for_converting_works(kind: str, tiny_model: Path, answering_adapter: Path, tmp_path: Path) -> None:
    model = {"model": tiny_model, "adapter": answering_adapter}[kind]
    folder = with_pickle(model, tmp_path / "a model")
    with pytest.raises(UserError) as refusal:
        load_for_inference(str(folder), need_contract=False)
    command = re.search(r'python -c "(.*?)" -- ', str(refusal.value))
    assert command
    exec(command.group(1), {})  # noqa: S102  what a shell would hand to Python
    assert load_for_inference(str(folder), need_contract=False)
    name = {"model": "model", "adapter": "adapter_model"}[kind] + ".safetensors"
    before, after = load_file(model / name), load_file(folder / name)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_pickle_in_the_clothes_of_safetensors(tiny_model: Path, tmp_path: Path, marker: Path) -> None:
    """Ways by which transformers' `use_safetensors=True` still reads a pickle."""
    indexed = with_pickle(tiny_model, tmp_path / "indexed", lambda path: save_attack(path, marker))
    weights = load_file(tiny_model / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "pytorch_model.bin")}
    (indexed / "model.safetensors.index.json").write_text(json.dumps(index))
    assert pickled_weights(indexed) == ["pytorch_model.bin"]
    named = tmp_path / "named"
    shutil.copytree(tiny_model, named)
    config = json.loads((named / "config.json").read_text())
    (named / "config.json").write_text(json.dumps(config | {"transformers_weights": "adapter_model.bin"}))
    shutil.copy(tiny_model / "model.safetensors", named / "adapter_model.safetensors")
    save_attack(named / "adapter_model.bin", marker)
    beside = tmp_path / "beside"
    shutil.copytree(tiny_model, beside)
    save_attack(beside / "adapter_model.bin", marker)
    for folder, message in (
        (indexed, r"as pickle \(pytorch_model.bin\)"),
        (named, "its config.json names adapter_model.bin as weights"),
        (beside, r"as pickle \(adapter_model.bin\)"),
    ):
        with pytest.raises(UserError, match=message):
            load_base(str(folder), model_config(folder), dtype=torch.float32)


def test_safetensors_win_over_a_pickle_beside_them(tiny_model: Path, tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_model, folder)
    save_attack(folder / "pytorch_model.bin", marker)
    for allow in (False, True):
        load_base(str(folder), model_config(folder, allow_pickle=allow), dtype=torch.float32)


def cache_model(cache: Path, name: str, folders: dict[str, Path]) -> None:
    """Put revisions (`{"main": folder}`) of a model into a cache as huggingface_hub lays it out."""
    model = cache / f"models--{name.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    for number, (revision, folder) in enumerate(folders.items()):
        commit = f"{number + 1:040x}"
        shutil.copytree(folder, model / "snapshots" / commit)
        (model / "refs" / revision).write_text(commit)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


def test_a_hub_model_of_pickle_is_refused_unread(
    tiny_model: Path, hub_cache: Path, tmp_path: Path, marker: Path
) -> None:
    folder = with_pickle(tiny_model, tmp_path / "m", lambda path: save_attack(path, marker))
    cache_model(hub_cache, "someone/model", {"main": folder})
    with pytest.raises(UserError, match="cannot load 'someone/model'.*allow_pickle=true"):
        load_base("someone/model", model_config("someone/model"), dtype=torch.float32)


def test_the_processor_is_that_of_the_revision(tiny_model: Path, hub_cache: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    shutil.copytree(tiny_model, older)
    (older / "chat_template.jinja").write_text("of the older revision")
    cache_model(hub_cache, "someone/model", {"main": tiny_model, "older": older})
    for revision, is_older in ((None, False), ("main", False), ("older", True)):
        config = model_config("someone/model", revision=revision)
        processor = load_processor(resolve_source("someone/model"), config)
        assert (processor.chat_template == "of the older revision") == is_older


@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_the_entry_scripts_say_so_in_one_line(
    kind: str,
    tiny_model: Path,
    demo_data: Path,
    tmp_path: Path,
    marker: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = with_pickle(tiny_model, tmp_path / "m", lambda path: save_attack(path, marker))
    arguments = [
        *("--config", str(REPO_ROOT / f"configs/demo/{kind}_config.yaml")),
        *("--data_config", str(REPO_ROOT / "configs/demo/video_config.yaml")),
        *("--output_dir", str(tmp_path / "run"), "--model_path", str(folder), "--dry_run"),
        *(f"data.{split}={demo_data / split}.jsonl" for split in ("train", "val", "test")),
        "data.cache_dir=null",
    ]
    monkeypatch.setattr(sys, "argv", [f"train_{kind}.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPO_ROOT / f"train_{kind}.py"), run_name="__main__")
    err = capfd.readouterr().err
    last = err.strip().splitlines()[-1]
    assert ended.value.code == 2 and "Traceback" not in err
    assert last.startswith(f"error: {folder} holds weights as pickle (pytorch_model.bin)")


def test_weights_of_a_resumed_checkpoint(tiny_model: Path, tmp_path: Path, marker: Path) -> None:
    """The optimizer's and random states are in tests/trainers/test_resumed_pickles.py."""
    folder = with_pickle(tiny_model, tmp_path / "run/checkpoint-2", lambda path: save_attack(path, marker))
    (folder / "trainer_state.json").write_text("{}")
    write_manifest(folder)
    with pytest.raises(UserError, match=REFUSED.format(name="pytorch_model.bin")):
        start_run(tmp_path / "run", SFTConfig(), "auto")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-2"]


# ---- code that comes with a model


def plant_code(folder: Path, marker: Path) -> None:
    """A module in a model's folder that makes `marker` when it is imported."""
    (folder / "planted.py").write_text(
        "from pathlib import Path\n"
        "from transformers import PreTrainedConfig\n"
        f"Path({str(marker)!r}).touch()\n"
        "class Planted(PreTrainedConfig):\n"
        "    model_type = 'planted'\n"
    )


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_models_own_code_must_be_asked_for(
    tiny_model: Path, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # transformers adds its folder of such modules
    folder = tmp_path / "m"
    shutil.copytree(tiny_model, folder)
    plant_code(folder, marker)
    edit_json(folder / "config.json", model_type="planted", auto_map={"AutoConfig": "planted.Planted"})
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert marker.exists(), "the attack does not work, so refusing it proves nothing"
    marker.unlink()
    message = "cannot load .*custom code.*model.trust_remote_code=true"
    with pytest.raises(UserError, match=message):
        load_base(str(folder), model_config(folder), dtype=torch.float32)
    with pytest.raises(UserError, match=message):
        load_for_inference(str(folder), need_contract=False)
    assert ModelConfig().trust_remote_code is False


def test_a_processors_own_code_is_never_imported(
    tiny_model: Path, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "m"
    shutil.copytree(tiny_model, folder)
    plant_code(folder, marker)
    names = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor", "AutoVideoProcessor")
    auto_map: dict[str, Any] = dict.fromkeys(names, "planted.Planted") | {"AutoTokenizer": ["planted.Planted", None]}
    files = [path for path in folder.glob("*config*.json") if path.name != "generation_config.json"]
    assert {"config.json", "tokenizer_config.json"} < {path.name for path in files}
    for path in files:
        edit_json(path, auto_map=auto_map)
    processor = load_processor(resolve_source(str(folder)))
    assert type(processor).__module__.startswith("transformers.")
    load_base(str(folder), model_config(folder), dtype=torch.float32)


def test_a_checkpoint_brings_no_vision_encoder_of_its_own(
    tiny_model: Path, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "downloads" / "evil"
    shutil.copytree(tiny_model, folder)
    for path in (folder / "__init__.py", folder / "tower.py"):
        path.write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    contract = PromptContract.current(DataFile().prompt, DataFile().data, "downloads.evil.tower:build")
    contract.save(folder)
    for read in (
        lambda: load_for_inference(str(folder)),
        lambda: load_policy(model_config(folder), LORA, RATES),
        lambda: VideoTemporalInference(folder),
    ):
        with pytest.raises(UserError, match="names the vision encoder downloads.evil.tower:build, whose code lies in"):
            read()
    assert not marker.exists()
    importlib.import_module("downloads.evil.tower")
    assert marker.exists(), "the attack does not work, so refusing it proves nothing"
    marker.unlink()
    refuse_own_code("utils.rows:Row", folder)  # one's own package may hold it
    refuse_own_code("no_such_package:tower", folder)
    with pytest.raises(UserError, match="a checkpoint may not bring code along"):
        refuse_own_code("ckpts.evil.tower:build", folder)


# ---- YAML

SFT_FILES = [REPO_ROOT / "configs/training/sft_config.yaml", REPO_ROOT / "configs/data/video_config.yaml"]


@pytest.fixture(params=["object/apply", "object/new", "name", "module"])
def tag(request: pytest.FixtureRequest, marker: Path) -> str:
    """A value that makes `marker`, or imports a module, when it is read without a guard."""
    text = {
        "object/apply": f'!!python/object/apply:os.system ["touch {marker}"]',
        "object/new": f'!!python/object/new:os.system ["touch {marker}"]',
        "name": '!!python/name:os.system ""',
        "module": '!!python/module:os ""',
    }[request.param]
    yaml.unsafe_load(text)
    assert marker.exists() == request.param.startswith("object")
    marker.unlink(missing_ok=True)
    return text


def test_a_tag_in_any_yaml_is_refused(tag: str, tmp_path: Path) -> None:
    """Of --config and --data_config (in training, in inference, by the tools) and in an override."""
    refused = r"has the tag tag:yaml.org,2002:python/.*, which is not used here"
    places = (
        "model:\n  revision: {}\n",
        "training:\n  report_to: {}\n",
        "data: {}\n",
        "data:\n  train: [a, {}]\n",
        "{}",
    )
    for text in (place.format(tag) for place in places):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        for cls in (SFTConfig, RLConfig, DataFile):
            with pytest.raises(ConfigError, match=refused):
                load_config(cls, [path])
        with pytest.raises(UserError, match=refused):
            VideoTemporalInference("no/model", data_config=path)
    with pytest.raises(ConfigError, match="model.revision=.* is not valid YAML"):
        load_config(SFTConfig, SFT_FILES, [f"model.revision={tag}"])


def test_tags_on_keys_and_collections(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for line in ('!!python/name:os.system "name_or_path": x', "revision: !!python/tuple [a]", "revision: !!set {a}"):
        path.write_text(f"model:\n  {line}\n")
        with pytest.raises(ConfigError, match=r"model\.\w+ has the tag .*config.yaml:2\); remove the tag"):
            load_config(SFTConfig, [path])


def test_a_tag_in_the_record_of_a_resumed_run(tag: str, tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_model, run / "checkpoint-2")
    (run / "checkpoint-2" / "trainer_state.json").write_text("{}")
    write_manifest(run / "checkpoint-2")
    (run / "config.yaml").write_text(f"model:\n  revision: {tag}\n")
    with pytest.raises(UserError, match=r"record of the run.*has the tag .*config.yaml:2"):
        start_run(run, SFTConfig(), "auto")


# ---- plug-ins


@pytest.mark.parametrize(
    "setting",
    [
        "model.vision_tower=os.system('touch {marker}')",
        "model.vision_tower=__import__('os').system:x",
        "model.name_or_path=$(touch {marker})",
        'prompt.question="{{sentence.__class__}}"',
        "training.torch_compile_backend=os:system",
        "training.optim=os:system",
    ],
)
def test_text_in_a_config_is_never_code(setting: str, marker: Path) -> None:
    setting = setting.format(marker=marker)
    if setting.startswith(("model.name_or_path", "training.torch_compile_backend")):
        config = load_config(SFTConfig, SFT_FILES, [setting])  # text like any other
        with pytest.raises(UserError):
            resolve_source(config.model.name_or_path if "$" in setting else "./no/model")
        return
    with pytest.raises(ConfigError, match=re.escape(setting.partition("=")[0])):
        load_config(SFTConfig, SFT_FILES, [setting])


def test_our_code_has_one_way_to_run_what_a_file_names() -> None:
    """`package.module:Name`, for `model.vision_tower`, `rewards` and `--dataset` (data.backend is one of three names);
    no reader that runs what it reads."""
    importers, unsafe = set(), []
    for path in [*REPO_ROOT.glob("*.py"), *(p for room in ROOMS for p in (REPO_ROOT / room).rglob("*.py"))]:
        name = path.relative_to(REPO_ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called.endswith("import_module") or called == "__import__":
                importers.add(name)
            if called in UNSAFE or any(word.arg in UNSAFE_WORDS for word in node.keywords):
                unsafe.append(f"{name}:{node.lineno}: {called}")
            if called == "torch.load" and "weights_only=True" not in map(ast.unparse, node.keywords):
                unsafe.append(f"{name}:{node.lineno}: {called} without weights_only=True")
    importers.discard("scripts/bench.py")  # its own commands, which the command line lists
    assert importers == {"utils/common.py", "rewards/reward_registry.py", "utils/video_backends.py"}
    assert unsafe == []


ROOMS = ("utils", "datasets", "trainers", "rewards", "inference", "scripts")
UNSAFE = {
    *("eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "dill.load", "joblib.load"),
    *("marshal.loads", "shelve.open", "runpy.run_path", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
}
UNSAFE_WORDS = {"shell", "custom_generate"}


# ---- annotations


@pytest.fixture
def library(demo_data: Path, tmp_path: Path) -> Path:
    """A root with three videos, one outside it, and links within and out of it."""
    root = tmp_path / "root"
    (root / "day").mkdir(parents=True)
    source = sorted((demo_data / "videos" / "train").iterdir())[0]
    for path in (root / "a.mp4", root / "day" / "b.mp4", tmp_path / "secret.mp4"):
        shutil.copy(source, path)
    (root / "inside.mp4").symlink_to("day/b.mp4")
    (root / "leaves.mp4").symlink_to(tmp_path / "secret.mp4")
    (root / "folder").symlink_to(tmp_path)
    (tmp_path / "root_too").mkdir()  # a name that begins with the root's
    shutil.copy(source, tmp_path / "root_too" / "c.mp4")
    return root


def write_names(path: Path, names: list[str]) -> Path:
    rows = [{"video": name, "duration": 4.0, "timestamp": [1.0, 2.0], "sentence": "it moves"} for name in names]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def staying(root: Path) -> list[str]:
    return ["a.mp4", "day/../a.mp4", "./day/b.mp4", str(root / "a.mp4"), "inside.mp4", f"../{root.name}/a.mp4"]


def leaving(root: Path) -> list[str]:
    outside = root.parent / "secret.mp4"
    return [
        "../secret.mp4",
        "day/../../secret.mp4",
        str(outside),
        f"{root}/../secret.mp4",
        "~/secret.mp4",
        str(root.parent / "root_too" / "c.mp4"),
        "/etc/passwd",
    ]


def test_rows_that_leave_the_root_are_counted_bad(
    library: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = staying(library) + leaving(library)
    path = write_names(tmp_path / "notes/rows.jsonl", names)
    source = [AnnotationSource(path=path)]
    rows = load_annotations(source, max_bad_fraction=1.0, videos_root=library)
    assert [row.video for row in rows] == staying(library)
    assert "7 of 13 annotation rows are bad (54 %: 7 outside_root) and left out" in caplog.text
    assert f'{path}:7: `video` "../secret.mp4" ({tmp_path}/secret.mp4) lies outside data.videos_root' in caplog.text
    with pytest.raises(UserError, match=r"7 of 13 .*more than data.max_bad_fraction = 0.01.*rows.jsonl:7: `video`"):
        load_annotations(source, max_bad_fraction=0.01, videos_root=library)
    assert len(load_annotations(source, max_bad_fraction=0.0)) == len(names)  # without a root any path is opened


@pytest.fixture
def never_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The videos that were opened, instead of opening them."""
    opened: list[str] = []
    monkeypatch.setattr("utils.clip_reader.decode", lambda path, *_args, **_more: opened.append(path.name))
    return opened


def test_links_that_leave_the_root_are_counted_when_opened(
    library: Path, tiny_model: Path, tmp_path: Path, never_read: list[str]
) -> None:
    path = write_names(tmp_path / "notes/rows.jsonl", ["a.mp4", "leaves.mp4", "folder/secret.mp4", "inside.mp4"])
    data = DataConfig(train=(AnnotationSource(path=path),), videos_root=library)
    dataset = VideoTemporalDataset(data, load_processor(resolve_source(str(tiny_model))))
    for index, name in ((1, "leaves.mp4"), (2, "folder/secret.mp4")):
        fault = dataset[index]["fault"]
        assert fault.startswith(f"{path}:{index + 1}: cannot read the video {library / name}: ")
        assert f'`video` "{name}" ({tmp_path}/secret.mp4) lies outside data.videos_root ({library})' in fault
    assert never_read == []
    for index in (0, 3):
        dataset.clip(dataset.rows[index])
    assert never_read == ["a.mp4", "inside.mp4"]


def test_the_validator_finds_both(library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [*staying(library), *leaving(library), "leaves.mp4", "folder/secret.mp4", "gone.mp4"]
    path = write_names(tmp_path / "notes/rows.jsonl", names)
    report = tmp_path / "report.json"
    command = ["--annotations", str(path), "--videos_root", str(library), "--report", str(report)]
    assert validate_main(command) == 1
    counts = json.loads(report.read_text())["counts"]
    assert (counts["outside_root"], counts["missing_video"]) == (9, 1)
    assert "9  outside_root" in capsys.readouterr().out
    fixed = tmp_path / "notes/fixed.jsonl"
    validate_main([*command[:4], "--fix", str(fixed), "--policy", "outside_root=drop"])
    left = [row.video for row in read_rows(fixed)[0]]
    assert set(left) == {*staying(library), "gone.mp4"}


# ---- what is said


def test_security_md_says_it() -> None:
    text = (REPO_ROOT / "SECURITY.md").read_text()
    for word in (
        *("Report a vulnerability", "model.allow_pickle", "model.trust_remote_code", "data.videos_root"),
        *("safetensors", "package.module:Name", "weights_only=False", "outside_root", "safe loader"),
    ):
        assert word in text, word
    assert "@" not in text  # no address: the repository's private advisory is the way
    assert "[SECURITY.md](SECURITY.md)" in (REPO_ROOT / "README.md").read_text()


def test_keys_are_off_in_every_shipped_config() -> None:
    files = sorted((REPO_ROOT / "configs").glob("**/*.yaml"))
    with_model = [path for path in files if "model:" in path.read_text().splitlines()]
    assert len(with_model) >= 4
    for path in with_model:
        model = yaml.safe_load(path.read_text())["model"]
        assert not model.get("allow_pickle") and not model.get("trust_remote_code"), path
    assert ModelConfig().allow_pickle is False and ModelConfig().trust_remote_code is False
    assert not pickle.loads(pickle.dumps(ModelConfig())).allow_pickle
