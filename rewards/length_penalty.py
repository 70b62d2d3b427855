"""A mark that falls with length and with repetition."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewards.base import Reward
from utils.common import UserError

_WORD = re.compile(r"</?[a-z]{1,16}>|\d+(?:\.\d+)?|[^\W\d]{1,16}|[^\w\s]")
"""A tag, a number, a word or a sign. Longer runs of letters are cut, so that text without spaces has a length too."""


class LengthPenalty(Reward):
    """`scale * short * fresh`: 1 for an answer that is short and does not repeat itself, less for others.

    `short` is DAPO's soft overlong punishment (Yu et al., arXiv:2503.14476, Eq. 13) plus one: 1 up to
    `max_words - buffer_words`, from there linearly to 0 at `max_words`. `fresh` is the share of distinct ones among the
    `ngram`-grams (Yeo et al., arXiv:2502.03373, Appendix C.2). Both count words, numbers and signs, not tokens, so the
    mark does not depend on the tokenizer. It says nothing of where the event is; an absence rightly stated earns what
    its text earns, a false one 0, like everywhere.

    >>> text = "From 1.0 to 2.0 seconds. So, from 1.0 to 2.0 seconds."  # 14 words, 11 4-grams, 8 distinct
    >>> LengthPenalty(max_words=16, buffer_words=4).compute_from_text([text], [(1, 2)])  # 1/2 * 8/11
    tensor([0.3636], dtype=torch.float64)
    """

    name = "length_penalty"
    needs = ("texts",)
    judges_absence = True

    def __init__(self, max_words: int = 512, buffer_words: int = 128, ngram: int = 4, scale: float = 1.0) -> None:
        super().__init__(scale)
        self.max_words = self._whole("max_words", max_words)
        self.buffer_words = self._whole("buffer_words", buffer_words)
        self.ngram = self._whole("ngram", ngram)
        if self.buffer_words > self.max_words:
            raise UserError(
                f"{self.name}.buffer_words must not be above {self.name}.max_words = {max_words}, got {buffer_words}"
            )

    def marks(self, pred: Tensor, gt: Tensor, texts: Sequence[str] = (), **needed: Any) -> Tensor:
        """`texts`: the N completions."""
        return torch.tensor([self._mark(_WORD.findall(text.lower())) for text in texts], dtype=torch.float64)

    def _mark(self, words: list[str]) -> float:
        short = min(1.0, max(0.0, (self.max_words - len(words)) / self.buffer_words))
        grams = list(zip(*(words[start:] for start in range(self.ngram)), strict=False))
        return short * len(set(grams)) / len(grams) if grams else short

    def _whole(self, key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{self.name}.{key} must be a whole number above 0, got {value!r}")
        return value
