"""Many queries at once: those on one stretch of one video share its frames, its vision features and its prompt.

Owns what an item of a batch may be, which queries are computed together, and what becomes of a video that cannot be
read. Where a prompt is divided is `datasets.shared_prompt`, decoding is `trainers.shared_decoding`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets.encoding import PromptError, require_plain_text
from datasets.shared_prompt import SharedPrompt, encode_alike
from datasets.shared_video import share_clips
from trainers.model import Policy
from trainers.shared_decoding import continue_texts, prefill
from utils.clip_reader import ClipReader
from utils.common import UserError, nearest
from utils.prompts import PromptContract, build_messages
from utils.video import VideoClip, VideoReadError

ITEM_KEYS = ("video", "query", "video_start", "video_end")
Item = Sequence[Any] | Mapping[str, Any]
"""`(video, query)`, `(video, query, video_start, video_end)`, or a mapping with those keys."""


# ---------------------------------------------------------------------------------------------- items
@dataclass(frozen=True)
class Query:
    """One item of a batch."""

    video: str
    text: str
    start_s: float | None = None
    end_s: float | None = None
    """Seconds on the file's clock; None is the file's own bound."""

    @property
    def clip_key(self) -> tuple[Any, ...]:
        """Equal for queries on the same stretch of the same file, however its path is written."""
        return os.path.realpath(self.video), self.start_s or 0.0, self.end_s


def read_items(items: Iterable[Item]) -> list[Query]:
    """Raises UserError, naming the item, for one of another form, an unknown key and an empty query."""
    return [_read_item(item, f"item {number}") for number, item in enumerate(items)]


def _read_item(item: Item, name: str) -> Query:
    if isinstance(item, str | bytes) or not isinstance(item, Sequence | Mapping):
        raise UserError(f"{name} must be (video, query), with video_start and video_end if wanted, got {item!r}")
    if isinstance(item, Mapping):
        _check_keys(item, name)
        item = [item.get(key) for key in ITEM_KEYS]
    elif len(item) not in (2, 4):
        raise UserError(
            f"{name} must be (video, query) or (video, query, video_start, video_end), got {len(item)} parts"
        )
    video, text, start, end = (*item, None, None)[:4]
    if not isinstance(video, str | os.PathLike):
        raise UserError(f"{name}: video must be the path of a file, got {video!r}")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{name}: query is empty: say in a sentence what to look for (got {text!r})")
    return Query(os.fspath(video), text, _seconds(start, f"{name}: video_start"), _seconds(end, f"{name}: video_end"))


def _check_keys(item: Mapping[str, Any], name: str) -> None:
    for key in item:
        if key not in ITEM_KEYS:
            hint = nearest(key, ITEM_KEYS)
            raise UserError(
                f"{name}: unknown key {key!r}; the keys are {', '.join(ITEM_KEYS)}"
                + (f" (did you mean {hint!r}?)" if hint else "")
            )


def _seconds(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{name} must be a number of seconds or None, got {value!r}")
    return float(value)


# ---------------------------------------------------------------------------------------------- answers
@dataclass(frozen=True)
class Answer:
    """What became of the query with this number: a text and the clip that was shown, or the reason why not."""

    number: int
    text: str = ""
    clip: VideoClip | None = None
    error: UserError | None = None


@dataclass(frozen=True)
class _Unit:
    """Queries that share a prompt up to the end of the video."""

    numbers: list[int]
    shared: SharedPrompt


def answer_queries(
    policy: Policy,
    queries: Sequence[Query],
    *,
    batch_size: int,
    max_new_tokens: int,
    sampling: Mapping[str, Any],
) -> Iterator[Answer]:
    """One `Answer` for every query, in the order in which they are found. `policy` has a contract.

    Videos come in the order of their first query. A video's queries stay together: those of several videos are decoded
    in one batch as long as they are no more than `batch_size`, and more than that on one video follow one another on
    the same prefill.
    """
    waiting: list[_Unit] = []
    for found in _encode(policy, queries):
        if isinstance(found, Answer):
            yield found
            continue
        if waiting and sum(len(unit.numbers) for unit in (*waiting, found)) > batch_size:
            yield from _decode(policy, waiting, batch_size, max_new_tokens, sampling)
            waiting = []
        waiting.append(found)
    if waiting:
        yield from _decode(policy, waiting, batch_size, max_new_tokens, sampling)


def _encode(policy: Policy, queries: Sequence[Query]) -> Iterator[_Unit | Answer]:
    """Clip by clip: read once, and its queries' prompts divided; faults at once."""
    assert policy.contract is not None
    reader = ClipReader(policy.contract.data)
    for numbers in share_clips(range(len(queries)), lambda number: queries[number].clip_key, most=len(queries)):
        try:
            first = queries[numbers[0]]
            clip = reader.read(first.video, first.start_s, first.end_s)
        except VideoReadError as error:
            yield from (Answer(number, error=error) for number in numbers)
        else:
            yield from _encode_clip(policy, policy.contract, {number: queries[number] for number in numbers}, clip)


def _encode_clip(
    policy: Policy, contract: PromptContract, queries: Mapping[int, Query], clip: VideoClip
) -> Iterator[_Unit | Answer]:
    questions: dict[int, list[dict[str, Any]]] = {}
    for number, query in queries.items():
        messages = build_messages(contract.prompt, query.text)
        try:
            require_plain_text(policy.processor, messages)
        except PromptError as error:
            yield Answer(number, error=error)
        else:
            questions[number] = messages
    if not questions:
        return
    data, numbers = contract.data, list(questions)
    shared, faults = encode_alike(
        policy.processor, list(questions.values()), clip, max_tokens=data.max_prompt_tokens,
        on_overlong=data.on_overlong, name=queries[numbers[0]].video, remedy="ask them one by one, with predict",
    )  # fmt: skip
    yield from (Answer(numbers[place], error=error) for place, error in faults.items())
    yield from (_Unit([numbers[place] for place in places], prompt) for places, prompt in shared)


def _decode(
    policy: Policy, units: Sequence[_Unit], batch_size: int, max_new_tokens: int, sampling: Mapping[str, Any]
) -> Iterator[Answer]:
    """`units` are one of any size, or several of no more than `batch_size` queries together."""
    prefilled = prefill(policy.model, [unit.shared.prefix for unit in units])
    parts = math.ceil(sum(len(unit.numbers) for unit in units) / batch_size)
    for part in range(parts):
        tails = [unit.shared.tails[part::parts] for unit in units]
        texts = continue_texts(
            policy.model, policy.processor, prefilled, tails, max_new_tokens=max_new_tokens, **sampling
        )
        for unit, found in zip(units, texts, strict=True):
            for number, text in zip(unit.numbers[part::parts], found, strict=True):
                yield Answer(number, text, unit.shared.clip)
