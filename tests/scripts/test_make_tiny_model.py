"""The tiny checkpoint: it loads, speaks and breaks like a released Qwen3-VL."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, Qwen3VLForConditionalGeneration

from scripts.make_tiny_model import (
    MANIFEST,
    PLAIN_ADDED_TOKENS,
    SPECIAL_TOKENS,
    build_tiny_checkpoint,
    build_tokenizer,
    is_made,
    prompt_texts,
)
from tests.tiny import tiny_checkpoint
from utils.common import REPO_ROOT, UserError
from utils.config import PromptConfig
from utils.rows import Row, write_rows
from utils.spans import Span

USER = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "When does the red square appear?"}]}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory)


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> Any:
    return AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(checkpoint)


def process(processor: Any, frames: np.ndarray, times_s: list[float], messages: list[dict[str, Any]] = USER) -> Any:
    """Model inputs of one video whose frames carry their own times, on a clock of milliseconds."""
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    metadata = {
        "fps": 1000.0,
        "frames_indices": [round(time * 1000) for time in times_s],
        "total_num_frames": round(times_s[-1] * 1000) + 500,
        "duration": times_s[-1] + 0.5,
    }
    options = {"do_resize": False, "do_sample_frames": False, "return_tensors": "pt"}
    return processor(text=[text], videos=[frames], video_metadata=[metadata], **options)


def noise(num_frames: int, side: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_frames, side, side, 3), dtype=np.uint8)


# --- tokenizer --------------------------------------------------------------------------------------------------------


def test_words_digits_and_markers(processor: Any) -> None:
    def tokens(text: str) -> list[str]:
        return [processor.tokenizer.decode([token]) for token in processor.tokenizer(text).input_ids]

    assert tokens("<13.2 seconds>") == ["<", "1", "3", ".", "2", " seconds", ">"]
    assert tokens("From 0.5 to 12.0 seconds.<|im_end|>") == [
        *("From", " ", "0", ".", "5", " to", " ", "1", "2", ".", "0", " seconds", ".", "<|im_end|>"),
    ]
    assert tokens("the red square appears") == ["the", " red", " square", " appears"]


@pytest.mark.parametrize("text", ["", "Ünïcödé 日本 🎬\r\n\t ", "a  b", "1e-3", " leading", "<|im_start|>user\n"])
def test_any_text_comes_back(processor: Any, text: str) -> None:
    assert processor.tokenizer.decode(processor.tokenizer(text).input_ids) == text


def test_special_tokens(processor: Any, model: Any) -> None:
    tokenizer = processor.tokenizer
    for token in (*SPECIAL_TOKENS, *PLAIN_ADDED_TOKENS):
        assert len(tokenizer(token).input_ids) == 1
    assert set(tokenizer.all_special_tokens) == set(SPECIAL_TOKENS)
    ids = tokenizer("<|im_start|><think>a</think><|im_end|>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a</think>"
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<|endoftext|>", "<|im_end|>", None)
    config = model.config
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        assert getattr(config, name) == getattr(processor, name)
    assert config.text_config.vocab_size >= len(tokenizer)
    assert config.text_config.eos_token_id == tokenizer.eos_token_id


def test_tokenizer_is_the_same_each_time_and_learns_its_texts() -> None:
    texts = ["zebra crossing"] * 3
    first, again = (build_tokenizer(texts).backend_tokenizer.to_str() for _ in range(2))
    assert first == again
    tokenizer = build_tokenizer(texts)
    assert [tokenizer.decode([i]) for i in tokenizer("zebra crossing 42").input_ids] == [
        *("zebra", " crossing", " ", "4", "2"),
    ]


def test_prompt_texts_hold_the_prompt() -> None:
    texts = prompt_texts(["a dog barks"], PromptConfig(system="You watch.", question="When? {sentence}"))
    assert {"You watch.", "When? a dog barks", "From 0.5 to 1.5 seconds.", "<0.2 seconds>"} <= set(texts)


# --- chat template ----------------------------------------------------------------------------------------------------

PICTURE, FILM = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"


@pytest.mark.parametrize(
    ("messages", "options", "text"),
    [
        ([{"role": "user", "content": "Hi"}], {}, "<|im_start|>user\nHi<|im_end|>\n"),
        (
            [
                {"role": "system", "content": [{"type": "text", "text": "S"}]},
                {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": " Q? "}]},
            ],
            {"add_generation_prompt": True},
            f"<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n{FILM} Q? <|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            [
                {"role": "system", "content": "S"},
                {"role": "user", "content": [{"video": "a.mp4"}, {"image_url": "b"}, {"type": "image"}, {"text": "Q"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
                {"role": "user", "content": [{"type": "video"}]},
            ],
            {"add_vision_id": True},
            f"<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nVideo 1: {FILM}Picture 1: {PICTURE}"
            f"Picture 2: {PICTURE}Q<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
            f"<|im_start|>user\nVideo 2: {FILM}<|im_end|>\n",
        ),
    ],
    ids=["string", "system and video", "everything"],
)
def test_chat_template(processor: Any, messages: list[dict[str, Any]], options: dict[str, bool], text: str) -> None:
    assert processor.apply_chat_template(messages, tokenize=False, **options) == text


# --- processor --------------------------------------------------------------------------------------------------------


def test_one_visual_token_for_two_frames_and_true_markers(processor: Any) -> None:
    times = [0.0, 0.5, 1.0, 1.75, 4.2, 4.6]
    inputs = process(processor, noise(6), times)
    assert inputs["video_grid_thw"].tolist() == [[3, 2, 2]]
    assert inputs["pixel_values_videos"].shape == (12, 1536)
    pads = inputs["input_ids"] == processor.video_token_id
    assert pads.sum() == 3
    assert (inputs["mm_token_type_ids"] == 2 * pads).all()
    patch = "<|vision_start|><|video_pad|><|vision_end|>"
    markers = "".join(f"<{time} seconds>{patch}" for time in ("0.2", "1.4", "4.4"))
    assert markers in processor.tokenizer.decode(inputs["input_ids"][0])


def test_pixels_reach_the_patches(processor: Any) -> None:
    """Channels last or first, normalised to [-1, 1] as in the released checkpoints."""
    frames = noise(4)
    last = process(processor, frames, [0, 0.5, 1, 1.5])["pixel_values_videos"]
    first = process(processor, frames.transpose(0, 3, 1, 2).copy(), [0, 0.5, 1, 1.5])["pixel_values_videos"]
    assert torch.equal(last, first)
    patch = last.view(2, 2, 2, 3, 2, 16, 16)[1, 0, 1]  # second pair of frames, upper right patch: (C, T, H, W)
    expected = torch.from_numpy(frames[2:4, :16, 16:]).permute(3, 0, 1, 2) / 127.5 - 1
    assert torch.allclose(patch, expected, atol=1e-5)


def test_images(processor: Any, model: Any) -> None:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the red square"}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[noise(1, 64)[0]], do_resize=False, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 4
    assert torch.isfinite(model(**inputs).logits).all()


# --- model ------------------------------------------------------------------------------------------------------------


def test_loads_as_the_real_one(checkpoint: Path, model: Any, processor: Any) -> None:
    assert type(model) is Qwen3VLForConditionalGeneration
    assert type(processor).__name__ == "Qwen3VLProcessor"
    assert {path.name for path in checkpoint.iterdir()} >= {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "processor_config.json"),
    }
    assert 1.0e6 < sum(weight.numel() for weight in model.parameters()) < 1.6e6
    assert model.lm_head.weight is model.get_input_embeddings().weight
    vision = model.config.vision_config
    assert (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size) == (16, 2, 2)
    assert len(model.model.visual.deepstack_merger_list) == len(vision.deepstack_visual_indexes) == 2
    generation = GenerationConfig.from_pretrained(checkpoint)
    assert generation.do_sample and generation.eos_token_id[0] == processor.tokenizer.eos_token_id


def test_every_weight_gets_a_gradient(model: Any, processor: Any) -> None:
    inputs = process(processor, noise(4), [0, 0.5, 1, 1.5])
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    assert loss.item() == pytest.approx(np.log(model.config.text_config.vocab_size), abs=0.5)
    loss.backward()
    without = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    model.zero_grad()
    assert without == []


def test_the_pixels_move_the_answer(model: Any, processor: Any) -> None:
    with torch.no_grad():
        inputs = process(processor, noise(8), [i / 2 for i in range(8)])
        seen, again = (model(**inputs).logits[:, -1].log_softmax(-1) for _ in range(2))
        inputs["pixel_values_videos"] = torch.zeros_like(inputs["pixel_values_videos"])
        blind = model(**inputs).logits[:, -1].log_softmax(-1)
    assert (seen - blind).abs().max() > 100 * (seen - again).abs().max()
    assert (seen - blind).abs().max() > 1e-3


def test_generates_by_itself(model: Any, processor: Any) -> None:
    inputs = process(processor, noise(4), [0, 0.5, 1, 1.5])
    greedy = [model.generate(**inputs, do_sample=False, max_new_tokens=6) for _ in range(2)]
    assert torch.equal(*greedy)
    assert greedy[0].shape[1] <= inputs["input_ids"].shape[1] + 6
    sampled = [model.generate(**inputs, max_new_tokens=6) for _ in range(3)]
    assert any(not torch.equal(greedy[0], other) for other in sampled)  # it samples unless told otherwise


def test_sizes_and_untied_head(tmp_path: Path) -> None:
    folder = build_tiny_checkpoint(
        tmp_path / "m", ["a b"] * 2, hidden=64, layers=3, vision_hidden=32, vision_layers=3, tie=False
    )
    model = AutoModelForImageTextToText.from_pretrained(folder)
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.hidden_size, text.num_hidden_layers, vision.hidden_size, vision.depth) == (64, 3, 32, 3)
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    assert "lm_head.weight" in load_file(folder / "model.safetensors")
    inputs = process(AutoProcessor.from_pretrained(folder), noise(2), [0, 0.5])
    assert torch.isfinite(model(**inputs).logits).all()


def test_seed_decides_the_weights_and_touches_no_other_dice(tmp_path: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    folders = [
        build_tiny_checkpoint(tmp_path / name, ["a"], hidden=32, layers=2, seed=seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert torch.rand(1) == expected
    digests = [hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() for folder in folders]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden": 100}, "hidden must be a positive multiple of 32, got 100"),
        ({"vision_hidden": 0}, "vision_hidden must be a positive multiple of 16, got 0"),
        ({"layers": 1}, "layers >= min\\(vision_layers, 3\\), got vision_layers 2 and layers 1"),
    ],
)
def test_impossible_sizes(sizes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        build_tiny_checkpoint(tmp_path / "m", ["a"], **sizes)
    assert list(tmp_path.iterdir()) == []


# --- the command ------------------------------------------------------------------------------------------------------


def test_command(tmp_path: Path) -> None:
    rows = [Row("v.mp4", 8, (Span(1, 2),), "the zebra crosses", None, None, {}, "", 0)]
    write_rows(tmp_path / "train.jsonl", rows)
    (tmp_path / "video.yaml").write_text('prompt:\n  question: "Quand {sentence}?"\n')

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        script = [sys.executable, str(REPO_ROOT / "scripts" / "make_tiny_model.py"), "--output_dir", "model"]
        options = ["--annotations", "train.jsonl", "--data_config", "video.yaml", "--hidden", "64", "--layers", "2"]
        return subprocess.run([*script, *options, *arguments], cwd=tmp_path, capture_output=True, text=True)

    first = command()
    assert first.returncode == 0, first.stderr
    assert "M parameters" in first.stdout
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "model").tokenizer
    assert [tokenizer.decode([token]) for token in tokenizer("Quand the zebra crosses?").input_ids] == [
        *("Quand", " the", " zebra", " crosses", "?"),
    ]
    assert json.loads((tmp_path / "model" / MANIFEST).read_text())["hidden"] == 64
    weights = (tmp_path / "model" / "model.safetensors").stat()
    second = command()
    assert "there already" in second.stdout
    assert (tmp_path / "model" / "model.safetensors").stat() == weights
    recipe = json.loads((tmp_path / "model" / MANIFEST).read_text())
    with pytest.raises(UserError, match="other settings or texts; choose another --output_dir"):
        is_made(tmp_path / "model", {**recipe, "seed": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "train.jsonl", "video.yaml"]


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    assert not is_made(tmp_path / "new", {})
    assert not is_made(tmp_path, {})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds something that this script did not make; choose another --output_dir"):
        is_made(tmp_path, {})
