"""What is measured on: Qwen3-VL with random weights in the released sizes, and prompts of a wanted length about noise.

The tokenizer is the demo's whatever the size, so nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from datasets.encoding import Sample, encode_prompt
from scripts.make_demo_data import all_sentences
from scripts.make_tiny_model import build_config, build_processor, build_tokenizer, prompt_texts
from trainers.model import add_lora
from trainers.parts import LearningRates, freeze_by_rate
from utils.config import LoraConfig, PromptConfig
from utils.prompts import build_messages
from utils.video import VideoClip


# ---------------------------------------------------------------------------------------------- models
@dataclass(frozen=True)
class Size:
    """Widths and depths of a released Qwen3-VL."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    tie: bool
    vision: tuple[int, int, int]
    """Depth, hidden size and intermediate size of the vision tower (16 heads)."""
    deepstack: tuple[int, int, int]


SIZES = {
    "2b": Size(2048, 6144, 28, 16, True, (24, 1024, 4096), (5, 11, 17)),
    "4b": Size(2560, 9728, 36, 32, True, (24, 1024, 4096), (5, 11, 17)),
    "8b": Size(4096, 12288, 36, 32, False, (27, 1152, 4304), (8, 16, 24)),
}
TINY: dict[str, Any] = {"hidden": 128, "layers": 4, "vision_hidden": 64, "vision_layers": 2, "tie": True}
RATE = 1e-5
"""Of the parts that train: above 0, and never used."""


def model_config(size: str, tokenizer: Any) -> Qwen3VLConfig:
    """The configuration of `size`; special tokens are numbered as in `tokenizer`."""
    config = build_config(tokenizer, **TINY)
    if size == "tiny":
        return config
    chosen = SIZES[size]
    depth, width, inner = chosen.vision
    text = config.text_config.to_dict() | {
        "vocab_size": 151936,
        "hidden_size": chosen.hidden,
        "intermediate_size": chosen.intermediate,
        "num_hidden_layers": chosen.layers,
        "num_attention_heads": chosen.heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "initializer_range": 0.02,
        "tie_word_embeddings": chosen.tie,
        "rope_parameters": config.text_config.rope_parameters | {"mrope_section": [24, 20, 20]},
    }
    vision = config.vision_config.to_dict() | {
        "depth": depth,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_heads": 16,
        "out_hidden_size": chosen.hidden,
        "num_position_embeddings": 2304,
        "initializer_range": 0.02,
        "deepstack_visual_indexes": list(chosen.deepstack),
    }
    markers = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: getattr(config, name) for name in markers}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=chosen.tie, **ids)


def build_model(size: str, device: str, tokenizer: Any) -> Any:
    """Random weights made on the device itself: fp32 for the tiny model on a CPU, else bf16."""
    dtype = torch.float32 if (size, device) == ("tiny", "cpu") else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3VLForConditionalGeneration._from_config(model_config(size, tokenizer), dtype=dtype)
    return model.eval()


def make_trainable(model: Any, size: str, *, vision: bool | None = None) -> Any:
    """Everything trains in the tiny model; a real size gets LoRA on its attention and gradient checkpointing.

    `vision` says whether vision tower and mergers train, in full; by default they do in the tiny model alone.
    """
    trains = vision if vision is not None else size == "tiny"
    seen = RATE if trains else 0.0
    if size == "tiny":
        freeze_by_rate(model, LearningRates(RATE, seen, seen, RATE))
        return model
    lora = LoraConfig(r=64, lora_alpha=128, target_modules=("q_proj", "k_proj", "v_proj", "o_proj"), modules_to_save=())
    wrapped = add_lora(model, lora, LearningRates(RATE, seen, seen, 0.0), fp32_copies=False)
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # zeros: no gradient would reach the other matrix
            parameter.data.normal_(std=0.01)
    wrapped.gradient_checkpointing_enable({"use_reentrant": False})
    return wrapped


# ---------------------------------------------------------------------------------------------- prompts
def demo_processor() -> Any:
    """The processor of the demo's tiny model."""
    return build_processor(build_tokenizer(prompt_texts(all_sentences(), PromptConfig())))


def make_sample(processor: Any, prompt_tokens: int) -> Sample:
    """A prompt of about `prompt_tokens` tokens, markers and question included, about a clip of noise."""
    return _ask(processor, make_clip(processor, prompt_tokens))


def make_clip(processor: Any, prompt_tokens: int, seed: int = 0) -> VideoClip:
    """Noise that makes a short question a prompt of about `prompt_tokens` tokens; other noise for another `seed`.

    A pair of frames takes 60 visual tokens (192 x 320 pixels), 24 when the prompt is short, and a marker.
    """
    height, width = (192, 320) if prompt_tokens >= 250 else (128, 192)
    per_pair = height * width // 1024 + 10
    pairs = max(1, round((prompt_tokens - 40) / per_pair))
    clip = _noise(pairs, height, width, seed)
    length = len(_ask(processor, clip)["input_ids"])
    more = round((prompt_tokens - length) / per_pair)  # how long markers are depends on the times
    return _noise(max(1, pairs + more), height, width, seed) if more else clip


def _ask(processor: Any, clip: VideoClip) -> Sample:
    return encode_prompt(processor, build_messages(PromptConfig(), "the red square appears"), clip)


def _noise(pairs: int, height: int, width: int, seed: int) -> VideoClip:
    frames = np.random.default_rng(seed).integers(0, 256, (2 * pairs, height, width, 3), dtype=np.uint8)
    return VideoClip(frames, np.arange(2 * pairs) / 2.0, 0.0, float(pairs))
