"""Rows of a dataset: every field that the usual formats know is read, or refused by its name.

    {"text": ...}                                     plain text
    {"prompt": ..., "completion": ...}                both as texts, or both as lists of messages
    {"messages": [...], "tools": [...], ...}          a conversation as OpenAI, trl and axolotl write it
    {"conversations": [{"from": ..., "value": ...}]}  the same as ShareGPT writes it

A field that is null is not there. Of other columns the names are told, so that a reader can say what it left.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from app.domain.inputs.messages import Message, RowProblem, json_name, parse_messages, parse_tools

KINDS = ("text", "prompt", "completion", "messages", "conversations")
BESIDE_MESSAGES = ("tools", "functions", "chat_template_kwargs", "parallel_tool_calls", "system")
"""Read beside messages; beside texts they would be read past."""
ARGUMENTS_OF_RENDERING = frozenset(
    (
        *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
        *("continue_final_message", "sanitize_control_tokens", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    )
)
"""Arguments that say how a template is used, not what it reads: no row decides that."""

_PREFERENCE = "rows of preferences are not learned; give the answer to be learned as completion or as messages"
_LABELLED = "labelled answers are not learned; drop the rows with bad ones, and the column"
_ALPACA = "give instruction and input as prompt, and output as completion"
_ANSWERED = "give prompt and completion, or messages"
_MEDIA = "only text is read; drop the row, or the column where the text speaks for itself"
_TOKENS = "rows are tokenized here; give text, prompt and completion, or messages"
REFUSED_EVERYWHERE: Mapping[str, str] = {
    **dict.fromkeys(("chosen", "rejected", "ref_chosen_logps", "ref_rejected_logps"), _PREFERENCE),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
    **dict.fromkeys(("input_ids", "attention_mask", "completion_mask", "assistant_masks"), _TOKENS),
    "segments": "give prompt and completion: the segment that is learned is the completion",
    "weight": "a weight belongs to a message of the assistant; drop rows of weight 0, and the column",
}
REFUSED_BESIDE_TEXTS_IN_PARTS: Mapping[str, str] = {
    **dict.fromkeys(("label", "labels", "completions"), _LABELLED),
    **dict.fromkeys(("instruction", "input", "output"), _ALPACA),
    **dict.fromkeys(("question", "answer", "query", "response"), _ANSWERED),
    "documents": "give the documents as a message's content",
    "chat_template": "the model's own template is used; drop the column",
}
"""Beside `text` these are a classifier's or an author's columns: it holds all that is read."""


@dataclass(frozen=True)
class PlainText:
    """A text that is learned whole."""

    text: str

    @property
    def is_blank(self) -> bool:
        return not self.text.strip()


@dataclass(frozen=True)
class TextPair:
    """A text of which the end is learned."""

    prompt: str
    completion: str

    @property
    def is_blank(self) -> bool:
        return not (self.prompt + self.completion).strip()


@dataclass(frozen=True)
class Conversation:
    """Messages, and what a chat template reads besides: tools, and variables of its own (`settings`).

    `place` names the row in messages of errors, and is no part of what it says.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    place: str = field(default="", compare=False)

    @property
    def is_blank(self) -> bool:
        return all(message.is_blank for message in self.messages)


Row = PlainText | TextPair | Conversation


class RowKind(StrEnum):
    """Kind of a row, as mixtures tell rows apart."""

    TEXT = "text"
    COMPLETION = "completion"
    MESSAGES = "messages"
    TOOLS = "tools"

    @classmethod
    def of(cls, row: Row) -> "RowKind":
        """The kind of a row; of messages with tools or calls beside them, `tools`."""
        match row:
            case PlainText():
                return cls.TEXT
            case TextPair():
                return cls.COMPLETION
            case Conversation():
                calls = any("tool_calls" in message.fields for message in row.messages)
                return cls.TOOLS if row.tools or calls else cls.MESSAGES


def parse_row(row: Mapping[str, Any]) -> tuple[Row, tuple[str, ...]]:
    """The contents of a row, and the names of the columns that were not read.

    Raises:
        RowProblem: a field is not as documented, or has a meaning that is not honoured here.
    """
    given = {name: value for name, value in row.items() if value is not None}
    refused = {**REFUSED_EVERYWHERE, **({} if "text" in given else REFUSED_BESIDE_TEXTS_IN_PARTS)}
    for name, hint in refused.items():
        if given.get(name) not in (None, [], {}, ""):
            raise RowProblem(name, "is not honoured", hint)
    kinds = [name for name in KINDS if name in given]
    if "messages" in kinds and "prompt" in kinds and _is_repeated(given["prompt"], given["messages"]):
        kinds.remove("prompt")
    match kinds:
        case ["text"]:
            parsed: Row = PlainText(_text(given, "text"))
            read = {"text", "parallel_tool_calls"}
        case ["prompt", "completion"]:
            parsed, read = _pair(given), {"prompt", "completion", *BESIDE_MESSAGES}
        case ["messages"] | ["conversations"]:
            parsed, read = _conversation(given, parse_messages(given[kinds[0]], kinds[0])), {*kinds, *BESIDE_MESSAGES}
        case _:
            raise _no_kind(kinds, row)
    if not isinstance(parsed, Conversation):
        _demand_no_conversation(given)
    return parsed, tuple(sorted(name for name in given if name not in read))


def _no_kind(kinds: list[str], row: Mapping[str, Any]) -> RowProblem:
    if not kinds:
        hint = 'give "text", "prompt" and "completion", or "messages"'
        return RowProblem("", f"is an object without text; its fields are {sorted(map(str, row))[:8]}", hint)
    if kinds in (["prompt"], ["completion"]):
        other = "completion" if kinds == ["prompt"] else "prompt"
        return RowProblem(kinds[0], f"has no {other} beside it", f'add {other}, or give the row as "text"')
    return RowProblem(kinds[0], f"stands beside {' and '.join(kinds[1:])}", "keep the one that is to be read")


def _is_repeated(prompt: object, messages: object) -> bool:
    """True if a prompt only repeats what one of the messages says, as in some published datasets."""
    said = [each.get("content") for each in messages if isinstance(each, Mapping)] if isinstance(messages, list) else []
    return isinstance(prompt, str) and prompt in said


def _text(given: Mapping[str, Any], name: str) -> str:
    if not isinstance(given[name], str):
        raise RowProblem(name, f"is {json_name(given[name])}", "give a text")
    return str(given[name])


def _pair(given: Mapping[str, Any]) -> Row:
    prompt, completion = given["prompt"], given["completion"]
    if isinstance(prompt, str) != isinstance(completion, str):
        problem = f"is {json_name(completion)}, and prompt is {json_name(prompt)}"
        raise RowProblem("completion", problem, "give both as texts, or both as lists of messages")
    if isinstance(prompt, str):
        return TextPair(prompt, _text(given, "completion"))
    asked = parse_messages(prompt, "prompt", learned=False)
    return _conversation(given, asked + parse_messages(completion, "completion"))


def _demand_no_conversation(given: Mapping[str, Any]) -> None:
    """Refuses what only a chat template could write; a system prompt beside a whole text is a column like others."""
    for name in BESIDE_MESSAGES:
        if name == "parallel_tool_calls" or (name == "system" and "text" in given):
            continue
        if given.get(name) not in (None, [], {}, ""):
            hint = "only a chat template writes it; give the row as messages, or drop the column"
            raise RowProblem(name, "stands beside texts", hint)


def _conversation(given: Mapping[str, Any], messages: tuple[Message, ...]) -> Conversation:
    if not isinstance(given.get("parallel_tool_calls", True), bool):
        raise RowProblem("parallel_tool_calls", "is neither true nor false", "give one of them, or drop it")
    return Conversation(_with_system(given, messages), parse_tools(given), _settings(given))


def _with_system(given: Mapping[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages after the system prompt that some rows have in a column of its own."""
    if not given.get("system"):
        return messages
    prompt = _text(given, "system")
    said = [message.fields.get("content") for message in messages if message.role in ("system", "developer")]
    if said == [prompt]:
        return messages
    if said:
        raise RowProblem("system", "stands beside a system message", "keep one of them")
    return (Message("system", {"role": "system", "content": prompt}, path="system"), *messages)


def _settings(given: Mapping[str, Any]) -> Mapping[str, Any]:
    name = "chat_template_kwargs"
    settings = given.get(name) or {}
    if isinstance(settings, str):
        settings = _loaded(settings)
    if not isinstance(settings, Mapping):
        raise RowProblem(name, f"is {json_name(given[name])}", "give an object")
    for key in sorted(ARGUMENTS_OF_RENDERING & settings.keys()):
        raise RowProblem(f"{name}.{key}", "is no variable of a chat template", "drop it")
    return {key: value for key, value in settings.items() if value is not None}


def _loaded(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
