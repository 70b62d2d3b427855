"""When does it happen? One video, one query -> segments, in a notebook or on the command line.

    python inference/video_infer.py --model_path outputs/sft/checkpoint-best --video clip.mp4 \\
        --query "the person opens the door" --output visualization.png

Prompt, frame rate and pixel budget come from the checkpoint's own record (contract 2). Loading is `trainers.model`,
drawing is `inference.visualize` and `inference.animate`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Run as a file, Python put this folder first on the path; the root belongs there (see utils/attach.py).
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.attach import attach
from utils.common import UserError, run_command, settle_accelerator

attach()
settle_accelerator()

import torch  # noqa: E402

from datasets.collate_fns import VideoCollator  # noqa: E402
from datasets.encoding import fit_prompt  # noqa: E402
from inference.animate import animate_temporal_grounding, animation_suffix  # noqa: E402
from inference.batching import Answer, Item, Query, answer_queries, read_items  # noqa: E402
from inference.timeline_rows import EMPTY_WINDOW  # noqa: E402
from inference.visualize import visualize_temporal_grounding  # noqa: E402
from trainers.generation import generate_texts  # noqa: E402
from trainers.model import Policy, load_for_inference  # noqa: E402
from utils.clip_reader import ClipReader  # noqa: E402
from utils.config import DataFile, load_config  # noqa: E402
from utils.curves import figure_format  # noqa: E402
from utils.logging_utils import get_logger, setup_logging  # noqa: E402
from utils.palette import THEMES  # noqa: E402
from utils.prompts import PromptContract, build_messages  # noqa: E402
from utils.spans import Span, parse_spans  # noqa: E402
from utils.video import VideoClip, clip_from_frames, probe_video, resize_clip  # noqa: E402

__all__ = ["VideoTemporalInference", "animate_temporal_grounding", "visualize_temporal_grounding"]

ON_ERROR = ("report", "raise")
DEFAULT_NEW_TOKENS = 64
THINKING_NEW_TOKENS = 1024


class VideoTemporalInference:
    """Answers temporal grounding queries with a base model, an adapter or a merged checkpoint.

    Args:
        model_path: Folder of a checkpoint, or a hub name.
        device: "cuda", "cpu", ...; by default CUDA when there is one.
        dtype: "bfloat16", "float16" or "float32"; by default bfloat16 on CUDA and float32 on the CPU.
        data_config: YAML with `data` and `prompt` that replaces what the checkpoint recorded. Needed only for a
            checkpoint without a record; a base model without one is asked with the shipped defaults.
        attn_implementation: As `model.attn_implementation`; by default FlashAttention 2 where it can be had, else sdpa.
        allow_pickle: Read weights that are no safetensors, which can run code. Only from whom you trust (SECURITY.md).

    Raises:
        UserError: the model cannot be loaded, is not Qwen3-VL, or lacks its processor or prompt contract.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        device: str | None = None,
        dtype: str | None = None,
        data_config: str | Path | None = None,
        attn_implementation: str | None = None,
        allow_pickle: bool = False,
    ) -> None:
        given = _given_contract(data_config)
        policy = load_for_inference(
            str(model_path),
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            need_contract=given is None,
            allow_pickle=allow_pickle,
        )
        self._serve(policy, given or policy.contract or _default_contract(str(model_path)))

    @classmethod
    def of(cls, policy: Policy) -> VideoTemporalInference:
        """An engine around a model that is loaded already. `policy` has a prompt contract."""
        assert policy.contract is not None
        engine = cls.__new__(cls)
        engine._serve(policy, policy.contract)
        return engine

    def _serve(self, policy: Policy, contract: PromptContract) -> None:
        self.model, self.processor, self.contract = policy.model, policy.processor, contract
        _warn_if_served_differently(contract)

    def predict(
        self,
        video_path: str | Path | None = None,
        query: str = "",
        *,
        video_start: float | None = None,
        video_end: float | None = None,
        frames: Any = None,
        times_s: Any = None,
        fps: float | None = None,
        max_new_tokens: int | None = None,
        **sampling: Any,
    ) -> dict[str, Any]:
        """Find `query` in a video file, or in `frames` (T, H, W, 3) uint8 with their `times_s` or `fps`.

        With `video_start` / `video_end` (seconds on the file's clock) only that stretch is decoded and searched.
        Greedy unless `sampling` says otherwise (`do_sample=True, temperature=0.7`).

        Returns a dict: `start_time`, `end_time` (seconds on the file's clock; None when nothing was found),
        `segments` (all windows, `[[s, e], ...]`, file's clock), `clip_segments` (the same on the clip's clock, 0 at
        `video_start`), `raw_text`, `parsed` (False: the answer could not be read; True with no segments: the model
        says it does not happen), `query`, `video`, `clip` (`[start, end]` searched) and `num_frames`.
        An answer that cannot be read never raises.

        Raises UserError for an empty query or an unreadable video.
        """
        if not query or not query.strip():
            raise UserError("query is empty: say in a sentence what to look for")
        clip = self._clip(video_path, frames, times_s, fps, video_start, video_end)
        text, clip = self._answer(clip, query, str(video_path or "frames"), max_new_tokens, sampling)
        spans = parse_spans(text, duration=clip.duration_s)
        return {"video": None if video_path is None else str(video_path), "query": query} | describe(text, spans, clip)

    def predict_batch(
        self,
        items: Iterable[Item],
        *,
        max_new_tokens: int | None = None,
        batch_size: int = 8,
        on_error: str = "report",
        **sampling: Any,
    ) -> list[dict[str, Any]]:
        """`predict` for many queries, each with the answer it has alone, computing every video once.

        Queries on the same stretch of the same file, wherever they stand in `items`, share its frames, its vision
        features and its prompt up to the end of the video, and are decoded together; so are those of different videos.

        Args:
            items: `(video, query)`, `(video, query, video_start, video_end)`, or mappings with those keys.
            max_new_tokens: Of an answer, as in `predict`.
            batch_size: Queries decoded together. Memory is that of as many prompts if each is on another video; queries
                on one video add little.
            on_error: What becomes of a video that cannot be read, or a query that cannot be asked: "report" (its item
                gets a dict with an `error`, so that one bad file does not cost the answers of all others) or "raise".
            sampling: As in `predict`.

        Returns a dict as `predict` does for each item, in their order. With "report" one that failed has the key
        `error` (the reason) besides, no segments, `parsed` False and `clip` None; a warning gives their number.

        Raises UserError for an item of another form, before anything is computed, and for what "raise" says.
        """
        asked = read_items(items)
        found = dict(
            self._stream(asked, max_new_tokens=max_new_tokens, batch_size=batch_size, on_error=on_error, **sampling)
        )
        failed = [number for number in sorted(found) if "error" in found[number]]
        if failed:
            get_logger().warning(
                "%d of %d items have no answer; the first is item %d: %s",
                len(failed), len(asked), failed[0], found[failed[0]]["error"],
            )  # fmt: skip
        return [found[number] for number in range(len(asked))]

    def predict_stream(self, items: Iterable[Item], **options: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        """`predict_batch`, one by one: (number of the item, its dict) as soon as it is known, not in order."""
        return self._stream(read_items(items), **options)

    def _stream(
        self,
        queries: list[Query],
        *,
        max_new_tokens: int | None = None,
        batch_size: int = 8,
        on_error: str = "report",
        **sampling: Any,
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        if batch_size < 1:
            raise UserError(f"batch_size must be >= 1, got {batch_size}")
        if on_error not in ON_ERROR:
            raise UserError(f"on_error must be one of {', '.join(ON_ERROR)}, got {on_error!r}")
        answers = answer_queries(
            Policy(self.model, self.processor, self.contract),
            queries,
            batch_size=batch_size,
            max_new_tokens=self._limit(max_new_tokens),
            sampling=sampling,
        )
        for answer in answers:
            if answer.error is not None and on_error == "raise":
                raise answer.error
            yield answer.number, _prediction(queries[answer.number], answer)

    def _limit(self, max_new_tokens: int | None) -> int:
        return max_new_tokens or (THINKING_NEW_TOKENS if self.contract.prompt.thinking else DEFAULT_NEW_TOKENS)

    def _clip(
        self,
        path: str | Path | None,
        frames: Any,
        times_s: Any,
        fps: float | None,
        start: float | None,
        end: float | None,
    ) -> VideoClip:
        if (path is None) == (frames is None):
            raise UserError("give either video_path or frames (with times_s or fps), not both and not neither")
        if frames is not None:
            return resize_clip(clip_from_frames(frames, times_s=times_s, fps=fps), self.contract.data.budget)
        return ClipReader(self.contract.data).read(str(path), start, end)

    def _answer(
        self, clip: VideoClip, query: str, name: str, max_new_tokens: int | None, sampling: dict[str, Any]
    ) -> tuple[str, VideoClip]:
        prompt, data = self.contract.prompt, self.contract.data
        sample, clip = fit_prompt(
            self.processor,
            build_messages(prompt, query),
            clip,
            max_tokens=data.max_prompt_tokens,
            on_overlong=data.on_overlong,
            name=name,
        )
        sample["index"] = 0
        collator = VideoCollator(self.processor.tokenizer.pad_token_id, sample, side="left")
        limit = self._limit(max_new_tokens)
        texts = generate_texts(self.model, self.processor, collator([sample]), max_new_tokens=limit, **sampling)
        return texts[0], clip


def _prediction(query: Query, answer: Answer) -> dict[str, Any]:
    """The dict of one item of a batch."""
    asked = {"video": query.video, "query": query.text}
    if answer.clip is not None:
        spans = parse_spans(answer.text, duration=answer.clip.duration_s)
        return asked | describe(answer.text, spans, answer.clip)
    return asked | {
        "start_time": None,
        "end_time": None,
        "segments": [],
        "clip_segments": [],
        "raw_text": "",
        "parsed": False,
        "clip": None,
        "num_frames": 0,
        "error": str(answer.error),
    }


def describe(text: str, spans: list[Span] | None, clip: VideoClip) -> dict[str, Any]:
    """The part of a prediction that follows from the answer; see `VideoTemporalInference.predict`."""
    on_clip = [[span.start, span.end] for span in spans or []]
    on_file = [[start + clip.start_s, end + clip.start_s] for start, end in on_clip]
    return {
        "start_time": on_file[0][0] if on_file else None,
        "end_time": on_file[0][1] if on_file else None,
        "segments": on_file,
        "clip_segments": on_clip,
        "raw_text": text,
        "parsed": spans is not None,
        "clip": [clip.start_s, clip.start_s + clip.duration_s],
        "num_frames": len(clip.frames),
    }


def _given_contract(data_config: str | Path | None) -> PromptContract | None:
    if data_config is None:
        return None
    config = load_config(DataFile, [Path(data_config)])
    return PromptContract.current(config.prompt, config.data)


def _default_contract(model_path: str) -> PromptContract:
    get_logger().info("%s records no prompt: asking it with the default prompt and pixel budget", model_path)
    config = DataFile()
    return PromptContract.current(config.prompt, config.data)


def _warn_if_served_differently(contract: PromptContract) -> None:
    installed = PromptContract.current(contract.prompt, contract.data).transformers_version
    if installed.split(".")[:2] != contract.transformers_version.split(".")[:2]:
        get_logger().warning(
            "trained with transformers %s, served with %s: releases have differed in how a video is written into the "
            "prompt; compare a few predictions, or install the version it was trained with",
            contract.transformers_version,
            installed,
        )


# ---------------------------------------------------------------------------------------------- command line
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True, help="base model, adapter or merged checkpoint")
    parser.add_argument("--video", required=True, type=Path)
    parser.add_argument("--query", required=True, help="what to look for, in a sentence")
    parser.add_argument("--output", type=Path, help="timeline picture (.png, .svg, .pdf)")
    parser.add_argument("--mp4", type=Path, help="the clip itself over the timeline, with a moving cursor (.mp4)")
    parser.add_argument("--gif", type=Path, help="the same as a GIF, with fewer frames and a smaller clip (.gif)")
    parser.add_argument("--theme", choices=tuple(THEMES), default="light", help="paper of picture and animation")
    parser.add_argument("--json", action="store_true", help="print the prediction as one JSON object")
    parser.add_argument("--ground_truth", type=float, nargs=2, action="append", metavar=("START", "END"), default=[])
    parser.add_argument("--video_start", type=float, help="search only from here (seconds)")
    parser.add_argument("--video_end", type=float, help="search only up to here (seconds)")
    parser.add_argument("--data_config", type=Path, help="prompt and sampling, instead of the checkpoint's own")
    parser.add_argument("--max_new_tokens", type=int)
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--allow_pickle", action="store_true", help="read weights that are no safetensors: SECURITY.md")
    return parser.parse_args(argv)


def main() -> None:
    """Predict, print, draw."""
    args = parse_args()
    setup_logging()
    _check_early(args)
    try:
        found = _predict(args)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"CUDA ran out of memory ({str(error).splitlines()[0]}). What lowers it: a shorter stretch (--video_start, "
            "--video_end), a smaller data.total_pixels or data.max_frames in a --data_config, a smaller model; "
            "--device cpu does without the GPU"
        ) from error
    if args.json:
        print(json.dumps(found, ensure_ascii=False))  # noqa: T201
    else:
        print(summary(found))  # noqa: T201
    _draw(args, found)


def _predict(args: argparse.Namespace) -> dict[str, Any]:
    """Load the model and ask it."""
    engine = VideoTemporalInference(
        args.model_path,
        device=args.device,
        dtype=args.dtype,
        data_config=args.data_config,
        allow_pickle=args.allow_pickle,
    )
    return engine.predict(
        args.video,
        args.query,
        video_start=args.video_start,
        video_end=args.video_end,
        max_new_tokens=args.max_new_tokens,
    )


def _draw(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """The picture and the animations that were asked for."""
    shown: dict[str, Any] = {
        "video_path": args.video,
        "predictions": [found],
        "ground_truths": [tuple(window) for window in args.ground_truth] or None,
        "query": args.query,
        "theme": args.theme,
    }
    if args.output:
        visualize_temporal_grounding(output_path=args.output, **shown)
        get_logger().info("timeline: %s", args.output)
    for path in filter(None, (args.mp4, args.gif)):
        stretch = {"video_start": args.video_start, "video_end": args.video_end}
        animate_temporal_grounding(output_path=path, **shown, **stretch)
        get_logger().info("animation: %s", path)


def _check_early(args: argparse.Namespace) -> None:
    """What can be wrong without the model, before its weights take minutes to load."""
    if not args.query.strip():
        raise UserError("--query is empty: say in a sentence what to look for")
    probe_video(args.video)
    if args.output:
        figure_format(args.output)
    for suffix, path in ((".mp4", args.mp4), (".gif", args.gif)):
        if path and animation_suffix(path) != suffix:
            raise UserError(f"--{suffix[1:]} writes a {suffix} file, got {path}; change its suffix")


def summary(found: dict[str, Any]) -> str:
    """One or more lines a person reads."""
    if not found["parsed"]:
        return f"no segment could be read from the answer: {found['raw_text']!r}"
    if not found["segments"]:
        return f"not in the video, says the model: {found['raw_text']!r}"
    return "\n".join(_window_in_words(start, end) for start, end in found["segments"])


def _window_in_words(start: float, end: float) -> str:
    return f"{start:.1f} s ({EMPTY_WINDOW})" if start == end else f"{start:.1f} s to {end:.1f} s"


if __name__ == "__main__":
    run_command(main)
