"""Calls of tools in texts that models write, in the forms of several templates."""

import pytest

from workers.disk.task_rows import Call
from workers.engine.tasks.turns import calls_in, is_valid, same_calls, tries_to_call

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["C", "F"]}},
            "required": ["city"],
        },
    },
}
CALL = Call(name="weather", arguments={"city": "Graz"})


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Graz"}}\n</tool_call>',
        '{"name": "weather", "parameters": {"city": "Graz"}}',
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Graz"}}]',
        'I look it up. {"type": "function", "function": {"name": "weather", "arguments": "{\\"city\\": \\"Graz\\"}"}}',
    ],
)
def test_a_call_is_found_in_whatever_stands_around_it(text: str) -> None:
    assert calls_in(text) == [CALL]
    assert tries_to_call(text)


@pytest.mark.parametrize("text", ['{"name": "weather", "arguments": {"city": "Gr', "sunny, {mostly}", "[1, 2]", ""])
def test_what_is_no_call_is_none(text: str) -> None:
    assert calls_in(text) == []


@pytest.mark.parametrize(
    ("call", "valid"),
    [
        (CALL, True),
        (Call(name="weather", arguments={"city": "Graz", "days": 3, "unit": "C"}), True),
        (Call(name="weather", arguments={}), False),
        (Call(name="weather", arguments={"city": 8}), False),
        (Call(name="weather", arguments={"city": "Graz", "days": True}), False),
        (Call(name="weather", arguments={"city": "Graz", "unit": "K"}), False),
        (Call(name="weather", arguments={"city": "Graz", "hours": 3}), False),
        (Call(name="wether", arguments={"city": "Graz"}), False),
    ],
)
def test_a_call_is_held_to_the_tools_schema(call: Call, valid: bool) -> None:
    assert is_valid(call, [WEATHER]) is valid


def test_calls_are_the_same_in_any_order() -> None:
    other = Call(name="time", arguments={})
    assert same_calls([CALL, other], [other, CALL])
    assert not same_calls([CALL], [other])
