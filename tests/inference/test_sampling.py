"""Sampled answers: drawn from the model's own distribution, a row's answers beside its number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from datasets.video_dataset import VideoTemporalDataset
from inference.sampling import plain_sampling, sample_answers
from trainers.generation import vision_token_ids
from trainers.model import Policy, load_for_inference
from utils.config import DataConfig, PromptConfig


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Policy:
    return load_for_inference(str(tiny_model), need_contract=False)


@pytest.fixture(scope="module")
def dataset(policy: Policy, demo_data: Path) -> VideoTemporalDataset:
    data = DataConfig(
        test=(str(demo_data / "test.jsonl"),),  # type: ignore[arg-type]
        backend="pyav", max_frames=8, min_pixels_per_frame=2048, max_pixels_per_frame=2048,
    )  # fmt: skip
    return VideoTemporalDataset(
        data, policy.processor, PromptConfig(question="When {sentence}?"), split="test", with_answer=False
    )


def test_every_readable_row_gets_its_answers(policy: Policy, dataset: VideoTemporalDataset) -> None:
    """Batches do not matter: 5 rows in batches of 2 with a fault among them; greedy-like at a tiny temperature."""
    samples = [dataset[0], dataset[1], {"index": 2, "fault": "gone"}, dataset[3], dataset[4], dataset[5]]
    settings = {"num_samples": 3, "temperature": 1e-4, "max_new_tokens": 5}
    by_two = dict(sample_answers(policy, samples, prompts_per_batch=2, **settings))
    assert list(by_two) == [0, 1, 3, 4, 5]
    for answers in by_two.values():
        assert len(answers) == 3 and len(set(answers)) == 1
    assert dict(sample_answers(policy, samples, prompts_per_batch=5, **settings)) == by_two


def test_answers_at_temperature_1_differ(policy: Policy, dataset: VideoTemporalDataset) -> None:
    torch.manual_seed(0)
    ((_, answers),) = sample_answers(policy, [dataset[0]], num_samples=4, max_new_tokens=12)
    assert len(set(answers)) == 4


def test_the_checkpoints_own_sampling_does_not_count(policy: Policy) -> None:
    config = plain_sampling(policy, temperature=0.7, max_new_tokens=9)
    assert (config.temperature, config.top_p, config.top_k, config.max_new_tokens) == (0.7, 1.0, 0, 9)
    assert config.suppress_tokens == vision_token_ids(policy.processor)
