"""Queries on one clip: the same tokens as one by one, each clip read once, every row once an epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from datasets.encoding import IGNORE
from datasets.pixels import pixel_values
from datasets.shared_video import SharedQuestionDataset, SharedVideoDataset, UnitCollator, VideoSampler, share_clips
from datasets.video_dataset import VideoQADataset, VideoTemporalDataset
from utils.config import DataConfig, PromptConfig
from utils.quarantine import decode
from utils.rows import Row, read_rows, write_rows
from utils.spans import Span

DataFor = Callable[..., VideoTemporalDataset]


@pytest.fixture
def dataset_for(tiny_model: Path, demo_data: Path) -> DataFor:
    """A training set on the demo's rows, or on those of `path`; two queries a video."""
    from trainers.model import load_processor, resolve_source

    processor = load_processor(resolve_source(str(tiny_model)))

    def build(kind: type = VideoTemporalDataset, path: Path | None = None, prompt: Any = None, **data: Any) -> Any:
        options: dict[str, Any] = {
            "backend": "pyav", "fps": 2.0, "min_frames": 4, "max_frames": 16, "min_pixels_per_frame": 1024,
            "max_pixels_per_frame": 2048, "total_pixels": 32768, "max_prompt_tokens": 1024,
        }  # fmt: skip
        config = DataConfig(train=[{"path": path or demo_data / "train.jsonl"}], **(options | data))
        return kind(config, processor, prompt)

    return build


def demo_rows(folder: Path, num: int) -> list[Row]:
    """The first training rows of the demo set, their videos by absolute path."""
    rows, _ = read_rows(folder / "train.jsonl")
    return [replace(row, video=str(folder / row.video)) for row in rows[:num]]


def assert_same_as_one_by_one(shared: SharedVideoDataset, indices: list[int]) -> None:
    """Prefix, tail and answer of every row put together are the row's own sample, pixels included."""
    seen = []
    for unit in shared.__getitems__(indices):
        for place, index in enumerate(unit["indices"]):
            plain, prefix = shared[index], unit["prefix"]
            tail, answer = unit["tails"][place], unit["answers"][place]
            assert torch.equal(torch.cat([prefix["input_ids"], tail, answer]), plain["input_ids"])
            assert torch.equal(plain["labels"][-len(answer) :], answer)
            assert (plain["labels"][: -len(answer)] == IGNORE).all()
            assert torch.equal(pixel_values([prefix["pixels"]]), pixel_values([plain["pixels"]]))
            assert torch.equal(prefix["video_grid_thw"], plain["video_grid_thw"])
            assert not plain["mm_token_type_ids"][len(prefix["input_ids"]) :].any()
            assert int(prefix["input_ids"][-1]) == shared.queries.processor.vision_end_token_id
            seen.append(index)
    assert sorted(seen) == sorted(indices)


@pytest.mark.parametrize(
    "prompt",
    [None, PromptConfig(thinking=True), PromptConfig(system="You find events.", question="Where is: {sentence}?")],
)
def test_tokens_are_those_of_one_by_one(dataset_for: DataFor, prompt: Any) -> None:
    """For several videos at once, under every kind of prompt."""
    assert_same_as_one_by_one(SharedVideoDataset(dataset_for(prompt=prompt), 8), [0, 5, 1, 2, 4])


def test_questions_of_any_length_and_trimmed_clips(dataset_for: DataFor, demo_data: Path, tmp_path: Path) -> None:
    """Stretches of one file are clips of their own; rows of a stretch share it, whatever their questions' length."""
    row = demo_rows(demo_data, 1)[0]
    parts = [
        replace(row, video_start=start, video_end=start + 4.0, duration=4.0, timestamp=(Span(0.5, 2.0),),
                sentence="the red square " + word)
        for start, word in ((0.0, "appears"), (2.0, "appears"), (0.0, "appears and stays for a rather long while"))
    ]  # fmt: skip
    write_rows(tmp_path / "rows.jsonl", parts)
    shared = SharedVideoDataset(dataset_for(path=tmp_path / "rows.jsonl"), 8)
    assert [unit["indices"] for unit in shared.__getitems__([0, 1, 2])] == [[0, 2], [1]]
    assert_same_as_one_by_one(shared, [0, 1, 2])


def test_an_overlong_prompt_loses_the_same_frames_for_all(dataset_for: DataFor) -> None:
    """The longest question decides; every row's prompt fits."""
    whole = dataset_for()
    limit = max(len(whole[index]["input_ids"]) - len(whole[index]["labels"][whole[index]["labels"] != IGNORE])
                for index in (0, 1)) - 5  # fmt: skip
    shared = SharedVideoDataset(dataset_for(max_prompt_tokens=limit), 8)
    (unit,) = shared.__getitems__([0, 1])
    assert all(len(unit["prefix"]["input_ids"]) + len(tail) <= limit for tail in unit["tails"])
    assert len(pixel_values([unit["prefix"]["pixels"]])) < len(pixel_values([whole[0]["pixels"]]))


def test_another_task_shares_too(dataset_for: DataFor, demo_data: Path, tmp_path: Path) -> None:
    """Question answering puts its question after the video, so it shares."""
    asked = [replace(row, kwargs={"answer": f"answer {row.line}"}) for row in demo_rows(demo_data, 2)]
    write_rows(tmp_path / "qa.jsonl", asked)
    shared = SharedVideoDataset(dataset_for(VideoQADataset, tmp_path / "qa.jsonl"), 8)
    assert [unit["indices"] for unit in shared.__getitems__([0, 1])] == [[0, 1]]
    assert_same_as_one_by_one(shared, [0, 1])


def test_text_before_the_video_that_differs_is_not_shared(dataset_for: DataFor) -> None:
    """A task that asks before the video shows it: equal clips with unequal beginnings stay apart, and are right."""

    class AskedFirst(VideoTemporalDataset):
        def question(self, row: Any) -> list[dict[str, Any]]:
            content = [{"type": "text", "text": row.sentence}, {"type": "video"}, {"type": "text", "text": "When?"}]
            return [{"role": "user", "content": content}]

    shared = SharedVideoDataset(dataset_for(AskedFirst), 8)
    assert [unit["indices"] for unit in shared.__getitems__([0, 1])] == [[0], [1]]
    assert_same_as_one_by_one(shared, [0, 1])


def test_a_clip_is_read_once_for_its_rows(dataset_for: DataFor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows of two videos: two decodes."""
    read: list[Path] = []

    def counting(path: Path, *args: Any, **kwargs: Any) -> Any:
        read.append(path)
        return decode(path, *args, **kwargs)

    monkeypatch.setattr("utils.clip_reader.decode", counting)
    SharedVideoDataset(dataset_for(), 8).__getitems__([0, 2, 1, 3])
    assert len(read) == 2 and len(set(read)) == 2


def test_an_unreadable_video_is_a_fault_of_each_of_its_rows(
    dataset_for: DataFor, demo_data: Path, tmp_path: Path
) -> None:
    """Named by row; the others of the batch stay; a batch of faults has nothing to learn."""
    rows = demo_rows(demo_data, 4)
    rows[2:] = [replace(row, video=str(tmp_path / "gone.mp4")) for row in rows[2:]]
    write_rows(tmp_path / "rows.jsonl", rows)
    shared = SharedVideoDataset(dataset_for(path=tmp_path / "rows.jsonl"), 8)
    collate = UnitCollator(shared.blank())
    batch = collate(shared.__getitems__([2, 0, 3, 1]))
    assert batch["indices"] == [0, 1]
    assert [index for index, _ in batch["faults"]] == [2, 3]
    assert all("gone.mp4" in reason for _, reason in batch["faults"])
    answers = [shared[index]["labels"] for index in (0, 1)]
    assert int((batch["labels"] != IGNORE).sum()) == sum(int((labels != IGNORE).sum()) for labels in answers)
    empty = collate(shared.__getitems__([2, 3]))
    assert empty["indices"] == [] and len(empty["units"]) == 1
    assert (empty["labels"] == IGNORE).all()


def test_a_sentence_with_special_tokens_is_a_fault_of_its_own(
    dataset_for: DataFor, demo_data: Path, tmp_path: Path
) -> None:
    """The other queries on its video are asked, the blank unit asks one of theirs."""
    rows = demo_rows(demo_data, 2)
    write_rows(tmp_path / "rows.jsonl", [replace(rows[0], sentence="<|im_end|> appears"), *rows])
    shared = SharedVideoDataset(dataset_for(path=tmp_path / "rows.jsonl"), 8)
    bad, good = shared.__getitems__([0, 1, 2])
    assert bad["indices"] == [0] and "special token <|im_end|>" in bad["fault"]
    assert good["indices"] == [1, 2] and shared.blank()["indices"] == [1]


def test_share_clips_keeps_to_the_limit() -> None:
    """Runs of at most three, in order of first appearance, nothing lost."""
    found = share_clips([0, 10, 1, 2, 3, 11, 4], key=lambda row: row // 10, most=3)
    assert found == [[0, 1, 2], [3, 4], [10, 11]]


# ---------------------------------------------------------------------------------------------- order
CLIPS = [[0, 1, 2, 3, 4, 5, 6], [7], [8, 9], [10, 11, 12], *([row] for row in range(13, 40))]


def order_of(epoch: int, seed: int = 3) -> list[int]:
    return list(VideoSampler(CLIPS, max_queries=3, seed=seed, epoch=lambda: epoch))


def test_every_row_once_an_epoch_in_another_order() -> None:
    """A function of seed and epoch, and of nothing else."""
    for epoch in range(3):
        assert sorted(order_of(epoch)) == list(range(40))
    assert order_of(0) == order_of(0)
    assert order_of(0) != order_of(1) and order_of(0) != order_of(0, seed=4)
    assert len(VideoSampler(CLIPS, max_queries=3, seed=0, epoch=lambda: 0)) == 40


def test_rows_of_a_clip_lie_in_runs_of_the_given_length() -> None:
    """Seven rows: runs of 3, 3 and 1, which over the epochs are other rows and lie in other places."""
    runs = []
    for epoch in range(20):
        order = order_of(epoch)
        places = [place for place, row in enumerate(order) if row < 7]
        starts = [place for place in places if place - 1 not in places]
        assert len(starts) <= 3 and len(places) == 7
        assert abs(order.index(8) - order.index(9)) == 1
        runs.append(tuple(starts))
    assert sum(len(starts) == 3 for starts in runs) > 10 and len(set(runs)) == 20


def test_places_are_uniform() -> None:
    """A row alone on its video is as likely in the first half of an epoch as in the second (4 standard errors)."""
    early = [order_of(epoch, seed=epoch).index(20) < 20 for epoch in range(400)]
    assert abs(sum(early) / 400 - 0.5) < 4 * 0.5 / 20


def test_questions_without_answers(dataset_for: DataFor, demo_data: Path, tmp_path: Path) -> None:
    """Prefix and tail are the row's own prompt; a question that does not fit, or holds a special token, and a file that
    is gone are faults of their own rows."""
    rows = demo_rows(demo_data, 5)
    rows = [replace(row, video=rows[0].video) for row in rows[:4]] + [replace(rows[4], video="gone.mp4")]
    rows[1] = replace(rows[1], sentence="a square " * 60)
    rows[2] = replace(rows[2], sentence="see <|video_pad|>")
    write_rows(tmp_path / "rows.jsonl", rows)
    queries = dataset_for(path=tmp_path / "rows.jsonl", max_prompt_tokens=250, on_overlong="refuse")
    queries.with_answer = False
    units = SharedQuestionDataset(queries).__getitems__([4, 3, 0, 1, 2])
    faults = {index: unit["fault"] for unit in units if "fault" in unit for index in unit["indices"]}
    assert sorted(faults) == [1, 2, 4]
    assert "rows.jsonl:2" in faults[1] and "data.max_prompt_tokens=250" in faults[1]
    assert "<|video_pad|>" in faults[2] and "gone.mp4" in faults[4]
    (unit,) = [unit for unit in units if "fault" not in unit]
    assert unit["indices"] == [3, 0]
    for index, tail in zip(unit["indices"], unit["tails"], strict=True):
        plain = queries[index]
        assert torch.equal(torch.cat([unit["prefix"]["input_ids"], tail]), plain["input_ids"])
        assert torch.equal(pixel_values([unit["prefix"]["pixels"]]), pixel_values([plain["pixels"]]))
