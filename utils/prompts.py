"""The one prompt: what the model is asked, what it is taught to answer, and the record of both (contract 2).

The record, `PromptContract`, is saved with every checkpoint as `prompt_contract.json` and read back by inference, so
that a model is served with the words, the frame rate and the pixel budget it was trained with. Reading an answer back
is `utils.spans`; turning messages into tokens is `datasets.encoding`.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from utils.common import UserError, write_json
from utils.config import DataConfig, PromptConfig
from utils.logging_utils import get_logger
from utils.spans import Span

CONTRACT_FILE = "prompt_contract.json"

SAMPLING_KEYS = (
    "backend",
    "fps",
    "min_frames",
    "max_frames",
    "min_pixels_per_frame",
    "max_pixels_per_frame",
    "total_pixels",
    "max_prompt_tokens",
    "on_overlong",
)
"""The `data` keys that decide which pixels and markers the model sees; they travel with a checkpoint."""


def build_messages(prompt: PromptConfig, sentence: str) -> list[dict[str, Any]]:
    """Chat messages for one query: the optional system text, then the video part *before* the question.

    The video part is a bare placeholder; the frames are given to the processor beside the text.
    """
    question = prompt.question.format(sentence=sentence.strip())
    if prompt.thinking:
        question = f"{question} {prompt.thinking_instruction}"
    messages: list[dict[str, Any]] = []
    if prompt.system:
        messages.append({"role": "system", "content": [{"type": "text", "text": prompt.system}]})
    messages.append({"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]})
    return messages


def format_answer(prompt: PromptConfig, windows: Sequence[Span], thought: str | None = None) -> str:
    """The text the model is taught to answer for `windows` (seconds on the clip's clock; empty = the event is absent).

    With `prompt.thinking` the answer is wrapped in `<answer>` after a `<think>` block that holds `thought` (may be
    empty).

    >>> format_answer(PromptConfig(), [Span(3.24, 7.9)])
    'From 3.2 to 7.9 seconds.'
    >>> format_answer(PromptConfig(), [Span(1, 2), Span(5, 6.5)])
    'From 1.0 to 2.0 seconds and from 5.0 to 6.5 seconds.'
    >>> format_answer(PromptConfig(), [])
    'The event does not happen in the video.'
    """
    answer = join_windows(prompt, windows) if windows else prompt.absent
    if not prompt.thinking:
        return answer
    return f"<think>{(thought or '').strip()}</think><answer>{answer}</answer>"


def join_windows(prompt: PromptConfig, windows: Sequence[Span]) -> str:
    """Every window in the answer's words, joined by "and": the first keeps its capital, the last its full stop."""
    texts = [prompt.answer.format(start=window[0], end=window[1]) for window in windows]
    heads = [text.rstrip().removesuffix(".") for text in texts[:-1]] + texts[-1:]
    tails = [text[:1].lower() + text[1:] for text in heads[1:]]
    return " and ".join(heads[:1] + tails)


@dataclass(frozen=True)
class PromptContract:
    """What a checkpoint was trained to see and say."""

    prompt: PromptConfig
    data: DataConfig
    """Only the sampling keys (`SAMPLING_KEYS`) are stored; the rest is at its default after loading."""
    transformers_version: str
    vision_tower: str | None = None
    """`package.module:factory` when the vision encoder was replaced."""

    @classmethod
    def current(cls, prompt: PromptConfig, data: DataConfig, vision_tower: str | None = None) -> PromptContract:
        """The contract of a run that starts now, with the installed transformers version."""
        return cls(prompt, data, importlib.metadata.version("transformers"), vision_tower)

    def save(self, folder: Path) -> None:
        """Write `prompt_contract.json` into `folder`, atomically."""
        write_json(
            folder / CONTRACT_FILE,
            {
                "prompt": self.prompt.model_dump(mode="json"),
                "video": self.data.model_dump(mode="json", include=set(SAMPLING_KEYS)),
                "transformers": self.transformers_version,
                "vision_tower": self.vision_tower,
            },
        )

    def differences(self, other: PromptContract) -> list[str]:
        """`key: other's value -> own value` for what the model would see or say otherwise than under `other`."""
        pairs = [(f"prompt.{k}", getattr(other.prompt, k), getattr(self.prompt, k)) for k in PromptConfig.model_fields]
        pairs += [(f"data.{key}", getattr(other.data, key), getattr(self.data, key)) for key in SAMPLING_KEYS]
        pairs += [("transformers", other.transformers_version, self.transformers_version)]
        return [f"{key}: {before!r} -> {now!r}" for key, before, now in pairs if before != now]

    def warn_if_other(self, earlier: PromptContract | None) -> None:
        """One log line that names what differs from the contract of the checkpoint a run begins with, if anything."""
        if earlier is not None and (changed := self.differences(earlier)):
            get_logger().warning("the checkpoint was trained with another prompt or sampling: %s", "; ".join(changed))

    @classmethod
    def load(cls, folder: Path) -> PromptContract:
        """Read `folder/prompt_contract.json`. Raises UserError when it is missing or unreadable."""
        path = folder / CONTRACT_FILE
        if not path.is_file():
            raise UserError(
                f"{folder} has no {CONTRACT_FILE}: it does not say with which prompt, frame rate and pixel budget the "
                f"model "
                "was trained, and guessing would shift every timestamp. Copy the file from the run folder that "
                "trained it, "
                "or give the settings yourself with --data_config"
            )
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                PromptConfig(**stored["prompt"]),
                DataConfig(**stored["video"]),
                stored["transformers"],
                stored["vision_tower"],
            )
        except (ValidationError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            detail = "; ".join(str(error).splitlines()[:3])
            raise UserError(
                f"{path} is not a valid prompt contract ({detail}). Copy it again from the run folder that trained "
                f"the model"
            ) from error
