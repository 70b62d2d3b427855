"""GRPO on video: what TRL would compute, on whole groups, from prompts read once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration
from trl import GRPOTrainer

import trainers.shared_prefix
from datasets.pixels import pixel_values
from datasets.rollouts import GroupSampler
from rewards import register_reward
from trainers.generation import reset_rope, vision_token_ids
from trainers.model import add_lora, load_for_inference, load_policy
from trainers.parts import LearningRates
from trainers.rl_trainer import VideoGRPOTrainer
from trainers.rollout_batches import regroup
from trainers.rollout_log import ROLLOUTS_FILE, flat_cause, read_records
from trainers.suffix_attention import SuffixRows
from utils.checkpoints import manifest_problems
from utils.common import UserError
from utils.config import LoraConfig, RLConfig
from utils.logging_utils import read_metrics

ConfigWith = Callable[..., RLConfig]
TrainerFor = Callable[..., VideoGRPOTrainer]
RATES = LearningRates(1e-4, 0.0, 0.0, 1e-4)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def history(trainer: VideoGRPOTrainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def rollouts(trainer: VideoGRPOTrainer) -> dict[str, Any]:
    """One generation batch, as the trainer draws it."""
    trainer.accelerator.free_memory()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    return trainer._generate_and_score_completions(batch)


@pytest.fixture
def sft_adapter(answering_model: Path, tmp_path: Path) -> Path:
    """A LoRA checkpoint with full copies of the tied embeddings, as train_sft.py leaves one, on a bf16 base."""
    base = tmp_path / "base"
    shutil.copytree(answering_model, base)
    model = Qwen3VLForConditionalGeneration.from_pretrained(base, dtype=torch.bfloat16)
    lists = {"target_modules": ("q_proj", "lm_head"), "modules_to_save": ("embed_tokens", "lm_head")}
    lora = LoraConfig(r=4, lora_alpha=8, **lists)
    torch.manual_seed(0)
    wrapped = add_lora(model, lora, RATES, fp32_copies=True)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
        elif "modules_to_save" in name:
            parameter.data += 1e-4 * torch.randn_like(parameter)  # below what bf16 would keep
    folder = tmp_path / "adapter"
    wrapped.save_pretrained(folder)
    for path in answering_model.iterdir():
        if path.suffix in (".json", ".jinja") and path.name not in ("config.json", "generation_config.json"):
            shutil.copy(path, folder / path.name)
    (folder / "manifest.json").unlink(missing_ok=True)
    return folder


ADAPTER = (
    "lora.r=4", "lora.lora_alpha=8",
    "lora.target_modules=[q_proj, lm_head]", "lora.modules_to_save=[embed_tokens, lm_head]",
)  # fmt: skip
"""Its shape, with the head in both lists as in the shipped configurations."""


# ---------------------------------------------------------------------------------------------- scoring
@pytest.mark.parametrize("share", ["true", "false"])
def test_log_probs_and_entropies_equal_trls_own_method(
    share: str, rl_config_with: ConfigWith, rl_trainer_for: TrainerFor
) -> None:
    """TRL's code on the same rows, given the pixels it does not know of, at a temperature other than 1."""
    trainer = rl_trainer_for(rl_config_with(f"training.share_prefix={share}", "training.temperature=0.7"))
    out = rollouts(trainer)
    repeated = [prompt for prompt in trainer._prompts for _ in range(4)]
    video = {
        "pixel_values_videos": pixel_values([prompt.pixels for prompt in repeated]),
        "video_grid_thw": torch.cat([prompt.video_grid_thw for prompt in repeated]),
    }
    ids = torch.cat([out["prompt_ids"], out["completion_ids"]], dim=1)
    mask = torch.cat([out["prompt_mask"], out["completion_mask"]], dim=1)
    kinds = 2 * (ids == trainer.model.config.video_token_id)
    width = out["completion_ids"].shape[1]

    def with_video(**inputs: Any) -> Any:
        reset_rope(trainer.model)
        return trainer.model(**inputs, **video)

    with torch.no_grad():
        stock = GRPOTrainer._get_per_token_logps_and_entropies(
            trainer, with_video, ids, mask, width, compute_entropy=True, mm_token_type_ids=kinds
        )
        own = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width, compute_entropy=True)
    shown = out["completion_mask"].bool()
    for mine, theirs in zip(own[:2], stock[:2], strict=True):
        assert torch.allclose(mine[shown], theirs[shown], atol=1e-5)
    assert float(own[0][shown].min()) < -0.1  # there is something to compare


def test_sharing_changes_no_loss_gradient_or_weight(
    rl_config_with: ConfigWith, rl_trainer_for: TrainerFor, tmp_path: Path
) -> None:
    runs = []
    for share in ("true", "false"):
        config = rl_config_with(f"training.share_prefix={share}", "training.kl_coef=0.1", "training.learning_rate=1e-4")
        trainer = rl_trainer_for(config, tmp_path / share)
        trainer.train()
        runs.append(trainer)
    shared, plain = runs
    for key in ("loss", "reward", "kl", "entropy", "grad_norm"):
        assert history(shared, key) == pytest.approx(history(plain, key), abs=2e-5), key
    assert max(history(shared, "grad_norm")) > 1e-3
    after = parameters(plain.model)
    assert all(torch.allclose(value, after[name], atol=1e-5) for name, value in parameters(shared.model).items())


def test_accumulating_2x4_equals_1x8(rl_config_with: ConfigWith, rl_trainer_for: TrainerFor, tmp_path: Path) -> None:
    runs = []
    for size, accumulation in ((4, 2), (8, 1)):
        config = rl_config_with(
            f"training.per_device_train_batch_size={size}", f"training.gradient_accumulation_steps={accumulation}"
        )
        trainer = rl_trainer_for(config, tmp_path / str(size))
        trainer.train()
        runs.append(parameters(trainer.model))
    moved = 0
    for name, value in runs[0].items():
        assert torch.allclose(value, runs[1][name], atol=2e-5), name
        moved += "lora_B" in name and bool(value.any())
    assert moved


def test_micro_batches_hold_whole_groups() -> None:
    """Rows shuffled over two micro-batches come back group by group, each row with all its columns."""
    rows = torch.tensor([5, 0, 3, 6, 1, 7, 2, 4])
    columns = {"row_id": rows, "advantages": rows * 10.0, "completion_ids": rows[:, None].repeat(1, 3)}
    shuffled = [{key: value[i : i + 4] for key, value in columns.items()} for i in (0, 4)]
    shuffled = [batch | {"num_items_in_batch": torch.tensor(24)} for batch in shuffled]
    first, second = regroup(shuffled)
    assert first["row_id"].tolist() == [0, 1, 2, 3] and second["row_id"].tolist() == [4, 5, 6, 7]
    assert first["advantages"].tolist() == [0, 10, 20, 30]
    assert second["completion_ids"][:, 0].tolist() == [4, 5, 6, 7]
    assert int(first["num_items_in_batch"]) == 24


def test_each_prompt_is_read_once(
    rl_config_with: ConfigWith, rl_trainer_for: TrainerFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 steps of 2 prompts x 4 completions over 2 micro-batches and 2 passes: 4 videos (2 new ones at step 1 and 3)."""
    trainer = rl_trainer_for(rl_config_with("training.num_iterations=2", "training.check_sharing=false",
                                            "training.blindness_guard=false"))  # fmt: skip
    trainer.at_train_begin = lambda: None  # type: ignore[method-assign]
    read: list[int] = []
    plain = trainer.rows.prompts.sample
    monkeypatch.setattr(trainer.rows.prompts, "sample", lambda index: read.append(index) or plain(index))  # type: ignore[func-returns-value]
    trainer.train()
    assert len(read) == 4
    assert len(set(read)) == 4


@pytest.mark.parametrize("rate", ["0.0", "1e-4"], ids=["mergers frozen", "mergers train"])
def test_a_video_passes_the_vision_tower_once(
    rate: str, rl_config_with: ConfigWith, rl_trainer_for: TrainerFor
) -> None:
    """2 prompts x 4 completions, sampled once and trained on twice, with a reference. Frozen, the features of sampling
    serve the old policy, the reference and both updates; else each of these passes makes them anew, once a prompt."""
    trainer = rl_trainer_for(rl_config_with(
        "training.kl_coef=0.05", "training.num_iterations=2", "training.max_steps=2", "training.check_sharing=false",
        "training.blindness_guard=false", f"training.mm_projector_lr={rate}",
    ))  # fmt: skip
    clips: list[int] = []
    visual = trainers.shared_prefix.backbone_of(trainer.model).visual
    visual.register_forward_pre_hook(
        lambda _m, args, kwargs: clips.append(len(kwargs.get("grid_thw", args[-1]))), with_kwargs=True
    )
    trainer.train()
    assert sum(clips) == 2 if rate == "0.0" else 2 < sum(clips) <= 2 * 5


# ---------------------------------------------------------------------------------------------- reference
def test_kl_begins_at_zero_and_the_reference_is_the_sft_model(
    sft_adapter: Path, rl_config_with: ConfigWith, rl_trainer_for: TrainerFor
) -> None:
    """The fp32 copies of a bf16 model included: a reference rounded to bf16 would start with a KL above 0."""
    config = rl_config_with(
        f"model.name_or_path={sft_adapter}", "model.torch_dtype=bfloat16", *ADAPTER, "training.kl_coef=0.05",
        "training.head_lr=1e-3", "training.learning_rate=1e-2", "training.check_sharing=true",
    )  # fmt: skip
    trainer = rl_trainer_for(config)
    before = parameters(trainer.model)
    sft = load_policy(config.model, config.lora, RATES).model
    ids = torch.arange(60, 90)[None]
    trainer.model.set_adapter("ref")
    with torch.no_grad():
        assert torch.equal(trainer.model(input_ids=ids).logits, sft(input_ids=ids).logits)
    trainer.model.set_adapter("default")
    trainer.train()
    kl = history(trainer, "kl")
    assert kl[0] == 0.0
    assert kl[-1] > 0.0
    moved = {name for name, value in parameters(trainer.model).items() if not torch.equal(value, before[name])}
    assert moved and not any(".ref." in name or "visual" in name for name in moved)
    assert any("embed_tokens.modules_to_save.default" in name for name in moved)


def test_the_saved_adapter_loads_in_plain_peft_on_the_base(
    sft_adapter: Path, rl_config_with: ConfigWith, rl_trainer_for: TrainerFor
) -> None:
    config = rl_config_with(f"model.name_or_path={sft_adapter}", *ADAPTER, "training.kl_coef=0.05",
                            "training.head_lr=1e-4")  # fmt: skip
    trainer = rl_trainer_for(config)
    trainer.train()
    folder = trainer.save_named("checkpoint-final")
    assert not (folder / "ref").exists()
    assert "ref" in trainer.model.peft_config
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    plain = PeftModel.from_pretrained(Qwen3VLForConditionalGeneration.from_pretrained(base), folder)
    ids = torch.arange(60, 90)[None]
    with torch.no_grad():
        assert torch.allclose(plain(input_ids=ids).logits, trainer.model(input_ids=ids).logits, atol=1e-5)
    assert load_for_inference(str(folder)).contract is not None


def test_the_readmes_lora_block_works_in_both_stages(
    config_with: Callable[..., Any], trainer_for: Callable[..., Any], rl_config_with: ConfigWith,
    rl_trainer_for: TrainerFor, answering_model: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """`lm_head` in both lists: SFT trains it in full, tied to the embeddings, and GRPO goes on with that adapter."""
    block = (
        "lora.enabled=true", "lora.r=64", "lora.lora_alpha=128", "lora.modules_to_save=[embed_tokens, lm_head]",
        "lora.target_modules=[q_proj, k_proj, v_proj, o_proj, lm_head]",
    )  # fmt: skip
    sft = trainer_for(config_with(*block, f"model.name_or_path={answering_model}", "training.max_steps=1"))
    sft.train()
    folder = sft.save_named("checkpoint-final")
    options = ("training.kl_coef=0.05", "training.head_lr=1e-3", "training.max_steps=3")
    trainer = rl_trainer_for(rl_config_with(*block, f"model.name_or_path={folder}", *options))
    assert not (tmp_path / "rl/merged_base").exists()
    trainer.train()
    kl = history(trainer, "kl")
    assert kl[0] == 0.0 < kl[2]
    base = trainer.model.get_base_model()
    assert torch.equal(base.lm_head.weight, base.get_input_embeddings().weight)
    assert load_for_inference(str(trainer.save_named("checkpoint-final"))).contract is not None


def test_another_lora_shape_is_merged_first(
    sft_adapter: Path, rl_config_with: ConfigWith, rl_trainer_for: TrainerFor, tmp_path: Path
) -> None:
    """The merged base answers as base + adapter did, and the new adapter begins at nothing."""
    changed = ("lora.r=2", "lora.lora_alpha=4", "lora.target_modules=[v_proj]", "lora.modules_to_save=[]")
    config = rl_config_with(f"model.name_or_path={sft_adapter}", *changed)
    trainer = rl_trainer_for(config)
    merged = tmp_path / "rl/merged_base"
    assert manifest_problems(merged) == []
    sft = load_policy(config.model, LoraConfig(**_shape(ADAPTER)), RATES).model
    ids = torch.arange(60, 90)[None]
    with torch.no_grad():
        difference = (trainer.model(input_ids=ids).logits - sft(input_ids=ids).logits).abs().max()
    assert float(difference) < 1e-4
    assert trainer.model.config.tie_word_embeddings


def _shape(overrides: tuple[str, ...]) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 8, "target_modules": ("q_proj",), "modules_to_save": ("embed_tokens",)}


# ---------------------------------------------------------------------------------------------- rewards and faults
def test_a_users_module_inside_the_composite(rl_config_with: ConfigWith, rl_trainer_for: TrainerFor) -> None:
    @register_reward("my_reward")
    class MyReward(nn.Module):
        def forward(self, pred: Tensor, gt: Tensor) -> Tensor:
            return 1 / (1 + (pred[:, 0] - gt[:, 0]).abs())

    trainer = rl_trainer_for(rl_config_with("rewards.my_reward.weight=0.5"))
    trainer.train()
    last = trainer.state.log_history[-2]
    assert 0 < last["rewards/my_reward/mean"] <= 1
    total = last["rewards/temporal_iou/mean"] + 0.5 * last["rewards/my_reward/mean"]
    assert last["reward"] == pytest.approx(total, abs=1e-6)
    for name in ("temporal_iou", "my_reward"):
        assert 0 <= last[f"rewards/{name}/zero_spread"] <= 1
        assert last[f"rewards/{name}/std"] >= 0


def test_rollouts_are_recorded_with_rewards_and_advantages(
    rl_config_with: ConfigWith, rl_trainer_for: TrainerFor
) -> None:
    trainer = rl_trainer_for(rl_config_with("training.scale_rewards=none"))
    trainer.train()
    records = read_records(Path(str(trainer.args.output_dir)) / ROLLOUTS_FILE)
    assert [record["step"] for record in records] == [0, 0, 1, 1, 2, 2]
    for record in records:
        rewards = torch.tensor([completion["reward"] for completion in record["completions"]])
        advantages = torch.tensor([completion["advantage"] for completion in record["completions"]])
        assert torch.allclose(advantages, rewards - rewards.mean(), atol=1e-5)
        assert all(c["spans"] is None or c["rewards"]["temporal_iou"] <= 1 for c in record["completions"])
        assert record["timestamp"] and record["video"].endswith(".mp4")
    spread = [completion["reward"] for record in records for completion in record["completions"]]
    assert max(spread) > min(spread)


def test_a_broken_video_is_counted_and_teaches_nothing(
    rl_config_with: ConfigWith, rl_trainer_for: TrainerFor, demo_data: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (demo_data / "train.jsonl").read_text().splitlines()][:2]
    (tmp_path / "broken.mp4").write_bytes(b"")
    rows[0]["video"], rows[1]["video"] = str(tmp_path / "broken.mp4"), str(demo_data / rows[1]["video"])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = rl_config_with(f"data.train={tmp_path / 'rows.jsonl'}", "data.max_bad_fraction=0.5",
                            "training.shuffle_dataset=false")  # fmt: skip
    trainer = rl_trainer_for(config)
    out = rollouts(trainer)
    assert list(trainer.faults.rows) == [0]
    assert out["completion_mask"][:4].sum() == 0 and out["completion_mask"][4:].sum() > 0
    assert out["advantages"][:4].tolist() == [0.0] * 4
    assert int(out["num_items_in_batch"]) == int(out["completion_mask"].sum())
    assert [record["row"] for record in read_records(Path(str(trainer.args.output_dir)) / ROLLOUTS_FILE)] == [1]


def test_too_many_broken_videos_stop_the_run(
    rl_config_with: ConfigWith, rl_trainer_for: TrainerFor, demo_data: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (demo_data / "train.jsonl").read_text().splitlines()][:2]
    (tmp_path / "broken.mp4").write_bytes(b"")
    rows = [row | {"video": str(tmp_path / "broken.mp4")} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = rl_trainer_for(rl_config_with(f"data.train={tmp_path / 'rows.jsonl'}"))
    with pytest.raises(UserError, match="data.max_bad_fraction"):
        trainer.train()


def test_the_ground_truth_can_stand_among_the_rollouts(rl_config_with: ConfigWith, rl_trainer_for: TrainerFor) -> None:
    trainer = rl_trainer_for(rl_config_with("training.ground_truth_rollout=true"))
    trainer.train()
    for record in read_records(Path(str(trainer.args.output_dir)) / ROLLOUTS_FILE):
        assert record["completions"][-1]["rewards"]["temporal_iou"] == pytest.approx(1.0)


def test_no_vision_token_is_sampled(rl_config_with: ConfigWith, rl_trainer_for: TrainerFor) -> None:
    """A model that wants to say nothing else than the video placeholder is kept from it."""
    trainer = rl_trainer_for(rl_config_with())
    forbidden = set(vision_token_ids(trainer.processing_class))
    embeddings = trainer.model.get_base_model().get_output_embeddings().weight
    with torch.no_grad():
        embeddings[trainer.model.config.video_token_id] = 50 * embeddings.abs().mean()
    out = rollouts(trainer)
    assert forbidden
    assert not forbidden & set(out["completion_ids"].flatten().tolist())


def test_what_is_said_of_flat_groups() -> None:
    assert "every completion earns 0" in flat_cause(torch.zeros(8), 1.0)
    assert "too easy" in flat_cause(torch.full((8,), 0.99), 1.0)
    assert "training.temperature" in flat_cause(torch.tensor([0.2, 0.2, 0.7, 0.7]), 1.0)


def test_flat_groups_are_warned_of_when_they_last(
    rl_config_with: ConfigWith, rl_trainer_for: TrainerFor, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, after ten generation steps on end in which over 0.8 of the groups have no spread; one better step begins
    the count anew."""
    trainer = rl_trainer_for(rl_config_with())
    flat, at_the_limit = torch.zeros(5 * 4), torch.zeros(5 * 4)
    at_the_limit[0] = 1.0  # one group of five has spread: a share of 0.8, not above it
    said = []
    for totals in [flat] * 9 + [at_the_limit] + [flat] * 12:
        capsys.readouterr()
        trainer._warn_when_flat(totals)
        said.append("over 80 % of the groups earned the same" in capsys.readouterr().err)
    assert [step for step, warned in enumerate(said) if warned] == [19]


# ---------------------------------------------------------------------------------------------- guards
def test_a_leak_between_completions_stops_the_run(
    rl_config_with: ConfigWith, rl_trainer_for: TrainerFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A patched attention that lets completions see each other must not train in silence."""
    honest = trainers.shared_prefix.suffix_attention

    def leaky(query: Tensor, key: Tensor, value: Tensor, rows: SuffixRows, *more: Any) -> Tensor:
        return honest(query, key, value, SuffixRows.of([sum(rows.lengths)], query.device), *more)

    monkeypatch.setattr(trainers.shared_prefix, "suffix_attention", leaky)
    with pytest.raises(UserError, match=r"training.share_prefix: the shared and the row-by-row path differ by"):
        rl_trainer_for(rl_config_with()).train()


def test_the_checks_leave_the_random_state(rl_config_with: ConfigWith, rl_trainer_for: TrainerFor) -> None:
    trainer = rl_trainer_for(rl_config_with())
    before = torch.get_rng_state()
    trainer.at_train_begin()
    assert torch.equal(before, torch.get_rng_state())


def test_too_few_rows_for_a_generation_batch(rl_config_with: ConfigWith, rl_trainer_for: TrainerFor) -> None:
    with pytest.raises(UserError, match=r"data.train has \d+ usable rows, fewer than the 100 prompts"):
        rl_trainer_for(rl_config_with("training.gradient_accumulation_steps=100"))


# ---------------------------------------------------------------------------------------------- resume
@pytest.mark.parametrize(
    ("overrides", "stop"),
    [(("training.max_steps=5",), 3), (("training.num_iterations=2", "training.max_steps=6"), 4)],
    ids=["in epoch 2", "two passes over each batch"],
)
def test_resume_repeats_the_uninterrupted_run(
    overrides: tuple[str, ...], stop: int, rl_config_with: ConfigWith, rl_trainer_for: TrainerFor,
    demo_data: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """4 rows make 2 generation batches an epoch: step 3 begins epoch 2, in another order."""
    rows = (demo_data / "train.jsonl").read_text().splitlines()[:4]
    rows = [json.dumps(row | {"video": str(demo_data / row["video"])}) for row in map(json.loads, rows)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    common = (f"data.train={tmp_path / 'rows.jsonl'}", "training.save_strategy=steps", "training.save_steps=1")
    config = rl_config_with(*common, *overrides, "training.kl_coef=0.01", "training.learning_rate=1e-3")
    whole = rl_trainer_for(config, tmp_path / "whole")
    whole.train()
    part = tmp_path / "part"
    shutil.copytree(tmp_path / "whole", part, ignore=shutil.ignore_patterns("merged_base"))
    saved = sorted(int(folder.name.split("-")[1]) for folder in part.glob("checkpoint-*"))
    assert stop in saved
    for step in saved:
        if step > stop:
            shutil.rmtree(part / f"checkpoint-{step}")
    resumed = rl_trainer_for(config, part, "auto")
    resumed.train(resume_from_checkpoint=str(part / f"checkpoint-{stop}"))
    for key in ("loss", "reward", "kl"):
        assert history(resumed, key)[stop:] == pytest.approx(history(whole, key)[stop:], abs=1e-7), key
    after = parameters(whole.model)
    assert all(torch.equal(value, after[name]) for name, value in parameters(resumed.model).items())


def test_checkpoints_are_saved_between_generations(
    rl_config_with: ConfigWith, rl_trainer_for: TrainerFor, tmp_path: Path
) -> None:
    """Each batch of completions feeds two updates; a save due after the first waits for the second."""
    config = rl_config_with("training.num_iterations=2", "training.max_steps=5", "training.save_strategy=steps",
                            "training.save_steps=1")  # fmt: skip
    trainer = rl_trainer_for(config)
    trainer.train()
    assert {folder.name for folder in (tmp_path / "rl").glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (2, 4, 5)}


def test_validation_best_and_final(rl_config_with: ConfigWith, rl_trainer_for: TrainerFor, tmp_path: Path) -> None:
    config = rl_config_with("training.eval_strategy=steps", "training.eval_steps=2", "training.max_steps=4",
                            "training.learning_rate=1e-2")  # fmt: skip
    trainer = rl_trainer_for(config)
    trainer.train()
    final = trainer.finish()
    rewards = history(trainer, "eval_reward")
    assert len(rewards) == 2 and final["eval_reward"] == rewards[-1]
    assert history(trainer, "eval_rewards/temporal_iou") == rewards
    assert [100 * reward for reward in rewards] == pytest.approx(history(trainer, "eval_mIoU"))
    best = json.loads((tmp_path / "rl/checkpoint-best/metrics.json").read_text())
    assert best["eval_reward"] == max(rewards)
    assert len(history(trainer, "reward")) == 4  # training's records are not drained into validation's
    assert "loss" not in next(entry for entry in trainer.state.log_history if "eval_reward" in entry)


def test_the_order_of_rows_is_a_function_of_seed_and_epoch() -> None:
    epoch = 0
    sampler = GroupSampler(5, num_generations=2, num_prompts=2, repeats=3, shuffle=True, seed=1, epoch=lambda: epoch)
    first = list(sampler)
    assert len(first) == len(sampler) == 2 * 2 * 2 * 3
    for batch in (first[:12], first[12:]):
        fresh, *stale = (batch[i : i + 4] for i in (0, 4, 8))
        assert fresh[0] == fresh[1] != fresh[2] == fresh[3]
        assert stale == [[index + 5 for index in fresh]] * 2
    epoch = 1
    second = list(sampler)
    assert second != first
    epoch = 0
    assert list(sampler) == first


def test_no_clip_is_decoded_twice(
    rl_config_with: ConfigWith, rl_trainer_for: TrainerFor, demo_data: Path, tmp_path: Path
) -> None:
    """Two epochs over four rows on two videos, from a worker: the records count two decodes in all."""
    rows = [json.loads(line) for line in (demo_data / "train.jsonl").read_text().splitlines()][:4]
    for row in rows:
        row["video"] = str(demo_data / row["video"])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len({row["video"] for row in rows}) == 2
    config = rl_config_with(
        f"data.train={tmp_path / 'rows.jsonl'}", f"data.cache_dir={tmp_path / 'cache'}", "training.max_steps=-1",
        "training.num_train_epochs=2", "training.dataloader_num_workers=1",
    )  # fmt: skip
    trainer = rl_trainer_for(config)
    trainer.train()
    records = [record for record in read_metrics(tmp_path / "metrics/rl.jsonl") if "train/loss" in record]
    assert [record["data/decoded"] for record in records] == [2] * len(records) and len(records) >= 4
    # Each of the four prompts once an epoch, and the checks at the start: all but two came from the cache.
    assert records[-1]["data/cache_hits"] == 4 * 2 + 1 - 2
