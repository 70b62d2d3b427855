"""Supervised fine-tuning: a thin subclass of transformers' Trainer.

Adds to what `trainers.run_keeper` keeps: a loss on the answer only, batches of like length or of shared videos, the
blindness guard.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.nn import functional
from transformers import TrainingArguments

from datasets.collate_fns import Batch, VideoCollator, answer_columns
from datasets.encoding import IGNORE, Sample
from datasets.pixels import with_pixel_values
from datasets.samplers import EpochSampler
from datasets.shared_video import SharedVideoDataset, Unit, UnitCollator, VideoSampler
from datasets.video_dataset import VideoTemporalDataset
from trainers.generation import check_sees_video
from trainers.model import Policy
from trainers.run_keeper import RunKeeper, TrainingSetup
from trainers.shared_prefix import enable_shared_prefix, make_prompt, pack
from trainers.sharing_check import check_sharing, compute_dtype, picked_log_probs
from utils.logging_utils import get_logger


def answer_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy over answer tokens. Logits stand only at `answer_columns(labels)`.

    Divided by `num_items_in_batch` (answer tokens of the whole optimizer step) so that accumulation does not change it;
    by the batch's own count when that is not known.
    """
    targets = labels[:, answer_columns(labels) + 1]  # (B, K)
    total = functional.cross_entropy(
        outputs.logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    count = num_items_in_batch if num_items_in_batch is not None else (targets != IGNORE).sum()
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)


def packed_inputs(model: Any, batch: Batch) -> Batch:
    """The model's inputs for a batch of `UnitCollator`: every clip once, followed by its queries and answers.

    `labels` (1, L + 1) hold each answer token in the column after the one that predicts it, as `answer_loss` reads
    them.
    """
    units = batch["units"]
    prompts = [make_prompt(model, unit["prefix"]) for unit in units]
    queries = [[torch.cat(pair) for pair in zip(unit["tails"], unit["answers"], strict=True)] for unit in units]
    is_blank = not batch["indices"]
    scored = [[0 if is_blank else len(answer) for answer in unit["answers"]] for unit in units]
    packed = pack(prompts, queries, scored)
    labels = packed.targets.new_full((1, packed.inputs["input_ids"].shape[1] + 1), IGNORE)
    labels[:, packed.columns + 1] = packed.targets
    return {**packed.inputs, "labels": labels, "logits_to_keep": answer_columns(labels)}


class VideoSFTTrainer(RunKeeper):
    """Trains a `Policy` on a `VideoTemporalDataset`.

    Args:
        policy: Model and processor, as `trainers.model.load_policy` gives them.
        train_dataset: Samples with labels.
        eval_dataset: Samples without answers (`with_answer=False`), or None for no validation.
        args: transformers' TrainingArguments.
        setup: Learning rates per part, prompt contract, validation and fault limits. With `max_queries_per_video` over
            1, the rows of a batch that share a video are computed as one packed sequence, exactly as one by one.
    """

    _shared: SharedVideoDataset | None = None

    def __init__(
        self,
        policy: Policy,
        train_dataset: VideoTemporalDataset,
        eval_dataset: VideoTemporalDataset | None,
        args: TrainingArguments,
        setup: TrainingSetup,
    ) -> None:
        self.prepare(policy, train_dataset, eval_dataset, args, setup)
        self.plain_collator = VideoCollator(policy.processor.tokenizer.pad_token_id, train_dataset.blank())
        if setup.max_queries_per_video > 1:
            self._shared = SharedVideoDataset(train_dataset, setup.max_queries_per_video)
            enable_shared_prefix(policy.model)
        super().__init__(
            model=policy.model,
            args=args,
            data_collator=UnitCollator(self._shared.blank()) if self._shared else self.plain_collator,
            train_dataset=self._shared or train_dataset,
            eval_dataset=eval_dataset,
            processing_class=policy.processor,
            compute_loss_func=answer_loss,
        )
        self.watch()

    # ------------------------------------------------------------------ data
    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        """Lengths for grouping are estimated from durations: Trainer's own way would decode every video. Shared videos
        need no like lengths, since a packed sequence has no padding."""
        if self._shared is not None:
            return self._video_sampler(self._shared)
        dataset: Any = train_dataset if train_dataset is not None else self.train_dataset
        return EpochSampler(
            len(dataset),
            seed=self._order_seed,
            epoch=lambda: int((self.state.epoch or 0) + 1e-6),
            lengths=dataset.lengths if self.args.train_sampling_strategy == "group_by_length" else None,
            batch_size=self.args.train_batch_size * self.args.gradient_accumulation_steps,
        )

    def _video_sampler(self, shared: SharedVideoDataset) -> VideoSampler:
        clips: dict[Any, list[int]] = defaultdict(list)
        for index in range(len(shared)):
            clips[shared.clip_key(index)].append(index)
        get_logger().info(
            "training.share_video: %d rows on %d videos, up to %d of a video computed together",
            len(shared), len(clips), shared.max_queries,
        )  # fmt: skip
        return VideoSampler(
            list(clips.values()),
            max_queries=shared.max_queries,
            seed=self._order_seed,
            epoch=lambda: int((self.state.epoch or 0) + 1e-6),
        )

    @property
    def _order_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def get_train_dataloader(self) -> Any:
        """As Trainer's, but each batch goes to the device when its forward pass comes.

        Trainer draws all batches of an update beforehand, and accelerate would put them on the device at once: 8 passes
        over 2 clips of 8,192 visual tokens are 3 GB of pixels.
        """
        loader = super().get_train_dataloader()
        loader.device = None
        return loader

    # ------------------------------------------------------------------ one step
    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Count the batch's faults, reads and tokens, then Trainer's own (model forward and `answer_loss`)."""
        self.faults.add(inputs.pop("faults"))
        self.count_reads(inputs.pop("reads"))
        if self._shared is not None:
            num_samples, inputs = max(1, len(inputs["indices"])), packed_inputs(self.model, inputs)
            num_tokens = inputs["input_ids"].numel()
        else:
            inputs.pop("indices")
            inputs = with_pixel_values(inputs, inputs["input_ids"].device)
            num_samples, num_tokens = len(inputs["input_ids"]), int(inputs["attention_mask"].sum())
        self.speed.add(num_samples, num_tokens)
        # A key/value cache would be built for nothing, and is refused with a warning under gradient checkpointing.
        return super().compute_loss(model, {**inputs, "use_cache": False}, return_outputs, num_items_in_batch)

    def at_train_begin(self) -> None:
        """The blindness guard (contract 4) and the check of sharing (contract 9) on the first readable training sample,
        alike on every rank.

        Called when training begins: under ZeRO-3 the weights are whole only inside the wrapped model's forward.
        """
        self.speed.restart()
        if not self.setup.blindness_guard and self._shared is None:
            return
        for index in range(len(self.train_dataset)):
            sample = self.train_dataset[index]
            self.count_reads(sample["reads"])
            if "fault" not in sample:
                self._check(sample, index)
                return
            self.faults.add([(index, sample["fault"])])

    def _check(self, sample: Sample, index: int) -> None:
        if self.setup.blindness_guard:
            get_logger().info(check_sees_video(self.model_wrapped, self.plain_collator([sample])))
        if self._shared is not None:
            unit = self._shared.unit([index])
            self.count_reads(unit["reads"])
            get_logger().info(self._check_sharing(unit))

    def _check_sharing(self, unit: Unit) -> str:
        model, was_training = self.model_wrapped, self.model.training
        model.eval()
        prompt = make_prompt(self.model, unit["prefix"])
        with self.accelerator.autocast():
            line = check_sharing(
                prompt,
                torch.cat([unit["tails"][0], unit["answers"][0]]).to(prompt.input_ids.device),
                lambda packed: picked_log_probs(model, packed),
                pad_token_id=self.plain_collator.pad_token_id,
                dtype=compute_dtype(self.model, self.args),
                key="training.share_video",
            )
        model.train(was_training)
        return line
