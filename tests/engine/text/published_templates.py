"""The chat templates that the installed `trl` carries, a tokenizer for each, and kinds of rows to try them with."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CONTROL = re.compile(r"<\|[^|<>{}\s']+\|?>|<[^|<>{}\s'/]+\|>|<｜[^<>｜]+｜>|<(?:start|end)_of_\w+>|</s>")
START, END = "<|first|>", "<|eos|>"


@cache
def published() -> Mapping[str, str]:
    """The templates by name, in order."""
    files = distribution("trl").files or []
    found = sorted(Path(str(file.locate())) for file in files if str(file).endswith(".jinja"))
    return {file.stem: file.read_text(encoding="utf-8") for file in found if file.parent.name == "chat_templates"}


@cache
def tokenizer_for(name: str, *, starts: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes that knows the control tokens of a published template as such."""
    return made_tokenizer(published()[name], starts=starts)


def made_tokenizer(source: str, *, starts: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes with a template; `starts`: it puts its first token before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    control = [*sorted({*CONTROL.findall(source)} - {START, END}), START, END]
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    if starts:
        pair = (START, made.token_to_id(START))
        made.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[pair])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=START,
        eos_token=END,
        additional_special_tokens=control,
        chat_template=source,
        clean_up_tokenization_spaces=False,
    )


USER, AGAIN = ({"role": "user", "content": text} for text in ("Asking the first.", "Asking the second."))
ONE, TWO = ({"role": "assistant", "content": text} for text in ("Answering one.", "Answering two."))
SYSTEM = {"role": "system", "content": "Ordering all."}
THOUGHT = {"role": "assistant", "reasoning_content": "Thinking first.", "content": "Answering one."}
RETHOUGHT = {"role": "assistant", "reasoning_content": "Thinking second.", "content": "Answering two."}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Telling the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where."}},
            "required": ["city"],
        },
    },
}


def call(*cities: str, **more: Any) -> dict[str, Any]:
    """An assistant's message that calls the tool for each city."""
    calls = [
        {
            "id": f"call{number:05d}",
            "type": "function",
            "function": {"name": "get_weather", "arguments": {"city": city}},
        }
        for number, city in enumerate(cities)
    ]
    return {"role": "assistant", "tool_calls": calls, **more}


RESULT = {"role": "tool", "tool_call_id": "call00000", "name": "get_weather", "content": "Raining outside."}

ROWS: Mapping[str, dict[str, Any]] = {
    "one answer": {"messages": [USER, ONE]},
    "two answers": {"messages": [USER, ONE, AGAIN, TWO]},
    "system": {"messages": [SYSTEM, USER, ONE, AGAIN, TWO]},
    "assistant first": {"messages": [ONE, AGAIN, TWO]},
    "ends with the user": {"messages": [USER, ONE, AGAIN]},
    "tool call": {"messages": [USER, call("Rome"), RESULT, ONE, AGAIN, TWO], "tools": [TOOL]},
    "last is a call": {"messages": [SYSTEM, USER, call("Rome")], "tools": [TOOL]},
    "call without tools": {"messages": [USER, call("Rome"), RESULT, ONE]},
    "call with words": {"messages": [USER, call("Rome", content="Looking it up."), RESULT, ONE], "tools": [TOOL]},
    "two calls": {
        "messages": [
            USER,
            call("Rome", "Oslo"),
            RESULT,
            {**RESULT, "tool_call_id": "call00001", "content": "Snowing outside."},
            ONE,
        ],
        "tools": [TOOL],
    },
    "thinking": {"messages": [USER, THOUGHT]},
    "thinking twice": {"messages": [USER, THOUGHT, AGAIN, RETHOUGHT]},
    "thinking inside": {"messages": [USER, {**ONE, "content": "<think>\nThinking first.\n</think>\n\nAnswering one."}]},
    "weights": {"messages": [USER, {**ONE, "weight": 0}, AGAIN, TWO]},
    "parts": {
        "messages": [
            USER,
            {**ONE, "content": [{"type": "text", "text": "Answering one."}]},
            {**AGAIN, "content": [{"type": "text", "text": "Asking the second."}]},
            TWO,
        ]
    },
    "prompt and completion": {"prompt": [SYSTEM, USER, ONE, AGAIN], "completion": [TWO]},
}
"""Rows by kind. The texts of users, system and tools end in other words than those of assistants."""


def conversation(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All messages of a row."""
    return list(row["messages"]) if "messages" in row else [*row["prompt"], *row["completion"]]


def said(row: Mapping[str, Any]) -> Iterator[str]:
    """Texts of a row that others than the assistant say."""
    for message in conversation(row):
        if message["role"] != "assistant":
            content = message["content"]
            yield content if isinstance(content, str) else content[0]["text"]
