"""Conversation rows, as ms-swift and LLaMA-Factory train on them: read, and written from this project's rows.

ms-swift, one object a line:

    {"messages": [{"role": "user", "content": "<video>When does 'a dog jumps' happen?"},
                  {"role": "assistant", "content": "From 3.2 to 7.9 seconds."}], "videos": ["a.mp4"]}

LLaMA-Factory (`formatting: sharegpt`), a list of objects or one a line:

    {"conversations": [{"from": "human", "value": "<video>When does 'a dog jumps' happen?"},
                       {"from": "gpt", "value": "From 3.2 to 7.9 seconds."}], "videos": ["a.mp4"]}

Nothing is lost either way. What is read stays whole in `kwargs.conversation`, and comes out again when rows are
exported that nobody changed; what is written holds its rows in `vtg_rows`, a column that the other trainers ignore.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from datasets.converters.base import Converter, SourceRow, number, read_json_lines
from datasets.converters.own_rows import OWN_SPLIT, from_record
from utils.common import UserError, atomic_open
from utils.config import PromptConfig
from utils.prompts import build_messages, format_answer
from utils.rows import record_to_row, to_file_clock, windows_of
from utils.spans import parse_spans

STYLES = ("ms_swift", "llama_factory")
ROWS_KEY = "vtg_rows"
VIDEO_TAG = "<video>"

_QUOTED = re.compile(r"“([^”]+)”|\"([^\"]+)\"|(?<!\w)'(.+?)'(?!\w)|`([^`]+)`")
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


class Turn(NamedTuple):
    """A question and its answer; None where nobody answered (rows for GRPO)."""

    question: str
    answer: str | None


class Conversations(Converter):
    """Reads both styles, in JSON or JSON lines; every question with its answer is a row."""

    name = "conversations"
    published = "They are another trainer's rows; answers are read by the grammar that reads our model's."

    def find(self, annotations: Path, split: str | None) -> tuple[Path, str]:
        return annotations, split or self._split_in_name(annotations.stem) or OWN_SPLIT

    def read(self, path: Path, split: str) -> Iterator[SourceRow]:
        for index, record in enumerate(read_json_lines(path), start=1):
            if ROWS_KEY in record:
                yield from _written_rows(record, split, f"{path.stem}-{index}")
            else:
                yield from foreign_rows(record, split, f"{path.stem}-{index}")


# ---- reading


def foreign_rows(record: Mapping[str, Any], split: str, qid: str) -> list[SourceRow]:
    """The rows of a conversation that another program wrote. Raises ValueError, KeyError or TypeError."""
    turns, video = turns_of(record), video_of(record)
    if not turns:
        raise ValueError("a conversation without a question")
    duration = None if record.get("duration") is None else number(record["duration"])
    rows = []
    for index, turn in enumerate(turns):
        sentence, whole = event_in(turn.question)
        spans = None if turn.answer is None else parse_spans(turn.answer, duration)
        quirks = [kind for kind, told in (("whole_question", whole), ("unread_answer", spans is None)) if told]
        if turn.answer is None:
            quirks = quirks[:-1]
        rows.append(
            SourceRow(
                videos=(video,),
                sentence=sentence,
                timestamp=spans,
                split=split,
                qid=record.get("qid", record.get("id", qid)) if len(turns) == 1 else f"{qid}-{index}",
                duration=duration,
                quirks=tuple(quirks),
                kwargs={"conversation": dict(record), "turn": index},
            )
        )
    return rows


def turns_of(record: Mapping[str, Any]) -> list[Turn]:
    """The questions of a conversation with their answers, in either style; system texts are left out."""
    messages = [(_ROLES.get(role, role), text) for role, text in _messages(record)]
    turns = []
    for index, (role, text) in enumerate(messages):
        if role != "user":
            continue
        answered = index + 1 < len(messages) and messages[index + 1][0] == "assistant"
        turns.append(Turn(text, messages[index + 1][1] if answered else None))
    solution = record.get("solution")  # where ms-swift's GRPO rows have the answer
    if len(turns) == 1 and turns[0].answer is None and isinstance(solution, str):
        turns = [Turn(turns[0].question, solution)]
    return turns


def _messages(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    if "messages" in record:
        return [(message["role"], _text(message["content"])) for message in record["messages"]]
    if "conversations" in record:
        return [(message["from"], _text(message["value"])) for message in record["conversations"]]
    if "query" in record and "response" in record:
        return [("user", record["query"]), ("assistant", record["response"])]
    raise ValueError("neither `messages` (ms-swift) nor `conversations` (LLaMA-Factory)")


def _text(content: Any) -> str:
    """A message's text; the parts of one that is a list, as in the OpenAI format."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")


def video_of(record: Mapping[str, Any]) -> str:
    """The conversation's one video. Raises ValueError for several or none."""
    videos = record.get("videos", record.get("video", []))
    videos = [videos] if isinstance(videos, str) else list(videos)
    for message in record.get("messages", []):
        if not isinstance(message["content"], str):
            videos += [part["video"] for part in message["content"] if part.get("type") == "video"]
    if len(videos) != 1 or not isinstance(videos[0], str):
        raise ValueError(f"a row has one video (the path of a file), got {json.dumps(videos)[:80]}")
    return videos[0]


def event_in(question: str) -> tuple[str, bool]:
    """What a question asks for: its one quoted part; else all of it, and True.

    >>> event_in("<video>When does 'a dog jumps' happen?")
    ('a dog jumps', False)
    >>> event_in("<video>When does a dog jump?")
    ('When does a dog jump?', True)
    """
    text = question.replace(VIDEO_TAG, "").strip()
    quoted = [part for match in _QUOTED.finditer(text) for part in match.groups() if part]
    return (quoted[0], False) if len(quoted) == 1 else (text, True)


def _written_rows(record: Mapping[str, Any], split: str, qid: str) -> Iterator[SourceRow]:
    """The rows of a conversation that this project wrote, marked where it says something else by now."""
    conversation, rows = {key: value for key, value in record.items() if key != ROWS_KEY}, record[ROWS_KEY]
    style = "llama_factory" if "conversations" in record else "ms_swift"
    # Of another program's conversation what it said is left out of its rows.
    is_foreign = "turn" in rows[0]["kwargs"] and _says_the_same(conversation, rows, style)
    is_own = not is_foreign and len(rows) == 1 and fresh(rows[0], style) == dict(record)
    for row in rows:
        source = from_record(row if is_own else _with_conversation(row, conversation), split, qid)
        is_changed = not (is_foreign or is_own)
        yield replace(source, quirks=(*source.quirks, "differing_rows")) if is_changed else source


def _with_conversation(row: Mapping[str, Any], conversation: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "kwargs": {"conversation": conversation, **row["kwargs"]}}


# ---- writing


def to_conversations(records: Sequence[Mapping[str, Any]], style: str) -> list[dict[str, Any]]:
    """Rows as conversations of a style (`STYLES`), in order.

    Rows that came from conversations of that style and still say the same come out as those; every other row becomes
    a question in the words of this project's default prompt. Windows are on the file's clock, since the other trainers
    show the whole file; the row in `vtg_rows` has its stretch.
    """
    if style not in STYLES:
        raise UserError(f"--to {style}: must be one of rows, {', '.join(STYLES)}")
    return [item for group in _by_conversation(records) for item in _conversation(group, style)]


def _by_conversation(records: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Rows in a row that are the turns of one conversation; every other row alone."""
    groups: list[list[Mapping[str, Any]]] = []
    for record in records:
        turn, original = record["kwargs"].get("turn"), record["kwargs"].get("conversation")
        before = groups[-1][-1]["kwargs"] if groups else {}
        if turn and original is not None and original == before.get("conversation") and before.get("turn") == turn - 1:
            groups[-1].append(record)
        else:
            groups.append([record])
    return groups


def _conversation(group: Sequence[Mapping[str, Any]], style: str) -> list[dict[str, Any]]:
    original = group[0]["kwargs"].get("conversation")
    if original is None or not _says_the_same(original, group, style):
        return [fresh(record, style) for record in group]
    rows = [
        {**record, "kwargs": {key: value for key, value in record["kwargs"].items() if key != "conversation"}}
        for record in group
    ]
    return [{**original, ROWS_KEY: rows}]


def _says_the_same(original: Mapping[str, Any], group: Sequence[Mapping[str, Any]], style: str) -> bool:
    """Whether a conversation is of the style, and all its rows are there as they were read."""
    if ("conversations" in original) != (style == "llama_factory") or "turn" not in group[0]["kwargs"]:
        return False
    said = [(row.sentence, windows_of(row.timestamp)) for row in foreign_rows(original, "", "")]
    return said == [(record["sentence"], windows_of(record["timestamp"])) for record in group]


def fresh(record: Mapping[str, Any], style: str) -> dict[str, Any]:
    """One row as a new conversation."""
    row, prompt = record_to_row(record), PromptConfig()
    content = build_messages(prompt, row.sentence)[-1]["content"]
    said = [("user", VIDEO_TAG + "".join(part.get("text", "") for part in content))]
    if row.timestamp is not None:
        windows = [to_file_clock(span, row, "relative") for span in row.timestamp]
        said.append(("assistant", format_answer(prompt, windows)))
    about = {"videos": [row.video], ROWS_KEY: [dict(record)]}
    if style == "ms_swift":
        return {"messages": [{"role": role, "content": text} for role, text in said], **about}
    names = {"user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[role], "value": text} for role, text in said], **about}


def write_conversations(path: Path, records: Sequence[Mapping[str, Any]], style: str) -> int:
    """Write rows as conversations, atomically: one JSON array to a `.json` file, else JSON lines. Returns how many."""
    items = to_conversations(records, style)
    with atomic_open(path) as handle:
        if path.suffix == ".json":
            json.dump(items, handle, ensure_ascii=False, indent=1)
            handle.write("\n")
        else:
            handle.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    return len(items)
