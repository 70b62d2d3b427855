"""From completions and labels to what rewards judge: texts, windows, tensors, and which rows there is to judge.

A batch is read once and shared by all components of a composite. Reading an answer is `utils.spans` alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from rewards.span_tensors import span_giou
from utils.common import UserError
from utils.spans import Span, parse_spans

NO_SPAN = Span(math.nan, math.nan)


@dataclass(frozen=True)
class Batch:
    """N completions beside their labels, read."""

    texts: list[str]
    pred_windows: list[list[Span] | None]
    """What each text answers: windows as written, [] = "the event is absent", None = it cannot be read."""
    gt_windows: list[tuple[Span, ...]]
    """The labelled windows, sorted; () = labelled absent."""
    durations: list[float | None]
    """Length of each labelled stretch in seconds, where it was given."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of the data set, by name, and whatever else TRL hands over."""

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def pred(self) -> Tensor:
        """The first window of each answer, (N, 2) float64 in seconds; NaN where there is none."""
        return _tensor([windows[0] if windows else NO_SPAN for windows in self.pred_windows])

    @cached_property
    def gt(self) -> Tensor:
        """The labelled window nearest to each answer's first, (N, 2) float64 in seconds; NaN where none is labelled."""
        return _tensor(list(map(_nearest_window, self.pred_windows, self.gt_windows)))

    @cached_property
    def grounded(self) -> Tensor:
        """Which rows have a window on both sides, (N,) bool: those there is to judge."""
        pairs = zip(self.pred_windows, self.gt_windows, strict=True)
        return torch.tensor([bool(pred) and bool(gt) for pred, gt in pairs], dtype=torch.bool)

    @cached_property
    def absence_agreed(self) -> Tensor:
        """Which rows answer absence and are labelled absent, (N,) bool."""
        pairs = zip(self.pred_windows, self.gt_windows, strict=True)
        return torch.tensor([pred == [] and not gt for pred, gt in pairs], dtype=torch.bool)


def read_batch(
    completions: Sequence[Any],
    ground_truths: Sequence[Any],
    durations: Sequence[Any] | None = None,
    columns: Mapping[str, Any] | None = None,
) -> Batch:
    """Read N completions (texts, or TRL's lists of messages), N labels and N durations in seconds.

    A label is `(start, end)`, several `[(start, end), ...]`, or `[]` for an event labelled absent.
    Raises UserError for another form, for an unlabelled row (None) and for lists of different length.
    """
    texts = [text_of(completion) for completion in completions]
    given: Sequence[Any] = [None] * len(texts) if durations is None else durations
    lengths = [_duration(index, value) for index, value in enumerate(given)]
    labels = [_labelled(index, label) for index, label in enumerate(ground_truths)]
    for name, number in {"ground truths": len(labels), "durations": len(lengths)}.items():
        if number != len(texts):
            raise UserError(f"{len(texts)} completions but {number} {name}; give one for each completion")
    return Batch(texts, list(map(parse_spans, texts, lengths)), labels, lengths, columns or {})


def text_of(completion: Any) -> str:
    """The text of a completion: a string, or TRL's conversational form, a list of messages.

    Thinking that a tokenizer's response template has split off is put back in its `<think>` tags.

    >>> text_of([{"role": "assistant", "content": "From 1.0 to 2.0 seconds."}])
    'From 1.0 to 2.0 seconds.'
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Sequence) and all(isinstance(message, Mapping) for message in completion):
        return "".join(map(_message_text, completion))
    raise UserError(f"a completion must be a text or a list of messages, got {completion!r:.120}")


def _message_text(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part.get("text") or "" for part in content)
    thought = message.get("reasoning_content")
    return f"<think>{thought}</think>{content}" if thought else content


def _labelled(index: int, label: Any) -> tuple[Span, ...]:
    if label is None:
        raise UserError(
            f"ground truth {index} is None: the row is not labelled and cannot be rewarded; "
            "leave such rows out (an event labelled absent is [])"
        )
    items = label.tolist() if hasattr(label, "tolist") else label
    if not isinstance(items, Iterable) or isinstance(items, str | Mapping):
        raise _bad_label(index, label)
    windows = list(items)
    if windows and isinstance(windows[0], Real):
        windows = [windows]
    try:
        spans = sorted(Span(float(start), float(end)) for start, end in windows)
    except (TypeError, ValueError):
        raise _bad_label(index, label) from None
    if not all(math.isfinite(time) for span in spans for time in span):
        raise _bad_label(index, label)
    return tuple(spans)


def _bad_label(index: int, label: Any) -> UserError:
    return UserError(
        f"ground truth {index} must be (start, end) in seconds, a list of such windows, or [] for an event labelled "
        f"absent, got {label!r:.120}"
    )


def _duration(index: int, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value <= 0:
        raise UserError(f"duration {index} must be a number of seconds above 0, got {value!r}")
    return float(value)


def _nearest_window(pred_windows: list[Span] | None, gt_windows: tuple[Span, ...]) -> Span:
    if not gt_windows:
        return NO_SPAN
    if not pred_windows or len(gt_windows) == 1:
        return gt_windows[0]
    return gt_windows[int(span_giou(_tensor(pred_windows[:1]), _tensor(gt_windows)).argmax())]


def _tensor(spans: Sequence[Span]) -> Tensor:
    return torch.tensor(spans, dtype=torch.float64).reshape(-1, 2)
