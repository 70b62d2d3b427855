"""The `training` and `rewards` sections of GRPO.

Beside the keys that SFT has too (`utils.config_training`) stand those of sampling, of the loss and of sharing a prompt,
and every `trl.GRPOConfig` key that makes sense with video. What a reward takes is checked by `rewards`, training is
`trainers.rl_trainer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, PlainSerializer

from utils.config_base import Broken, StrictModel
from utils.config_trainer import TrainerSection
from utils.config_training import LearningKeys, RecordKeys, Updates, refusals, stopping_rule

if TYPE_CHECKING:
    from trl import GRPOConfig

RENAMED: Mapping[str, str] = {"kl_coef": "beta", "clip_range": "epsilon", "clip_range_high": "epsilon_high"}
"""Keys of this project that GRPOConfig knows by another name."""

_VLLM = (
    "vLLM changes or drops the video tokens of Qwen3-VL, so its prompt tokens are not those that are trained on; "
    "completions are sampled by transformers, the prompt shared (training.share_prefix)"
)
_VLLM_KEYS = (
    "use_vllm",
    "vllm_mode",
    "vllm_model_impl",
    "vllm_enable_sleep_mode",
    "vllm_structured_outputs_regex",
    "vllm_server_base_url",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_server_timeout",
    "vllm_group_port",
    "vllm_gpu_memory_utilization",
    "vllm_max_model_length",
    "vllm_tensor_parallel_size",
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_cap",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
)
_BATCHING = "continuous batching takes token ids alone, so it drops the video; training.rollout_prompts batches prompts"
_BATCHING_KEYS = (
    "use_transformers_continuous_batching",
    "transformers_continuous_batching_config",
    "use_transformers_paged",
)
_LIGER = "it replaces parts of the forward pass that a shared prompt goes through, and TRL 2 drops it; leave it out"
_REFERENCE = "the KL reference is the frozen model that the run starts from; training.kl_coef weighs it"
_ROLLOUTS = "set training.log_rollouts: every rollout goes to rollouts.jsonl in the run's folder"
_ORDER = "prompts are drawn in whole groups, shuffled; training.shuffle_dataset: false keeps the order of the files"
_NO_LABELS = "the loss is the policy gradient's and reads no labels; choose it by training.loss_type"
_MODEL_SECTION = "the section model says how the model is loaded"

REFUSED: Mapping[str, str] = {
    **refusals("eval/reward", "scripts/rl.sh"),
    **{theirs: f"write training.{ours}" for ours, theirs in RENAMED.items()},
    **dict.fromkeys(_VLLM_KEYS, _VLLM),
    **dict.fromkeys(_BATCHING_KEYS, _BATCHING),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), _LIGER),
    **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), _REFERENCE),
    **dict.fromkeys(("log_completions", "log_multimodal", "num_completions_to_print"), _ROLLOUTS),
    "log_unique_prompts": _ROLLOUTS,
    "log_completions_hub_repo": f"training publishes nothing; {_ROLLOUTS}",
    **dict.fromkeys(("train_sampling_strategy", "length_column_name", "group_by_length"), _ORDER),
    "data_seed": "the order of prompts follows training.seed",
    "label_names": _NO_LABELS,
    "label_smoothing_factor": _NO_LABELS,
    "generation_batch_size": "it follows: per_device_train_batch_size x steps_per_generation x GPUs",
    "num_generations_eval": "validation answers every row once, greedily",
    "max_new_tokens": "validation takes training.max_completion_length too",
    "max_prompt_length": "set data.max_prompt_tokens",
    "reward_weights": "set rewards.<name>.weight",
    "model_init_kwargs": _MODEL_SECTION,
    "trust_remote_code": "set model.trust_remote_code",
    "chat_template_kwargs": "the section prompt holds the words of the question",
    "generation_kwargs": "they could sample at another temperature than the loss divides by, or video tokens; set "
    "training.temperature, top_p, top_k, min_p, repetition_penalty or max_completion_length",
    "cache_implementation": "one filled cache is copied for the completions of a group, which takes the default kind",
    "max_tool_calling_iterations": "completions are answers and call no tools",
    "router_aux_loss_coef": "it is for mixtures of experts, and only dense models are trained",
    "cast_lm_head_to_fp32": "TRL's cast does not find Qwen3-VL's embeddings; a trained copy of the head is float32 "
    "already (outside DeepSpeed), and model.torch_dtype: float32 makes everything so",
    "auto_find_batch_size": "a smaller batch would split groups; lower training.per_device_train_batch_size yourself",
    "neftune_noise_alpha": "its noise would give one completion another log-probability in every pass; leave it out",
}
"""Keys that a config may not set, with the reason and what to do instead."""


class _GRPOKeys(TrainerSection):
    """What only GRPO has."""

    num_generations: int = Field(4, ge=2)
    """Completions sampled per prompt (GRPO group size G)."""
    temperature: float = Field(0.7, gt=0)
    """Of sampling; the loss divides the logits by it too. Higher gives more varied completions."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the likeliest tokens that make up this share of the probability; 1 takes all."""
    top_k: int = Field(0, ge=0)
    """Sample from this many likeliest tokens; 0 takes all."""
    max_completion_length: int = Field(64, ge=1)
    """Tokens of a completion at most, in training and in validation. With prompt.thinking 512 or more."""
    mask_truncated_completions: bool = False
    """Leave completions that reach max_completion_length out of the loss. false teaches the model to end its answer."""
    kl_coef: float = Field(0.05, ge=0)
    """Weight of the KL divergence from the model the run starts from (GRPOConfig's `beta`). 0 needs no reference."""
    clip_range: float = Field(0.2, gt=0, lt=1)
    """How far below 1 the ratio of new to old probability counts (GRPOConfig's `epsilon`)."""
    clip_range_high: float | None = Field(None, gt=0)
    """How far above 1 it counts (GRPOConfig's `epsilon_high`); null takes clip_range."""
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"] = "dapo"
    """How the losses of tokens are averaged; dapo: over all completion tokens of an update."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the group's rewards, of the whole batch's, or not at all."""
    num_iterations: int = Field(1, ge=1)
    """Times each batch of completions is trained on."""
    steps_per_generation: int | None = Field(None, ge=1)
    """Forward passes that one round of sampling feeds; null: gradient_accumulation_steps, a round for each update."""
    share_prefix: bool = True
    """Compute the video and the prompt once per group. false computes them for every completion: equal, and slower."""
    check_sharing: bool = True
    """With share_prefix: compare both ways once at the start, and stop if they differ."""
    rollout_prompts: int = Field(2, ge=1)
    """Prompts whose completions are sampled together on each GPU, with a key/value cache for each completion."""
    ground_truth_rollout: bool = False
    """Put the labelled answer in the place of one completion of each group (TempSamp-R1)."""
    log_rollouts: bool = True
    """Append every completion with its rewards to rollouts.jsonl in the run's folder."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after this many validations without a better eval/reward; null never stops early."""


class RLTrainingConfig(RecordKeys, _GRPOKeys, LearningKeys):  # pydantic lists the last base's keys first
    """How GRPO trains. Any other GRPOConfig key may be written beside these, but for the `REFUSED` ones."""

    REFUSED: ClassVar[Mapping[str, str]] = REFUSED
    RENAMED: ClassVar[Mapping[str, str]] = RENAMED
    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "importance_sampling_level": ("token", "sequence"),
        "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    }

    learning_rate: float = Field(1e-5, ge=0)
    """Peak learning rate of the language LoRA. About 1e-6 in full fine-tuning. 0 freezes them."""
    mm_projector_lr: float = Field(0.0, ge=0)
    """Peak learning rate of the merger and the deepstack mergers. 0 freezes them, and keeps each video's features."""
    head_lr: float = Field(1e-6, ge=0)
    """Peak learning rate of the token embeddings and the output head, which train in full."""
    per_device_train_batch_size: int = Field(4, ge=1)
    """Completions in one forward pass on each GPU: whole groups, so a multiple of num_generations."""
    gradient_accumulation_steps: int = Field(8, ge=1)
    """Forward passes to one update, which sees this x per_device_train_batch_size x GPUs completions."""
    num_train_epochs: float = Field(1.0, gt=0)
    """Passes over the training rows, one prompt each."""
    lr_scheduler_type: str = "constant_with_warmup"
    """Shape of the learning rate over the run, one of transformers' schedulers."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Share of all updates over which the learning rates rise from 0. Not used when warmup_steps is set."""
    logging_steps: Updates = 1
    """Updates between two lines of rewards, loss and speed; below 1 a share of the run."""
    eval_steps: Updates = 50
    """Updates between two validations; below 1 a share of the run."""
    save_steps: Updates = 50
    """Updates between two checkpoints; below 1 a share of the run."""

    @classmethod
    def arguments_class(cls) -> type[GRPOConfig]:
        """TRL's arguments, which extend transformers'. Imports trl, which takes seconds."""
        from utils.attach import attach

        attach()  # trl imports Hugging Face's datasets, not our folder of that name
        from trl import GRPOConfig

        return GRPOConfig

    def rules(self) -> Iterable[Broken]:
        """Something trains, groups stay whole, and the upper clip range is no smaller than the lower."""
        yield from super().rules()
        yield from stopping_rule(self.early_stopping_patience, self.eval_strategy)
        yield from self._groups_are_whole()
        if self.clip_range_high is not None and self.clip_range_high < self.clip_range:
            keys = ("training.clip_range_high", "training.clip_range")
            text = f"training.clip_range_high must be >= training.clip_range, got {self.clip_range_high:g} and "
            yield Broken(keys, f"{text}{self.clip_range:g}", "raise it, or set it to null for the same range")

    def _groups_are_whole(self) -> Iterable[Broken]:
        """Every forward pass on a GPU holds whole groups: what a group shares is computed in one of them."""
        size, group = self.per_device_train_batch_size, self.num_generations
        if size % group == 0:
            return
        keys = ("training.per_device_train_batch_size", "training.num_generations")
        text = f"{keys[0]} must be a multiple of {keys[1]}, so that a forward pass holds whole groups"
        sizes = [near for near in (size // group * group, (size // group + 1) * group) if near]
        remedy = f"set the batch size to {_either(sizes)}"
        if groups := _divisors_around(size, group):
            remedy += f", or {keys[1]} to {_either(groups)}"
        yield Broken(keys, f"{text}, got {size} and {group}", remedy)

    def trainer_values(self) -> dict[str, Any]:
        """With one answer for each row of a validation."""
        return {**super().trainer_values(), "num_generations_eval": 1}


def _divisors_around(size: int, group: int) -> list[int]:
    """The divisors of `size` next below and next above `group`, from 2 on.

    >>> _divisors_around(6, 4)
    [3, 6]
    """
    divisors = [number for number in range(2, size + 1) if size % number == 0]
    below, above = [n for n in divisors if n < group], [n for n in divisors if n > group]
    return below[-1:] + above[:1]


def _either(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, numbers))


class _RewardTerms(StrictModel):
    """The keys of one reward: its weight, and what the reward itself takes."""

    model_config = ConfigDict(extra="allow")

    weight: float = 1.0
    """The rewards are summed with these weights; 0 only logs the reward, a negative weight makes it a cost."""


if TYPE_CHECKING:
    RewardTerms = dict[str, Any]
else:
    RewardTerms = Annotated[
        _RewardTerms,
        BeforeValidator(lambda value: {} if value is None else value),  # a bare `temporal_iou:` in YAML
        AfterValidator(lambda terms: terms.model_dump(exclude_unset=True)),
        PlainSerializer(dict),
    ]
"""What `rewards` says of one reward, a plain mapping: `weight`, a finite number, and keys that the reward checks."""


def default_rewards() -> dict[str, RewardTerms]:
    """IoU, and a little for an answer that can be read: without it a wrong window and prose would earn the same."""
    return {"temporal_iou": {"weight": 1.0}, "format": {"weight": 0.1}}
