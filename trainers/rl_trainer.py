"""GRPO on video: a thin subclass of TRL's GRPOTrainer through its own hooks; no method of it is copied.

TRL keeps the algorithm (groups, advantages, loss types, KL reference, metrics). Here stands what video needs: prompts
with pixels that are read and computed once per group (`trainers.shared_prefix`), groups that stay whole in every
micro-batch, rewards from `rewards`, held-out validation, exact resume, and the record of every rollout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import unwrap_model_for_generation

from datasets.collate_fns import VideoCollator, sum_reads
from datasets.encoding import Sample, append_answer
from datasets.rollouts import GroupSampler, RolloutCollator, RolloutDataset, RolloutRow
from datasets.video_dataset import VideoTemporalDataset
from rewards import CompositeReward, zero_spread_share
from trainers.generation import autocast_for, check_sees_video, vision_token_ids
from trainers.model import Policy, settle_reference
from trainers.parts import freeze_by_rate
from trainers.rollout_batches import (
    Scored,
    ScoredRows,
    check_batch_shape,
    is_fault,
    regroup,
    until_end,
    widen,
)
from trainers.rollout_log import ROLLOUTS_FILE, append_records, flat_cause, group_record, supersede
from trainers.run_keeper import RunKeeper, TrainingSetup, rng_kept
from trainers.shared_prefix import (
    Packed,
    Prompt,
    enable_shared_prefix,
    make_prompt,
    pack,
    rows,
    sample_rows,
    sample_shared,
    vision_is_frozen,
    with_vision,
)
from trainers.sharing_check import check_sharing, compute_dtype
from utils.common import UserError, or_nan
from utils.config import RLTrainingConfig
from utils.logging_utils import get_logger
from utils.spans import parse_spans

FLAT_SHARE, FLAT_PATIENCE = 0.8, 10
"""A warning comes when more than this share of groups has no spread for so many generation steps on end."""


@dataclass(frozen=True)
class RolloutSettings:
    """How rollouts are made; the part of the configuration that TRL does not know."""

    share_prefix: bool = True
    check_sharing: bool = True
    rollout_prompts: int = 2
    ground_truth_rollout: bool = False
    log_rollouts: bool = True

    @classmethod
    def from_training(cls, training: RLTrainingConfig) -> RolloutSettings:
        """The keys of the `training` section."""
        return cls(
            training.share_prefix,
            training.check_sharing,
            training.rollout_prompts,
            training.ground_truth_rollout,
            training.log_rollouts,
        )


class VideoGRPOTrainer(RunKeeper, GRPOTrainer):
    """Trains a `Policy` by GRPO on the rows of a `VideoTemporalDataset`.

    Args:
        policy: as `trainers.model.load_policy` gives it. With `args.beta` > 0 and LoRA, the KL reference is a frozen
            copy of the adapter as it is now.
        train_dataset: `with_answer=False`.
        eval_dataset: `with_answer=False`, or None for no validation.
        reward: what completions earn. Its components are logged one by one.
        args: TRL's GRPOConfig.
        setup: learning rates per part, prompt contract, validation and fault limits.
        rollout: sharing, and what is recorded.

    Raises:
        UserError: fewer rows than one generation batch has prompts, or micro-batches that would split a group.
    """

    _buffered_inputs: Any  # TRL does not say their types
    best_metric: ClassVar[str] = "eval_reward"
    memory_advice: ClassVar[str] = "training.rollout_prompts, training.num_generations, "

    def __init__(
        self,
        policy: Policy,
        train_dataset: VideoTemporalDataset,
        eval_dataset: VideoTemporalDataset | None,
        reward: CompositeReward,
        args: GRPOConfig,
        setup: TrainingSetup,
        rollout: RolloutSettings | None = None,
    ) -> None:
        self.rollout = rollout or RolloutSettings()
        self.reward = reward
        self.rows = RolloutDataset(train_dataset)
        check_batch_shape(args, len(self.rows))
        self.prepare(policy, self.rows, eval_dataset, args, setup)
        args.reward_weights = list(reward.weights.values())
        args.shuffle_dataset, shuffle = False, args.shuffle_dataset  # the sampler below does it
        self.shuffle = shuffle
        from datasets import Dataset as TableDataset  # TRL insists on one; the rows are put in its place below

        super().__init__(
            model=policy.model,
            reward_funcs=[ScoredRows(name, part) for name, part in reward.rewards.items()],
            args=args,
            train_dataset=TableDataset.from_dict({"prompt": [""]}),
            eval_dataset=eval_dataset,
            processing_class=policy.processor,
        )
        self.train_dataset = self.rows
        self.data_collator = RolloutCollator(train_dataset)
        self._settle_model(policy)
        self._settle_sampling(policy)
        self._prompts: list[Prompt] = []  # of the generation batch, one a group
        self._active: list[Prompt] = []  # of the rows that are being scored
        self._faulty: list[bool] = []  # rows of the generation batch whose video could not be read
        self._table: list[RolloutRow] = []
        self._scored = Scored([], [], torch.zeros(0, len(reward.rewards)))
        self._flat_steps = 0
        self.watch()
        self.add_callback(SaveBetweenGenerations(self))

    def _settle_model(self, policy: Policy) -> None:
        if isinstance(self.model, PeftModel):
            settle_reference(self.model)
        freeze_by_rate(policy.model, self.setup.rates)
        for model in filter(None, (self.model, self.ref_model)):
            enable_shared_prefix(model)
        self.keep_vision = self.rollout.share_prefix and vision_is_frozen(policy.model)

    def _settle_sampling(self, policy: Policy) -> None:
        """Sampling never gives a vision placeholder: the next forward would look for its pixels."""
        forbidden = {*vision_token_ids(policy.processor), *(self.generation_kwargs.get("suppress_tokens") or ())}
        self.generation_kwargs["suppress_tokens"] = sorted(forbidden)
        self.generation_config = GenerationConfig(**self.generation_kwargs, disable_compile=True)

    # ------------------------------------------------------------------ data
    def _get_train_sampler(self, dataset: Any = None) -> GroupSampler:
        return GroupSampler(
            len(self.rows),
            num_generations=self.num_generations,
            num_prompts=self.args.generation_batch_size // self.num_generations,
            repeats=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle,
            seed=self.args.seed,
            epoch=lambda: int((self.state.epoch or 0) + 1e-6),
        )

    @property
    def between_generations(self) -> bool:
        """Whether the next step samples anew, so that nothing of the buffer would be lost by stopping here."""
        return self._step % (self.args.steps_per_generation * self.num_iterations) == 0

    def may_stop(self) -> bool:
        """Between two generations, and after the last step."""
        return self.between_generations or self.state.global_step >= self.state.max_steps

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL's, but what it shuffles by row is put together by group again: a micro-batch holds whole groups."""
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before:
            return inputs
        self._buffered_inputs = regroup(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    # ------------------------------------------------------------------ rollouts
    def _generate_and_score_completions(self, inputs: list[RolloutRow]) -> dict[str, Any]:
        """TRL's, with the prompts kept for scoring, and rows whose video could not be read left out of the loss."""
        self._table = inputs
        output = super()._generate_and_score_completions(inputs)
        device = output["completion_ids"].device
        output["row_id"] = torch.arange(len(inputs), device=device)
        good = ~torch.tensor(self._faulty, device=device)
        output["advantages"] = output["advantages"] * good
        output["completion_mask"] = output["completion_mask"] * good[:, None]
        output["num_items_in_batch"] = self.accelerator.gather(output["completion_mask"].sum()).sum()
        self._record(output["advantages"])
        self._table = []
        return output

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """Token ids of every row; the prompts themselves, one a group, stay on the trainer."""
        samples: list[Any] = [row.pop("sample") for row in self._table[:: self.num_generations]]
        self._faulty = [is_fault(sample) for sample in samples for _ in range(self.num_generations)]
        faults = [(sample["index"], sample["fault"]) for sample in samples if is_fault(sample)]
        self.faults.add(faults)
        self.count_reads(sum_reads(samples))
        blank: Sample = self.rows.prompts.blank() if faults else {}
        self._prompts = [make_prompt(self.model, blank if is_fault(sample) else sample) for sample in samples]
        self._active = self._prompts
        ids = [prompt.input_ids.tolist() for prompt in self._prompts]
        return [row for row in ids for _ in range(self.num_generations)], None, {}

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, num_generations: int, has_tool_images: bool = False
    ) -> tuple[list[list[int]], None]:
        """Completions of every group: `num_generations` of each prompt, `rollout_prompts` prompts at a time."""
        sample = sample_shared if self.rollout.share_prefix else sample_rows
        pad = self._tokenizer.pad_token_id
        completions: list[list[int]] = []
        with (
            self._model_for_sampling() as model,
            torch.no_grad(),
            autocast_for(model, self.accelerator.device, bf16=self.args.bf16),
        ):
            if self.keep_vision:
                self._prompts = self._active = with_vision(model, self._prompts)
            for start in range(0, len(self._prompts), self.rollout.rollout_prompts):
                prompts = self._prompts[start : start + self.rollout.rollout_prompts]
                ids = sample(model, prompts, num_generations, self.generation_config, pad)
                completions += [until_end(row, self.eos_token_ids) for row in ids.tolist()]
        if self.rollout.ground_truth_rollout:
            self._put_ground_truth(completions)
        return completions, None

    @contextmanager
    def _model_for_sampling(self) -> Iterator[Any]:
        was_training = self.model.training
        with unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            generation_kwargs=self.generation_kwargs,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        ) as model:
            model.eval()  # no dropout in what is sampled
            try:
                yield model
            finally:
                model.train(was_training)

    def _put_ground_truth(self, completions: list[list[int]]) -> None:
        """The labelled answer in the place of each group's last completion (TempSamp-R1)."""
        for row in range(self.num_generations - 1, len(completions), self.num_generations):
            completions[row] = self._answer_ids(self._table[row]["row"])[: self.max_completion_length]

    # ------------------------------------------------------------------ scoring
    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss on the micro-batch, whose groups are scored from their prompts."""
        first_rows = inputs["row_id"][:: self.num_generations].tolist()
        self._active = [self._prompts[row // self.num_generations] for row in first_rows]
        self.speed.add(len(inputs["row_id"]), int(inputs["completion_mask"].sum()))
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **_fields: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """Log-probabilities (and entropies) of completion tokens, (rows, C), of the policy, the old or the reference.

        `input_ids` and `attention_mask` (rows, P + C) are TRL's; the prompts come from the groups in hand.
        """
        size = self.num_generations
        completions = [
            [row[: max(1, int(mask.sum()))] for row, mask in zip(ids, masks, strict=True)]  # 1: a masked-out row
            for ids, masks in zip(
                input_ids[:, -logits_to_keep:].split(size), attention_mask[:, -logits_to_keep:].split(size), strict=True
            )
        ]
        step = max(1, (batch_size or len(input_ids)) // size)  # groups in one forward pass
        log_probs, entropies = [], []
        for start in range(0, len(completions), step):
            packed = self._pack(self._active[start : start + step], completions[start : start + step])
            with self.accelerator.autocast():
                outputs = score(model, packed)
            log_probs += [widen(packed.unpack(outputs.log_probs), logits_to_keep)]
            if compute_entropy:
                entropies += [widen(packed.unpack(outputs.entropy), logits_to_keep)]
        mask = attention_mask[:, -logits_to_keep:]
        return torch.cat(log_probs) * mask, torch.cat(entropies) * mask if compute_entropy else None, None

    def _pack(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Tensor]]) -> Packed:
        if self.rollout.share_prefix:
            return pack(prompts, completions)
        return rows(prompts, completions, pad_token_id=self._tokenizer.pad_token_id)

    # ------------------------------------------------------------------ rewards
    def _calculate_rewards(
        self, inputs: list[RolloutRow], prompts: Any, completions: list[str], completion_ids_list: list[list[int]]
    ) -> Tensor:
        """TRL's (rows of all processes, components). Logs each component's share of groups without spread."""
        rows_of_reward = [row | {"faulty": bad} for row, bad in zip(inputs, self._faulty, strict=True)]
        table = super()._calculate_rewards(rows_of_reward, prompts, completions, completion_ids_list)
        self._scored = Scored(completions, list(map(len, completion_ids_list)), table)
        usable = table[~table.isnan().any(dim=1)].double()
        for index, name in enumerate(self.reward_func_names):
            share = zero_spread_share(usable[:, index], self.num_generations)
            self._metrics["train"][f"rewards/{name}/zero_spread"].append(share)
        self._warn_when_flat(usable @ self.reward_weights.to(table.device, torch.float64))
        return table

    def _warn_when_flat(self, totals: Tensor) -> None:
        flat = len(totals) and zero_spread_share(totals, self.num_generations) > FLAT_SHARE
        self._flat_steps = self._flat_steps + 1 if flat else 0
        if self._flat_steps == FLAT_PATIENCE:
            get_logger().warning(
                "for %d generation steps on end over %.0f %% of the groups earned the same for all completions, so "
                "they teach nothing: %s",
                FLAT_PATIENCE, 100 * FLAT_SHARE, flat_cause(totals, self.reward.scale),
            )  # fmt: skip

    def _record(self, advantages: Tensor) -> None:
        """Count the answers that cannot be read, and append the groups of all processes to the run's rollouts.

        Collective: every process calls it.
        """
        scored, device = self._scored, self.accelerator.device
        spans = [parse_spans(text, row["duration"]) for text, row in zip(scored.texts, self._table, strict=True)]
        readable = [span is not None for span, bad in zip(spans, self._faulty, strict=True) if not bad]
        counts = torch.tensor([[len(readable) - sum(readable), len(readable)]], device=device)
        failed, total = self.accelerator.gather(counts).sum(0).tolist()
        self._metrics["train"]["parse_failure_rate"].append(100 * failed / max(1, total))
        if total and failed == total:
            get_logger().warning(
                "step %d: no answer of the batch can be read as a time window, e.g. %r. Fine-tune with train_sft.py "
                "first; raise training.max_completion_length if answers are cut off",
                self.state.global_step, scored.texts[0][:200],
            )  # fmt: skip
        if self.rollout.log_rollouts:
            records = gather_object(self._group_records(spans, advantages.tolist()))
            if self.is_world_process_zero():
                append_records(Path(str(self.args.output_dir)) / ROLLOUTS_FILE, records)

    def _group_records(self, spans: list[Any], advantages: list[float]) -> list[dict[str, Any]]:
        scored, size = self._scored, self.num_generations
        first = self.accelerator.process_index * len(spans)
        values = scored.rewards[first : first + len(spans)].tolist()
        parts = [dict(zip(self.reward_func_names, row, strict=True)) for row in values]
        totals = [sum(weight * row[name] for name, weight in self.reward.weights.items()) for row in parts]
        groups = [slice(start, start + size) for start in range(0, len(spans), size) if not self._faulty[start]]
        columns: tuple[Any, ...] = (scored.texts, spans, parts, totals, advantages, scored.lengths)
        return [
            group_record(self.state.global_step, self._table[group.start], *(column[group] for column in columns))
            for group in groups
        ]

    # ------------------------------------------------------------------ checks at the start
    def at_train_begin(self) -> None:
        """The blindness guard (contract 4) and the comparison of the two paths (contract 9), alike on every rank."""
        super().at_train_begin()
        if self.rollout.log_rollouts and self.is_world_process_zero():
            supersede(Path(str(self.args.output_dir)) / ROLLOUTS_FILE, self.state.global_step)
        sample = self._first_readable()
        with rng_kept(self.args.device):
            if self.setup.blindness_guard:
                get_logger().info(check_sees_video(self.model_wrapped, self._labelled(sample)))
            if self.rollout.share_prefix and self.rollout.check_sharing:
                get_logger().info(self.check_sharing(sample))

    def _first_readable(self) -> Sample:
        for index in range(len(self.rows)):
            sample = self.rows.prompts[index]
            self.count_reads(sample["reads"])
            if not is_fault(sample):
                return sample
            self.faults.add([(index, sample["fault"])])
        raise UserError("no training video can be read; run python -m utils.data_validation --probe_videos")

    def _answer_ids(self, row: int) -> list[int]:
        answer = self.rows.prompts.answer(self.rows.prompts.rows[row])
        return [*self._tokenizer(answer, add_special_tokens=False)["input_ids"], self._tokenizer.eos_token_id]

    def _labelled(self, sample: Sample) -> Any:
        answer = self.rows.prompts.answer(self.rows.prompts.rows[sample["index"]])
        blank = self.rows.prompts.blank()
        return VideoCollator(self._tokenizer.pad_token_id, blank)(
            [append_answer(self.processing_class, sample, answer)]
        )

    def check_sharing(self, sample: Sample) -> str:
        """Score two completions of `sample`'s prompt packed and row by row; returns the line to log, or raises."""
        model, was_training = self.model_wrapped, self.model.training
        model.eval()
        prompt = make_prompt(self.model, sample)
        with self.accelerator.autocast():
            line = check_sharing(
                prompt,
                torch.tensor(self._answer_ids(sample["index"]), device=prompt.input_ids.device),
                lambda packed: score(model, packed).log_probs,
                pad_token_id=self._tokenizer.pad_token_id,
                dtype=compute_dtype(self.model, self.args),
                key="training.share_prefix",
            )
        model.train(was_training)
        return line

    # ------------------------------------------------------------------ validation and logs
    def further_scores(self, dataset: Any, predictions: Mapping[int, str]) -> dict[str, float]:
        """`reward` and its components: means over the greedy validation answers."""
        table = RolloutDataset(dataset)
        drawn = [table[index] for index in predictions]
        columns = {key: [row[key] for row in drawn] for key in drawn[0]} if drawn else {}
        if not columns:
            return {}
        total = self.reward(completions=list(predictions.values()), **columns)
        parts = {f"rewards/{name}": sum(values) / len(values) for name, values in self.reward.components.items()}
        return {"reward": sum(total) / len(total), **parts}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As before; TRL tells a validation's record from the model's mode, and would else drain training's into it."""
        was_training = self.model.training
        self.model.train(was_training and not any(key.startswith("eval_") for key in logs))
        for key in [key for key, values in self._metrics["train"].items() if all(map(math.isnan, values))]:
            del self._metrics["train"][key]  # a batch of faults has no mean: TRL would record None, trackers complain
        try:
            super().log(logs, start_time)
        finally:
            self.model.train(was_training)

    # ------------------------------------------------------------------ checkpoints
    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Without the frozen reference: it is the checkpoint that the run began with."""
        weights = self.model.state_dict() if state_dict is None else state_dict
        with without_reference(self.model):
            super()._save(output_dir, {name: value for name, value in weights.items() if ".ref." not in name})

    def progress(self) -> dict[str, Any]:
        """With the rollouts' figures that the next record will average."""
        return {
            **super().progress(),
            "metrics": {key: list(map(float, v)) for key, v in self._metrics["train"].items()},
        }

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Take up what `progress` gave."""
        super().restore(progress)
        self._metrics["train"].update({key: list(map(or_nan, v)) for key, v in progress["metrics"].items()})

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None here: a model card is written when the model is published."""


class SaveBetweenGenerations(TrainerCallback):
    """Moves a save to where no sampled completion waits to be used.

    The buffer of rollouts is not part of a checkpoint; saved between two generations nothing of it is missing, and the
    resumed run repeats the uninterrupted one.
    """

    def __init__(self, trainer: VideoGRPOTrainer) -> None:
        self.trainer = trainer
        self.save_is_due = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put off, or make up for what was put off."""
        if state.global_step >= state.max_steps:
            return
        if self.trainer.between_generations:
            control.should_save = control.should_save or self.save_is_due
            self.save_is_due = False
        else:
            self.save_is_due = self.save_is_due or control.should_save
            control.should_save = False


def score(model: Any, packed: Packed) -> Any:
    """The model's forward on `packed`: an output with `log_probs` and `entropy`, each (B, K), from TRL's fused head.

    Only the wanted positions reach the head, in tiles: logits of the whole vocabulary never stand in memory.
    """
    return model(**packed.inputs, gather_columns=packed.columns, shift_labels=packed.targets, fused_lm_head=True)


@contextmanager
def without_reference(model: Any) -> Iterator[None]:
    """Hide the adapter `ref` from PEFT's saving."""
    configs = model.peft_config if isinstance(model, PeftModel) else {}
    reference = configs.pop("ref", None)
    try:
        yield
    finally:
        if reference is not None:
            configs["ref"] = reference
