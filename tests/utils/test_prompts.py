"""The prompt contract: what is asked, what is answered, and that both survive being stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from utils.common import UserError
from utils.config import DataConfig, PromptConfig
from utils.prompts import CONTRACT_FILE, PromptContract, build_messages, format_answer
from utils.spans import Span, parse_spans


def test_video_stands_before_the_question() -> None:
    messages = build_messages(PromptConfig(system="Be brief.", question="When: {sentence}?"), "  a door opens ")
    assert [message["role"] for message in messages] == ["system", "user"]
    assert messages[1]["content"] == [{"type": "video"}, {"type": "text", "text": "When: a door opens?"}]


def test_sentence_with_braces_is_taken_literally() -> None:
    messages = build_messages(PromptConfig(question="When: {sentence}?"), "a {red} box")
    assert messages[0]["content"][1]["text"] == "When: a {red} box?"


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(
    "windows", [[], [Span(0.0, 1.5)], [Span(1.0, 2.0), Span(5.0, 6.5)], [Span(0.1, 0.2), Span(3, 4), Span(10, 20)]]
)
def test_answers_are_read_back_by_the_one_parser(windows: list[Span], thinking: bool) -> None:
    text = format_answer(PromptConfig(thinking=thinking), windows, thought="maybe 8 to 9 seconds")
    assert parse_spans(text) == windows


def test_thinking_wraps_thought_and_answer() -> None:
    prompt = PromptConfig(thinking=True)
    assert format_answer(prompt, [Span(1, 2)], " It opens. ") == (
        "<think>It opens.</think><answer>From 1.0 to 2.0 seconds.</answer>"
    )
    assert prompt.thinking_instruction in build_messages(prompt, "x")[0]["content"][1]["text"]


def test_contract_round_trip(tmp_path: Path) -> None:
    prompt = PromptConfig(question="Find {sentence}.", thinking=True)
    data = DataConfig(fps=1.5, max_frames=32, total_pixels=99999, train="x.jsonl", cache_dir="/machine/of/training")
    PromptContract.current(prompt, data, "a.b:c").save(tmp_path)
    loaded = PromptContract.load(tmp_path)
    assert loaded.prompt == prompt and loaded.vision_tower == "a.b:c"
    assert loaded.data.budget == data.budget and loaded.data.train == ()
    assert loaded.data.cache_dir is None  # and so inference reads its videos itself
    stored = json.loads((tmp_path / CONTRACT_FILE).read_text())
    import transformers

    assert stored["transformers"] == transformers.__version__ == loaded.transformers_version


@pytest.mark.parametrize(
    "text", ["", "{", "{}", '{"prompt": {"nonsense": 1}, "video": {}, "transformers": "5", "x": 1}']
)
def test_damaged_contract_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / CONTRACT_FILE).write_text(text)
    with pytest.raises(UserError, match="is not a valid prompt contract"):
        PromptContract.load(tmp_path)


def test_missing_contract_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data_config"):
        PromptContract.load(tmp_path)
