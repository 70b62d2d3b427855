"""The weighted sum, what it keeps, and what it says when a component fails. Ends with a step of TRL's own trainer."""

import math

import pytest
import torch
from torch import nn

from rewards import REWARDS, CompositeReward, build_reward, register_reward
from rewards.reward_registry import BUILT_IN
from utils.common import UserError

CONFIG = {"temporal_iou": {"weight": 1.0}, "segment_overlap": {"weight": 0.5, "mode": "recall"}}
TEXTS = ["From 2.0 to 6.0 seconds.", "From 0.0 to 4.0 seconds.", "Hm.", "The event does not happen in the video."]
LABELS = [(4, 6), (0, 8), (1, 2), []]


@pytest.fixture(autouse=True)
def _registry_as_it_was():
    before = dict(REWARDS)
    yield
    REWARDS.clear()
    REWARDS.update(before)


def test_weighted_sum():
    reward = CompositeReward(CONFIG)
    values = reward.compute_from_text(TEXTS, LABELS)
    assert values.tolist() == [0.5 + 0.5, 0.5 + 0.25, 0.0, 1.5] and values.dtype == torch.float64
    assert reward.components == {"temporal_iou": [0.5, 0.5, 0.0, 1.0], "segment_overlap": [1.0, 0.5, 0.0, 1.0]}
    assert reward.weights == {"temporal_iou": 1.0, "segment_overlap": 0.5} and reward.scale == 1.5
    assert reward(completions=TEXTS[:1], timestamp=LABELS[:1]) == [1.0]
    assert reward.components == {"temporal_iou": [0.5], "segment_overlap": [1.0]}


def test_components_are_rewards_of_their_own():
    """So that TRL can be given them one by one, with its `reward_weights`."""
    reward = CompositeReward(CONFIG)
    columns = {"timestamp": LABELS, "duration": [9.0] * 4}
    parts = [
        weight * torch.tensor(part(TEXTS, **columns))
        for weight, part in zip(reward.weights.values(), reward.rewards.values(), strict=True)
    ]
    assert sum(parts).tolist() == pytest.approx(reward(TEXTS, **columns))
    assert [part.__name__ for part in reward.rewards.values()] == list(CONFIG)


def test_tensors():
    pred, gt = torch.tensor([[2.0, 6.0]]).double(), torch.tensor([[4.0, 6.0]]).double()
    reward = CompositeReward(CONFIG | {"timestamp_iou": {"weight": 2}})
    assert reward(pred, gt, durations=[8.0]).tolist() == [1.0 + 2 * 0.5 * 0.75]


def test_weights():
    assert CompositeReward({"temporal_iou": None, "generalized_iou": {}}).weights == {
        "temporal_iou": 1,
        "generalized_iou": 1,
    }
    logged = CompositeReward({"temporal_iou": {"weight": 1}, "format": {"weight": 0}})
    assert logged.compute_from_text(TEXTS, LABELS).tolist() == [0.5, 0.5, 0.0, 1.0]
    assert logged.components["format"] == [1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("weight", [math.nan, math.inf, "1", True, None])
def test_bad_weights(weight):
    with pytest.raises(UserError, match=r"rewards\.temporal_iou\.weight must be a number, got"):
        CompositeReward({"temporal_iou": {"weight": weight}})


@pytest.mark.parametrize("config", [{}, [], None, "temporal_iou"])
def test_nothing_configured(config):
    with pytest.raises(UserError, match="rewards must map names to weights"):
        CompositeReward(config)


def test_a_bare_number_is_no_configuration():
    with pytest.raises(
        UserError, match=r"rewards\.temporal_iou must map keys to values, as in \{weight: 1.0\}, got 1.0"
    ):
        CompositeReward({"temporal_iou": 1.0})


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(UserError, match=r"did you mean segment_overlap\? Choose from temporal_iou"):
        CompositeReward({"segment_overlp": {"weight": 1.0}})


@pytest.mark.parametrize("config", [{"tiou": 1}, {"temporal_iou": 1.0, "tiou": {"weight": "much"}}])
def test_an_unknown_name_comes_before_what_it_is_given(config):
    with pytest.raises(UserError, match=r"^rewards\.tiou is no reward; did you mean temporal_iou\? Choose from"):
        CompositeReward(config)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda n: None, "returned None; it must return one number for each of the 4 rows"),
        (lambda n: torch.full((n,), math.nan), r"returned nan for 2 of 4 rows; first: row 0, label .*'From 2\.0 to"),
        (
            lambda n: torch.tensor([0.5, math.inf, 0, 0]),
            r"returned inf for 1 of 4 rows; first: row 1, .*\(0\.0, 8\.0\)",
        ),
        (lambda n: torch.zeros(n - 1), r"returned values of shape \(3,\); it must return one number"),
        (lambda n: torch.zeros(n, 2), r"returned values of shape \(4, 2\)"),
        (lambda n: 0.5, r"returned values of shape \(\)"),
        (lambda n: [0.5, None, 0.5, 0.5], "returned .*, which is not numeric"),
        (lambda n: "high", "returned .*, which is not numeric"),
    ],
)
def test_a_component_that_fails_is_named(returned, message):
    @register_reward("faulty")
    class Faulty(nn.Module):
        def forward(self, pred, gt):
            return returned(len(pred))

    reward = CompositeReward(CONFIG | {"faulty": {"weight": 0.1}})
    with pytest.raises(UserError, match=f"reward `faulty` {message}"):
        reward.compute_from_text(TEXTS, LABELS)


def test_values_of_other_kinds_are_taken():
    @register_reward("whole")
    class Whole(nn.Module):
        def forward(self, pred, gt):
            return [1] * len(pred)

    @register_reward("learned")
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.tensor(0.25))

        def forward(self, pred, gt):
            return self.bias.expand(len(pred))

    reward = CompositeReward({"whole": {}, "learned": {}})
    assert reward.compute_from_text(TEXTS, LABELS).tolist() == [1.25, 1.25, 0.0, 2.0]


def test_missing_column():
    with pytest.raises(UserError, match="finds no data set column `timestamp`"):
        CompositeReward(CONFIG)(completions=TEXTS)


def test_no_rows():
    reward = CompositeReward({name: {} for name in BUILT_IN})
    assert reward(completions=[], timestamp=[], duration=[]) == []


def test_shapes():
    with pytest.raises(
        UserError, match=r"`temporal_iou` takes pred and gt of one shape \(N, 2\), got \(2,\) and \(2,\)"
    ):
        build_reward("temporal_iou", {})(torch.zeros(2), torch.zeros(2))


@pytest.mark.slow
def test_my_reward_in_a_step_of_trl(tmp_path):
    """Exactly this `MyReward`, inside `CompositeReward`, in one step of the stock GRPOTrainer on a tiny text model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    from datasets import Dataset

    @register_reward("my_reward")
    class MyReward(nn.Module):
        def forward(self, pred, gt):
            return 1 / (1 + (pred - gt).abs().sum(-1))

    words = ["<pad>", "</s>", "?", "when", "1s-2s", "1s-3s", "0s-1s"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    processor = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="?")
    torch.manual_seed(0)
    shape = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(words), pad_token_id=0, eos_token_id=1, **shape))
    reward = CompositeReward({"my_reward": {"weight": 1.0}, "temporal_iou": {"weight": 0.5}})
    args = GRPOConfig(
        str(tmp_path), per_device_train_batch_size=8, num_generations=4, max_completion_length=6, max_steps=1,
        report_to=[], use_cpu=True, bf16=False, logging_steps=1, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "when", "timestamp": [1.0, 2.0], "duration": 9.0}] * 8)
    trainer = GRPOTrainer(model, reward, args=args, train_dataset=data, processing_class=processor)
    trainer.train()
    logged = trainer.state.log_history[0]
    total = [
        a + 0.5 * b for a, b in zip(reward.components["my_reward"], reward.components["temporal_iou"], strict=True)
    ]
    assert len(total) == 8 and max(total) > 0
    assert logged["rewards/composite/mean"] == pytest.approx(sum(total) / 8, abs=1e-6)
