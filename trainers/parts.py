"""The parts of a Qwen3-VL model that train at their own rate: vision tower, mergers, language, embeddings and head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from utils.config import RLTrainingConfig, SFTTrainingConfig
from utils.logging_utils import human_count


@dataclass(frozen=True)
class LearningRates:
    """Learning rate per part of the model; 0 freezes the part."""

    language: float
    mm_projector: float
    vision_tower: float
    head: float

    @classmethod
    def from_training(cls, training: SFTTrainingConfig | RLTrainingConfig) -> LearningRates:
        """The rates of the configuration's `training` section."""
        return cls(training.learning_rate, training.mm_projector_lr, training.vision_tower_lr, training.head_lr)


def part_of(name: str) -> str:
    """The part a parameter belongs to, from its name: vision_tower, mm_projector, head or language.

    >>> part_of("model.visual.deepstack_merger_list.0.norm.weight")
    'mm_projector'
    """
    pieces = name.split(".")
    if "visual" in pieces:
        return "mm_projector" if {"merger", "deepstack_merger_list"} & set(pieces) else "vision_tower"
    return "head" if {"lm_head", "embed_tokens"} & set(pieces) else "language"


def freeze_by_rate(model: nn.Module, rates: LearningRates) -> None:
    """Freeze every parameter whose part has learning rate 0; never unfreezes what LoRA froze."""
    for name, parameter in model.named_parameters():
        if getattr(rates, part_of(name)) == 0:
            parameter.requires_grad_(False)


def describe_trainable(model: nn.Module, rates: LearningRates) -> str:
    """One line: what trains, at which learning rate, with how many parameters."""
    counts: dict[str, int] = {}
    total = 0
    for name, parameter in model.named_parameters():
        size = parameter_size(parameter)
        total += size
        if parameter.requires_grad:
            counts[part_of(name)] = counts.get(part_of(name), 0) + size
    trained = [f"{part} {human_count(count)} (lr {getattr(rates, part):g})" for part, count in counts.items()]
    frozen = total - sum(counts.values())
    return (
        f"training {', '.join(trained) or 'nothing'}; frozen {human_count(frozen)} of {human_count(total)} parameters"
    )


def parameter_size(parameter: nn.Parameter) -> int:
    """Number of elements; under ZeRO-3 a parameter is empty and `ds_numel` holds the true number."""
    return int(parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel())
