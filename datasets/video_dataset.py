"""Annotation rows -> samples the model trains on or answers.

Owns which row asks and answers what, and what happens to a video that cannot be read. Clips are `utils.clip_reader`,
rows are `utils.rows`, tokens are `datasets.encoding`, batches are `datasets.collate_fns`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch.utils.data import Dataset

from datasets.encoding import PromptError, Sample, append_answer, fit_prompt, require_plain_text
from utils.clip_reader import ClipReader
from utils.common import UserError
from utils.config import AnnotationSource, DataConfig, PromptConfig
from utils.logging_utils import get_logger
from utils.prompts import build_messages, format_answer
from utils.rows import Row, clip_bounds, load_annotations, look_up_video, model_windows
from utils.selection import select_rows
from utils.spans import parse_spans
from utils.video import FrameBudget, VideoClip, VideoReadError, clip_from_frames, plan_num_frames, plan_size

_MARKER_TOKENS = 9
"""Tokens of one `<12.5 seconds>` marker with its vision_start and vision_end; an estimate for length grouping only."""
_TEXT_TOKENS = 64
"""Tokens of the chat frame, question and answer; an estimate for length grouping only."""


def require_annotations(data: DataConfig) -> None:
    """Raise UserError when an annotation file that training reads does not exist; quick, opens nothing."""
    splits = (("train", data.train), ("val", data.val))
    absent = [f"data.{name} names {s.path}" for name, split in splits for s in split if not s.path.is_file()]
    if absent:
        raise UserError(f"{'; '.join(absent)}: no such file (relative to {Path.cwd()})")


def estimate_tokens(duration_s: float, budget: FrameBudget) -> tuple[int, int]:
    """Visual tokens, and all tokens of a sample, from a clip's duration alone: as if its frames were 16:9."""
    num_frames = plan_num_frames(duration_s, budget.max_frames, budget)
    height, width = plan_size(num_frames, 720, 1280, budget)
    patches = (num_frames + 1) // 2
    visual = patches * (height * width // 1024)
    return visual, visual + patches * _MARKER_TOKENS + _TEXT_TOKENS


class VideoTemporalDataset(Dataset[Sample]):
    """Temporal grounding: one sample per labelled row.

    `dataset[i]` gives `input_ids` (L,), `mm_token_type_ids` (L,), `video_grid_thw` (1, 3), `pixels` (the clip's bytes:
    the model reads `datasets.pixels.pixel_values` of them), `index`, for training `labels` (L,), and `reads`: what was
    decoded for it (`utils.clip_reader.Reads`). A video that cannot be read gives `{"index": i, "fault": reason,
    "reads": ...}`, which the collator counts: it is never replaced by a neighbour. `sample(i)` raises instead.

    To teach another task override `is_usable`, `question` and `answer`; `VideoQADataset` below is the example.

    Args:
        data: Where the rows are, how clips are sampled.
        processor: The checkpoint's processor (tokenizer, chat template and video processor).
        prompt: What is asked and how the answer reads.
        split: "train", "val" or "test": which `data.<split>` to read. Of "train" only what `data.select` draws.
        with_answer: True for training (labels), False for generation (prompt only).
        max_samples: Keep an evenly spread subset of at most this many rows, the same for every run.
        seed: Decides which rows a fractional `weight` keeps.

    Raises:
        UserError: no annotation file, no usable row, too many bad rows, trim fields that fit another `data.trim`, or
            no scores for `data.select`.
    """

    def __init__(
        self,
        data: DataConfig,
        processor: Any,
        prompt: PromptConfig | None = None,
        *,
        split: str = "train",
        with_answer: bool = True,
        max_samples: int | None = None,
        seed: int = 42,
    ) -> None:
        self.data = data
        self.reader = ClipReader(data)
        self.processor = processor
        self.prompt = prompt or PromptConfig()
        self.with_answer = with_answer
        sources: tuple[AnnotationSource, ...] = {"train": data.train, "val": data.val, "test": data.test}[split]
        if not sources:
            raise UserError(
                f"data.{split} names no annotation file; give one, e.g. data.{split}=data/annotations/{split}.jsonl"
            )
        limit, root = data.max_bad_fraction, data.videos_root
        rows = load_annotations(
            sources, max_bad_fraction=limit, trim=data.trim, videos_root=root, seed=seed,
            kept_faults=self.kept_faults,
        )  # fmt: skip
        usable = [row for row in rows if self.is_usable(row)]
        if not usable:
            raise UserError(
                f"data.{split}: none of the {len(rows)} rows in {sources[0].path} is labelled (timestamp is null)"
            )
        if len(usable) < len(rows):
            get_logger().info(
                "data.%s: %d of %d rows have no label and are left out", split, len(rows) - len(usable), len(rows)
            )
        if split == "train" and data.select is not None:
            usable = select_rows(usable, data.select)
        if max_samples is not None and max_samples < len(usable):
            usable = [usable[i] for i in np.linspace(0, len(usable) - 1, max_samples).round().astype(int)]
        self.rows: list[Row] = usable

    # ------------------------------------------------------------------ what a task decides
    kept_faults: ClassVar[frozenset[str]] = frozenset()
    """Kinds of problems of a row in spite of which it is used."""

    def is_usable(self, row: Row) -> bool:
        """Whether the row can be trained on or scored: here, whether it is labelled (`[]` is: the event is absent)."""
        return row.timestamp is not None

    def question(self, row: Row) -> list[dict[str, Any]]:
        """Chat messages for the row, with a video part before the text."""
        return build_messages(self.prompt, row.sentence)

    def answer(self, row: Row) -> str:
        """The text to learn. Windows are on the clip's clock, as the `<t seconds>` markers are."""
        windows = model_windows(row, self.data.trim)
        if windows is None:
            raise ValueError(f"{row.file}:{row.line} is not labelled")
        return format_answer(self.prompt, windows, thought=row.kwargs.get("thinking"))

    def scored_sample(self, index: int, text: str) -> dict[str, Any]:
        """What `utils.metrics.evaluate` takes for row `index` and the answer `text`; times on the clip's clock."""
        row = self.rows[index]
        windows = model_windows(row, self.data.trim) or ()
        return {
            "qid": index,
            "gt": [list(window) for window in windows],
            "pred": parse_spans(text, duration=row.duration),
            "duration": row.duration,
        }

    # ------------------------------------------------------------------ samples
    def clip(self, row: Row) -> VideoClip:
        """The labelled stretch of the row's video. Raises VideoReadError, for one outside `data.videos_root` too."""
        bounds = clip_bounds(row, self.data.trim)
        start_s, end_s = bounds if bounds is not None else (None, None)
        path, fault = look_up_video(row, self.data.videos_root)
        if fault is not None:
            raise VideoReadError(path, fault)
        return self.reader.read(path, start_s, end_s)

    def sample(self, index: int) -> Sample:
        """The sample of row `index`. Raises VideoReadError for a video that cannot be read."""
        row = self.rows[index]
        return {**self._encode(row, self.clip(row)), "index": index}

    def blank(self) -> Sample:
        """A two-frame black clip with a row's question: it stands in when every sample of a batch is faulty, so that a
        distributed step still runs the same modules. Its labels are never learnt."""
        return {**self._encode(self.rows[self.first_plain_row()], self.blank_clip()), "index": -1}

    def first_plain_row(self) -> int:
        """The first row whose question can be put to the model. Raises PromptError when there is none."""
        for index, row in enumerate(self.rows):
            try:
                require_plain_text(self.processor, self.question(row))
            except PromptError:
                continue
            return index
        raise PromptError("no row has a question that can be put to the model: all hold special tokens")

    def blank_clip(self) -> VideoClip:
        """Two black frames."""
        return clip_from_frames(np.zeros((2, 32, 32, 3), dtype=np.uint8), fps=self.data.fps)

    def _encode(self, row: Row, clip: VideoClip) -> Sample:
        sample, _ = fit_prompt(
            self.processor,
            self.question(row),
            clip,
            max_tokens=self.data.max_prompt_tokens,
            on_overlong=self.data.on_overlong,
            name=f"{row.file}:{row.line} ({row.video})",
        )
        return append_answer(self.processor, sample, self.answer(row)) if self.with_answer else sample

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        try:
            sample = self.sample(index)
        except (VideoReadError, PromptError) as error:
            row = self.rows[index]
            sample = {"index": index, "fault": f"{row.file}:{row.line}: {error}"}
        return sample | {"reads": self.reader.take()}

    @property
    def lengths(self) -> list[int]:
        """Estimated tokens per sample, from durations alone (16:9 frames), for grouping batches by length."""
        return [self._estimated_length(row) for row in self.rows]

    def _estimated_length(self, row: Row) -> int:
        return estimate_tokens(row.duration, self.data.budget)[1]


class VideoQADataset(VideoTemporalDataset):
    """Question answering on the same rows: `sentence` is the question, `kwargs.answer` the text to learn.

    An example of the extension point; everything about clips, budgets, faults and batches is inherited.
    """

    def is_usable(self, row: Row) -> bool:
        """Whether the row has an answer text; `timestamp` may be null."""
        return isinstance(row.kwargs.get("answer"), str)

    def question(self, row: Row) -> list[dict[str, Any]]:
        """The sentence itself, after the video."""
        return [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": row.sentence.strip()}]}]

    def answer(self, row: Row) -> str:
        """`kwargs.answer`."""
        return str(row.kwargs["answer"])
