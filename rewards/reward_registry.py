"""The rewards by name: one dict, a user's own beside the built-in ones."""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from rewards.answer_format import AnswerFormat
from rewards.base import ModuleReward, Reward
from rewards.boundary_distance import BoundaryDistance
from rewards.generalized_iou import GeneralizedIoU
from rewards.length_penalty import LengthPenalty
from rewards.segment_overlap import SegmentOverlap
from rewards.shaped_iou import ShapedIoU
from rewards.step_consistency import StepConsistency
from rewards.temporal_iou import TemporalIoU
from rewards.timestamp_iou import TimestampIoU
from rewards.window_matching import WindowMatching
from utils.common import UserError, nearest

log = logging.getLogger("vtg")

REWARDS: dict[str, type[Reward]] = {
    reward.name: reward
    for reward in (
        TemporalIoU,
        SegmentOverlap,
        StepConsistency,
        AnswerFormat,
        TimestampIoU,
        GeneralizedIoU,
        ShapedIoU,
        BoundaryDistance,
        WindowMatching,
        LengthPenalty,
    )
}
"""Every reward that a configuration can name. `register_reward` adds to it."""

BUILT_IN = frozenset(REWARDS)
"""Names that cannot be taken."""
_NAME = re.compile(r"[A-Za-z]\w*")
_PATH = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")


def register_reward(name: str) -> Callable[[type], type[Reward]]:
    """Class decorator that makes a reward known as `name`.

    A plain `nn.Module` with `forward(pred, gt)` becomes a `Reward` around it, with `compute_from_text` and TRL's
    callable: `pred` and `gt` are float64 tensors (N, 2) in seconds, NaN rows where nothing could be read, and it
    returns (N,). Class attributes declare what else it wants (`Reward.needs`, `Reward.judges_absence`). A `Reward` is
    registered as it is. What an answer earns that cannot be read, or that states an absence, is settled for it (see
    `rewards.base`).

    Raises UserError for a built-in's name, a name that is no identifier, and another kind of class.

    >>> @register_reward("my_reward")
    ... class MyReward(nn.Module):
    ...     def forward(self, pred, gt):
    ...         return 1 / (1 + (pred[:, 0] - gt[:, 0]).abs())
    >>> MyReward().compute_from_text(["From 5.0 to 9.0 seconds.", "no idea"], [(4, 8), (4, 8)])
    tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(f"register_reward takes a name of letters, digits and _, as in 'my_reward', got {name!r}")
    if name in BUILT_IN:
        raise UserError(f"register_reward: {name!r} is a built-in reward; choose another name")

    def add(cls: type) -> type[Reward]:
        reward = as_reward(cls, name)
        if name in REWARDS and REWARDS[name].__qualname__ != reward.__qualname__:
            log.warning("reward %s was %s and is now %s", name, REWARDS[name].__qualname__, reward.__qualname__)
        REWARDS[name] = reward
        return reward

    return add


def as_reward(cls: Any, name: str) -> type[Reward]:
    """`cls` as a kind of reward called `name`: a `Reward` itself, a plain `nn.Module` wrapped. Raises UserError for
    anything else."""
    if not isinstance(cls, type) or not issubclass(cls, Reward | nn.Module):
        raise UserError(
            f"reward `{name}` must be a class, an nn.Module with forward(pred, gt) or a rewards.Reward, got {cls!r}"
        )
    reward = cls if issubclass(cls, Reward) and cls.name == name else _derived(cls, name)
    if not isinstance(reward.needs, tuple | list) or not all(isinstance(need, str) for need in reward.needs):
        raise UserError(f"reward `{name}`: `needs` must be a tuple of names, as in ('texts',), got {reward.needs!r}")
    return reward


def _derived(cls: type, name: str) -> type[Reward]:
    """A subclass of its own, so that the class itself (which may have another name already) stays as it is."""
    declared: dict[str, Any] = {"name": name}
    declared |= {key: getattr(cls, key) for key in ("__doc__", "__module__", "__qualname__")}
    title = cls.__name__
    if issubclass(cls, Reward):
        return type(title, (cls,), declared)
    declared |= {key: getattr(cls, key) for key in ("needs", "judges_absence") if hasattr(cls, key)}
    inherits_init = cls.__init__ is nn.Module.__init__  # which claims to take anything, and takes nothing
    signature = inspect.Signature() if inherits_init else inspect.signature(cls)
    return type(title, (ModuleReward,), declared | {"module_class": cls, "__signature__": signature})


def find_reward(name: str) -> type[Reward]:
    """The kind of reward called `name`, or the class that `package.module:Name` names.

    Raises UserError that lists the choices, with the nearest.
    """
    path = _PATH.fullmatch(name) if isinstance(name, str) else None
    if path:
        return as_reward(_load(name, *path.groups()), name)
    if name in REWARDS:
        return REWARDS[name]
    close = nearest(str(name), REWARDS)
    hint = f"did you mean {close}? Choose" if close else "choose"
    raise UserError(
        f"rewards.{name} is no reward; {hint} from {', '.join(REWARDS)}, or give your own as package.module:Name"
    )


def build_reward(name: str, params: Mapping[str, Any]) -> Reward:
    """The reward called `name` (or `package.module:Name`) with these parameters.

    Raises UserError for an unknown name or parameter, naming the nearest, and for a missing or bad one.
    """
    kind = find_reward(name)
    known = inspect.signature(kind).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for key in params:
        if key not in known and not takes_any:
            close = nearest(str(key), known)
            hint = f"did you mean {close}? It" if close else "it"
            raise UserError(f"rewards.{name}.{key} is not a key; {hint} takes {', '.join(['weight', *known])}")
    missing = [key for key, parameter in known.items() if _is_required(parameter) and key not in params]
    if missing:
        raise UserError(f"rewards.{name} needs {', '.join(missing)}")
    return kind(**params)


def _is_required(parameter: inspect.Parameter) -> bool:
    named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    return named and parameter.default is parameter.empty


def _load(name: str, module_name: str, attribute: str) -> Any:
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"rewards.{name} cannot be imported: {error}; give package.module:Name of a class that Python can find"
        ) from error
    if attribute not in vars(module):
        close = nearest(attribute, vars(module))
        hint = f"; did you mean {module_name}:{close}?" if close else ""
        raise UserError(f"rewards.{name}: {module_name} has no {attribute}{hint}")
    return vars(module)[attribute]
