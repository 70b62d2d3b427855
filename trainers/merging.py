"""An adapter folded into its base weights, where GRPO cannot go on with the adapter itself (contract 8).

TRL scores from the head's plain weight, so a LoRA pair on `lm_head` would be ignored; and an adapter cannot change its
shape. In every other case the adapter goes on training. Export folds every adapter, by `merged_weights`.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from trainers.model import (
    ADAPTER_CONFIG,
    TOWER,
    WeightSource,
    holds_tower,
    load_adapter,
    load_base,
    load_processor,
    resolve_source,
)
from trainers.parts import LearningRates
from utils.checkpoints import manifest_problems, replace_folder, saving, start_save, unfinished_of, write_manifest
from utils.common import UserError, write_json
from utils.config import LoraConfig, ModelConfig
from utils.logging_utils import get_logger, is_rank_zero

MERGED = "merged_base"
"""Folder in the run's output folder that holds the merged weights."""
ORIGIN_FILE = "merged_from.json"
"""Names the adapter that was merged, inside that folder."""
_WAIT_S = 4 * 3600


def merge_reason(adapter: Path, lora: LoraConfig, rates: LearningRates) -> str | None:
    """Why the adapter in `adapter` cannot go on training under this configuration; None when it can.

    Modules that the adapter holds in full and the configuration does not train (learning rate 0) are no reason.
    """
    stored = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    targets, saved = set(stored["target_modules"]), set(stored["modules_to_save"] or ())
    if not lora.enabled:
        return "lora.enabled is false"
    if "lm_head" in targets:
        return "it has a low-rank pair on lm_head, which GRPO's scoring would ignore"
    for key, value in (("r", lora.r), ("lora_alpha", lora.lora_alpha)):
        if stored[key] != value:
            return f"lora.{key} is {value}, and the adapter has {stored[key]}"
    wanted = set(lora.target_modules) - set(lora.modules_to_save)
    if wanted != targets:
        return f"lora.target_modules asks for {sorted(wanted)}, and the adapter has {sorted(targets)}"
    if TOWER in saved:  # a replaced vision tower, whole
        saved |= {"merger", "patch_embed"}
    if stored.get("ensure_weight_tying") and any(name.endswith("embed_tokens") for name in saved):
        saved |= {"embed_tokens", "lm_head"}  # one tensor, of which PEFT writes down one name
    if lacking := _wanted_in_full(lora, rates) - saved:
        return f"{sorted(lacking)} should train in full, and the adapter has no copy of it"
    return None


def _wanted_in_full(lora: LoraConfig, rates: LearningRates) -> set[str]:
    """Modules that need a trainable copy; of the vision parts one stands for all."""
    return (
        set(lora.modules_to_save)
        | ({"merger"} if rates.mm_projector else set())
        | ({"patch_embed"} if rates.vision_tower else set())
    )


def settle_start(model: ModelConfig, lora: LoraConfig, rates: LearningRates, output_dir: Path) -> ModelConfig:
    """The model section to load for GRPO: as it is, or with the adapter merged into `output_dir/merged_base`.

    Call it before any DeepSpeed configuration is alive: under ZeRO-3 the weights would have no elements. Rank 0 merges
    on the CPU, the other ranks wait. A merge that is complete is used again, if it is of the same adapter.

    Raises UserError when the folder holds the merge of another adapter: checkpoints of an earlier run may rest on it.
    """
    source = resolve_source(model.name_or_path)
    reason = merge_reason(source.adapter, lora, rates) if source.adapter else None
    if reason is None:
        return model
    target = output_dir / MERGED
    if is_rank_zero():
        if manifest_problems(target):
            get_logger().info("merging %s into its base weights: %s", source.adapter, reason)
            merge(source, model, target)
        else:
            _require_same_adapter(source, target)
    else:
        _wait_for(target)
    return model.model_copy(update={"name_or_path": str(target), "vision_tower": None})


def plan_start(model: ModelConfig, lora: LoraConfig, rates: LearningRates) -> ModelConfig:
    """What a dry run loads in the place of `settle_start`'s: nothing is merged, and the base stands for the merge."""
    source = resolve_source(model.name_or_path)
    reason = merge_reason(source.adapter, lora, rates) if source.adapter else None
    if reason is None:
        return model
    get_logger().info("training would merge %s into its base weights first: %s", source.adapter, reason)
    tower = model.vision_tower or (source.contract.vision_tower if source.contract else None)
    return model.model_copy(update={"name_or_path": source.base, "vision_tower": tower})


@torch.no_grad()
def merged_weights(source: WeightSource, config: ModelConfig, dtype: torch.dtype, *, progress: bool = False) -> Any:
    """Base + adapter as one model in `dtype`, on the CPU. Every sum is made in fp32 and rounded once.

    `config.tie_word_embeddings` of the result says what the weights are: a tied pair stays tied as long as both
    matrices are equal. Raises UserError when the base or the adapter cannot be loaded.
    """
    assert source.adapter is not None
    tower = source.contract.vision_tower if source.contract else None
    stored = holds_tower(source.base, tower)
    base: Any = load_base(source.base, config, dtype=dtype, vision_tower=tower, tower_is_stored=stored)
    was_tied = bool(base.config.tie_word_embeddings)
    options = {"fp32_copies": True, "allow_pickle": config.allow_pickle}
    wrapped = load_adapter(base, source.adapter, trainable=False, **options)
    if was_tied:
        _own_head(wrapped)
    merged = wrapped.merge_and_unload(progressbar=progress).to(dtype)
    if was_tied:
        _settle_tying(merged)
    return merged


def _own_head(wrapped: Any) -> None:
    """Give the head a matrix of its own where a low-rank pair sits on it or on the embedding it is tied to.

    Merging adds to the matrix in place, so the pair would change both. PEFT only warns.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = wrapped.get_base_model()
    head = base.get_output_embeddings()
    if any(isinstance(layer, BaseTunerLayer) for layer in (head, base.get_input_embeddings())):
        linear = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        linear.weight = torch.nn.Parameter(linear.weight.detach().clone(), requires_grad=False)


def _settle_tying(model: Any) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = torch.equal(embedding.weight, head.weight)
    if tied:
        head.weight = embedding.weight
    for config in (model.config, model.config.text_config):  # PEFT corrects the first alone
        config.tie_word_embeddings = tied


@torch.no_grad()
def merge(source: WeightSource, config: ModelConfig, target: Path) -> None:
    """Write base + adapter as a full checkpoint with processor, prompt contract and manifest; nothing half-written."""
    assert source.adapter is not None
    merged = merged_weights(source, config, getattr(torch, config.torch_dtype))
    unfinished = unfinished_of(target)
    with saving(target, sum(p.numel() * p.element_size() for p in merged.parameters())):
        start_save(unfinished)
        merged.save_pretrained(unfinished)
        load_processor(source, config).save_pretrained(unfinished)
        if source.contract is not None:
            source.contract.save(unfinished)
        write_json(unfinished / ORIGIN_FILE, {"adapter": str(source.adapter), "sha256": weights_digest(source.adapter)})
    write_manifest(unfinished)
    replace_folder(unfinished, target)


def weights_digest(folder: Path) -> str:
    """sha256 of the weights (an adapter's or a model's) in `folder`: a later run may leave others under the same
    name."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*model*.safetensors")):
        with open(path, "rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def _require_same_adapter(source: WeightSource, target: Path) -> None:
    assert source.adapter is not None
    origin = json.loads((target / ORIGIN_FILE).read_text(encoding="utf-8"))
    if origin["sha256"] != weights_digest(source.adapter):
        raise UserError(
            f"{target} was merged from other weights ({origin['adapter']}) than those of {source.adapter}. Choose "
            "another --output_dir, or remove that folder if no checkpoint of the earlier run is needed"
        )


def _wait_for(target: Path) -> None:
    """Until rank 0 has merged. No collective: the processes must not join before DeepSpeed's settings are read."""
    until = time.monotonic() + _WAIT_S
    while manifest_problems(target):
        if time.monotonic() > until:
            raise UserError(f"{target} was not complete after {_WAIT_S} s (rank {os.environ.get('RANK')})")
        time.sleep(1)
