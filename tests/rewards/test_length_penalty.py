"""Length and repetition."""

import pytest

from rewards import LengthPenalty
from utils.common import UserError
from utils.config import PromptConfig
from utils.prompts import format_answer
from utils.spans import Span


def earned(text, **params):
    return LengthPenalty(**params).compute_from_text([text], [(1, 2)]).item()


@pytest.mark.parametrize("thinking", [True, False])
def test_what_the_model_is_taught_earns_the_full_mark(thinking):
    windows = [Span(1, 2), Span(3, 4.5), Span(10, 20), Span(31, 40.5)]
    assert earned(format_answer(PromptConfig(thinking=thinking), windows, thought="Four times.")) == 1.0


@pytest.mark.parametrize(("words", "mark"), [(10, 1.0), (12, 1.0), (14, 0.75), (16, 0.5), (20, 0.0), (30, 0.0)])
def test_length_falls_linearly_over_the_buffer(words, mark):
    text = "1 to 2 " + " ".join("abcdefghijklmnopqrstuvwxyzABCDEFGHI"[: words - 3])
    assert earned(text, max_words=20, buffer_words=8, ngram=50) == mark


def test_repetition():
    assert earned("1 to 2 so so so so so", ngram=1) == pytest.approx(4 / 8)
    assert earned("1 to 2 so so so so so", ngram=2) == pytest.approx(4 / 7)
    loop = "It is 1.0 to 2.0 seconds. " * 20
    assert earned(loop) < 0.1
    assert earned("1 to 2 SO so", ngram=1) == pytest.approx(4 / 5)


def test_text_without_spaces_has_a_length():
    filler = "\u554a" * 800
    assert earned(f"1 to 2 {filler}", max_words=40, buffer_words=10, ngram=99) == 0.0
    assert earned(f"1 to 2 {filler}", ngram=1) == pytest.approx(4 / 53)


@pytest.mark.parametrize("params", [{"max_words": 0}, {"ngram": 1.5}, {"buffer_words": True}, {"max_words": 8}])
def test_bad_parameters(params):
    with pytest.raises(UserError, match=r"length_penalty\.\w+ must .*got"):
        LengthPenalty(**params)
