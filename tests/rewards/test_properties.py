"""What holds for every reward: its range, the absence table, monotony, invariance, one parser and one IoU.

Generated batches are read once and given to all rewards, so a failure names the reward in its message.
"""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from rewards import CompositeReward, TemporalIoU, build_reward, register_reward
from rewards.reading import read_batch
from rewards.reward_registry import BUILT_IN
from utils.common import REPO_ROOT
from utils.spans import Span, parse_spans, temporal_iou

ABSENT = "The event does not happen in the video."
DURATION_S = 1000.0
SCALE = 2.5


@register_reward("naive_start_error")
class StartError(nn.Module):
    """A user's own, which knows nothing of NaN rows."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, pred, gt):
        return self.scale / (1 + (pred[:, 0] - gt[:, 0]).abs())


PARAMS = {
    **{name: (name, {}) for name in sorted(BUILT_IN)},
    "recall": ("segment_overlap", {"mode": "recall"}),
    "precision": ("segment_overlap", {"mode": "precision"}),
    "shaped_iou_steep": ("shaped_iou", {"threshold": 0.5, "gain": 0.5, "steepness": 6.0}),
    "boundary_distance_10s": ("boundary_distance", {"tolerance_s": 10.0}),
    "length_penalty_tight": ("length_penalty", {"max_words": 20, "buffer_words": 20, "ngram": 1}),
    "format_thinking": ("format", {"thinking": True}),
    "format_plain": ("format", {"thinking": False}),
    "own": ("naive_start_error", {}),
}
REWARDS = {case: build_reward(name, params) for case, (name, params) in PARAMS.items()}
REWARDS["composite"] = CompositeReward({name: {"weight": 0.1} for name in BUILT_IN})
SCALED = {case: build_reward(name, params | {"scale": SCALE}) for case, (name, params) in PARAMS.items()}
OF_TEXT = ("format", "length")
"""What starts so judges the text and not where the event is."""
EVERY_WINDOW = ["segment_overlap", "recall", "precision", "window_matching"]


def read(texts, labels):
    return read_batch(texts, labels, [DURATION_S] * len(texts))


def score(reward, texts, labels):
    return reward.score(read(texts, labels)).tolist()


def say(*spans):
    return " and ".join(f"from {start!r} to {end!r} seconds" for start, end in spans)


def think(text, thought="Rather late, perhaps 0.5 to 900 seconds."):
    return f"<think>{thought}</think><answer>{text}</answer>"


times = st.integers(0, 9000).map(lambda tenths: tenths / 10)
lengths = st.integers(1, 900).map(lambda tenths: tenths / 10)
windows = st.builds(lambda start, length: Span(start, round(start + length, 1)), times, lengths)
labels = st.one_of(windows, st.lists(windows, max_size=4), st.just([]))
PIECES = [
    "3.2", "7.9", "-3", "0:12", "1e308", "-1e308", "25%", "75%", " to ", " - ", " s", " and ", "from ", "[", "]", ", ",
    "<think>", "</think>", "<answer>", "</answer>", "<timestamp>", "</timestamp>", "not ", ABSENT, '{"start": ',
    '"end": 9}', "no ", "the event ", "video", "\u7b2c", "\n", "a" * 40,
]  # fmt: skip
noise = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=16).map("".join))
answers = st.lists(windows, min_size=1, max_size=4).map(lambda spans: say(*spans))
anything = st.one_of(noise, answers, st.builds(think, answers), st.builds(think, answers, noise), st.just(ABSENT))
rows = st.lists(st.tuples(anything, labels), min_size=2, max_size=4)
some = settings(max_examples=50, deadline=None)


# ---------------------------------------------------------------------------------------------- range
@some
@given(rows=rows)
def test_range_and_finite_on_any_text(rows):
    batch = read(*zip(*rows, strict=True))
    for case, reward in REWARDS.items():
        values = reward.score(batch)
        assert values.shape == (len(rows),) and values.dtype == torch.float64, case
        assert ((values >= 0) & (values <= 1)).all(), (case, values)  # neither holds for NaN
        if case != "composite":
            assert torch.allclose(SCALED[case].score(batch), SCALE * values, atol=1e-12), case


@some
@given(text=noise, label=labels)
def test_unreadable_earns_nothing(text, label):
    batch = read([text], [label])
    assume(batch.pred_windows == [None])
    assert {case: reward.score(batch).item() for case, reward in REWARDS.items()} == dict.fromkeys(REWARDS, 0.0)


@pytest.mark.parametrize("case", [case for case in PARAMS if not case.startswith("length") and case != "own"])
def test_windows_that_are_none_earn_nothing(case):
    answers = ["From 9.0 to 3.0 seconds.", "From 5.0 to 5.0 seconds."]
    assert score(REWARDS[case], answers + [think(text) for text in answers], [(3, 9)] * 4) == [0.0] * 4


@pytest.mark.parametrize("case", [case for case in PARAMS if not case.startswith("length") and case != "own"])
def test_nan_rows_in_tensors_earn_nothing(case):
    reward = REWARDS[case]
    pred = torch.tensor([[math.nan, math.nan], [2.0, 6.0]], dtype=torch.float64)
    given = {"texts": ["", ""], "durations": [9.0, 9.0]}
    needed = {key: value for key, value in given.items() if key in reward.needs}
    assert reward(pred, pred.flip(0), **needed).tolist() == [0.0, 0.0]


# ---------------------------------------------------------------------------------------------- absence
@pytest.mark.parametrize("case", [case for case in PARAMS if case != "length_penalty_tight"])
def test_absence_table(case):
    """The full mark for an absence rightly stated, nothing for a false one, nor for a window where nothing happens."""
    wrap = think if case == "format_thinking" else str
    texts = [wrap(ABSENT), wrap("From 4.0 to 8.0 seconds."), wrap(ABSENT), "Hm."]
    assert score(SCALED[case], texts, [[], [], (4, 8), []]) == [SCALE, 0.0, 0.0, 0.0]


def test_rewards_of_the_text_judge_a_stated_absence_by_its_text():
    texts = [f"<think>Hm.</think>{ABSENT}", " ".join([ABSENT] * 20)]
    assert score(REWARDS["format"], texts, [[], []]) == [0.0, 1.0]
    assert 0 < score(REWARDS["length_penalty"], texts, [[], []])[1] < 0.1
    assert score(REWARDS["temporal_iou"], texts, [[], []]) == [1.0, 1.0]


# ---------------------------------------------------------------------------------------------- full mark, monotony
@pytest.mark.parametrize("case", [case for case in PARAMS if case != "length_penalty_tight"])
def test_the_exact_answer_earns_the_full_mark(case):
    text = "From 4.0 to 8.0 seconds."
    text = text if case == "format_plain" else think(text, "Between 2.0 and 9.0 seconds.")
    assert score(SCALED[case], [text], [(4, 8)]) == [SCALE]


@some
@given(
    truth=windows,
    length=lengths,
    steps=st.lists(st.floats(0, 600), min_size=2, max_size=8),
    side=st.sampled_from([-1, 1]),
    thought=st.sampled_from(["", "Somewhere in 1 to 800 s.", "It is 400 to 500 s, no, 50 to 90 s."]),
)
def test_monotone_as_a_span_slides_off_the_truth(truth, length, steps, side, thought):
    """From where the middles meet, for an answer of any length, to either side."""
    middles = [sum(truth) / 2 + side * step for step in sorted(steps)]
    spans = [Span(middle - length / 2, middle + length / 2) for middle in middles]
    batch = read([think(say(span), thought) for span in spans], [truth] * len(spans))
    assume(batch.pred_windows == [[span] for span in spans])
    for case, reward in REWARDS.items():
        # a mark of the text may depend on how many digits it has, and `own` looks at one end only
        if not case.startswith(("own", "composite", *OF_TEXT)):
            values = reward.score(batch)
            assert (values.diff() <= 1e-9).all(), (case, values)


@pytest.mark.parametrize("case", [case for case in PARAMS if case.startswith(OF_TEXT)])
def test_rewards_of_the_text_do_not_look_at_the_place(case):
    text = think("From 100.0 to 200.0 seconds.")
    assert len(set(score(REWARDS[case], [text] * 4, [(100, 200), (120, 220), (150, 900), (300, 400)]))) == 1


@pytest.mark.parametrize("case", [case for case in PARAMS if not case.startswith(OF_TEXT)])
def test_sliding_off_costs(case):
    texts = [think(say((start, start + 10)), "From 0.0 to 300.0 seconds") for start in (100.0, 102.0, 105.0, 109.0)]
    values = score(REWARDS[case], texts, [(100, 110)] * 4)
    assert values == sorted(values, reverse=True) and len(set(values)) == 4


@pytest.mark.parametrize("case", ["generalized_iou", "boundary_distance"])
def test_still_falls_beyond_the_overlap(case):
    values = score(REWARDS[case], [say((start, start + 10)) for start in (110.0, 120.0, 400.0)], [(100, 110)] * 3)
    assert values == sorted(values, reverse=True) and len(set(values)) == 3 and min(values) > 0


# ---------------------------------------------------------------------------------------------- invariance
@some
@given(rows=rows, data=st.data())
def test_rows_do_not_see_each_other(rows, data):
    """Permuted rows give permuted rewards, and a row alone gives the same."""
    batch = read(*zip(*rows, strict=True))
    order = data.draw(st.permutations(range(len(rows))))
    shuffled = read(*zip(*(rows[index] for index in order), strict=True))
    alone = read([rows[0][0]], [rows[0][1]])
    for case, reward in REWARDS.items():
        values = reward.score(batch)
        assert torch.equal(reward.score(shuffled), values[order]), case
        assert torch.equal(reward.score(alone), values[:1]), case


@some
@given(text=anything, label=st.lists(windows, min_size=2, max_size=4), data=st.data())
def test_order_of_the_labelled_windows_does_not_matter(text, label, data):
    batch, shuffled = read([text], [label]), read([text], [data.draw(st.permutations(label))])
    for case, reward in REWARDS.items():
        assert torch.equal(reward.score(batch), reward.score(shuffled)), case


@some
@given(pred=st.lists(windows, min_size=2, max_size=5), label=st.lists(windows, min_size=1, max_size=4), data=st.data())
def test_order_of_the_answered_windows_does_not_matter(pred, label, data):
    batch = read([say(*pred), say(*data.draw(st.permutations(pred)))], [label, label])
    for case in EVERY_WINDOW:
        ours, theirs = REWARDS[case].score(batch).tolist()
        assert ours == pytest.approx(theirs, abs=1e-12), case


# ---------------------------------------------------------------------------------------------- one parser, one IoU
@settings(max_examples=200, deadline=None)
@given(text=anything, label=labels)
def test_parser_and_iou_are_those_of_utils_spans(text, label):
    gts = [label] if isinstance(label, Span) else label
    spans = parse_spans(text, DURATION_S)
    assert read([text], [label]).pred_windows == [spans]
    if spans and gts:
        expected = max(temporal_iou(spans[0], window) for window in gts)
    else:
        expected = float(spans == [] and not gts)
    assert score(TemporalIoU(), [text], [label]) == [expected]


def test_no_second_parser_of_times():
    """Only one file looks for digits: it counts words."""
    found = [path.name for path in sorted((REPO_ROOT / "rewards").glob("*.py")) if r"\d" in path.read_text()]
    assert found == ["length_penalty.py"]


# ---------------------------------------------------------------------------------------------- as TRL calls it
@pytest.mark.parametrize("case", PARAMS)
def test_as_trl_calls_it(case):
    """`completions` as texts or as conversations, the columns as lists, further keyword arguments whatever they are."""
    texts = ["From 4.0 to 9.0 seconds.", think("0:04 - 0:10"), ABSENT, "Hm."]
    labels = [[4.0, 8.0], [[4.0, 8.0], [20.0, 22.5]], [], [1.0, 2.0]]
    reward = REWARDS[case]
    extra = {"prompts": ["?"] * 4, "completion_ids": [[1]] * 4, "trainer_state": None, "log_metric": print}
    columns = {"timestamp": labels, "duration": [DURATION_S] * 4, "video": ["a.mp4"] * 4}
    values = reward(completions=texts, **extra, **columns)
    assert isinstance(values, list) and all(type(value) is float for value in values)
    assert values == reward.compute_from_text(texts, labels, [DURATION_S] * 4).tolist()
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    assert reward(chats, **columns) == values
    assert reward.__name__ == PARAMS[case][0]
    assert not isinstance(reward, nn.Module)  # TRL takes those for reward models
