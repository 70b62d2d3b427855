"""Anchors in the thinking, and what they earn."""

import pytest

from rewards import StepConsistency
from rewards.step_consistency import anchors_of, thought_of
from utils.spans import Span

LABEL = (10, 20)


def text(*anchors, answer="From 10.0 to 20.0 seconds."):
    return f"<think>{' Then '.join(f'it is {a} to {b} s.' for a, b in anchors)}</think><answer>{answer}</answer>"


def earned(*texts, label=LABEL):
    return StepConsistency().compute_from_text(texts, [label] * len(texts)).tolist()


def test_anchors_that_approach():
    assert earned(text((0, 40), (5, 25), (9, 20))) == [1.0]


def test_each_step_back_costs_its_share():
    assert earned(text((9, 20), (5, 25), (0, 40))) == pytest.approx([1 / 3])  # only the last step, to the answer
    assert earned(text((5, 25), (0, 40), (9, 20))) == pytest.approx([2 / 3])
    assert earned(text((10, 20), answer="From 10.0 to 15.0 seconds.")) == [0.0]


def test_steps_weigh_the_answers_iou():
    half = "From 10.0 to 15.0 seconds."
    assert earned(text((0, 40), answer=half)) == [0.5]
    assert earned(text(*[(10, 15)] * 9, answer=half), text((10, 15), answer=half)) == [0.5, 0.5]  # no pay for repeating
    assert earned(text(*[(50, 60)] * 9, answer="From 50.0 to 60.0 seconds.")) == [0.0]  # steadily wrong


def test_no_worse_is_enough():
    assert earned(text((10, 20), (10.0, 20.0))) == [1.0]


def test_neutral_without_thinking():
    """All the same, however good: no spread, so no advantage."""
    plain = ["From 10.0 to 20.0 seconds.", "From 0.0 to 90.0 seconds.", "<answer>From 10.0 to 20.0 seconds.</answer>"]
    assert earned(*plain, "<think></think>From 10.0 to 20.0 seconds.", text()) == [0.0] * 5


def test_anchors():
    assert anchors_of("<think>At 0:05 - 0:09, no, 0:06 - 0:09.</think>0:06 - 0:10") == [Span(5, 9), Span(6, 9)]
    tagged = "<think>About 2 to 9 s. <timestamp>3 to 8</timestamp> it ends. <timestamp>what</timestamp></think>x"
    assert anchors_of(tagged) == [Span(3, 8)]
    assert anchors_of("From 2 to 9 s.") == anchors_of("<think>2 to 9 s") == anchors_of("") == []


def test_thought():
    assert thought_of("<think>a</think>b") == "a"
    assert thought_of("a</think>b") == "a"  # the prompt opened it
    assert thought_of("<think>a</think>b</think>c") == "a</think>b"
    assert thought_of("<think>a") is None


def test_several_labelled_windows():
    """Every window is measured with the label it fits best."""
    value = StepConsistency().compute_from_text(
        [text((30, 42), answer="From 10.0 to 20.0 seconds.")], [[LABEL, (30, 40)]]
    )
    assert value.tolist() == [1.0]
