"""Completions and labels in all the forms in which they come."""

import math

import numpy as np
import pytest
import torch

from rewards.reading import read_batch, text_of
from utils.common import UserError
from utils.spans import Span

WINDOW = (Span(4.0, 8.0),)


@pytest.mark.parametrize(
    "label",
    [
        (4, 8),
        [4.0, 8.0],
        Span(4, 8),
        [[4, 8]],
        ((4, 8),),
        (Span(4.0, 8.0),),
        np.array([4.0, 8.0]),
        np.array([[4, 8]]),
        torch.tensor([4.0, 8.0]),
    ],
    ids=repr,
)
def test_forms_of_one_window(label):
    assert read_batch(["x"], [label]).gt_windows == [WINDOW]


@pytest.mark.parametrize("label", [[], (), np.zeros((0, 2)), torch.zeros(0)], ids=repr)
def test_labelled_absent(label):
    assert read_batch(["x"], [label]).gt_windows == [()]


def test_several_windows_are_sorted():
    assert read_batch(["x"], [[(9, 12), (1, 2)]]).gt_windows == [(Span(1.0, 2.0), Span(9.0, 12.0))]


@pytest.mark.parametrize(
    "label", ["3 to 7", 3.0, (1, 2, 3), [(1, 2), 3], [(1,)], {"start": 1}, (1, math.nan), [["a", "b"]]]
)
def test_bad_labels_are_refused(label):
    with pytest.raises(UserError, match=r"ground truth 1 must be \(start, end\) in seconds"):
        read_batch(["x", "x"], [(4, 8), label])


def test_unlabelled_rows_are_refused():
    with pytest.raises(UserError, match=r"ground truth 0 is None.*not labelled"):
        read_batch(["x"], [None])


@pytest.mark.parametrize("duration", [0, -3, math.nan, math.inf, "60", True])
def test_bad_durations_are_refused(duration):
    with pytest.raises(UserError, match="duration 0 must be a number of seconds above 0"):
        read_batch(["x"], [(4, 8)], [duration])


def test_lists_of_one_length():
    with pytest.raises(UserError, match="2 completions but 1 ground truths"):
        read_batch(["x", "y"], [(4, 8)])
    with pytest.raises(UserError, match="1 completions but 2 durations"):
        read_batch(["x"], [(4, 8)], [9, 9])


def test_texts():
    parts = [{"type": "text", "text": "From 1 "}, {"type": "text", "text": "to 2 s"}]
    assert text_of([{"role": "assistant", "content": parts}]) == "From 1 to 2 s"
    assert text_of([{"role": "assistant", "content": None}]) == ""
    assert text_of([]) == text_of("") == ""
    message = {"role": "assistant", "reasoning_content": "3 to 4 s", "content": "From 1 to 2 s"}
    assert text_of([message]) == "<think>3 to 4 s</think>From 1 to 2 s"


@pytest.mark.parametrize("completion", [None, 3, {"content": "x"}, ["x"]])
def test_bad_completions_are_refused(completion):
    with pytest.raises(UserError, match="a completion must be a text or a list of messages"):
        text_of(completion)


def test_durations_turn_percent_into_seconds_row_by_row():
    batch = read_batch(["25% to 75%"] * 3, [(1, 2)] * 3, [40, 80, None])
    assert batch.pred_windows == [[Span(10.0, 30.0)], [Span(20.0, 60.0)], None]


def test_tensors():
    """The first answered window, the labelled one nearest to it, NaN where there is none; order is as written."""
    texts = ["From 21 to 29 s and from 1 to 2 s.", "From 3 to 4 s.", "The event does not happen in the video.", "Hm."]
    labels = [[(0, 10), (20, 30)], [(0, 2), (90, 95)], (4, 8), []]
    batch = read_batch(texts, labels)
    nan = pytest.approx(math.nan, nan_ok=True)
    assert batch.pred.tolist() == [[21, 29], [3, 4], [nan, nan], [nan, nan]]
    assert batch.gt.tolist() == [[20, 30], [0, 2], [4, 8], [nan, nan]]
    assert batch.pred.dtype == batch.gt.dtype == torch.float64
    assert batch.grounded.tolist() == [True, True, False, False]
    assert batch.absence_agreed.tolist() == [False] * 4
    assert read_batch(texts[2:3], [[]]).absence_agreed.tolist() == [True]


def test_no_rows():
    batch = read_batch([], [])
    assert batch.pred.shape == batch.gt.shape == (0, 2) and batch.grounded.shape == (0,)
