"""Writes a tiny Qwen3-VL checkpoint of random weights: the real architecture, processor and file layout, in 5 MB.

It loads through the same `from_pretrained` calls as a released checkpoint, so the demo and the tests take the paths a
4B model takes. What is tiny: width, depth and vocabulary. What is not: patch 16, merge 2, temporal patch 2, deepstack,
interleaved mrope, grouped-query attention, the special tokens, the chat template, the `<t seconds>` markers and a
generation config that samples unless told otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # Python had put scripts/ there; see utils/attach.py

from scripts.make_demo_data import all_sentences  # noqa: E402
from utils.common import UserError, run_command, settle_accelerator, write_json  # noqa: E402
from utils.config import DataFile, PromptConfig, load_config  # noqa: E402
from utils.prompts import build_messages, format_answer  # noqa: E402
from utils.rows import read_rows  # noqa: E402
from utils.spans import Span  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3VLConfig, Qwen3VLProcessor

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
"""Qwen3-VL's special tokens in its order; decoding with `skip_special_tokens` drops them."""

PLAIN_ADDED_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
"""One id each as in Qwen3-VL, but kept by `skip_special_tokens`."""

CHAT_TEMPLATE = """\
{%- macro render(content, counts) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
                {%- set counts.images = counts.images + 1 -%}
                {{- 'Picture ' ~ counts.images ~ ': ' if add_vision_id else '' -}}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type == 'video' or 'video' in part -%}
                {%- set counts.videos = counts.videos + 1 -%}
                {{- 'Video ' ~ counts.videos ~ ': ' if add_vision_id else '' -}}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif 'text' in part -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set counts = namespace(images=0, videos=0) -%}
{%- for message in messages -%}
    {%- if message.role in ('user', 'assistant') or (message.role == 'system' and loop.first) -%}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ render(message.content, counts) ~ '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt else '' -}}
"""
"""Renders system, user and assistant turns of text, image and video parts as Qwen3-VL's own template does; no tools."""

MAX_LEARNED_TOKENS = 1024
"""The vocabulary before the added tokens is cut here; words beyond it are spelt in pieces."""

HEAD_DIM = 32

INITIALIZER_RANGE = 0.05
"""Of the weights. Qwen's 0.02 is small at this width: at step 121 the loss was 0.378 with it, 0.353 with this."""

MANIFEST = "tiny_model.json"


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with Qwen's splitting rules (every digit its own token), trained on `texts`.

    Any text can be encoded. A word that `texts` hold at least twice is one token, up to `MAX_LEARNED_TOKENS`.
    """
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    untrained = Qwen2Tokenizer(unk_token=None, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer = untrained.train_new_from_iterator(
        texts,
        MAX_LEARNED_TOKENS,
        new_special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_ADDED_TOKENS])
    return tokenizer


def build_processor(tokenizer: PreTrainedTokenizerBase) -> Qwen3VLProcessor:
    """The Qwen3-VL processor of the released checkpoints (sizes and normalisation included) around `tokenizer`."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    tokenizer.model_max_length = 262144
    half = [0.5, 0.5, 0.5]
    image_processor = Qwen2VLImageProcessor(
        patch_size=16, image_mean=half, image_std=half, size={"shortest_edge": 65536, "longest_edge": 16777216}
    )
    video_processor = Qwen3VLVideoProcessor(
        size={"shortest_edge": 4096, "longest_edge": 25165824}, cap_pixels_per_frame=False
    )
    return Qwen3VLProcessor(image_processor, tokenizer, video_processor, chat_template=CHAT_TEMPLATE)


def build_config(
    tokenizer: PreTrainedTokenizerBase, *, hidden: int, layers: int, vision_hidden: int, vision_layers: int, tie: bool
) -> Qwen3VLConfig:
    """A Qwen3-VL configuration of the given widths and depths over `tokenizer`'s vocabulary.

    As in the released models the embedding has a few rows more than the tokenizer has tokens.
    """
    from transformers import Qwen3VLConfig

    frequencies = HEAD_DIM // 2  # shared out between time, height and width
    mrope_section = [frequencies - 2 * (frequencies // 3), frequencies // 3, frequencies // 3]
    heads = hidden // HEAD_DIM
    token_id = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": -(-len(tokenizer) // 16) * 16,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2 or 1,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 262144,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": mrope_section,
            "mrope_interleaved": True,
        },
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
        "initializer_range": INITIALIZER_RANGE,
        "tie_word_embeddings": tie,
    }
    vision = {
        "depth": vision_layers,
        "hidden_size": vision_hidden,
        "intermediate_size": 4 * vision_hidden,
        "num_heads": vision_hidden // 16,
        "out_hidden_size": hidden,
        "num_position_embeddings": 256,
        "initializer_range": INITIALIZER_RANGE,
        "deepstack_visual_indexes": list(range(vision_layers))[:3],
    }
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=tie,
    )


def build_tiny_checkpoint(
    path: str | os.PathLike[str],
    texts: Iterable[str],
    *,
    hidden: int = 128,
    layers: int = 4,
    vision_hidden: int = 64,
    vision_layers: int = 2,
    tie: bool = True,
    seed: int = 0,
) -> Path:
    """Write model and processor to `path` in the Hugging Face layout; the same arguments give the same weights.

    Args:
        path: folder of the checkpoint, made if absent; files of the same names are overwritten.
        texts: what the tokenizer is trained on: prompts, answers and the words of the queries.
        hidden: width of the language model, a multiple of 32.
        layers: depth of the language model, at least the number of deepstack layers (`min(vision_layers, 3)`).
        vision_hidden: width of the vision encoder, a multiple of 16.
        vision_layers: depth of the vision encoder.
        tie: one matrix for the embedding and the head (as 2B and 4B) or two (as 8B).
        seed: of the weights. Torch's own random state is left as it was.

    Returns:
        The folder.

    Raises:
        UserError: a width or depth out of its rule.
    """
    import torch
    from transformers import GenerationConfig, Qwen3VLForConditionalGeneration

    _check_sizes(hidden, layers, vision_hidden, vision_layers)
    processor = build_processor(build_tokenizer(texts))
    sizes = {"hidden": hidden, "layers": layers, "vision_hidden": vision_hidden, "vision_layers": vision_layers}
    config = build_config(processor.tokenizer, **sizes, tie=tie)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
    text_config = config.text_config
    model.generation_config = GenerationConfig(  # the released checkpoints sample by default
        do_sample=True,
        temperature=0.7,
        top_p=0.8,
        top_k=20,
        pad_token_id=text_config.pad_token_id,
        bos_token_id=text_config.bos_token_id,
        eos_token_id=[text_config.eos_token_id, text_config.pad_token_id],
    )
    folder = Path(path)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _check_sizes(hidden: int, layers: int, vision_hidden: int, vision_layers: int) -> None:
    if hidden < HEAD_DIM or hidden % HEAD_DIM:
        raise UserError(f"hidden must be a positive multiple of {HEAD_DIM}, got {hidden}")
    if vision_hidden < 16 or vision_hidden % 16:
        raise UserError(f"vision_hidden must be a positive multiple of 16, got {vision_hidden}")
    if vision_layers < 1 or layers < min(vision_layers, 3):
        raise UserError(
            f"vision_layers must be >= 1 and layers >= min(vision_layers, 3), got vision_layers {vision_layers} and "
            f"layers {layers}: each deepstack feature is added to one layer of the language model"
        )


def prompt_texts(sentences: Iterable[str], prompt: PromptConfig) -> list[str]:
    """What a tokenizer should know to ask about `sentences` and to answer: every turn, its role, markers, numbers."""
    answers = [[Span(0.5, 1.5)], [Span(2, 3), Span(4, 5)], []]
    turns = [format_answer(prompt, windows) for windows in answers] + ["system", "user", "assistant", "<0.2 seconds>"]
    texts: list[str] = []
    for sentence in sentences:
        asked = [part["text"] for message in build_messages(prompt, sentence) for part in message["content"][-1:]]
        texts += [*asked, *turns]
    return texts * 2  # a word has to occur twice


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--annotations", type=Path, nargs="*", help="JSONL whose sentences the tokenizer learns")
    parser.add_argument("--data_config", type=Path, help="YAML whose prompt the tokenizer learns")
    parser.add_argument("--hidden", type=int, default=128, help="width of the language model (%(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="depth of the language model (%(default)s)")
    parser.add_argument("--vision_hidden", type=int, default=64, help="width of the vision encoder (%(default)s)")
    parser.add_argument("--vision_layers", type=int, default=2, help="depth of the vision encoder (%(default)s)")
    parser.add_argument("--untied", action="store_true", help="a head of its own instead of the embedding's matrix")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main() -> None:
    args = parse_arguments()
    settle_accelerator()
    sentences = [row.sentence for path in args.annotations or () for row in read_rows(path)[0]]
    prompt = load_config(DataFile, [args.data_config] if args.data_config else []).prompt
    texts = prompt_texts(sorted(set(sentences)) or all_sentences(), prompt)
    sizes = {name: getattr(args, name) for name in ("hidden", "layers", "vision_hidden", "vision_layers", "seed")}
    recipe = {**sizes, "tie": not args.untied, "texts": hashlib.sha256("\n".join(texts).encode()).hexdigest()}
    if is_made(args.output_dir, recipe):
        print(f"{args.output_dir}: this checkpoint is there already")
        return
    make_whole(args.output_dir, texts, recipe)
    print(f"{args.output_dir}: {describe(args.output_dir)}")


def is_made(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether `folder` holds the checkpoint of `recipe`. Raises UserError when it holds something else."""
    manifest = folder / MANIFEST
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not manifest.is_file():
        raise UserError(f"{folder} holds something that this script did not make; choose another --output_dir")
    if json.loads(manifest.read_text(encoding="utf-8")) != recipe:
        raise UserError(f"{folder} holds a tiny model of other settings or texts; choose another --output_dir")
    return True


def make_whole(folder: Path, texts: Sequence[str], recipe: dict[str, Any]) -> None:
    """Build the checkpoint beside `folder` and move it there, so that an interrupted run leaves no half."""
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        settings = {name: value for name, value in recipe.items() if name != "texts"}
        write_json(build_tiny_checkpoint(unfinished, texts, **settings) / MANIFEST, recipe)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def describe(folder: Path) -> str:
    """Parameters and tokens of a saved checkpoint, in words."""
    from safetensors import safe_open
    from transformers import AutoTokenizer

    with safe_open(folder / "model.safetensors", framework="numpy") as weights:
        num_parameters = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())
    return f"{num_parameters / 1e6:.2f} M parameters, {len(AutoTokenizer.from_pretrained(folder))} tokens"


if __name__ == "__main__":
    run_command(main)
