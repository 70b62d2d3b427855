"""Many queries at once get the answers that stock transformers gives them one by one."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from datasets.encoding import encode_prompt, fit_prompt
from datasets.pixels import pixel_values
from inference.batching import read_items
from inference.video_infer import VideoTemporalInference
from trainers.generation import vision_token_ids
from trainers.shared_prefix import backbone_of
from utils.common import UserError
from utils.config import DataConfig, PromptConfig
from utils.prompts import PromptContract, build_messages
from utils.video import read_clip

DATA = DataConfig(
    fps=2.0, min_frames=2, max_frames=16, min_pixels_per_frame=1024, max_pixels_per_frame=2048, total_pixels=32768
)
PROMPT = PromptConfig(question="When {sentence}?")
TOKENS = 12
SHORT, LONG = "the red square appears", "the blue square appears after the green square and the red square appears"


@pytest.fixture(scope="module")
def stock(tiny_model: Path) -> Any:
    """The model without a change of ours."""
    return Qwen3VLForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture
def engine(tiny_model: Path) -> VideoTemporalInference:
    return engine_with(tiny_model)


def engine_with(tiny_model: Path, prompt: PromptConfig = PROMPT, **data: Any) -> VideoTemporalInference:
    made = VideoTemporalInference(tiny_model, dtype="float32", device="cpu")
    made.contract = PromptContract.current(prompt, DATA.model_copy(update=data))
    return made


@pytest.fixture(scope="module")
def videos(demo_data: Path) -> list[str]:
    return [str(path) for path in sorted((demo_data / "videos" / "test").iterdir())]


def first_logits(model: Any) -> list[torch.Tensor]:
    """(rows, vocabulary) of every pass of the head, filled as it runs."""
    seen: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda _m, _a, output: seen.append(output[:, -1].detach()))
    return seen


def stock_answer(model: Any, engine: VideoTemporalInference, item: tuple[Any, ...]) -> tuple[str, torch.Tensor]:
    """Plain `generate` of one row from pixels: the text, and the logits of its first token."""
    (video, query, start, end), data = (*item, None, None)[:4], engine.contract.data
    clip = read_clip(video, data.budget, start_s=start, end_s=end, backend=data.backend)
    sample, _ = fit_prompt(
        engine.processor, build_messages(engine.contract.prompt, query), clip,
        max_tokens=data.max_prompt_tokens, on_overlong=data.on_overlong, name="x",
    )  # fmt: skip
    ids = sample["input_ids"][None]
    model.model.rope_deltas = None
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=sample["mm_token_type_ids"][None],
        pixel_values_videos=pixel_values([sample["pixels"]]), video_grid_thw=sample["video_grid_thw"],
        max_new_tokens=TOKENS, do_sample=False, suppress_tokens=vision_token_ids(engine.processor),
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    text = engine.processor.tokenizer.decode(output.sequences[0, ids.shape[1] :], skip_special_tokens=True)
    return text.strip(), output.logits[0][0]


def items_of(videos: list[str]) -> list[tuple[Any, ...]]:
    """Three, one and two queries on whole videos and stretches of different length, in mixed order."""
    one, two, three = videos[:3]
    return [
        (one, SHORT), (two, LONG, 1.0, 4.0), (one, LONG), (three, SHORT), (two, SHORT, 1.0, 4.0), (one, "it moves"),
        (two, SHORT), (one, SHORT, 0.5, 2.5),
    ]  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8, 100])
def test_answers_are_stock_generates_one_by_one(
    engine: VideoTemporalInference, stock: Any, videos: list[str], batch_size: int
) -> None:
    items = items_of(videos)
    seen = first_logits(engine.model)
    found = engine.predict_batch(items, batch_size=batch_size, max_new_tokens=TOKENS)
    expected = [stock_answer(stock, engine, item) for item in items]
    assert [prediction["raw_text"] for prediction in found] == [text for text, _ in expected]
    assert len({text for text, _ in expected}) > 2
    if batch_size == 100:  # one batch: rows by video, in the order of first appearance
        order = [0, 2, 5, 1, 4, 3, 6, 7]
        wanted = torch.stack([expected[number][1] for number in order])
        assert (seen[0] - wanted).abs().max() < 1e-4
        assert wanted.std(dim=0).max() > 1e-2  # rows differ: equality is no accident


def test_a_dict_is_what_predict_returns(engine: VideoTemporalInference, videos: list[str]) -> None:
    """All keys, on the file's clock, for every form of an item."""
    items: list[Any] = [
        (videos[0], SHORT),
        {"video": Path(videos[1]), "query": LONG, "video_start": 1.0, "video_end": 4},
        [videos[1], SHORT, None, 3.0],
    ]
    found = engine.predict_batch(items, max_new_tokens=TOKENS)
    assert found == [
        engine.predict(videos[0], SHORT, max_new_tokens=TOKENS),
        engine.predict(videos[1], LONG, video_start=1.0, video_end=4.0, max_new_tokens=TOKENS),
        engine.predict(videos[1], SHORT, video_end=3.0, max_new_tokens=TOKENS),
    ]
    assert found[1]["clip"] == [pytest.approx(1.0), pytest.approx(4.0)] and found[1]["num_frames"] == 6


def test_an_answer_is_read_on_the_files_clock(
    engine: VideoTemporalInference, videos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "inference.batching.continue_texts", lambda *_a, **_k: [["From 1.0 to 2.5 seconds.", "purple monkeys"]]
    )
    window, nonsense = engine.predict_batch([(videos[0], text, 3.0, 7.0) for text in (SHORT, LONG)])
    assert window["segments"] == [[pytest.approx(4.0), pytest.approx(5.5)]]
    assert (window["start_time"], window["clip_segments"], window["parsed"]) == (pytest.approx(4.0), [[1.0, 2.5]], True)
    assert (nonsense["parsed"], nonsense["segments"], nonsense["raw_text"]) == (False, [], "purple monkeys")
    assert "error" not in nonsense


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """Arguments of the calls of a function, named in full."""
    calls: list[Any] = []
    module, _, attribute = name.rpartition(".")
    real = getattr(importlib.import_module(module), attribute)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(name, counting)
    return calls


@pytest.mark.parametrize("batch_size", [2, 8])
def test_a_stretch_is_computed_once(
    engine: VideoTemporalInference, videos: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, batch_size: int
) -> None:
    """Five queries on one stretch, written in different ways, and one on another: two decodes, two vision passes."""
    (tmp_path / "link.mp4").symlink_to(videos[0])
    read, passes, rows = counted(monkeypatch, "utils.clip_reader.decode"), [], []
    backbone = backbone_of(engine.model)
    backbone.visual.register_forward_hook(lambda *_: passes.append(1))
    engine.model.lm_head.register_forward_hook(lambda _m, _a, output: rows.append(len(output)))
    items = [
        (videos[0], SHORT), (videos[1], SHORT), (videos[0], LONG), (tmp_path / "link.mp4", SHORT),
        (videos[0], "it moves", 0.0, None), (videos[0], "it stays", 0, None),
    ]  # fmt: skip
    engine.predict_batch(items, batch_size=batch_size, max_new_tokens=2)
    assert len(read) == 2 and len(passes) == 2
    assert sorted(set(rows)) == ([1, 2] if batch_size == 2 else [6])


def test_an_overlong_prompt_loses_the_frames_it_loses_alone(tiny_model: Path, stock: Any, videos: list[str]) -> None:
    """Whatever else is asked about the video: a long question takes frames from itself only."""
    clip = read_clip(videos[0], DATA.budget, backend=DATA.backend)
    whole = engine_with(tiny_model)
    length = len(encode_prompt(whole.processor, build_messages(PROMPT, SHORT), clip)["input_ids"])
    long = " and ".join([LONG] * 3)
    engine = engine_with(tiny_model, max_prompt_tokens=length)
    items = [(videos[0], SHORT), (videos[0], long), (videos[0], LONG), (videos[0], SHORT)]
    found = engine.predict_batch(items, max_new_tokens=TOKENS)
    assert [prediction["raw_text"] for prediction in found] == [stock_answer(stock, engine, item)[0] for item in items]
    assert [prediction["num_frames"] for prediction in found] == [
        engine.predict(*item, max_new_tokens=1)["num_frames"] for item in items
    ]
    assert found[0]["num_frames"] == len(clip.frames) == found[3]["num_frames"] > found[1]["num_frames"]


def test_a_question_that_cannot_fit_is_a_fault_of_its_own(tiny_model: Path, videos: list[str]) -> None:
    clip = read_clip(videos[0], DATA.budget, backend=DATA.backend)
    whole = engine_with(tiny_model)
    length = len(encode_prompt(whole.processor, build_messages(PROMPT, SHORT), clip)["input_ids"])
    engine = engine_with(tiny_model, max_prompt_tokens=length, on_overlong="refuse")
    kept, refused = engine.predict_batch([(videos[0], SHORT), (videos[0], LONG)], max_new_tokens=2)
    assert kept == engine.predict(videos[0], SHORT, max_new_tokens=2)
    assert f"more than data.max_prompt_tokens={length}" in refused["error"]


def test_a_bad_file_costs_no_other_its_answer(
    engine: VideoTemporalInference, videos: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "text.mp4").write_text("not a video")
    items: list[Any] = [
        (tmp_path / "gone.mp4", SHORT), (videos[0], SHORT), (tmp_path / "text.mp4", LONG),
        (videos[0], "see <|video_pad|>"), (videos[0], LONG), (videos[0], SHORT, 500.0, 600.0),
    ]  # fmt: skip
    with caplog.at_level(logging.WARNING, "vtg"):
        found = engine.predict_batch(items, max_new_tokens=TOKENS)
    assert [number for number, prediction in enumerate(found) if "error" in prediction] == [0, 2, 3, 5]
    assert "gone.mp4" in found[0]["error"] and "text.mp4" in found[2]["error"]
    assert "<|video_pad|>" in found[3]["error"] and "500.0" in found[5]["error"]
    assert set(found[0]) == set(found[1]) | {"error"}
    assert (found[0]["start_time"], found[0]["segments"], found[0]["parsed"]) == (None, [], False)
    assert (found[0]["video"], found[0]["query"]) == (str(tmp_path / "gone.mp4"), SHORT)
    for number in (1, 4):
        assert found[number] == engine.predict(*items[number], max_new_tokens=TOKENS)
    assert "4 of 6 items have no answer; the first is item 0" in caplog.text


def test_a_bad_file_can_raise(engine: VideoTemporalInference, videos: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.mp4"):
        engine.predict_batch([(tmp_path / "gone.mp4", SHORT), (videos[0], SHORT)], on_error="raise", max_new_tokens=1)


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ("clip.mp4", r"item 1 must be \(video, query\)"),
        (("clip.mp4",), "item 1 must be .* got 1 parts"),
        (("clip.mp4", "x", 1.0), "item 1 must be .* got 3 parts"),
        (("clip.mp4", "  "), "item 1: query is empty"),
        ((None, "x"), "item 1: video must be the path of a file, got None"),
        ({"video": "clip.mp4", "query": "x", "video_begin": 1.0}, "item 1: unknown key 'video_begin'.*did you mean"),
        ({"video": "clip.mp4"}, "item 1: query is empty"),
        (("clip.mp4", "x", "1", None), "item 1: video_start must be a number of seconds or None, got '1'"),
    ],
)
def test_an_item_of_another_form_is_named_before_work_begins(item: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        read_items([("clip.mp4", "x"), item])


def test_options_out_of_their_rule(engine: VideoTemporalInference, videos: list[str]) -> None:
    with pytest.raises(UserError, match="batch_size must be >= 1, got 0"):
        engine.predict_batch([(videos[0], SHORT)], batch_size=0)
    with pytest.raises(UserError, match="on_error must be one of report, raise, got 'ignore'"):
        engine.predict_batch([(videos[0], SHORT)], on_error="ignore")
    assert engine.predict_batch([]) == []


def test_a_stream_gives_each_answer_as_it_is_known(
    engine: VideoTemporalInference, videos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first video's answers come before the third is read."""
    read = counted(monkeypatch, "utils.clip_reader.decode")
    items = [(videos[0], SHORT), (videos[1], SHORT), (videos[0], LONG), (videos[2], SHORT)]
    stream = engine.predict_stream(items, batch_size=2, max_new_tokens=TOKENS)
    early = [next(stream), next(stream)]
    assert [number for number, _ in early] == [0, 2] and len(read) == 2
    whole = dict([*early, *stream])
    assert [whole[number] for number in range(4)] == engine.predict_batch(items, max_new_tokens=TOKENS)


def test_sampling_and_limits_reach_generate(engine: VideoTemporalInference, videos: list[str]) -> None:
    items = [(videos[0], SHORT), (videos[1], LONG)]
    short = engine.predict_batch(items, max_new_tokens=1)
    greedy = engine.predict_batch(items, max_new_tokens=TOKENS)
    assert all(len(a["raw_text"]) < len(b["raw_text"]) for a, b in zip(short, greedy, strict=True))
    torch.manual_seed(0)
    sampled = engine.predict_batch(items, max_new_tokens=TOKENS, do_sample=True, temperature=2.0)
    assert [a["raw_text"] for a in sampled] != [a["raw_text"] for a in greedy]


def test_predict_is_unmoved_by_a_batch_before_it(engine: VideoTemporalInference, videos: list[str]) -> None:
    before = engine.predict(videos[2], LONG, max_new_tokens=TOKENS)
    engine.predict_batch([(videos[0], SHORT), (videos[1], SHORT), (videos[0], LONG)], max_new_tokens=TOKENS)
    assert engine.predict(videos[2], LONG, max_new_tokens=TOKENS) == before


@pytest.mark.parametrize("prompt", [PromptConfig(question="Where: {sentence}?", system="You find events."),
                                    PromptConfig(question="When {sentence}?", thinking=True)])  # fmt: skip
def test_every_kind_of_prompt(tiny_model: Path, stock: Any, videos: list[str], prompt: PromptConfig) -> None:
    engine = engine_with(tiny_model, prompt)
    items = [(videos[0], SHORT), (videos[0], LONG), (videos[1], SHORT)]
    found = engine.predict_batch(items, max_new_tokens=TOKENS)
    assert [prediction["raw_text"] for prediction in found] == [stock_answer(stock, engine, item)[0] for item in items]
