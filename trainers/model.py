"""The one place that loads a Qwen3-VL model, its processor and its LoRA.

Owns: where weights come from (hub, folder, adapter), attention fallback, a replaced vision tower, LoRA with tied
embeddings, fp32 copies, which parameters train and at which learning rate. Leaves the training loop to the trainers.
"""

from __future__ import annotations

import importlib.util
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoProcessor, Qwen3VLForConditionalGeneration
from transformers.utils import ModelOutput

from trainers.parts import LearningRates, describe_trainable, freeze_by_rate
from trainers.vision_attention import batch_vision_frames
from utils.common import UserError, load_named
from utils.config import LoraConfig, ModelConfig
from utils.hub import require_hub
from utils.logging_utils import get_logger
from utils.prompts import CONTRACT_FILE, PromptContract
from utils.weight_files import PICKLE_KEY, refuse_own_code, require_safetensors

MODEL_TYPE = "qwen3_vl"
PRECISIONS = ("bfloat16", "float16", "float32")
ADAPTER_CONFIG = "adapter_config.json"
TOWER = "visual"
"""Name of the vision tower's module; an adapter whose `modules_to_save` holds it carries a whole tower."""


@dataclass
class Policy:
    """A model ready to train or to answer, with what it needs to be asked."""

    model: Any
    """`Qwen3VLForConditionalGeneration`, or a `PeftModel` around one."""
    processor: Any
    contract: PromptContract | None
    """The prompt contract stored with the weights; None for a base model."""
    vision_tower: str | None = None


# ---------------------------------------------------------------------------------------------- where weights come from
@dataclass(frozen=True)
class WeightSource:
    """A resolved `model.name_or_path`: base weights, and the adapter on top of them if the path holds one."""

    base: str
    adapter: Path | None
    contract: PromptContract | None
    processor_from: str


def resolve_source(name_or_path: str, *, need_contract: bool = False) -> WeightSource:
    """Find out what `name_or_path` is: a folder with full weights, a folder with an adapter, or a hub name.

    `need_contract` asks for a stored prompt contract beside weights that were trained here. Raises UserError for a path
    that does not exist or holds no model.
    """
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        if _looks_local(name_or_path):
            raise UserError(
                f"model path {name_or_path!r} does not exist. Give a folder with config.json or {ADAPTER_CONFIG}, or "
                f"a hub "
                "name such as Qwen/Qwen3-VL-4B-Instruct (model.name_or_path, --model_path)"
            )
        return WeightSource(name_or_path, None, None, name_or_path)
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if not is_adapter and not (folder / "config.json").is_file():
        inside = sorted(path.name for path in folder.glob("checkpoint-*"))
        hint = f"; it holds {', '.join(inside)}: name one of them" if inside else ""
        raise UserError(f"{folder} holds neither config.json nor {ADAPTER_CONFIG}, so it is no model{hint}")
    ours = is_adapter or (folder / "training_args.bin").is_file()
    contract = PromptContract.load(folder) if (folder / CONTRACT_FILE).is_file() or (need_contract and ours) else None
    if contract is not None and contract.vision_tower:
        refuse_own_code(contract.vision_tower, folder)
    if not (folder / "preprocessor_config.json").is_file() and not (folder / "processor_config.json").is_file():
        raise UserError(
            f"{folder} has no processor (processor_config.json, tokenizer files): copy them from the model it was "
            f"trained "
            "from, or from the run folder's checkpoint-final"
        )
    base = _adapter_base(folder) if is_adapter else str(folder)
    return WeightSource(base, folder if is_adapter else None, contract, str(folder))


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~", "outputs/", "ckpts/")) or name.count("/") != 1


def _adapter_base(folder: Path) -> str:
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / ADAPTER_CONFIG} does not name its base model (base_model_name_or_path)") from error
    if _looks_local(base) and not Path(base).is_dir():
        raise UserError(
            f"the adapter in {folder} was trained on {base}, which does not exist here. Put the base model there, or "
            f"change "
            f"base_model_name_or_path in {folder / ADAPTER_CONFIG}"
        )
    return str(base)


def _from_hub(name: str, load: Callable[[], Any]) -> Any:
    """Run a `from_pretrained`, turning what cannot be found or reached into one clear line."""
    require_hub(name)
    try:
        return load()
    except (OSError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        # The first line is the reason; what follows is advice for other situations.
        reason = str(error).strip().splitlines()[0][:300]
        raise UserError(f"cannot load {name!r}: {reason}. {_remedy(reason, name)}") from error


def _remedy(reason: str, name: str) -> str:
    """What to do about a `from_pretrained` of `name` that failed for `reason`."""
    if "Error while deserializing header" in reason or "incomplete metadata" in reason or "HeaderToo" in reason:
        return "A safetensors file is cut off or damaged: copy or download it again"
    if "cannot be loaded with `safetensors`" in reason:
        return (
            "It holds its weights as pickle, which can run code when it is read. Take a model with safetensors, or "
            f"allow it, if you trust its author: {PICKLE_KEY}=true (in inference allow_pickle=True, --allow_pickle)"
        )
    if "custom code" in reason:
        return "If you have read that code and trust it: model.trust_remote_code=true"
    if Path(name).is_dir():
        return "A file in that folder is missing, damaged or of another release: copy or download the folder again"
    return (
        "Check the name (model.name_or_path, --model_path), the network or HF_ENDPOINT, and for private models "
        "`hf auth login`; a downloaded folder can be given instead of a hub name"
    )


def load_processor(source: WeightSource, config: ModelConfig | None = None) -> Any:
    """The processor saved with the weights, at `config.revision` on the hub. Raises UserError when it is missing or not
    Qwen3-VL's."""
    name = source.processor_from
    options = _load_options(config or ModelConfig())
    processor = _from_hub(name, lambda: AutoProcessor.from_pretrained(name, **options))
    if not hasattr(processor, "video_processor"):
        raise UserError(
            f"{name} has a {type(processor).__name__}, which cannot read video; a Qwen3-VL processor is needed"
        )
    return processor


def _load_options(config: ModelConfig) -> dict[str, Any]:
    """What every `from_pretrained` of a model's parts is told."""
    return {"trust_remote_code": config.trust_remote_code, "revision": config.revision}


def holds_tower(base: str, tower: str | None) -> bool:
    """Whether `base` is full weights that were saved with the replaced vision tower `tower`."""
    folder = Path(base)
    if tower is None or not (folder / CONTRACT_FILE).is_file():
        return False
    return PromptContract.load(folder).vision_tower == tower


# ---------------------------------------------------------------------------------------------- base weights
def pick_attention(wanted: str) -> str:
    """`flash_attention_2` where it can be had, else `sdpa` with one line that says why; others as they are."""
    if wanted != "flash_attention_2":
        return wanted
    if not torch.cuda.is_available():
        reason = "no CUDA device"
    elif importlib.util.find_spec("flash_attn") is None:
        reason = "the flash-attn package is not installed (env/install.sh --with-flash-attn)"
    else:
        return wanted
    get_logger().info("model.attn_implementation=flash_attention_2 is not available (%s): using sdpa", reason)
    return "sdpa"


def _class_with_tower(factory: Callable[..., nn.Module]) -> type[Qwen3VLForConditionalGeneration]:
    class WithVisionTower(Qwen3VLForConditionalGeneration):
        """Qwen3-VL built around the replaced vision tower, so that saved weights find their names."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model.visual = factory(config.vision_config, self.model.visual)

    return WithVisionTower


def load_base(
    name: str,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    vision_tower: str | None = None,
    tower_is_stored: bool = False,
) -> Qwen3VLForConditionalGeneration:
    """Load full Qwen3-VL weights from a folder or the hub.

    `vision_tower` names a `factory(vision_config, original_tower) -> nn.Module` whose forward keeps the original's
    contract: `(hidden_states (patches, patch_dim), grid_thw (videos, 3))` -> the same output class, deepstack included.
    `tower_is_stored`: the weights of the replaced tower lie in `name` (a checkpoint of an earlier run).

    Raises UserError for a model that is not Qwen3-VL, for weights that cannot be loaded, and for weights as pickle
    unless `config.allow_pickle`.
    """
    options = _load_options(config)
    hf_config = _from_hub(name, lambda: AutoConfig.from_pretrained(name, **options))
    if hf_config.model_type != MODEL_TYPE:
        raise UserError(
            f"{name} is a {hf_config.model_type!r} model; this framework trains Qwen3-VL ({MODEL_TYPE!r}), e.g. "
            "Qwen/Qwen3-VL-4B-Instruct (model.name_or_path, --model_path)"
        )
    _refuse_pickle(name, hf_config, config)
    if not config.allow_pickle:
        options["use_safetensors"] = True
    factory = load_named(vision_tower, "model.vision_tower") if vision_tower else None
    model_class = _class_with_tower(factory) if factory and tower_is_stored else Qwen3VLForConditionalGeneration
    attention = pick_attention(config.attn_implementation)
    model = _from_hub(
        name, lambda: model_class.from_pretrained(name, dtype=dtype, attn_implementation=attention, **options)
    )
    # transformers saves with the renamings of old checkpoints reversed. It forgets those that loading did not use, but
    # not under ZeRO-3, where weights would be saved under names of no release.
    conversions: Any = model._weight_conversions or []
    model._weight_conversions = [conversion for conversion in conversions if conversion.was_used()]
    if factory and not tower_is_stored:
        model.model.visual = factory(model.config.vision_config, model.model.visual).to(dtype)
    batch_vision_frames(model)
    return model


def _refuse_pickle(name: str, hf_config: Any, config: ModelConfig) -> None:
    """Raise UserError for pickle that `use_safetensors` lets pass: in a folder, or named by its config.json."""
    if Path(name).is_dir():
        require_safetensors(Path(name), allow_pickle=config.allow_pickle)
    named = hf_config.to_dict().get("transformers_weights")
    is_safe = str(named).endswith((".safetensors", ".safetensors.index.json"))
    if named and not is_safe and not config.allow_pickle:
        raise UserError(
            f"{name}: its config.json names {named} as weights (transformers_weights), which is no safetensors; remove "
            f"that line, or allow pickle, if you trust its author: {PICKLE_KEY}=true"
        )


# ---------------------------------------------------------------------------------------------- LoRA
def peft_settings(
    lora: LoraConfig, model: Qwen3VLForConditionalGeneration, parts: LearningRates, *, own_tower: bool = False
) -> dict[str, Any]:
    """Arguments of `peft.LoraConfig` for this model.

    A module in both `target_modules` and `modules_to_save` trains in full: PEFT would let the second win in silence,
    and refuse when weights are tied. Tied embeddings stay one parameter. Vision parts with a learning rate train in
    full. A replaced vision tower (`own_tower`) is kept whole in the adapter, parts that do not train included: its
    weights are in no base model.
    """
    to_save = list(lora.modules_to_save)
    both = [name for name in lora.target_modules if name in to_save]
    if both:
        get_logger().info("LoRA: %s trains in full (modules_to_save), so it gets no low-rank pair", ", ".join(both))
    targets = [name for name in lora.target_modules if name not in both]
    tied = bool(model.config.tie_word_embeddings)
    tied_names = {"embed_tokens", "lm_head"}
    if tied and tied_names & set(to_save):
        to_save += sorted(tied_names - set(to_save))
    if tied and "lm_head" in targets:
        raise UserError(
            "lora.target_modules holds lm_head, but this model ties lm_head to embed_tokens: a low-rank pair on one "
            "of them "
            "would be lost when the weights are merged. Add lm_head and embed_tokens to lora.modules_to_save (they "
            "then train "
            "in full), or take lm_head out of lora.target_modules"
        )
    to_save += [TOWER] if own_tower else _vision_modules(model.model.visual, parts)
    return {
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": targets,
        "modules_to_save": to_save or None,
        "ensure_weight_tying": tied and bool(tied_names & set(to_save)),
        "task_type": "CAUSAL_LM",
    }


def _vision_modules(visual: Any, parts: LearningRates) -> list[str]:
    """Modules of Qwen3-VL's own tower that train in full."""
    names: list[str] = []
    if parts.mm_projector > 0:
        names += ["merger", *(f"deepstack_merger_list.{i}" for i in range(len(visual.deepstack_merger_list)))]
    if parts.vision_tower > 0:
        names += ["patch_embed", "pos_embed", *(f"visual.blocks.{i}" for i in range(len(visual.blocks)))]
    return names


def add_lora(
    model: Qwen3VLForConditionalGeneration,
    lora: LoraConfig,
    parts: LearningRates,
    *,
    fp32_copies: bool,
    own_tower: bool = False,
) -> Any:
    """Wrap `model` in a trainable PEFT adapter. Raises UserError when a target names no module."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    settings = PeftLoraConfig(**peft_settings(lora, model, parts, own_tower=own_tower))
    try:
        wrapped = get_peft_model(model, settings, autocast_adapter_dtype=fp32_copies)
    except ValueError as error:
        raise UserError(f"lora.target_modules={lora.target_modules}: {error}") from error
    if fp32_copies:
        keep_copies_in_fp32(wrapped)
    return wrapped


def load_adapter(
    model: Qwen3VLForConditionalGeneration,
    folder: Path,
    *,
    trainable: bool,
    fp32_copies: bool,
    allow_pickle: bool = False,
) -> Any:
    """Put the adapter saved in `folder` on `model`. Raises UserError when shapes or files do not fit, and for weights
    as pickle unless `allow_pickle`."""
    from peft import PeftModel

    require_safetensors(folder, allow_pickle=allow_pickle)
    if not any(folder.glob("adapter_model.*")):
        # PEFT would ask the hub for a repository of the folder's name.
        raise UserError(f"{folder} holds {ADAPTER_CONFIG} but no adapter_model.safetensors; copy the checkpoint again")
    try:
        wrapped = PeftModel.from_pretrained(model, folder, is_trainable=trainable, autocast_adapter_dtype=fp32_copies)
    except (RuntimeError, OSError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise UserError(f"the adapter in {folder} cannot be put on {model.name_or_path}: {reason}") from error
    if fp32_copies:
        keep_copies_in_fp32(wrapped)
    return wrapped


def keep_copies_in_fp32(model: Any, adapter: str = "default") -> None:
    """Train an adapter's full copies (`modules_to_save`) in fp32 inside a bf16 model.

    A bf16 weight near 1 cannot move by less than 0.004, so steps of a small learning rate would round away. Inputs are
    cast to the copy's dtype and outputs back to the model's, so the residual stream stays bf16 and plain generate works
    outside autocast; the head's output stays fp32. Not under DeepSpeed, which keeps fp32 masters itself.
    """
    from peft.utils import ModulesToSaveWrapper

    stream_dtype = model.get_base_model().dtype
    for name, wrapper in model.named_modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        copy = wrapper.modules_to_save[adapter]
        for parameter in copy.parameters():
            parameter.data = parameter.data.float()
        if stream_dtype != torch.float32:
            copy.register_forward_pre_hook(_cast_floats(torch.float32), with_kwargs=True)
            if not name.endswith("lm_head"):
                copy.register_forward_hook(_cast_output(stream_dtype))


def settle_reference(model: Any) -> None:
    """Make the adapter `ref`, TRL's copy of `default` for the KL term, its exact and frozen copy.

    TRL copies into bf16 modules, which would round the fp32 copies, so that the KL would not begin at 0.
    """
    from peft.utils import ModulesToSaveWrapper

    if "ref" not in model.peft_config:
        return
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    if any(p.dtype == torch.float32 for w in wrappers for p in w.modules_to_save["default"].parameters()):
        keep_copies_in_fp32(model, "ref")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        if ".ref." in name:
            parameter.data = parameters[name.replace(".ref.", ".default.")].data.clone()  # its dtype too
            parameter.requires_grad_(False)


def _cast_floats(dtype: torch.dtype) -> Callable[..., Any]:
    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(cast(arg) for arg in args), {key: cast(value) for key, value in kwargs.items()}

    return hook


def _cast_output(dtype: torch.dtype) -> Callable[..., Any]:
    def cast(output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return output.to(dtype)
        if isinstance(output, ModelOutput):  # a whole vision tower's
            return type(output)(**{key: cast(value) for key, value in output.items()})
        return type(output)(map(cast, output)) if isinstance(output, list | tuple) else output

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return cast(output)

    return hook


# ---------------------------------------------------------------------------------------------- entry points
def join_processes() -> None:
    """Make the process group known to DeepSpeed: under ZeRO-3 `from_pretrained` already divides the weights, and would
    take this process for the only one."""
    import deepspeed

    if torch.distributed.is_initialized():
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False)


def load_policy(config: ModelConfig, lora: LoraConfig, rates: LearningRates, *, deepspeed: bool = False) -> Policy:
    """A trainable policy from `config.name_or_path`: a base model, full weights of an earlier run, or its adapter.

    With `lora.enabled` a base gets a new adapter and a saved adapter goes on training. Without it all weights train
    (parts with learning rate 0 stay frozen); outside DeepSpeed they are then held in fp32 and computed in bf16 by
    autocast, since bf16 weights cannot take small steps.

    Raises UserError for what cannot be loaded or does not fit together.
    """
    if deepspeed:
        join_processes()
    source = resolve_source(config.name_or_path)
    processor = load_processor(source, config)
    if source.adapter and not lora.enabled:
        raise UserError(
            f"model.name_or_path={config.name_or_path} is a LoRA adapter but lora.enabled is false. Set "
            f"lora.enabled=true, or "
            "train the merged weights"
        )
    stored = source.contract.vision_tower if source.contract else None
    tower = config.vision_tower or stored
    dtype = getattr(torch, config.torch_dtype)
    if not lora.enabled and not deepspeed:
        dtype = torch.float32
    base = load_base(
        source.base,
        config,
        dtype=dtype,
        vision_tower=tower,
        tower_is_stored=holds_tower(source.base, tower),
    )
    model: Any = base
    if source.adapter:
        options = {"fp32_copies": not deepspeed, "allow_pickle": config.allow_pickle}
        model = load_adapter(base, source.adapter, trainable=True, **options)
    elif lora.enabled:
        model = add_lora(base, lora, rates, fp32_copies=not deepspeed, own_tower=tower is not None)
    freeze_by_rate(model, rates)
    get_logger().info(describe_trainable(model, rates))
    return Policy(model, processor, source.contract, tower)


def load_for_inference(
    model_path: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    attn_implementation: str | None = None,
    need_contract: bool = True,
    allow_pickle: bool = False,
) -> Policy:
    """A frozen policy for answering, from a base model, an adapter, or full weights.

    `device` defaults to CUDA when there is one; `dtype` to bfloat16 on CUDA and float32 on the CPU. `allow_pickle` is
    `model.allow_pickle`.
    Raises UserError for what cannot be loaded and, with `need_contract`, for trained weights without a prompt contract.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={device}, but torch sees no CUDA device here; leave it out, or give cpu")
    precision = dtype or ("bfloat16" if place.type == "cuda" else "float32")
    if precision not in PRECISIONS:
        raise UserError(f"dtype must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    source = resolve_source(model_path, need_contract=need_contract)
    tower = source.contract.vision_tower if source.contract else None
    attention = attn_implementation or ("flash_attention_2" if place.type == "cuda" else "sdpa")
    config = ModelConfig(name_or_path=source.base, attn_implementation=attention, allow_pickle=allow_pickle)  # type: ignore[arg-type]
    base = load_base(
        source.base,
        config,
        dtype=getattr(torch, precision),
        vision_tower=tower,
        tower_is_stored=holds_tower(source.base, tower),
    )
    model: Any = base
    if source.adapter:
        model = load_adapter(base, source.adapter, trainable=False, fp32_copies=False, allow_pickle=allow_pickle)
    return Policy(model.to(place).eval(), load_processor(source, config), source.contract, tower)
