"""The ways of reading a clip and of making a sample that `scripts/benchmarks/data.py` compares.

Reading, each way giving the same frames (by number) at the same size:

    decord         `decord.VideoReader` at the final size, `get_batch`: as most trainers read
    pyav           PyAV with its threads: decode to the last frame wanted, keep those wanted
    qwen_vl_utils  `fetch_video` with the project's budget: decord at full size, torchvision's resizing, float32
    cache          the project's `ClipReader`: a hit in the frame cache; "cold" decodes in its child process, and keeps

A sample is what `VideoTemporalDataset` gives ("own": frames from the warm cache), or `fetch_video` and the stock
processor, as the trainers that use qwen-vl-utils do ("qwen_vl_utils"). Both have the same tokens, and go through the
same collator.
"""

from __future__ import annotations

import itertools
import logging
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets.encoding import Sample, append_answer
from datasets.pixels import VALUES, Pixels
from datasets.video_dataset import VideoTemporalDataset
from scripts.make_demo_data import all_sentences
from utils.clip_reader import ClipReader
from utils.config import AnnotationSource, DataConfig
from utils.frame_cache import SUFFIX
from utils.rows import Row, write_rows
from utils.spans import Span
from utils.video import TEMPORAL_PATCH, FrameBudget

READERS = ("decord", "pyav", "qwen_vl_utils", "cache")
PEERS = READERS[:3]


@dataclass(frozen=True)
class Work:
    """One clip, and what every way must give of it."""

    name: str
    path: Path
    duration_s: float
    numbers: tuple[int, ...]
    """Of the frames wanted, counted from 0."""
    size: tuple[int, int]
    """Height and width wanted."""
    sum: int
    """`checksum` of the frames as the project decodes them without a cache."""
    data: DataConfig
    """With the folder of the cache."""


def make_work(name: str, path: Path, rate: float, data: DataConfig) -> Work:
    """What the project takes of the file at `path`, whose frames are shown at `rate` frames per second."""
    clip = ClipReader(data.model_copy(update={"cache_dir": None})).read(path)
    numbers = np.rint(clip.times_s * rate).astype(int).tolist()
    return Work(name, path, clip.duration_s, tuple(numbers), clip.frames.shape[1:3], checksum(clip.frames), data)


# ---------------------------------------------------------------------------------------------- reading
class Reader:
    """One of `READERS`; a call reads a clip: uint8 (T, H, W, 3), or what `fetch_video` gives, float32 (T, 3, H, W)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._reader: ClipReader | None = None

    def __call__(self, work: Work) -> np.ndarray:
        if self.name == "decord":
            return read_by_decord(work)
        if self.name == "pyav":
            return read_by_pyav(work)
        if self.name == "qwen_vl_utils":
            return fetch(work.path, work.data.budget)[0].numpy()
        if self._reader is None:
            self._reader = ClipReader(work.data)
        return self._reader.read(work.path).frames


def read_by_decord(work: Work) -> np.ndarray:
    """decord alone, at the final size, with as many threads as it likes."""
    import decord

    height, width = work.size
    return decord.VideoReader(str(work.path), width=width, height=height).get_batch(list(work.numbers)).asnumpy()


def read_by_pyav(work: Work) -> np.ndarray:
    """PyAV alone, with as many threads as it likes, resized as the project does (faster than by swscale's threads)."""
    import av

    height, width = work.size
    wanted = {number: place for place, number in enumerate(work.numbers)}
    frames = np.empty((len(wanted), height, width, 3), dtype=np.uint8)
    with av.open(str(work.path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for number, picture in enumerate(container.decode(stream)):
            if number in wanted:
                rgb = picture.reformat(width, height, "rgb24", interpolation="BICUBIC", threads=1)
                frames[wanted[number]] = rgb.to_ndarray()
            if number == work.numbers[-1]:
                break
    return frames


def fetch(path: Path, budget: FrameBudget) -> tuple[torch.Tensor, dict[str, Any]]:
    """`fetch_video` within the project's budget, and its metadata."""
    from qwen_vl_utils import fetch_video

    logging.getLogger("qwen_vl_utils").setLevel(logging.ERROR)  # it warns of its own limit at every clip
    request = {
        "type": "video",
        "video": str(path),
        "fps": budget.fps,
        "min_frames": budget.min_frames,
        "max_frames": budget.max_frames,
        "min_pixels": budget.min_pixels_per_frame,
        "max_pixels": budget.max_pixels_per_frame,
        "total_pixels": budget.total_pixels / TEMPORAL_PATCH,  # it counts temporal patches
    }
    return fetch_video(request, image_patch_size=16, return_video_metadata=True)


def checksum(array: np.ndarray) -> int:
    """Of every byte: the sum of its 64-bit words, and CRC-32 of what is left over. The same for every way."""
    flat = array.ravel(order="K").view(np.uint8)  # as it lies in memory: `fetch_video` gives channels last
    words = flat[: flat.size // 8 * 8].view(np.uint64)
    return int(np.add.reduce(words, dtype=np.uint64)) ^ zlib.crc32(flat[words.nbytes :].tobytes())


# ---------------------------------------------------------------------------------------------- page cache
def forget_pages(paths: Sequence[Path]) -> bool:
    """Have the system drop the files' pages from its memory; False where it cannot be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in paths:
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)  # pages that wait to be written are not dropped
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(number)
    return True


def entries(data: DataConfig) -> list[Path]:
    """The files of the frame cache."""
    assert data.cache_dir is not None
    return sorted(data.cache_dir.rglob(f"*{SUFFIX}"))


# ---------------------------------------------------------------------------------------------- samples
class PeerSamples(torch.utils.data.Dataset[Sample]):
    """The rows of `queries` by `fetch_video` and the stock processor."""

    def __init__(self, queries: VideoTemporalDataset) -> None:
        self.queries = queries

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, index: int) -> Sample:
        queries, row = self.queries, self.queries.rows[index]
        video, metadata = fetch(Path(row.video), queries.data.budget)
        sample = encode_stock(queries.processor, queries.question(row), video, metadata)
        return {**append_answer(queries.processor, sample, queries.answer(row)), "index": index}


def encode_stock(processor: Any, messages: Any, video: torch.Tensor, metadata: dict[str, Any]) -> Sample:
    """Tokens and patches of `video` (T, 3, H, W) by the processor as transformers ships it."""
    text = processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    inputs = processor(
        text=[text], videos=[video], video_metadata=[metadata], do_sample_frames=False, do_resize=False,
        cap_pixels_per_frame=True, return_tensors="pt",
    )  # fmt: skip
    rest = {"video_grid_thw": inputs["video_grid_thw"], "pixels": Pixels(inputs[VALUES])}
    return {name: inputs[name][0] for name in ("input_ids", "mm_token_type_ids")} | rest


def make_dataset(folder: Path, work: Work, num_rows: int, processor: Any) -> VideoTemporalDataset:
    """`num_rows` rows about the clip, each with another question."""
    asked, answer = itertools.cycle(all_sentences()), (Span(1.0, 3.0),)
    questions = itertools.islice(asked, num_rows)
    rows = [Row(str(work.path), work.duration_s, answer, text, None, None, {}, "", 0) for text in questions]
    path = folder / "rows.jsonl"
    write_rows(path, rows)
    data = work.data.model_copy(update={"train": (AnnotationSource(path=path),)})
    return VideoTemporalDataset(data, processor)
