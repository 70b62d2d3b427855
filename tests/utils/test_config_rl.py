"""GRPO's configuration: the shipped file, rewards, the choice of rows, refusals, rules, and the way to GRPOConfig."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from rewards import CompositeReward
from rewards.reward_registry import BUILT_IN
from utils.common import REPO_ROOT
from utils.config import (
    ConfigError,
    DataConfig,
    LoraConfig,
    ModelConfig,
    RLConfig,
    RLTrainingConfig,
    SelectConfig,
    SFTTrainingConfig,
    load_config,
    save_config,
)
from utils.config_rl import REFUSED, RENAMED

RL_YAML = REPO_ROOT / "configs/training/rl_config.yaml"
DATA_YAML = REPO_ROOT / "configs/data/video_config.yaml"
DEFAULT_REWARDS = {"temporal_iou": {"weight": 1.0}, "format": {"weight": 0.1}}


def load(*overrides: str) -> RLConfig:
    return load_config(RLConfig, [], overrides)


def problems(*overrides: str, path: Path | None = None) -> list[str]:
    """The lines of the error that loading raises."""
    with pytest.raises(ConfigError) as error:
        load_config(RLConfig, [path] if path else [], overrides)
    return list(error.value.problems)


def grpo_config(*overrides: str) -> Any:
    """TRL's arguments of the default configuration with `overrides`, on the CPU."""
    return load("training.use_cpu=true", *overrides).training.to_training_arguments("unused")


def grpo_keys() -> set[str]:
    return {field.name for field in dataclasses.fields(RLTrainingConfig.arguments_class())}


# ---- the shipped file


def test_shipped_file_holds_every_key_at_its_default() -> None:
    config = load_config(RLConfig, [RL_YAML, DATA_YAML])
    assert config.model == ModelConfig(name_or_path="outputs/sft/checkpoint-best")
    assert (config.lora, config.training, config.rewards) == (LoraConfig(), RLTrainingConfig(), DEFAULT_REWARDS)
    assert [str(source.path) for source in config.data.train] == ["data/annotations/train.jsonl"]
    written = yaml.safe_load(RL_YAML.read_text())
    assert list(written) == ["model", "lora", "rewards", "training"]
    assert set(written["training"]) == set(RLTrainingConfig.model_fields)
    assert set(written["model"]) == set(ModelConfig.model_fields)
    assert set(written["lora"]) == set(LoraConfig.model_fields)


@pytest.mark.parametrize(
    "path",
    sorted((REPO_ROOT / "configs").rglob("rl*.yaml")),
    ids=lambda path: path.relative_to(REPO_ROOT / "configs").as_posix(),
)
def test_every_shipped_rl_yaml_loads(path: Path) -> None:
    """The others are loaded by tests/utils/test_config.py."""
    written = yaml.safe_load(path.read_text())
    config = load_config(RLConfig, [path])
    assert list(config.rewards) == list(written["rewards"])
    assert config.training.learning_rate == float(written["training"]["learning_rate"])


def test_shipped_file_names_every_reward_and_they_can_be_built() -> None:
    text = RL_YAML.read_text()
    assert [name for name in BUILT_IN if name not in text] == []
    rewards = load_config(RLConfig, [RL_YAML]).rewards
    assert CompositeReward(rewards).weights == {"temporal_iou": 1.0, "format": 0.1}


@pytest.mark.parametrize("thinking", [True, False])
def test_format_is_that_of_the_prompt_unless_it_says_itself(thinking: bool) -> None:
    plain, thought = "From 1.0 to 2.0 seconds.", "<think>So.</think><answer>From 1.0 to 2.0 seconds.</answer>"

    def earned(*overrides: str) -> list[float]:
        config = load_config(RLConfig, [], [f"prompt.thinking={str(thinking).lower()}", *overrides])
        reward = CompositeReward(config.rewards_for_prompt)
        return reward.rewards["format"].compute_from_text([plain, thought], [(1.0, 2.0)] * 2).tolist()

    assert earned() == [float(not thinking), float(thinking)]
    assert earned("rewards.format.thinking=null") == [1.0, 1.0]
    assert earned(f"rewards.format.thinking={str(not thinking).lower()}") == [float(thinking), float(not thinking)]
    assert "format" not in load_config(RLConfig, [], ["rewards.temporal_iou.weight=1"]).rewards_for_prompt


def test_the_documented_lora_block_is_taken() -> None:
    lora = load(
        "lora.r=64",
        "lora.lora_alpha=128",
        "lora.target_modules=[q_proj, k_proj, v_proj, o_proj, lm_head]",
        "lora.modules_to_save=[embed_tokens, lm_head]",
    ).lora
    assert (lora.r, lora.lora_alpha) == (64, 128)
    assert "lm_head" in lora.target_modules and lora.modules_to_save == ("embed_tokens", "lm_head")


def test_documented_defaults() -> None:
    training = RLConfig().training
    rates = (training.learning_rate, training.mm_projector_lr, training.vision_tower_lr, training.head_lr)
    assert rates == (1e-5, 0.0, 0.0, 1e-6)
    assert (training.num_generations, training.temperature, training.top_p, training.top_k) == (4, 0.7, 1.0, 0)
    assert (training.kl_coef, training.clip_range, training.clip_range_high) == (0.05, 0.2, None)
    assert (training.loss_type, training.scale_rewards, training.num_iterations) == ("dapo", "group", 1)
    assert (training.max_completion_length, training.mask_truncated_completions) == (64, False)
    batch = (training.per_device_train_batch_size, training.per_device_eval_batch_size)
    assert (batch, training.steps_per_generation, training.num_train_epochs) == ((4, 4), None, 1.0)
    sharing = (training.share_prefix, training.check_sharing, training.rollout_prompts, training.ground_truth_rollout)
    assert (sharing, training.log_rollouts, training.logging_steps) == ((True, True, 2, False), True, 1)
    assert RLConfig().rewards == DEFAULT_REWARDS


def test_keys_shared_with_sft_agree() -> None:
    """But for those that GRPO sets otherwise on purpose."""
    own, sft = RLTrainingConfig().model_dump(), SFTTrainingConfig().model_dump()
    assert set(sft) - set(own) == {"max_new_tokens", "group_by_length", "share_video", "max_queries_per_video"}
    assert {name for name in set(own) & set(sft) if own[name] != sft[name]} == {
        "learning_rate",
        "mm_projector_lr",
        "head_lr",
        "per_device_train_batch_size",
        "num_train_epochs",
        "lr_scheduler_type",
        "warmup_ratio",
        "logging_steps",
        "eval_steps",
        "save_steps",
    }


# ---- GRPOConfig


def test_own_names_reach_grpo_config() -> None:
    arguments = grpo_config(
        "training.kl_coef=0.04",
        "training.clip_range=0.1",
        "training.clip_range_high=0.28",
        "training.num_generations=8",
        "training.per_device_train_batch_size=16",
        "training.steps_per_generation=2",
        "training.delta=4",
    )
    assert type(arguments).__name__ == "GRPOConfig"
    assert (arguments.beta, arguments.epsilon, arguments.epsilon_high, arguments.delta) == (0.04, 0.1, 0.28, 4)
    assert (arguments.num_generations, arguments.generation_batch_size) == (8, 32)
    assert (arguments.steps_per_generation, arguments.gradient_accumulation_steps) == (2, 8)


def test_defaults_reach_grpo_config() -> None:
    arguments = grpo_config()
    assert (arguments.beta, arguments.epsilon, arguments.epsilon_high) == (0.05, 0.2, None)
    assert (arguments.learning_rate, arguments.temperature, arguments.max_completion_length) == (1e-5, 0.7, 64)
    assert (arguments.steps_per_generation, arguments.generation_batch_size) == (8, 32)
    assert (arguments.lr_scheduler_type.value, arguments.get_warmup_steps(100)) == ("constant_with_warmup", 5)
    assert (arguments.remove_unused_columns, arguments.label_names) == (False, None)
    assert (arguments.bf16, arguments.gradient_checkpointing, arguments.logging_steps) == (True, True, 1)
    assert (arguments.use_vllm, arguments.reward_weights, arguments.log_completions) == (False, None, False)


def test_what_nobody_set_is_left_to_trl() -> None:
    arguments = grpo_config("training.top_entropy_quantile=0.2")
    plain = RLTrainingConfig.arguments_class()(output_dir="unused", use_cpu=True)
    changed = {name for name in grpo_keys() if getattr(arguments, name) != getattr(plain, name)}
    assert changed - set(RLTrainingConfig.model_fields) - set(RENAMED.values()) == {
        "top_entropy_quantile",
        "num_generations_eval",
        "generation_batch_size",  # these two follow from own keys
        "do_eval",
    }


def test_gradient_checkpointing_can_be_switched_off() -> None:
    """TRL has it on by default, under the older of transformers' two names."""
    assert grpo_config("training.gradient_checkpointing=false").gradient_checkpointing is False


def test_validation_is_greedy_so_its_batch_may_have_any_size() -> None:
    arguments = grpo_config("training.per_device_eval_batch_size=3")
    assert (arguments.num_generations_eval, arguments.per_device_eval_batch_size) == (1, 3)


def test_what_grpo_config_refuses_is_named_by_our_key() -> None:
    assert load().training._refusal("epsilon_high is no good", {}) == (
        "training.clip_range_high: the Trainer refuses the value (epsilon_high is no good); change it in the config"
    )
    wrong = load("training.use_cpu=true", "training.pad_to_multiple_of=many").training
    with pytest.raises(ConfigError, match=r"training\.pad_to_multiple_of: .*'many'"):
        wrong.to_training_arguments("unused")


# ---- keys


def test_every_grpo_key_is_reachable_or_refused() -> None:
    reachable = set(RLTrainingConfig.complete().model_fields)
    assert grpo_keys() - reachable - set(REFUSED) == set()
    assert reachable.isdisjoint(REFUSED)
    assert {
        "delta",
        "min_p",
        "shuffle_dataset",
        "disable_dropout",
        "use_cpu",
        "adam_beta2",
        "entropy_coef",
    } <= reachable
    assert {"importance_sampling_level", "off_policy_mask_threshold", "ds3_gather_for_generation"} <= reachable


def test_no_newer_trl_brings_in_what_is_refused_by_kind() -> None:
    reachable = RLTrainingConfig.complete().model_fields
    unwanted = ("vllm", "ref_model", "continuous_batching", "tool", "environment", "completions_", "liger", "hub")
    own = set(RLTrainingConfig.model_fields)
    assert [name for name in reachable if name not in own and any(word in name for word in unwanted)] == []


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (["beta"], "write training.kl_coef"),
        (["epsilon"], "write training.clip_range"),
        (["epsilon_high"], "write training.clip_range_high"),
        (["use_vllm", "vllm_mode", "vllm_server_host", "vllm_importance_sampling_cap"], "drops the video tokens"),
        (["use_transformers_continuous_batching", "use_transformers_paged"], "takes token ids alone, so it drops the"),
        (["use_liger_kernel", "liger_kernel_config"], "replaces parts of the forward pass"),
        (["generation_batch_size"], "per_device_train_batch_size x steps_per_generation x GPUs"),
        (["reward_weights"], "set rewards.<name>.weight"),
        (["remove_unused_columns"], "it would drop the video tensors"),
        (["model_init_kwargs"], "the section model"),
        (["trust_remote_code"], "set model.trust_remote_code"),
        (["chat_template_kwargs"], "the section prompt"),
        (["max_tool_calling_iterations"], "call no tools"),
        (["log_completions", "num_completions_to_print", "log_completions_hub_repo"], "set training.log_rollouts"),
        (["sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"], "the frozen model that the run starts"),
        (["cast_lm_head_to_fp32"], "does not find Qwen3-VL's embeddings"),
        (["generation_kwargs"], "another temperature than the loss divides by"),
        (["num_generations_eval"], "every row once, greedily"),
        (["max_prompt_length"], "set data.max_prompt_tokens"),
        (["max_new_tokens"], "takes training.max_completion_length too"),
        (["group_by_length", "train_sampling_strategy"], "training.shuffle_dataset: false keeps the order"),
        (["metric_for_best_model", "load_best_model_at_end"], "checkpoint-best is always kept by eval/reward"),
        (["label_names", "label_smoothing_factor"], "reads no labels"),
        (["local_rank"], "start with scripts/rl.sh --num_gpus N"),
        (["output_dir"], "--output_dir FOLDER"),
        (["push_to_hub"], "training publishes nothing"),
        (["auto_find_batch_size"], "lower training.per_device_train_batch_size yourself"),
        (["neftune_noise_alpha"], "another log-probability in every pass"),
    ],
)
def test_refused_keys_give_reason_and_remedy(keys: list[str], reason: str) -> None:
    found = problems(*(f"training.{key}=1" for key in keys))
    assert len(found) == len(keys)
    for key, problem in zip(keys, found, strict=True):
        assert problem.startswith(f"training.{key} cannot be set here (command line); ") and reason in problem


def test_misspelt_keys_and_values() -> None:
    found = problems(
        "training.num_generation=4",
        "training.kl_coeff=0.1",
        "training.loss_type=dapoo",
        "training.scale_rewards=false",
        "training.importance_sampling_level=sequense",
        "training.multi_objective_aggregation=sum",
        "training.temperature=0",
        "training.top_p=1.5",
        "training.num_generations=1",
        "training.kl_coef=-0.1",
        "training.rollout_prompts=0",
        "training.steps_per_generation=0",
        "training.num_iterations=0",
    )
    assert sorted(found) == sorted([
        "training.num_generation is not a key (command line); did you mean num_generations?",
        "training.kl_coeff is not a key (command line); did you mean kl_coef?",
        "training.num_generations must be >= 2, got 1 (command line)",
        "training.temperature must be > 0, got 0 (command line)",
        "training.top_p must be <= 1, got 1.5 (command line)",
        "training.kl_coef must be >= 0, got -0.1 (command line)",
        "training.loss_type must be one of grpo, dr_grpo, dapo, bnpo, cispo, sapo, luspo, vespo, got 'dapoo' "
        "(command line); did you mean dapo?",
        "training.scale_rewards must be one of group, batch, none, got false (command line)",
        "training.num_iterations must be >= 1, got 0 (command line)",
        "training.steps_per_generation must be >= 1, got 0 (command line)",
        "training.rollout_prompts must be >= 1, got 0 (command line)",
        "training.multi_objective_aggregation must be one of sum_then_normalize, normalize_then_sum, got 'sum' "
        "(command line); did you mean sum_then_normalize?",
        "training.importance_sampling_level must be one of token, sequence, got 'sequense' (command line); "
        "did you mean sequence?",
    ])  # fmt: skip


# ---- rules


@pytest.mark.parametrize(
    ("size", "group", "remedy"),
    [
        (6, 4, "set the batch size to 4 or 8, or training.num_generations to 3 or 6"),
        (4, 3, "set the batch size to 3 or 6, or training.num_generations to 2 or 4"),
        (2, 4, "set the batch size to 4, or training.num_generations to 2"),
        (1, 4, "set the batch size to 4"),
        (7, 4, "set the batch size to 4 or 8, or training.num_generations to 7"),
    ],
)
def test_a_forward_pass_holds_whole_groups(size: int, group: int, remedy: str, tmp_path: Path) -> None:
    path = tmp_path / "rl.yaml"
    path.write_text(f"training:\n  num_generations: {group}\n  per_device_train_batch_size: {size}\n")
    assert problems(path=path) == [
        "training.per_device_train_batch_size must be a multiple of training.num_generations, so that a forward pass "
        f"holds whole groups, got {size} and {group} ({path}:3; {path}:2); {remedy}"
    ]


@pytest.mark.parametrize(("size", "group"), [(2, 2), (8, 4), (16, 8)])
def test_whole_groups_are_taken(size: int, group: int) -> None:
    arguments = grpo_config(f"training.per_device_train_batch_size={size}", f"training.num_generations={group}")
    assert (arguments.per_device_train_batch_size, arguments.num_generations) == (size, group)


def test_rules_between_training_keys() -> None:
    zero = ("training.learning_rate=0", "training.head_lr=0", "lora.enabled=false")
    assert problems(*zero, "training.clip_range_high=0.1") == [
        "training.learning_rate, training.mm_projector_lr, training.vision_tower_lr, training.head_lr are all 0, "
        "so nothing would train (command line); raise one of them",
        "training.clip_range_high must be >= training.clip_range, got 0.1 and 0.2 (command line); "
        "raise it, or set it to null for the same range",
    ]
    (no_validation,) = problems(
        "training.early_stopping_patience=1", "training.eval_strategy=no", "data.val=v.jsonl"
    )  # fmt: skip
    assert no_validation.startswith("training.early_stopping_patience needs validations, and training.eval_strategy is")
    assert load("training.clip_range_high=0.2").training.clip_range_high == 0.2


def test_rules_between_sections() -> None:
    assert problems("training.head_lr=0", "training.early_stopping_patience=2") == [
        "training.head_lr must be > 0 while lora.modules_to_save holds embed_tokens and lm_head, got 0 (command line); "
        "raise training.head_lr, or take them out of lora.modules_to_save",
        "training.early_stopping_patience needs validations, and data.val is empty (command line); "
        "name a file in data.val, or set the patience to null",
    ]


# ---- rewards


def test_rewards_are_a_plain_mapping(tmp_path: Path) -> None:
    path = tmp_path / "rl.yaml"
    path.write_text(
        "rewards:\n  temporal_iou:\n  segment_overlap: {weight: 2, mode: recall}\n  my.rewards:Mine: {weight: -0.5}\n"
    )
    expected = {
        "temporal_iou": {},
        "segment_overlap": {"weight": 2.0, "mode": "recall"},
        "my.rewards:Mine": {"weight": -0.5},
    }
    rewards = load_config(RLConfig, [path]).rewards
    assert rewards == expected and [type(terms) for terms in rewards.values()] == [dict] * 3
    del rewards["my.rewards:Mine"]
    assert CompositeReward(rewards).weights == {"temporal_iou": 1.0, "segment_overlap": 2.0}


def test_rewards_on_the_command_line() -> None:
    config = load_config(RLConfig, [RL_YAML], ["rewards.temporal_iou.weight=2", "rewards.length_penalty.weight=0"])
    assert config.rewards == {"temporal_iou": {"weight": 2}, "format": {"weight": 0.1}, "length_penalty": {"weight": 0}}


@pytest.mark.parametrize("text", ["rewards:\n", "rewards: {}\n", "lora:\n  r: 8\n"])
def test_without_a_reward_the_defaults_stand(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rl.yaml"
    path.write_text(text)
    assert load_config(RLConfig, [path]).rewards == DEFAULT_REWARDS


def test_wrong_rewards_have_their_line(tmp_path: Path) -> None:
    path = tmp_path / "rl.yaml"
    path.write_text("rewards:\n  a: 3\n  b:\n    weight: high\n  c: {weight: .inf}\n  d: {weight: true}\n  e: [1]\n")
    assert problems(path=path) == [
        f"rewards.a must be a mapping of keys, got 3 ({path}:2)",
        f"rewards.b.weight must be a number, got 'high' ({path}:4)",
        f"rewards.c.weight must be a finite number, got inf ({path}:5)",
        f"rewards.d.weight must be a number, got true ({path}:6)",
        f"rewards.e must be a mapping of keys, got [1] ({path}:7)",
    ]
    path.write_text("rewards: temporal_iou\n")
    assert problems(path=path) == [f"rewards must be a mapping of keys, got 'temporal_iou' ({path}:1)"]


def test_no_reward_at_all_is_refused_in_code() -> None:
    with pytest.raises(ValidationError):
        RLConfig(rewards={})
    assert RLConfig(rewards={"format": {"weight": 2}}).rewards == {"format": {"weight": 2}}


# ---- data.select


def test_select() -> None:
    assert load().data.select is None
    select = load("data.select.mean=0.4", "data.select.num_rows=800").data.select
    assert select == SelectConfig(mean=0.4, num_rows=800)
    assert (SelectConfig().by, SelectConfig().mean, SelectConfig().std) == ("model_iou_mean", 0.5, 0.2)
    assert (SelectConfig().min_iou, SelectConfig().num_rows, SelectConfig().seed) == (0.05, None, 0)
    assert DataConfig(select=SelectConfig()).select == SelectConfig()


def test_wrong_select(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    path.write_text("data:\n  select:\n    std: 0\n    num_rows: 0\n    meen: 0.5\n    by: ''\n")
    assert problems(path=path) == [
        f"data.select.std must be > 0, got 0 ({path}:3)",
        f"data.select.num_rows must be >= 1, got 0 ({path}:4)",
        f"data.select.meen is not a key ({path}:5); did you mean mean?",
        f"data.select.by must not be empty, got '' ({path}:6)",
    ]
    path.write_text("data:\n  select: 800\n")
    assert problems(path=path) == [f"data.select must be a mapping of keys, got 800 ({path}:2)"]


# ---- saving


def test_saved_config_loads_equal(tmp_path: Path) -> None:
    overrides = [
        "rewards.segment_overlap.mode=recall",
        "rewards.temporal_iou.weight=2",
        "training.entropy_coef=0.01",
        "training.clip_range_high=0.28",
        "data.select.num_rows=800",
    ]
    config = load_config(RLConfig, [RL_YAML, DATA_YAML], overrides)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(RLConfig, [tmp_path / "config.yaml"]) == config
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert set(written["training"]) == {*RLTrainingConfig.model_fields, "entropy_coef"}  # nothing nobody set
    assert written["rewards"] == {
        "temporal_iou": {"weight": 2.0},
        "format": {"weight": 0.1},
        "segment_overlap": {"mode": "recall"},
    }
    assert written["data"]["select"]["num_rows"] == 800


def test_default_config_saves_and_loads_equal(tmp_path: Path) -> None:
    save_config(RLConfig(), tmp_path / "c.yaml")
    assert load_config(RLConfig, [tmp_path / "c.yaml"]) == RLConfig()


def test_config_pickles_and_copies() -> None:
    config = load("training.delta=4", "rewards.format.weight=1", "data.select.num_rows=3")
    for twin in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert twin == config and twin.rewards == {"format": {"weight": 1}}
        assert twin.training.values()["delta"] == 4
