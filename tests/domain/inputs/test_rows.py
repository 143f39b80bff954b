"""Fields of rows: what every known format says is read, or refused by line and name, with a way out."""

import io
import json
from typing import Any

import pytest

from app.domain.inputs.jsonl import check_jsonl, numbered_records
from app.domain.inputs.rows import Conversation, PlainText, TextPair
from bitwright.errors import InvalidDataset

USER = {"role": "user", "content": "asks"}
ANSWER = {"role": "assistant", "content": "answers"}
TALK = [USER, ANSWER]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


def stream(*rows: Any) -> io.BytesIO:
    return io.BytesIO("".join(json.dumps(row) + "\n" for row in rows).encode())


def parsed(row: dict[str, Any]) -> Any:
    (record,) = numbered_records(stream(row), "rows")
    return record.row


def talk(**fields: Any) -> Conversation:
    found = parsed({"messages": TALK} | fields)
    assert isinstance(found, Conversation)
    return found


def with_answer(**fields: Any) -> Any:
    """The answer's message, as it is read; a field of None is left out."""
    message = {name: value for name, value in (ANSWER | fields).items() if value is not ...}
    return talk(messages=[USER, message]).messages[1]


def test_texts_pairs_and_conversations() -> None:
    assert parsed({"text": "a", "messages": None}) == PlainText("a")
    assert parsed({"prompt": "a", "completion": "b"}) == TextPair("a", "b")
    found = talk()
    assert [message.fields for message in found.messages] == TALK
    assert [message.learned for message in found.messages] == [False, True]
    pair = parsed({"prompt": TALK, "completion": [ANSWER]})
    assert [message.learned for message in pair.messages] == [False, False, True]


def test_the_older_and_other_names_of_the_same() -> None:
    shared = parsed({"conversations": [{"from": "human", "value": "asks"}, {"from": "gpt", "value": "answers"}]})
    assert [dict(message.fields) for message in shared.messages] == TALK
    assert parsed({"conversations": TALK}) == talk()
    assert talk(system="be brief").messages[0].fields == {"role": "system", "content": "be brief"}
    assert talk(functions=[TOOL["function"]]).tools == talk(tools=[TOOL]).tools == (TOOL,)
    assert talk(tools=json.dumps([TOOL])).tools == talk(tools=[json.dumps(TOOL)]).tools == (TOOL,)
    assert talk(tools=[]).tools == talk(tools="").tools == ()
    assert talk(chat_template_kwargs={"enable_thinking": False}).settings == {"enable_thinking": False}
    assert talk(parallel_tool_calls=False) == talk()
    old = with_answer(content=None, function_call={"name": "look", "arguments": '{"at": "it"}'})
    short = with_answer(content=None, tool_calls=[{"name": "look", "arguments": {"at": "it"}}])
    json_arguments = {**CALL, "function": {"name": "look", "arguments": '{"at": "it"}'}}
    assert old.fields["tool_calls"] == short.fields["tool_calls"] == [CALL]
    assert with_answer(content=..., tool_calls=[json_arguments]).fields["tool_calls"] == [CALL]
    assert talk(messages=[*TALK, {"role": "function", "name": "look", "content": "seen"}]).messages[2].role == "tool"


def test_what_is_learned_of_a_conversation() -> None:
    for name, value in (("weight", 0), ("weight", 0.0), ("train", False), ("training", False)):
        message = with_answer(**{name: value})
        assert not message.learned
        assert dict(message.fields) == ANSWER
    assert with_answer(weight=1).learned
    assert with_answer(content=[{"type": "text", "text": "a", "image": None}]).texts == ("a",)
    assert with_answer(content=..., thinking="hm").reasoning == "hm"


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"text": 3}, "text is a number"),
        ({"text": ["a"]}, "text is a list"),
        ({"prompt": "a"}, "prompt has no completion beside it"),
        ({"completion": "a"}, "completion has no prompt beside it"),
        ({"prompt": "a", "completion": 3}, "completion is a number, and prompt is a text"),
        ({"prompt": "a", "completion": [ANSWER]}, "completion is a list, and prompt is a text"),
        ({"prompt": [USER], "completion": "a"}, "completion is a text, and prompt is a list"),
        ({"text": "a", "messages": TALK}, "text stands beside messages"),
        ({"messages": TALK, "conversations": TALK}, "messages stands beside conversations"),
        ({"prompt": "a", "completion": "b", "messages": TALK}, "prompt stands beside completion and messages"),
        ({"text": "a", "tools": [TOOL]}, "tools stands beside texts"),
        ({"prompt": "a", "completion": "b", "tools": "[{}]"}, "tools stands beside texts"),
        ({"prompt": "a", "completion": "b", "system": "c"}, "system stands beside texts"),
        ({"text": "a", "chat_template_kwargs": {"x": 1}}, "chat_template_kwargs stands beside texts"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen is not honoured"),
        ({"prompt": "a", "completion": "b", "label": False}, "label is not honoured"),
        (
            {"prompt": "a", "completions": ["b"], "labels": [True]},
            "labels? is not honoured|completions is not honoured",
        ),
        ({"instruction": "a", "input": "", "output": "b"}, "instruction is not honoured"),
        ({"question": "a", "answer": "b"}, "question is not honoured"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "input_ids is not honoured"),
        ({"segments": [{"label": True, "text": "a"}]}, "segments is not honoured"),
        ({"messages": TALK, "images": ["a.png"]}, "images is not honoured"),
        ({"messages": TALK, "documents": [{"title": "a"}]}, "documents is not honoured"),
        ({"messages": TALK, "chat_template": "x"}, "chat_template is not honoured"),
        ({"messages": TALK, "weight": 0}, "weight is not honoured"),
        ({"messages": TALK, "tools": 3}, "tools is a number"),
        ({"messages": TALK, "tools": "look"}, "tools is no JSON"),
        ({"messages": TALK, "tools": [3]}, r"tools\.0 is a number"),
        ({"messages": TALK, "tools": [TOOL], "functions": [TOOL]}, "functions stands beside tools"),
        ({"messages": TALK, "chat_template_kwargs": 3}, "chat_template_kwargs is a number"),
        ({"messages": TALK, "chat_template_kwargs": {"tokenize": True}}, r"chat_template_kwargs\.tokenize is no"),
        ({"messages": TALK, "parallel_tool_calls": "no"}, "parallel_tool_calls is neither"),
        ({"messages": [{"role": "system", "content": "a"}, *TALK], "system": "b"}, "system stands beside a system"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "hello"}, "messages is a text"),
        ({"messages": ["hello"]}, r"messages\.0 is a text"),
        ({"messages": [{"content": "x"}]}, r"messages\.0\.role is missing"),
        ({"messages": [{"role": 3, "content": "x"}]}, r"messages\.0\.role is a number"),
        ({"messages": [USER, {**ANSWER, "role": "Assistant"}, USER, ANSWER]}, r"messages\.1\.role is \"Assistant\""),
        ({"messages": [USER, {**ANSWER, "role": "assistant "}]}, r"messages\.1\.role is \"assistant \""),
        ({"messages": [USER, {**ANSWER, "role": "ai"}]}, r"messages\.1\.role is \"ai\""),
        ({"prompt": [USER], "completion": [{**ANSWER, "role": "ASSISTANT"}]}, r"completion\.0\.role is \"ASSISTANT\""),
        ({"messages": [{"from": "narrator", "value": "x"}]}, r"messages\.0\.from is \"narrator\""),
        ({"messages": [{"role": "user"}]}, r"messages\.0\.content is missing or null"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, r"messages\.1\.content is missing or null"),
        ({"messages": [USER, {**ANSWER, "content": 3}]}, r"messages\.1\.content is a number"),
        ({"messages": [USER, {**ANSWER, "content": {"text": "a"}}]}, r"messages\.1\.content is an object"),
        ({"messages": [USER, {**ANSWER, "content": ["a"]}]}, r"messages\.1\.content\.0 is a text"),
        (
            {"messages": [{**USER, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            r"messages\.0\.content\.0\.type is \"image_url\"",
        ),
        ({"messages": [{**USER, "content": [{"type": "text", "text": 3}]}]}, r"content\.0\.text is a number"),
        ({"messages": [{**USER, "content": [{"type": "text", "text": "a", "image": "x"}]}]}, r"content\.0\.image"),
        ({"messages": [{**USER, "weight": 1}, ANSWER]}, r"messages\.0\.weight asks to learn a message of role user"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, r"messages\.1\.weight is 0\.5"),
        ({"messages": [USER, {**ANSWER, "weight": True}]}, r"messages\.1\.weight is true"),
        ({"messages": [USER, {**ANSWER, "train": "no"}]}, r'messages\.1\.train is "no"'),
        ({"messages": [USER, {**ANSWER, "train_detail": [1]}]}, r"messages\.1\.train_detail is not honoured"),
        ({"messages": [USER, {**ANSWER, "refusal": "I will not"}]}, r"messages\.1\.refusal is not honoured"),
        ({"messages": [USER, {**ANSWER, "audio": {"id": "x"}}]}, r"messages\.1\.audio is not honoured"),
        ({"messages": [{**USER, "images": ["x"]}, ANSWER]}, r"messages\.0\.images is not honoured"),
        ({"messages": [{**USER, "name": 3}, ANSWER]}, r"messages\.0\.name is a number"),
        ({"messages": [{**USER, "thinking": "hm"}, ANSWER]}, r"messages\.0\.thinking is of a message of role user"),
        ({"messages": [USER, {**ANSWER, "thinking": "a", "reasoning": "b"}]}, r"messages\.1 has different texts"),
        ({"messages": [{**USER, "tool_calls": [CALL]}]}, r"messages\.0\.tool_calls is of a message of role user"),
        ({"messages": [USER, {**ANSWER, "tool_calls": "look"}]}, r"messages\.1\.tool_calls is a text"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"type": "custom"}]}]}, r"tool_calls\.0\.type is \"custom\""),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{"function": {}}]}]},
            r"tool_calls\.0\.function\.name is missing",
        ),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "look", "arguments": "at it"}]}]},
            r"tool_calls\.0\.function\.arguments is no JSON",
        ),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "look", "arguments": "[1]"}]}]},
            r"tool_calls\.0\.function\.arguments is a list",
        ),
        ({"messages": [USER, {**ANSWER, "tool_calls": [CALL], "function_call": CALL}]}, "function_call stands beside"),
        ({"prompt": [{"role": "user"}], "completion": [ANSWER]}, r"prompt\.0\.content is missing"),
        ({"prompt": [USER], "completion": [{"role": "assistant"}]}, r"completion\.0\.content is missing"),
    ],
)
def test_a_field_that_is_not_honoured_is_refused_by_line_and_name(row: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidDataset, match=rf"rows: line 2: [a-z_.0-9]*({named})") as caught:
        check_jsonl(stream({"text": "fine"}, row), "rows")
    assert caught.value.hint
    assert caught.value.field == "rows"
    assert caught.value.value is not None


def test_columns_that_no_format_knows_are_told() -> None:
    (record,) = numbered_records(stream({"text": "a", "id": 3, "label": 1, "source": "b", "url": None}), "rows")
    assert record.ignored == ("id", "label", "source")
    (record,) = numbered_records(stream({"messages": TALK, "prompt": "asks", "prompt_id": "c"}), "rows")
    assert record.ignored == ("prompt", "prompt_id")
    (record,) = numbered_records(stream({"text": "a", "instruction": "b", "input": "", "output": "c"}), "rows")
    assert record.ignored == ("input", "instruction", "output")


def test_rows_without_text_do_not_count() -> None:
    blank = [
        {"text": ""},
        {"text": " \n\t"},
        {"prompt": "", "completion": " "},
        {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": []}]},
    ]
    assert check_jsonl(stream(*blank, {"text": "a"}), "rows") == 1
    with pytest.raises(InvalidDataset, match="rows holds no text: its 4 rows are empty"):
        check_jsonl(stream(*blank), "rows")
