"""Rewards by name, a user's own among them."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import rewards
from rewards import REWARDS, Reward, TemporalIoU, build_reward, register_reward
from rewards.reward_registry import BUILT_IN
from utils.common import UserError


@pytest.fixture(autouse=True)
def _registry_as_it_was():
    before = dict(REWARDS)
    yield
    REWARDS.clear()
    REWARDS.update(before)


def test_the_family():
    assert BUILT_IN == {
        "temporal_iou",
        "segment_overlap",
        "step_consistency",
        "format",
        "timestamp_iou",
        "generalized_iou",
        "shaped_iou",
        "boundary_distance",
        "window_matching",
        "length_penalty",
    }


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_every_reward_is_exported_and_says_what_it_is(name):
    kind = REWARDS[name]
    assert kind in vars(rewards).values()
    words = " ".join(kind.__doc__.split())
    assert ">>> " in words and "bsence rightly stated earns" in words


def test_a_plain_module_becomes_a_reward():
    @register_reward("my_reward")
    class MyReward(nn.Module):
        """Mine."""

        def forward(self, pred, gt):
            assert pred.dtype == gt.dtype == torch.float64 and pred.shape == gt.shape
            self.seen = pred
            return (pred[:, 1] == gt[:, 1]).double()

    assert MyReward.__doc__ == "Mine." and repr(MyReward).endswith("MyReward'>")
    reward = build_reward("my_reward", {})
    assert isinstance(reward, MyReward) and isinstance(reward, Reward)
    texts = ["From 1.0 to 8.0 seconds.", "Hm.", "The event does not happen in the video."]
    assert reward.compute_from_text(texts, [(4, 8), (4, 8), []]).tolist() == [1.0, 0.0, 1.0]
    assert reward.module.seen.isnan().all(1).tolist() == [False, True, True]
    assert reward(completions=texts[:1], timestamp=[[4, 8]]) == [1.0]
    assert reward(torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[3.0, 2.0]]).double()).tolist() == [1.0]
    assert reward.name == reward.__name__ == "my_reward"


def test_a_module_declares_what_it_needs():
    @register_reward("polite")
    class Polite(nn.Module):
        needs = ("texts", "pred_windows", "gt_windows", "durations", "sentence")
        judges_absence = True

        def __init__(self, word: str, scale: float = 2.0) -> None:
            super().__init__()
            self.word, self.scale = word, scale

        def forward(self, pred, gt, texts, pred_windows, gt_windows, durations, sentence):
            assert pred_windows == [[(1.0, 2.0), (3.0, 4.0)], []] and gt_windows == [((1.0, 2.0),), ()]
            assert durations == [9.0, 8.0] and sentence == ["a", "b"]
            return [self.scale * (self.word in text) for text in texts]

    texts = ["Please: from 1 to 2 s and from 3 to 4 s.", "The event does not happen in the video."]
    reward = build_reward("polite", {"word": "Please"})
    assert reward.scale == 2.0
    values = reward(texts, timestamp=[[1, 2], []], duration=[9, 8], sentence=["a", "b"])
    assert values == [2.0, 0.0]
    with pytest.raises(UserError, match="`polite` needs 'sentence', which is no column"):
        reward(texts, timestamp=[[1, 2], []], duration=[9, 8])
    with pytest.raises(UserError, match="`polite` needs the duration of every row"):
        reward(texts, timestamp=[[1, 2], []], sentence=["a", "b"])
    with pytest.raises(UserError, match=r"rewards\.polite needs word"):
        build_reward("polite", {})
    with pytest.raises(
        UserError, match=r"rewards\.polite\.wrod is not a key; did you mean word\? It takes weight, word"
    ):
        build_reward("polite", {"wrod": "Please"})


def test_a_reward_is_registered_as_it_is():
    @register_reward("squared")
    class Squared(TemporalIoU):
        """Steeper."""

        def marks(self, pred, gt, **needed):
            return super().marks(pred, gt) ** 2

    reward = build_reward("squared", {"scale": 4.0})
    assert isinstance(reward, Squared) and reward.compute_from_text(["0 to 2"], [(0, 4)]).item() == 1.0
    assert TemporalIoU.name == "temporal_iou" and reward.name == "squared"


def test_names():
    with pytest.raises(UserError, match="'temporal_iou' is a built-in reward"):
        register_reward("temporal_iou")
    for bad in ("", "a b", "a:b", "1st", nn.Module):
        with pytest.raises(UserError, match="register_reward takes a name"):
            register_reward(bad)
    with pytest.raises(UserError, match="reward `f` must be a class"):
        register_reward("f")(lambda pred, gt: pred)
    with pytest.raises(UserError, match="reward `f` must be a class"):
        register_reward("f")(dict)

    class Greedy(nn.Module):
        needs = "texts"

    with pytest.raises(UserError, match=r"reward `f`: `needs` must be a tuple of names"):
        register_reward("f")(Greedy)


def test_a_name_taken_over_is_told(caplog):
    class First(nn.Module):
        pass

    class Second(nn.Module):
        pass

    register_reward("mine")(First)
    register_reward("mine")(First)  # a notebook cell run again
    assert caplog.text == ""
    register_reward("mine")(Second)
    assert "reward mine was" in caplog.text and build_reward("mine", {}).module.__class__ is Second


def test_unknown_names_list_the_choices():
    with pytest.raises(
        UserError, match=r"rewards\.temporal_iuo is no reward; did you mean temporal_iou\? Choose from .*"
    ):
        build_reward("temporal_iuo", {})
    with pytest.raises(
        UserError, match=r"rewards\.xyz is no reward; choose from temporal_iou, segment_overlap, .*:Name"
    ):
        build_reward("xyz", {})


def test_unknown_parameters():
    with pytest.raises(UserError, match=r"rewards\.segment_overlap\.mod is not a key; did you mean mode\?"):
        build_reward("segment_overlap", {"mod": "recall"})

    @register_reward("bare")
    class Bare(nn.Module):
        pass

    with pytest.raises(UserError, match=r"rewards\.bare\.x is not a key; it takes weight$"):
        build_reward("bare", {"x": 1})


SOURCE = """
from torch import nn
import rewards

class Mine(nn.Module):
    def __init__(self, bonus=0.0):
        super().__init__()
        self.bonus = bonus
    def forward(self, pred, gt):
        return (pred[:, 0] == gt[:, 0]).double() + self.bonus

class Theirs(rewards.TemporalIoU):
    pass

number = 3
"""


@pytest.fixture
def own_package(tmp_path: Path, monkeypatch):
    (tmp_path / "own_rewards_pkg").mkdir()
    (tmp_path / "own_rewards_pkg" / "__init__.py").write_text("")
    (tmp_path / "own_rewards_pkg" / "mod.py").write_text(SOURCE)
    (tmp_path / "own_rewards_pkg" / "broken.py").write_text("import no_such_package_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_rewards_pkg"
    for name in [name for name in sys.modules if name.startswith("own_rewards_pkg")]:
        del sys.modules[name]


def test_by_path(own_package):
    reward = build_reward(f"{own_package}.mod:Mine", {"bonus": 0.5})
    assert reward.compute_from_text(["From 1.0 to 2.0 seconds."], [(1, 9)]).tolist() == [1.5]
    assert reward.name == f"{own_package}.mod:Mine"
    assert build_reward(f"{own_package}.mod:Theirs", {}).compute_from_text(["0 to 2"], [(0, 4)]).tolist() == [0.5]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("mod:Mien", "own_rewards_pkg.mod has no Mien; did you mean own_rewards_pkg.mod:Mine"),
        ("mod:number", "must be a class, an nn.Module with forward"),
        ("broken:Mine", "cannot be imported: No module named 'no_such_package_at_all'"),
        ("nothing:Mine", "cannot be imported: No module named 'own_rewards_pkg.nothing'"),
    ],
)
def test_by_path_with_a_mistake(own_package, path, message):
    with pytest.raises(UserError, match=message):
        build_reward(f"{own_package}.{path}", {})
