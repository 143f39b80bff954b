"""Turns of a chat that a model has written: whether they end, and whether their calls of tools are well formed.

A call is a JSON object with `name`, and `arguments` or `parameters`, wherever it stands: templates write different
words around it. It is valid if the tool is offered, no required argument is missing, none is unknown where the tool
lists its arguments, and each has the type or one of the values that the tool's schema names. Deeper parts of a schema
are not looked at.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from workers.disk.task_rows import Call

TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
OPENINGS = ("tool_call", '"name"', "TOOL_CALLS", "python_tag")
"""Words that a turn has that begins to call a tool, whether it ends well or not."""


def calls_in(text: str) -> list[Call]:
    """The calls that a text holds, in order."""
    return [call for value in _objects(text) for call in _calls(value)]


def tries_to_call(text: str) -> bool:
    """True if a text has the words of a call."""
    return any(word in text for word in OPENINGS)


def is_valid(call: Call, tools: Sequence[Mapping[str, Any]]) -> bool:
    """True if a call is one of the tools that were offered, with arguments as its schema names them."""
    offered = {str(function.get("name")): function for function in map(_function, tools)}
    function = offered.get(call.name)
    if function is None:
        return False
    schema = function.get("parameters")
    schema = schema if isinstance(schema, Mapping) else {}
    properties, required = schema.get("properties"), schema.get("required")
    if isinstance(required, list) and not set(map(str, required)) <= call.arguments.keys():
        return False
    if not isinstance(properties, Mapping):
        return True
    return all(name in properties and _fits(value, properties[name]) for name, value in call.arguments.items())


def same_calls(one: Sequence[Call], other: Sequence[Call]) -> bool:
    """True if both are the same calls, in any order."""
    keys = [sorted(json.dumps([call.name, call.arguments], sort_keys=True) for call in calls) for calls in (one, other)]
    return keys[0] == keys[1]


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = tool.get("function")
    return inner if isinstance(inner, Mapping) else tool


def _fits(value: object, schema: object) -> bool:
    if not isinstance(schema, Mapping):
        return True
    values, kinds = schema.get("enum"), schema.get("type")
    if isinstance(values, list) and value not in values:
        return False
    names = kinds if isinstance(kinds, list) else [kinds]
    known = [name for name in names if isinstance(name, str) and name in TYPES]
    if not known:
        return True
    if isinstance(value, bool):
        return "boolean" in known
    return any(isinstance(value, TYPES[name]) for name in known)


def _objects(text: str) -> Iterator[object]:
    """Every JSON object or list in a text that stands in no other one."""
    decoder, place = json.JSONDecoder(), 0
    while (start := min((i for i in (text.find("{", place), text.find("[", place)) if i >= 0), default=-1)) >= 0:
        try:
            value, place = decoder.raw_decode(text, start)
            yield value
        except (ValueError, RecursionError):
            place = start + 1


def _calls(value: object) -> Iterator[Call]:
    if isinstance(value, list):
        for each in value:
            yield from _calls(each)
    elif isinstance(value, Mapping):
        called = _function(value)
        arguments = called.get("arguments", called.get("parameters"))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = None
        if isinstance(called.get("name"), str) and isinstance(arguments, dict):
            yield Call(name=called["name"], arguments=arguments)
