"""Which completions have the form they were asked for."""

import pytest

from rewards import AnswerFormat
from utils.common import UserError
from utils.config import PromptConfig
from utils.prompts import format_answer
from utils.spans import Span

ANSWER = "From 4.0 to 8.0 seconds."
TAGGED = f"<think>Hm.\nYes.</think>\n<answer>{ANSWER}</answer>"
MALFORMED = [
    f"<answer>{ANSWER}</answer>",
    f"<think>Hm.</think>{ANSWER}",
    f"<think>Hm.</think><answer>{ANSWER}",
    f"<answer>{ANSWER}</answer><think>Hm.</think>",
    f"<think>Hm.</think>So: <answer>{ANSWER}</answer>",
    f"{TAGGED} Done.",
    f"Well. {TAGGED}",
    f"<think><think>Hm.</think><answer>{ANSWER}</answer>",
    f"<think>Hm.</think><answer>1 to 2</answer><answer>{ANSWER}</answer>",
    f"<answer><think>Hm.</think>{ANSWER}</answer>",
    "<think>Hm.</think><answer>From 8.0 to 4.0 seconds.</answer>",
    "<think>Hm.</think><answer>Around 4.0 seconds.</answer>",
    "<think>From 4.0 to 8.0 seconds.</think><answer></answer>",
]


def earned(text, thinking, label=(4, 8)):
    return AnswerFormat(thinking=thinking).compute_from_text([text], [label]).item()


@pytest.mark.parametrize("thinking", [True, False, None])
@pytest.mark.parametrize("text", MALFORMED)
def test_malformed(text, thinking):
    assert earned(text, thinking) == 0.0


@pytest.mark.parametrize(("text", "form"), [(ANSWER, False), (TAGGED, True), (f"\n {TAGGED}\n", True)])
def test_well_formed(text, form):
    assert earned(text, form) == earned(text, None) == 1.0
    assert earned(text, not form) == 0.0


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("windows", [[], [Span(4, 8)], [Span(1, 2), Span(4, 8)]])
def test_what_the_model_is_taught_is_well_formed(thinking, windows):
    text = format_answer(PromptConfig(thinking=thinking), windows, thought="It is short.")
    assert earned(text, thinking, label=windows) == 1.0


def test_where_it_happens_does_not_matter():
    assert earned(ANSWER, False, label=(90, 99)) == 1.0


def test_bad_thinking():
    with pytest.raises(UserError, match=r"format\.thinking must be true, false or null"):
        AnswerFormat(thinking="yes")


def test_read_from_the_text_when_called_with_tensors():
    import torch

    rows = torch.zeros(2, 2, dtype=torch.float64)
    assert AnswerFormat()(rows, rows, texts=[ANSWER, "Hm."]).tolist() == [1.0, 0.0]
