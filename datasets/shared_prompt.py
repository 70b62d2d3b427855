"""Several questions on one clip -> the prompt up to the end of the video once, and what follows it for each question.

Used by training (`datasets.shared_video`) and by inference (`inference.batching`). Tokens are `datasets.encoding`'s.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from datasets.encoding import PromptTooLongError, Sample, fit_prompt
from utils.common import UserError
from utils.video import VideoClip

Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class SharedPrompt:
    """Prompts that begin alike. `prefix` followed by a tail is what `fit_prompt` makes of that question alone."""

    prefix: Sample
    """A sample that ends with the video."""
    tails: list[torch.Tensor]
    """(T,) token ids after the video, for each question."""
    clip: VideoClip
    """What was really shown: an overlong prompt loses frames."""


def split_prompt(processor: Any, messages: Messages) -> tuple[str, str]:
    """A prompt as text: up to the end of the video, and after it."""
    text = processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    before, end, after = text.rpartition(processor.vision_end_token)
    return before + end, after


def encode_shared(
    processor: Any,
    questions: Sequence[Messages],
    clip: VideoClip,
    *,
    max_tokens: int,
    on_overlong: str,
    name: str,
    remedy: str,
    warn: bool = True,
) -> SharedPrompt:
    """`fit_prompt` of all `questions` at once: the longest decides how many frames fit.

    Args:
        questions: chat messages, equal up to the end of the video.
        remedy: what a user does whose tokenizer cannot divide the prompt.

    Raises:
        PromptError: as `fit_prompt`.
        UserError: the tokenizer joins the end of the video with what follows.
    """
    tails = [_tail(processor, question) for question in questions]
    longest = max(range(len(tails)), key=lambda place: len(tails[place]))
    sample, clip = fit_prompt(
        processor, questions[longest], clip, max_tokens=max_tokens, on_overlong=on_overlong, name=name, warn=warn
    )
    length = len(sample["input_ids"]) - len(tails[longest])
    if not torch.equal(sample["input_ids"][length:], tails[longest]):
        raise UserError(
            "this tokenizer joins the question with the video before it, so queries cannot share the video's tokens; "
            f"{remedy}"
        )
    prefix = {**sample, **{key: sample[key][:length] for key in ("input_ids", "mm_token_type_ids")}}
    return SharedPrompt(prefix, tails, clip)


def encode_alike(
    processor: Any,
    questions: Sequence[Messages],
    clip: VideoClip,
    *,
    max_tokens: int,
    on_overlong: str,
    name: str,
    remedy: str,
) -> tuple[list[tuple[list[int], SharedPrompt]], dict[int, PromptTooLongError]]:
    """`encode_shared`, but every question sees the frames that it would see alone, whatever else is asked.

    Only when a prompt is overlong can that take more than one `SharedPrompt`.

    Returns the numbers of the questions of each shared prompt, and the fault of each question that cannot fit.
    """
    limits: dict[str, Any] = {"max_tokens": max_tokens, "on_overlong": on_overlong, "name": name}
    everyone = list(range(len(questions)))
    try:
        whole = encode_shared(processor, questions, clip, **limits, remedy=remedy, warn=False)
    except PromptTooLongError:
        whole = None
    if whole is not None and len(whole.clip.frames) == len(clip.frames):
        return [(everyone, whole)], {}
    alike: dict[int, list[int]] = defaultdict(list)
    faults: dict[int, PromptTooLongError] = {}
    for place in everyone:
        try:
            _, shown = fit_prompt(processor, questions[place], clip, **limits, warn=False)
        except PromptTooLongError as error:
            faults[place] = error
        else:
            alike[len(shown.frames)].append(place)
    shared = [
        (places, encode_shared(processor, [questions[place] for place in places], clip, **limits, remedy=remedy))
        for places in alike.values()
    ]
    return shared, faults


def _tail(processor: Any, messages: Messages) -> torch.Tensor:
    _, after = split_prompt(processor, messages)
    return torch.tensor(processor.tokenizer(after, add_special_tokens=False)["input_ids"])
