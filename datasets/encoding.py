"""One query and one clip -> the model's inputs. The only place that calls the processor.

Frames come already sampled and sized from `utils.video`; the processor writes the `<t seconds>` markers from the clip's
metadata, and what the model reads of the frames is `datasets.pixels`'. The prompt and the answer are tokenised apart
and joined, so the tokens a model is trained on are exactly those that generation starts from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from datasets.pixels import VALUES, Pixels, patching_of, without_patches
from utils.common import UserError
from utils.logging_utils import get_logger
from utils.video import VideoClip

IGNORE = -100
"""Label value that the loss leaves out."""

Sample = dict[str, Any]


class PromptError(UserError):
    """A question that cannot be put to the model."""


class PromptTooLongError(PromptError):
    """A prompt over `data.max_prompt_tokens` that may not, or cannot, lose frames."""


def require_plain_text(processor: Any, messages: Sequence[dict[str, Any]]) -> None:
    """Raise PromptError when a text of `messages` holds a special token of the tokenizer, e.g. `<|video_pad|>`: the
    model would take it for the end of a turn, or look for pixels that nobody gave."""
    # Added tokens that are not special, such as <think>, may stand in a text.
    special = [str(token) for token in processor.tokenizer.added_tokens_decoder.values() if token.special]
    texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
    for text in texts:
        if found := sorted(token for token in special if token in text):
            raise PromptError(f"the text {text[:80]!r} holds the special token {found[0]}; take it out of the sentence")


def encode_prompt(processor: Any, messages: Sequence[dict[str, Any]], clip: VideoClip) -> Sample:
    """Tokenise `messages` with `clip` in the place of their video part, up to where the answer begins.

    Returns `input_ids` (L,), `mm_token_type_ids` (L,), `video_grid_thw` (1, 3) and `pixels`, a
    `datasets.pixels.Pixels`: `pixel_values` makes of it what the model reads. Raises PromptError for a text with
    special tokens.
    """
    require_plain_text(processor, messages)
    text = processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    frames = torch.from_numpy(clip.frames)
    patching = patching_of(processor)
    inputs = (processor if patching is None else without_patches(processor, patching))(
        text=[text],
        videos=[frames.permute(0, 3, 1, 2)],  # (T, H, W, 3) -> (T, 3, H, W)
        video_metadata=[clip.metadata()],
        do_sample_frames=False,
        do_resize=False,
        # The size is already final; the key is set because its default is announced to change.
        cap_pixels_per_frame=True,
        return_tensors="pt",
    )
    return {
        "input_ids": inputs["input_ids"][0],
        "mm_token_type_ids": inputs["mm_token_type_ids"][0],
        "video_grid_thw": inputs["video_grid_thw"],
        "pixels": Pixels(inputs[VALUES]) if patching is None else Pixels(frames, patching),
    }


def fit_prompt(
    processor: Any,
    messages: Sequence[dict[str, Any]],
    clip: VideoClip,
    *,
    max_tokens: int,
    on_overlong: str,
    name: str,
    warn: bool = True,
) -> tuple[Sample, VideoClip]:
    """`encode_prompt` within `max_tokens`: an overlong prompt loses frames evenly (and says so, unless `warn` is False)
    or is refused.

    Visual tokens are never cut: whole temporal patches (two frames) go, so every marker that stays is true.
    Returns the sample and the clip that was really shown. Raises PromptTooLongError naming `name` when it cannot fit.
    """
    sample = encode_prompt(processor, messages, clip)
    num_frames = len(clip.frames)
    while (length := len(sample["input_ids"])) > max_tokens:
        if on_overlong == "refuse":
            raise PromptTooLongError(
                f"{name}: the prompt has {length} tokens, more than data.max_prompt_tokens={max_tokens}. Lower "
                f"data.fps, "
                "data.max_frames or data.total_pixels, raise data.max_prompt_tokens, or set "
                "data.on_overlong=drop_frames"
            )
        patches = math.ceil(len(clip.frames) / 2)
        per_patch = (length - _text_length(sample)) / patches
        keep = min(patches - 1, math.floor((max_tokens - _text_length(sample)) / per_patch))
        if keep < 1:
            raise PromptTooLongError(
                f"{name}: the question alone nearly fills data.max_prompt_tokens={max_tokens} (one pair of frames "
                f"takes "
                f"{math.ceil(per_patch)} tokens); raise it or lower data.max_pixels_per_frame"
            )
        clip = clip.subsample(2 * keep)
        sample = encode_prompt(processor, messages, clip)
    if warn and len(clip.frames) < num_frames:
        get_logger().warning(
            "%s: prompt over data.max_prompt_tokens=%d; kept %d of %d frames, spread evenly",
            name, max_tokens, len(clip.frames), num_frames,
        )  # fmt: skip
    return sample, clip


def _text_length(sample: Sample) -> int:
    """Tokens before the first and after the last visual token: what dropping frames cannot free."""
    visual = torch.nonzero(sample["mm_token_type_ids"]).flatten()
    return int(visual[0]) + len(sample["input_ids"]) - 1 - int(visual[-1])


def append_answer(processor: Any, sample: Sample, answer: str) -> Sample:
    """Add the answer and the end-of-turn token to a prompt sample; `labels` (L,) hold them and IGNORE elsewhere."""
    tokenizer = processor.tokenizer
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    answer_ids = torch.tensor(ids, dtype=sample["input_ids"].dtype)
    return {
        **sample,
        "input_ids": torch.cat([sample["input_ids"], answer_ids]),
        "mm_token_type_ids": torch.cat([sample["mm_token_type_ids"], torch.zeros_like(answer_ids)]),
        "labels": torch.cat([torch.full_like(sample["input_ids"], IGNORE), answer_ids]),
    }
