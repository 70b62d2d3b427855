"""The memory estimate of a run: moments, the shipped configurations on the meta device, and the table."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from datasets.video_dataset import VideoTemporalDataset, estimate_tokens
from scripts.bench_memory import plan
from trainers.memory import Allowances
from trainers.memory_estimate import GB, Clip, Estimate, Job, Term, estimate
from trainers.memory_plan import describe_estimate, largest_clip, longest_clip, read_job
from trainers.model import load_policy, load_processor, resolve_source
from trainers.parts import LearningRates
from trainers.sft_trainer import VideoSFTTrainer
from utils.common import REPO_ROOT
from utils.config import DataConfig, RLConfig, SFTConfig, load_config

CONFIGS = REPO_ROOT / "configs"
DATA = CONFIGS / "data/video_config.yaml"
SFT = CONFIGS / "training/sft_config.yaml"
ZERO2, ZERO3 = CONFIGS / "deepspeed/ds_zero2.json", CONFIGS / "deepspeed/ds_zero3_offload.json"
HALF_PIXELS = "data.total_pixels=8388608"


def sft_job(*overrides: str, size: str = "4b", file: str = "sft_config.yaml", **options: Any) -> Job:
    return plan(SFTConfig, [CONFIGS / "training" / file, DATA], size, overrides, **options)


def rl_job(*overrides: str, size: str = "4b", **options: Any) -> Job:
    return plan(RLConfig, [CONFIGS / "training/rl_config.yaml", DATA], size, overrides, **options)


@pytest.fixture(scope="module")
def default() -> Job:
    return sft_job()


# ---------------------------------------------------------------------------------------------- real sizes
@pytest.mark.parametrize(("size", "gibibytes"), [("4b", 16.4), ("2b", 10.5)])
def test_before_activations_real_sizes_take_what_was_counted_before(size: str, gibibytes: float) -> None:
    """Weights, gradients and AdamW of the shipped LoRA with fp32 copies (counted once on the meta device by hand)."""
    job = sft_job(size=size)
    found = estimate(job)
    gradients = job.parameters.trained_bytes
    total = found.bytes_of("weights") + found.bytes_of("optimizer") + gradients
    assert total / 2**30 == pytest.approx(gibibytes, abs=0.05)


def test_untied_heads_are_two_tensors() -> None:
    job = sft_job(size="8b")
    assert not job.tied
    assert job.parameters.num_trained_embedding == job.parameters.largest_trained == 151936 * 4096
    assert job.parameters.num_trained > 2 * 151936 * 4096


@pytest.mark.parametrize(
    ("file", "size", "card", "overrides"),
    [("sft_16gb.yaml", "4b", 16, []), ("sft_8gb.yaml", "2b", 8, [HALF_PIXELS])],
    ids=["16 GB", "8 GB"],
)
def test_small_cards_hold_their_configurations(file: str, size: str, card: int, overrides: list[str]) -> None:
    job = sft_job(*overrides, file=file, size=size)
    found = estimate(job)
    assert found.total < (card - 0.5) * GB  # half a gigabyte for a desktop and what is not foreseen
    assert not (job.trains.head or job.trains.mergers or job.trains.tower or job.trains.language)
    assert job.trains.targets == {"q_proj", "k_proj", "v_proj", "o_proj"}
    text = (CONFIGS / "training" / file).read_text()
    table = [line.removeprefix("#   ") for line in text.splitlines() if line.startswith("#   ")]
    shown = [line.strip() for line in describe_estimate(found).splitlines()]
    assert [line for line in shown if line not in [row.strip() for row in table]] == []  # the file's own arithmetic
    assert f"configs/training/{file} " in " ".join(table) + text


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (lambda: sft_job(), "1 GPU"),
        (lambda: sft_job(deepspeed=ZERO2, num_gpus=4), "ZeRO-2"),
        (lambda: sft_job(deepspeed=ZERO3, num_gpus=4), "ZeRO-3"),
        (lambda: rl_job(), "GRPO"),
        (lambda: sft_job(file="sft_16gb.yaml"), "16gb"),
        (lambda: sft_job(HALF_PIXELS, file="sft_8gb.yaml", size="2b"), "8gb"),
    ],
)
def test_the_readme_says_what_the_estimate_says(job: Callable[[], Job], said: str) -> None:
    rows = [line for line in (REPO_ROOT / "README.md").read_text().splitlines() if line.startswith("|")]
    total = f"{estimate(job()).total / GB:.1f}"
    assert [row for row in rows if said in row and re.search(rf"\| {total} \|", row)], (said, total)


# ---------------------------------------------------------------------------------------------- what moves it
def test_queries_of_one_video_score_their_own_answers_only(default: Job) -> None:
    """Rows of an ordinary batch have their answers in other columns, and each computes those of all."""
    shared = sft_job("training.share_video=true")
    rows, answer = default.update.clips, default.clip.answer
    assert (shared.update.scored, default.update.scored) == (rows * answer, rows * rows * answer)
    assert shared.update.sequence.tokens == default.update.sequence.tokens
    assert shared.update.sequence.mask == 0  # completions attend without one


def test_more_of_anything_takes_more(default: Job) -> None:
    base = estimate(default).total
    for override in (
        "training.per_device_train_batch_size=4",
        "training.gradient_checkpointing=false",
        "training.vision_tower_lr=1e-6",
        "lora.r=256",
        "lora.target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]",
        "lora.enabled=false",
        "model.torch_dtype=float32",
    ):
        assert estimate(sft_job(override)).total > base, override


def test_less_of_anything_takes_less(default: Job) -> None:
    base = estimate(default).total
    for override in (
        "training.per_device_train_batch_size=1",
        HALF_PIXELS,
        "data.max_frames=256",
        "training.mm_projector_lr=0",
        "lora.modules_to_save=[]",
    ):
        more = ["lora.target_modules=[q_proj,v_proj]"] if "modules_to_save" in override else []
        assert estimate(sft_job(override, *more)).total < base, override
    assert estimate(sft_job(deepspeed=ZERO2, num_gpus=4)).total < base
    assert estimate(sft_job(deepspeed=ZERO3, num_gpus=4)).total < estimate(sft_job(deepspeed=ZERO2, num_gpus=4)).total


def test_a_shared_prompt_takes_less_than_rows() -> None:
    shared, rows = rl_job(), rl_job("training.share_prefix=false")
    assert rows.update.sequence.tokens > 3.5 * shared.update.sequence.tokens
    assert rows.rollout is not None and shared.rollout is not None
    assert (shared.rollout.prompts, shared.rollout.answers, rows.rollout.prompts) == (2, 8, 8)
    assert estimate(rows).bytes_of("rollout cache") > 3.9 * estimate(shared).bytes_of("rollout cache")
    assert estimate(rows).bytes_of("activations") > 3.5 * estimate(shared).bytes_of("activations")


def test_the_kl_reference_is_a_copy_of_the_adapter() -> None:
    job = rl_job()
    assert estimate(job).bytes_of("reference") == job.parameters.trained_bytes
    assert estimate(rl_job("training.kl_coef=0")).bytes_of("reference") == 0
    whole = rl_job("lora.enabled=false")
    everything = whole.parameters.frozen_bytes + whole.parameters.trained_bytes
    assert estimate(whole).bytes_of("reference") == everything


def test_zero_3_gathers_the_model_for_sampling() -> None:
    job = rl_job(deepspeed=ZERO3, num_gpus=4)
    whole = job.parameters.frozen_bytes + job.parameters.trained_bytes
    assert estimate(job).bytes_of("gathered weights") == whole
    assert estimate(rl_job(deepspeed=ZERO2, num_gpus=4)).bytes_of("gathered weights") == 0


def test_without_validation_there_is_no_such_moment(default: Job) -> None:
    assert default.validation is not None and default.validation.prompts == 4
    assert sft_job("data.val=[]").validation is None
    assert sft_job("training.eval_strategy=no").validation is None


def test_deepspeed_computes_in_16_bits_without_autocast(default: Job) -> None:
    assert (default.precision.weights, default.precision.adapters, default.precision.autocast) == (2, 4, True)
    job = sft_job(deepspeed=ZERO2, num_gpus=4)
    assert (job.precision.weights, job.precision.adapters, job.precision.autocast) == (2, 2, False)
    assert (job.sharding.stage, job.sharding.bucket, job.sharding.offload_weights) == (2, 2560**2, False)
    three = sft_job(deepspeed=ZERO3, num_gpus=4).sharding
    assert (three.stage, three.offload_weights, three.offload_optimizer, three.max_live) == (3, True, True, 10**9)


# ---------------------------------------------------------------------------------------------- moments and the table
def test_terms_of_other_moments_do_not_add_up() -> None:
    terms = (
        Term("weights", 5.0),
        Term("gradients", 1.0, "", "update"),
        Term("activations", 4.0, "", "kept"),
        Term("one layer", 3.0, "", "layer"),
        Term("logits", 2.0, "", "head"),
        Term("cache", 9.0, "", "rollout"),
    )
    found = Estimate(terms, Allowances(context=0, nccl=0, fragmentation=0.0), num_gpus=1)
    assert (found.tensors("layer"), found.tensors("head"), found.tensors("rollout")) == (13, 12, 14)
    assert (found.peak, found.total, found.largest.name) == ("rollout", 14, "cache")
    with_gaps = Estimate(terms[:-1], Allowances(context=10, nccl=7, fragmentation=0.5), num_gpus=2)
    assert (with_gaps.peak, with_gaps.total) == ("layer", 13 + 10 + 7 + 0.5 * 8)


def test_table_brackets_what_is_not_there_at_the_peak(default: Job) -> None:
    found = estimate(default)
    lines = describe_estimate(found).splitlines()
    assert lines[0].startswith(f"memory:      about {found.total / GB:.1f} GB on the GPU, in a layer's backward pass")
    assert lines[0].endswith(f"largest term: weights, {found.bytes_of('weights') / GB:.1f} GB")
    plain = [float(value) for value in re.findall(r"^  [a-z ]+? +(\d+\.\d+) GB", "\n".join(lines[2:]), re.MULTILINE)]
    assert sum(plain) == pytest.approx(found.total / GB, abs=0.05)
    assert re.search(r"^  logits +\(\d+\.\d+\) GB", "\n".join(lines), re.MULTILINE)


def test_a_real_policy_gives_the_same_job_as_the_meta_device(
    config_with: Callable[..., SFTConfig], tmp_path: Path
) -> None:
    config = config_with("lora.enabled=true", "lora.r=4", "training.bf16=true", "model.torch_dtype=bfloat16")
    args = config.training.to_training_arguments(tmp_path)
    processor = load_processor(resolve_source(config.model.name_or_path))
    rows = VideoTemporalDataset(config.data, processor, config.prompt)
    rates = LearningRates.from_training(config.training)
    policy = load_policy(config.model, config.lora, rates)
    job = read_job(policy.model, config, args, longest_clip(rows))
    assert job.clip.tokens == max(rows.lengths)
    longest = max(len(processor.tokenizer(rows.answer(row))["input_ids"]) for row in rows.rows)
    assert job.clip.answer == longest + 1
    real = sum(parameter.nbytes for parameter in policy.model.parameters())
    assert job.parameters.frozen_bytes + job.parameters.trained_bytes == real
    assert estimate(job).total > real


# ---------------------------------------------------------------------------------------------- clips
def test_clips_follow_the_pixel_budget() -> None:
    data = load_config(SFTConfig, [DATA]).data
    assert largest_clip(data) == Clip(visual=8064, tokens=10683)
    half = data.model_copy(update={"total_pixels": 8388608})
    assert largest_clip(half).visual <= 4096
    short = largest_clip(data.model_copy(update={"max_prompt_tokens": 4000}))
    assert (short.visual, short.tokens) == (4000, 4000)


def test_tokens_of_a_clip_stay_within_the_total() -> None:
    """A long clip has no more frames than `total_pixels` holds at the smallest size."""
    budget = DataConfig(total_pixels=8388608).budget
    visual, tokens = estimate_tokens(3600.0, budget)
    assert visual <= 8388608 // 2048 and budget.most_frames == 512
    assert tokens - visual == 256 * 9 + 64


def test_batches_wait_for_their_pass_in_the_hosts_memory(
    config_with: Callable[..., SFTConfig], trainer_for: Callable[..., VideoSFTTrainer]
) -> None:
    """Accelerate would put all batches of an update on the device at once."""
    trainer = trainer_for(config_with())
    assert super(VideoSFTTrainer, trainer).get_train_dataloader().device == torch.device("cpu")  # what it is else
    loader: Any = trainer.get_train_dataloader()
    assert loader.device is None
    assert next(iter(loader))["pixels"][0].source.dtype == torch.uint8
