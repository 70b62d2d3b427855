"""Supervised fine-tuning: a thin subclass of transformers' Trainer.

Adds to what `trainers.run_keeper` keeps: a loss on the answer only, batches of like length, the blindness guard.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from datasets.collate_fns import Batch, VideoCollator, answer_columns
from datasets.encoding import IGNORE
from datasets.video_dataset import VideoTemporalDataset
from trainers.generation import check_sees_video
from trainers.model import Policy
from trainers.run_keeper import RunKeeper, TrainingSetup
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


class VideoSFTTrainer(RunKeeper):
    """Trains a `Policy` on a `VideoTemporalDataset`.

    Args:
        policy: Model and processor, as `trainers.model.load_policy` gives them.
        train_dataset: Samples with labels.
        eval_dataset: Samples without answers (`with_answer=False`), or None for no validation.
        args: transformers' TrainingArguments.
        setup: Learning rates per part, prompt contract, validation and fault limits.
    """

    def __init__(
        self,
        policy: Policy,
        train_dataset: VideoTemporalDataset,
        eval_dataset: VideoTemporalDataset | None,
        args: TrainingArguments,
        setup: TrainingSetup,
    ) -> None:
        self.prepare(policy, train_dataset, eval_dataset, args, setup)
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every batch has a video, so every trained parameter is used
        super().__init__(
            model=policy.model,
            args=args,
            data_collator=VideoCollator(policy.processor.tokenizer.pad_token_id, train_dataset.blank()),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=policy.processor,
            compute_loss_func=answer_loss,
        )
        self.watch()

    # ------------------------------------------------------------------ data
    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        """As Trainer's, but lengths for grouping are estimated from durations: its own way would decode every video."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset: Any = train_dataset if train_dataset is not None else self.train_dataset
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(batch, dataset=dataset, lengths=dataset.lengths)

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
        """Count the batch's faults and tokens, then Trainer's own (model forward and `answer_loss`)."""
        self.faults.add(inputs.pop("faults"))
        inputs.pop("indices")
        self.speed.add(len(inputs["input_ids"]), int(inputs["attention_mask"].sum()))
        # A key/value cache would be built for nothing, and is refused with a warning under gradient checkpointing.
        return super().compute_loss(model, {**inputs, "use_cache": False}, return_outputs, num_items_in_batch)

    def at_train_begin(self) -> None:
        """The blindness guard (contract 4) on the first readable training sample, alike on every rank.

        Called when training begins: under ZeRO-3 the weights are whole only inside the wrapped model's forward.
        """
        self.speed.restart()
        if not self.setup.blindness_guard:
            return
        for index in range(len(self.train_dataset)):
            sample = self.train_dataset[index]
            if "fault" not in sample:
                get_logger().info(check_sees_video(self.model_wrapped, self.data_collator([sample])))
                return
            self.faults.add([(index, sample["fault"])])
