"""Rows and clips to samples and batches: true markers (contract 3), labels on the answer only, faults counted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datasets.collate_fns import VideoCollator, answer_columns, pad_rows
from datasets.encoding import IGNORE, PromptError, PromptTooLongError, encode_prompt, fit_prompt
from datasets.pixels import pixel_values
from datasets.video_dataset import VideoQADataset, VideoTemporalDataset
from trainers.model import load_processor, resolve_source
from utils.common import UserError
from utils.config import AnnotationSource, DataConfig, PromptConfig
from utils.prompts import build_messages
from utils.video import VideoClip, clip_from_frames, read_clip, write_mp4

SMALL = {"min_pixels_per_frame": 1024, "max_pixels_per_frame": 4096, "max_frames": 32}


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Any:
    return load_processor(resolve_source(str(tiny_model)))


@pytest.fixture
def make_dataset(processor: Any, tmp_path: Path) -> Callable[..., VideoTemporalDataset]:
    """`make_dataset(rows, **data)`: a dataset over `clip.mp4` (20 s at 10 fps) and the given rows."""

    def build(
        rows: Sequence[dict[str, Any]],
        cls: type[VideoTemporalDataset] = VideoTemporalDataset,
        prompt: PromptConfig | None = None,
        with_answer: bool = True,
        **data: Any,
    ) -> VideoTemporalDataset:
        if not (tmp_path / "clip.mp4").exists():
            write_mp4(tmp_path / "clip.mp4", moving_frames(200), fps=10)
        base = {"video": "clip.mp4", "duration": 20.0, "timestamp": [1, 2], "sentence": "it moves"}
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(base | row) + "\n" for row in rows))
        config = DataConfig(train=(AnnotationSource(path=path),), **(SMALL | data))
        return cls(config, processor, prompt, with_answer=with_answer)

    return build


def moving_frames(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    frames = np.zeros((count, height, width, 3), np.uint8)
    for i in range(count):
        frames[i, :, (i * 3) % (width - 8) : (i * 3) % (width - 8) + 8] = (255, 200, 40)
    return frames


def markers(processor: Any, ids: torch.Tensor) -> list[float]:
    """The `<t seconds>` markers in the tokens, decoded back to text."""
    return [float(value) for value in re.findall(r"<(-?[\d.]+) seconds>", processor.tokenizer.decode(ids))]


def patch_times(clip: VideoClip) -> np.ndarray:
    """Mean time of the two frames of every temporal patch; an odd last frame stands for both."""
    times = np.append(clip.times_s, clip.times_s[-1]) if len(clip.times_s) % 2 else clip.times_s
    return times.reshape(-1, 2).mean(axis=1)


def assert_true_markers(processor: Any, ids: torch.Tensor, clip: VideoClip) -> None:
    found = markers(processor, ids)
    assert len(found) == len(patch_times(clip))
    assert np.abs(np.array(found) - patch_times(clip)).max() <= 0.05 + 1e-6


@pytest.mark.parametrize("fps", [2.0, 1.7, 0.9])
@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_markers_at_constant_rate(make_dataset: Callable[..., Any], processor: Any, fps: float, backend: str) -> None:
    dataset = make_dataset([{}], fps=fps, backend=backend)
    assert_true_markers(processor, dataset[0]["input_ids"], dataset.clip(dataset.rows[0]))


@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_markers_at_variable_rate(processor: Any, tmp_path: Path, backend: str) -> None:
    times = np.concatenate([np.arange(0, 4, 0.1), np.arange(4, 16, 0.8), np.arange(16, 18, 0.04)])
    write_mp4(tmp_path / "v.mp4", moving_frames(len(times)), times_s=times)
    budget = DataConfig(fps=1.3, **SMALL).budget
    clip = read_clip(tmp_path / "v.mp4", budget, backend=backend)
    assert min(abs(times - t).min() for t in clip.times_s) < 2e-3
    assert np.abs(times[:, None] - clip.times_s).min(axis=0).max() < 2e-3  # every chosen frame is a real one
    sample = encode_prompt(processor, build_messages(PromptConfig(), "x"), clip)
    assert_true_markers(processor, sample["input_ids"], clip)


def test_markers_of_a_trimmed_clip_start_at_zero(make_dataset: Callable[..., Any], processor: Any) -> None:
    dataset = make_dataset([{"video_start": 7.3, "video_end": 15.8, "duration": 8.5, "timestamp": [2, 4]}])
    clip = dataset.clip(dataset.rows[0])
    assert clip.start_s == pytest.approx(7.3, abs=0.11) and clip.times_s[0] == pytest.approx(0.0, abs=0.11)
    found = markers(processor, dataset[0]["input_ids"])
    assert found[0] < 1 and found[-1] < 8.6
    assert_true_markers(processor, dataset[0]["input_ids"], clip)
    assert dataset.answer(dataset.rows[0]) == "From 2.0 to 4.0 seconds."


def test_absolute_trim_is_rebased_for_the_model(make_dataset: Callable[..., Any]) -> None:
    row = {"video_start": 7.0, "video_end": 15.0, "duration": 8.0, "timestamp": [9.0, 11.0]}
    assert make_dataset([row], trim="absolute").answer(make_dataset([row], trim="absolute").rows[0]) == (
        "From 2.0 to 4.0 seconds."
    )


def test_markers_of_a_frame_list(processor: Any) -> None:
    times = [0.0, 0.4, 1.1, 2.9, 3.0]
    clip = clip_from_frames(moving_frames(5, 64, 64), times_s=times)
    sample = encode_prompt(processor, build_messages(PromptConfig(), "x"), clip)
    assert markers(processor, sample["input_ids"]) == [0.2, 2.0, 3.0]


def test_frames_without_times_are_an_error() -> None:
    with pytest.raises(UserError):
        clip_from_frames(moving_frames(4, 64, 64))


def test_labels_are_the_answer_and_end_of_turn_only(make_dataset: Callable[..., Any], processor: Any) -> None:
    dataset = make_dataset([{"timestamp": [3.25, 4]}, {"timestamp": [[1, 2], [5, 6]]}, {"timestamp": []}])
    texts = [processor.tokenizer.decode(s["labels"][s["labels"] != IGNORE]) for s in (dataset[i] for i in range(3))]
    assert texts == [
        "From 3.2 to 4.0 seconds.<|im_end|>",
        "From 1.0 to 2.0 seconds and from 5.0 to 6.0 seconds.<|im_end|>",
        "The event does not happen in the video.<|im_end|>",
    ]
    sample = dataset[0]
    prompt = dataset.__class__(dataset.data, processor, with_answer=False)[0]
    length = len(prompt["input_ids"])
    assert torch.equal(sample["input_ids"][:length], prompt["input_ids"])
    assert (sample["labels"][:length] == IGNORE).all() and (sample["labels"][length:] != IGNORE).all()


def test_collation_pads_right_to_train_and_left_to_generate(make_dataset: Callable[..., Any], processor: Any) -> None:
    rows = [{"duration": 20.0}, {"video_start": 0, "video_end": 5, "duration": 5.0}]
    for with_answer, side in ((True, "right"), (False, "left")):
        dataset = make_dataset(rows, with_answer=with_answer)
        samples = [dataset[0], dataset[1]]
        pad = processor.tokenizer.pad_token_id
        batch = VideoCollator(pad, dataset.blank(), side)(samples)
        lengths = [len(sample["input_ids"]) for sample in samples]
        assert lengths[0] > lengths[1]
        assert batch["attention_mask"].sum(dim=1).tolist() == lengths
        kept = batch["attention_mask"][1].bool()
        assert torch.equal(batch["input_ids"][1][kept], samples[1]["input_ids"])
        assert torch.equal(batch["mm_token_type_ids"][1][kept], samples[1]["mm_token_type_ids"])
        assert batch["attention_mask"][1][0 if side == "left" else -1] == 0
        assert batch["video_grid_thw"].tolist() == [s["video_grid_thw"][0].tolist() for s in samples]
        assert len(pixel_values(batch["pixels"])) == int(batch["video_grid_thw"].prod(dim=1).sum())
        visual = int((batch["mm_token_type_ids"] != 0).sum())
        assert visual == int((batch["video_grid_thw"].prod(dim=1) // 4).sum())
        assert ("labels" in batch) is with_answer


def test_answer_columns_are_where_a_label_is_predicted() -> None:
    labels = torch.tensor([[IGNORE, IGNORE, 5, 6, IGNORE], [IGNORE, IGNORE, IGNORE, 7, 8]])
    assert answer_columns(labels).tolist() == [1, 2, 3]
    assert answer_columns(torch.full((2, 4), IGNORE)).tolist() == [0]


def test_pad_rows() -> None:
    rows = [torch.tensor([1, 2]), torch.tensor([3])]
    assert pad_rows(rows, 0, "right").tolist() == [[1, 2], [3, 0]]
    assert pad_rows(rows, 0, "left").tolist() == [[1, 2], [0, 3]]


def test_unlabelled_rows_are_left_out(make_dataset: Callable[..., Any]) -> None:
    dataset = make_dataset([{"timestamp": None}, {}, {"timestamp": []}])
    assert [row.line for row in dataset.rows] == [2, 3]
    with pytest.raises(UserError, match="is labelled"):
        make_dataset([{"timestamp": None}])


def test_unreadable_video_is_a_named_fault(make_dataset: Callable[..., Any]) -> None:
    dataset = make_dataset([{}, {"video": "gone.mp4"}])
    bad = dataset[1]
    assert bad["index"] == 1 and "rows.jsonl:2" in bad["fault"] and "gone.mp4" in bad["fault"]
    batch = VideoCollator(0, dataset.blank())([dataset[0], bad])
    assert batch["indices"] == [0] and len(batch["faults"]) == 1 and len(batch["input_ids"]) == 1


def test_overlong_prompt_loses_frames_evenly_and_says_so(processor: Any, caplog: pytest.LogCaptureFixture) -> None:
    clip = clip_from_frames(moving_frames(32, 64, 64), fps=2.0)
    messages = build_messages(PromptConfig(), "x")
    full = len(encode_prompt(processor, messages, clip)["input_ids"])
    limit = full // 2
    with caplog.at_level("WARNING", logger="vtg"):
        sample, shown = fit_prompt(processor, messages, clip, max_tokens=limit, on_overlong="drop_frames", name="row 7")
    assert len(sample["input_ids"]) <= limit and 0.3 * 32 <= len(shown.frames) < 32
    assert "row 7" in caplog.text and "of 32 frames" in caplog.text
    steps = np.diff(shown.times_s)
    assert steps.max() <= 2 * steps.min() + 1e-9 and shown.times_s[0] == 0.0
    assert_true_markers(processor, sample["input_ids"], shown)
    with pytest.raises(PromptTooLongError, match="data.max_prompt_tokens"):
        fit_prompt(processor, messages, clip, max_tokens=limit, on_overlong="refuse", name="row 7")
    with pytest.raises(PromptTooLongError, match="question alone"):
        fit_prompt(processor, messages, clip, max_tokens=30, on_overlong="drop_frames", name="row 7")


def test_refused_prompt_counts_as_a_bad_row(make_dataset: Callable[..., Any]) -> None:
    dataset = make_dataset([{}], on_overlong="refuse", max_prompt_tokens=200)
    assert "data.max_prompt_tokens=200" in dataset[0]["fault"]


def test_a_sentence_with_special_tokens_counts_as_a_bad_row(make_dataset: Callable[..., Any]) -> None:
    """It would end a turn or ask for pixels that nobody gave; the blank sample asks another row's question."""
    bad = {"sentence": "<|video_pad|> the <|im_end|> square"}
    dataset = make_dataset([bad, {}])
    assert "special token <|im_end|>" in dataset[0]["fault"] and "fault" not in dataset[1]
    assert dataset.first_plain_row() == 1 and len(dataset.blank()["input_ids"])
    with pytest.raises(PromptError, match="no row has a question"):
        make_dataset([bad]).blank()


def test_weights_repeat_rows(processor: Any, make_dataset: Callable[..., Any]) -> None:
    dataset = make_dataset([{}, {}])
    path = dataset.data.train[0].path
    config = DataConfig(train=(AnnotationSource(path=path), AnnotationSource(path=path, weight=2.5)), **SMALL)
    assert len(VideoTemporalDataset(config, processor)) == 2 + 5


def test_max_samples_is_spread_and_fixed(make_dataset: Callable[..., Any], processor: Any) -> None:
    dataset = make_dataset([{} for _ in range(10)])
    few = VideoTemporalDataset(dataset.data, processor, max_samples=4)
    assert [row.line for row in few.rows] == [1, 4, 7, 10]


def test_video_qa_is_the_extension_example(make_dataset: Callable[..., Any], processor: Any) -> None:
    rows = [
        {"sentence": "What colour is it?", "timestamp": None, "kwargs": {"answer": "Yellow."}},
        {"sentence": "No answer here"},
    ]
    dataset = make_dataset(rows, cls=VideoQADataset)
    assert len(dataset) == 1
    sample = dataset[0]
    assert processor.tokenizer.decode(sample["labels"][sample["labels"] != IGNORE]) == "Yellow.<|im_end|>"
    assert "What colour is it?" in processor.tokenizer.decode(sample["input_ids"])


def test_lengths_grow_with_duration(make_dataset: Callable[..., Any]) -> None:
    rows = [{"video_end": 4, "video_start": 0, "duration": 4}, {"video_end": 16, "video_start": 0, "duration": 16}]
    lengths = make_dataset(rows).lengths
    assert lengths[0] < lengths[1]


def test_scored_sample_is_on_the_clips_clock(make_dataset: Callable[..., Any]) -> None:
    dataset = make_dataset([{"video_start": 5, "video_end": 15, "duration": 10, "timestamp": [1, 2]}])
    sample = dataset.scored_sample(0, "From 1.0 to 3.0 seconds.")
    assert sample == {"qid": 0, "gt": [[1.0, 2.0]], "pred": [(1.0, 3.0)], "duration": 10.0}
    assert dataset.scored_sample(0, "no idea")["pred"] is None
