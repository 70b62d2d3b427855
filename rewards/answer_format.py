"""Whether an answer has the form it was asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewards.base import Reward
from utils.common import UserError
from utils.spans import Span, parse_spans

_TAG = re.compile(r"</?(?:think|answer)\s*>", re.IGNORECASE)
_THOUGHT_THEN_ANSWER = re.compile(r"<think>.*</think>\s*<answer>.*</answer>", re.DOTALL)


class AnswerFormat(Reward):
    """`scale` for a completion of the right form, else 0: the format reward of DeepSeek-R1 (arXiv:2501.12948) and
    Time-R1 (arXiv:2503.13377; `main.py`, `format_reward`), with an answer that can be read.

    With `thinking` the completion is one `<think>...</think>`, then one `<answer>...</answer>`, and nothing but space
    around them; without it there are no such tags. `thinking=None` takes either. Every window of the answer has to end
    after it starts. An absence rightly stated earns what its form earns; a false one 0, like everywhere.

    >>> right, bare = "<think>It is short.</think><answer>From 1.0 to 2.0 seconds.</answer>", "From 1.0 to 2.0 seconds."
    >>> AnswerFormat(thinking=True).compute_from_text([right, bare], [(5, 6), (5, 6)])
    tensor([1., 0.], dtype=torch.float64)
    """

    name = "format"
    needs = ("texts", "pred_windows")
    judges_absence = True

    def __init__(self, thinking: bool | None = None, scale: float = 1.0) -> None:
        super().__init__(scale)
        if not isinstance(thinking, bool | None):
            raise UserError(f"{self.name}.thinking must be true, false or null (either), got {thinking!r}")
        self.thinking = thinking

    def marks(
        self,
        pred: Tensor,
        gt: Tensor,
        texts: Sequence[str] = (),
        pred_windows: Sequence[Sequence[Span] | None] | None = None,
        **needed: Any,
    ) -> Tensor:
        """`texts`: the N completions. Without the lists of windows they are read here."""
        windows = [parse_spans(text) for text in texts] if pred_windows is None else pred_windows
        marks = [self._is_right(text, found) for text, found in zip(texts, windows, strict=True)]
        return torch.tensor(marks, dtype=torch.float64)

    def _is_right(self, text: str, windows: Sequence[Span] | None) -> bool:
        if windows is None or not all(window.end > window.start for window in windows):
            return False
        num_tags = len(_TAG.findall(text))
        if num_tags == 0:
            return self.thinking is not True
        tagged = num_tags == 4 and _THOUGHT_THEN_ANSWER.fullmatch(text.strip()) is not None
        return tagged and self.thinking is not False
