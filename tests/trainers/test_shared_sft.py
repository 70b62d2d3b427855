"""SFT on shared videos: loss and gradients are those of stock transformers row by row, and queries are blind to each
other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from datasets.collate_fns import VideoCollator
from datasets.encoding import IGNORE
from trainers.generation import model_inputs
from trainers.sft_trainer import VideoSFTTrainer, answer_loss, packed_inputs
from trainers.shared_prefix import PrefixLayout
from trainers.suffix_attention import SuffixRows
from utils.common import UserError
from utils.config import SFTConfig
from utils.rows import read_rows, write_rows
from utils.spans import Span

ConfigWith = Callable[..., SFTConfig]
TrainerFor = Callable[..., VideoSFTTrainer]

SHARE = "training.share_video=true"
LORA = (
    "lora.enabled=true", "lora.r=4", "lora.lora_alpha=8", "lora.target_modules=[q_proj,v_proj,up_proj]",
    "lora.modules_to_save=[]", "training.vision_tower_lr=0", "training.mm_projector_lr=0", "training.head_lr=0",
)  # fmt: skip
ROWS = [0, 1, 4, 2, 3]  # three videos with two, two and one query


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Of every trained parameter; forgotten afterwards."""
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    return found


def stock(trainer: VideoSFTTrainer, indices: list[int]) -> tuple[list[float], dict[str, Tensor]]:
    """Loss of each row (sum over its answer) and the gradient of their mean over all answer tokens, by the model's own
    forward and labels, one row at a time, pixels and all."""
    model: Any = trainer.model
    batches = [trainer.plain_collator([trainer.train_dataset[index]]) for index in indices]
    counts = [int((batch["labels"] != IGNORE).sum()) for batch in batches]
    losses = []
    for batch, count in zip(batches, counts, strict=True):
        loss = model(**model_inputs(batch, torch.device("cpu")), labels=batch["labels"], use_cache=False).loss * count
        (loss / sum(counts)).backward()
        losses.append(loss.item())
    return losses, gradients(model)


def shared_batch(trainer: VideoSFTTrainer, indices: list[int]) -> dict[str, Any]:
    """The batch that the data loader would make of these rows."""
    dataset: Any = trainer.train_dataset
    return trainer.data_collator(dataset.__getitems__(indices))


def assert_equal_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """The whole gradient to a relative 1e-5."""
    assert found.keys() == wanted.keys() and found
    difference = sum(float((found[name] - wanted[name]).double().square().sum()) for name in wanted) ** 0.5
    norm = sum(float(value.double().square().sum()) for value in wanted.values()) ** 0.5
    assert difference < 1e-5 * norm


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [(), LORA], ids=["full", "lora"])
def test_loss_and_gradients_equal_stock_transformers(
    config_with: ConfigWith, trainer_for: TrainerFor, lora: tuple[str, ...], checkpointing: bool
) -> None:
    """Vision tower trained (full) and frozen (LoRA), with and without gradient checkpointing."""
    trainer = trainer_for(config_with(SHARE, *lora))
    losses, wanted = stock(trainer, ROWS)
    if checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.model.train()
    batch = shared_batch(trainer, ROWS)
    assert [len(unit["indices"]) for unit in batch["units"]] == [2, 1, 2]
    count = int((batch["labels"] != IGNORE).sum())
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
    loss.backward()
    assert loss.item() == pytest.approx(sum(losses) / count, rel=1e-5)
    found = gradients(trainer.model)
    assert_equal_gradients(found, wanted)
    assert bool(lora) != any("visual" in name for name in found)


def per_query(trainer: VideoSFTTrainer, batch: dict[str, Any]) -> list[float]:
    """Loss of each query of a packed batch, in the batch's order."""
    inputs = packed_inputs(trainer.model, batch)
    labels = inputs.pop("labels")
    with torch.no_grad():
        logits = trainer.model(**inputs, use_cache=False).logits[0]
    tokens = functional.cross_entropy(logits, labels[0, inputs["logits_to_keep"] + 1], reduction="none")
    lengths = [len(answer) for unit in batch["units"] for answer in unit["answers"]]
    return [float(part.sum()) for part in tokens.split(lengths)]


def test_loss_of_each_query_equals_its_row(config_with: ConfigWith, trainer_for: TrainerFor) -> None:
    """Query by query, not only in the mean."""
    trainer = trainer_for(config_with(SHARE))
    trainer.model.eval()
    losses, _ = stock(trainer, ROWS)
    batch = shared_batch(trainer, ROWS)
    wanted = dict(zip(ROWS, losses, strict=True))
    assert per_query(trainer, batch) == pytest.approx([wanted[index] for index in batch["indices"]], rel=1e-5)


def test_queries_are_blind_to_each_other(config_with: ConfigWith, trainer_for: TrainerFor) -> None:
    """Another question and answer for one query move nothing of the others."""
    trainer = trainer_for(config_with(SHARE))
    trainer.model.eval()
    batch = shared_batch(trainer, ROWS)
    before = per_query(trainer, batch)
    unit = batch["units"][0]
    unit["tails"][0], unit["answers"][0] = unit["tails"][0].flip(0), unit["answers"][0].flip(0)
    after = per_query(trainer, batch)
    assert after[0] != pytest.approx(before[0], rel=1e-3)
    assert after[1:] == pytest.approx(before[1:], rel=1e-6)


def test_many_queries_of_different_length_on_one_video(
    config_with: ConfigWith, trainer_for: TrainerFor, demo_data: Path, tmp_path: Path
) -> None:
    """Five queries, some with an absent event or several windows, and fewer allowed together than there are."""
    from dataclasses import replace

    first = read_rows(demo_data / "train.jsonl")[0][0]
    windows: list[tuple[Span, ...]] = [(), (Span(1, 2),), (Span(0, 3), Span(4, 7.5)), (Span(2, 3),), (Span(0, 8),)]
    rows = [
        replace(first, video=str(demo_data / first.video), timestamp=spans, sentence="the red square " + "appears " * n)
        for n, spans in enumerate(windows, start=1)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    trainer = trainer_for(config_with(SHARE, "training.max_queries_per_video=3", f"data.train={tmp_path}/rows.jsonl"))
    losses, wanted = stock(trainer, list(range(5)))
    batch = shared_batch(trainer, list(range(5)))
    assert [unit["indices"] for unit in batch["units"]] == [[0, 1, 2], [3, 4]]
    count = int((batch["labels"] != IGNORE).sum())
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
    loss.backward()
    assert loss.item() == pytest.approx(sum(losses) / count, rel=1e-5)
    assert_equal_gradients(gradients(trainer.model), wanted)


def losses_of(trainer: VideoSFTTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_accumulation_2x2_equals_4x1(config_with: ConfigWith, trainer_for: TrainerFor, tmp_path: Path) -> None:
    """The same rows an update, in packed sequences of two and of four."""
    runs = []
    for name, batch, accumulation in (("a", 4, 1), ("b", 2, 2)):
        sizes = [
            f"training.per_device_train_batch_size={batch}",
            f"training.gradient_accumulation_steps={accumulation}",
        ]
        trainer = trainer_for(config_with(SHARE, *sizes, f"training.run_name={name}"), tmp_path / name)
        trainer.train()
        runs.append(losses_of(trainer))
    assert len(runs[0]) == 4
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_a_run_equals_the_unshared_one_on_the_same_rows(
    config_with: ConfigWith, trainer_for: TrainerFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four updates by both paths in the order of the shared one; counted samples are the same."""
    shared = trainer_for(config_with(SHARE, "training.run_name=s"), tmp_path / "s")
    order = list(shared._get_train_sampler())
    shared.train()
    plain = trainer_for(config_with("training.run_name=p"), tmp_path / "p")
    monkeypatch.setattr(plain, "_get_train_sampler", lambda *_: order)
    plain.train()
    assert losses_of(shared) == pytest.approx(losses_of(plain), rel=1e-4)


def test_resume_repeats_the_uninterrupted_run(config_with: ConfigWith, trainer_for: TrainerFor, tmp_path: Path) -> None:
    """From a checkpoint in the second epoch: same losses, so same rows in the same order."""
    sizes = (SHARE, "training.per_device_train_batch_size=8", "training.save_strategy=steps", "training.save_steps=8")
    whole = trainer_for(config_with(*sizes, "training.max_steps=12", "training.run_name=w"), tmp_path / "whole")
    steps_per_epoch = len(whole.train_dataset) // 8
    assert steps_per_epoch < 8
    whole.train()
    resumed = trainer_for(
        config_with(*sizes, "training.max_steps=12", "training.run_name=w"), tmp_path / "whole", resume="auto"
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert losses_of(resumed)[-4:] == losses_of(whole)[-4:]


@pytest.mark.parametrize("share", ["true", "false"])
def test_data_seed_decides_the_order_of_rows(share: str, config_with: ConfigWith, trainer_for: TrainerFor) -> None:
    """With shared videos as without."""
    seeds = ("seed=1", "seed=2", "seed=2 data_seed=1")
    orders = [
        list(trainer_for(config_with(f"training.share_video={share}", *(f"training.{s}" for s in seed.split())))
             ._get_train_sampler())
        for seed in seeds
    ]  # fmt: skip
    assert orders[0] == orders[2] != orders[1]


def test_a_batch_of_faults_only_has_zero_loss(config_with: ConfigWith, trainer_for: TrainerFor) -> None:
    """The step runs through the same modules, learns nothing and counts the rows."""
    trainer = trainer_for(config_with(SHARE, "data.max_bad_fraction=0.5"))
    batch = trainer.data_collator([{"indices": [3, 4], "fault": "broken.mp4: cannot be read"}])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == 0.0
    assert all(float(value.abs().max()) == 0.0 for value in gradients(trainer.model).values())
    assert set(trainer.faults.rows) == {3, 4}


def test_sharing_that_is_not_exact_stops_the_run(
    config_with: ConfigWith,
    trainer_for: TrainerFor,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The check at the start passes as things are, and fails when completions see each other."""
    import trainers.sharing_check as module

    trainer = trainer_for(config_with(SHARE, "training.max_steps=1"))
    trainer.train()
    said = capsys.readouterr().err
    assert "sharing is exact" in said and "up to 8 of a video" in said
    honest = module.pack

    def leaking(*args: Any) -> Any:
        packed = honest(*args)
        groups = packed.inputs["prefix_layout"].groups
        as_one = [SuffixRows.of([sum(rows.lengths)], rows.places.device) for _, _, rows in groups]
        leaky = tuple((start, prefix, rows) for (start, prefix, _), rows in zip(groups, as_one, strict=True))
        packed.inputs["prefix_layout"] = PrefixLayout(leaky)
        return packed

    monkeypatch.setattr(module, "pack", leaking)
    with pytest.raises(UserError, match=r"training\.share_video: .*share_video=false"):
        trainer.at_train_begin()


def test_sharing_needs_a_batch_to_share_in(config_with: ConfigWith) -> None:
    """One row a batch has nothing to share; the error names both keys."""
    with pytest.raises(UserError, match=r"share_video .*per_device_train_batch_size is 1"):
        config_with(SHARE, "training.per_device_train_batch_size=1")


def test_answer_loss_reads_a_packed_batch(config_with: ConfigWith, trainer_for: TrainerFor) -> None:
    """Labels stand one column after what predicts them, in order, the last past the end of the sequence."""
    trainer = trainer_for(config_with(SHARE))
    batch = shared_batch(trainer, [0, 1])
    inputs = packed_inputs(trainer.model, batch)
    labels, columns = inputs["labels"], inputs["logits_to_keep"]
    assert labels.shape[1] == inputs["input_ids"].shape[1] + 1
    assert labels[0, columns + 1].tolist() == torch.cat(batch["units"][0]["answers"]).tolist()
    logits = torch.zeros(1, len(columns), 7)
    logits[..., 0] = 1.0
    labels = torch.where(labels == IGNORE, labels, 0)
    loss = answer_loss(type("Outputs", (), {"logits": logits}), labels)
    assert loss.item() == pytest.approx(float(functional.cross_entropy(logits[0, :1], torch.tensor([0]))))
    assert isinstance(trainer.plain_collator, VideoCollator)
