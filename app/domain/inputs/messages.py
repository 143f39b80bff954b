"""Messages of a conversation and the tools beside them: fields that OpenAI, trl, axolotl and ShareGPT document.

role, content     a text, or parts of type "text"; content may be missing where there are tool calls or reasoning
weight, train     0 or false: an assistant's turn that is read and not learned
tool_calls        with arguments as an object or as JSON; `function_call` is the older name for one of them
reasoning_content as `thinking` and `reasoning`: names of one field

Fields that nobody here knows are left to the chat template, which may read them.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

ROLES: Mapping[str, str] = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
"""Other names of the roles that templates know."""
SHAREGPT_ROLES = frozenset({*ROLES, "user", "assistant", "system", "developer", "tool"})
REASONING = ("reasoning_content", "thinking", "reasoning")
LEARNING = ("weight", "train", "training")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_DETAIL = ("train_detail", "training_detail")


class RowProblem(ValueError):
    """A problem with a field of a row: its path (empty for the row itself), what it is, and the way out."""

    def __init__(self, path: str, problem: str, hint: str) -> None:
        super().__init__(f"{path} {problem}")
        self.path, self.problem, self.hint = path, problem, hint


@dataclass(frozen=True)
class Message:
    """A message as a template reads it (`fields`), whether its turn is learned, and where it stands in its row."""

    role: str
    fields: Mapping[str, Any]
    learned: bool = False
    path: str = field(default="", compare=False)

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts of its content."""
        content = self.fields.get("content", ())
        return (content,) if isinstance(content, str) else tuple(part["text"] for part in content)

    @property
    def reasoning(self) -> str:
        return next((self.fields[name] for name in REASONING if self.fields.get(name)), "")

    @property
    def is_blank(self) -> bool:
        return not ("".join(self.texts) + self.reasoning).strip() and "tool_calls" not in self.fields


def parse_messages(value: object, path: str, *, learned: bool = True) -> tuple[Message, ...]:
    """The messages of a list; where `learned` is false, none of them is learned.

    Raises:
        RowProblem: one is not as documented.
    """
    if not isinstance(value, list) or not value:
        problem = "is empty" if value == [] else f"is {json_name(value)}"
        raise RowProblem(path, problem, "give a list of messages, each with role and content")
    return tuple(_message(each, f"{path}.{index}", learned) for index, each in enumerate(value))


def parse_tools(given: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The tools of a row: objects, or JSON; those of the older `functions` in the newer form.

    Raises:
        RowProblem: they are not as documented.
    """
    tools, functions = (_objects(given.get(name), name) for name in ("tools", "functions"))
    if tools and functions:
        raise RowProblem("functions", "stands beside tools", "keep tools")
    return (*tools, *({"type": "function", "function": each} for each in functions))


def json_name(value: object) -> str:
    """Name of a value's type in JSON."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return "a number"
    return "a text" if isinstance(value, str) else "a list" if isinstance(value, list) else "an object"


def _message(value: object, path: str, learned: bool) -> Message:
    if not isinstance(value, Mapping):
        raise RowProblem(path, f"is {json_name(value)}", "give an object with role and content")
    fields = {str(name): each for name, each in value.items() if each is not None}
    role = _role(fields, path)
    _demand_honoured(fields, path, role)
    weighs = _weighs(fields, path, role)
    if "content" in fields:
        fields["content"] = _content(fields["content"], f"{path}.content")
    calls = tuple(_calls(fields, path))
    if calls and role != "assistant":
        raise RowProblem(f"{path}.tool_calls", f"is of a message of role {role}", "only an assistant calls tools")
    fields = {name: each for name, each in fields.items() if name not in ("tool_calls", "function_call", *LEARNING)}
    if calls:
        fields["tool_calls"] = list(calls)
    message = Message(role, {**fields, "role": role}, learned and weighs and role == "assistant", path)
    if "content" not in fields and not calls and not message.reasoning:
        hint = 'give its text; an assistant that says nothing has "tool_calls" instead'
        raise RowProblem(f"{path}.content", "is missing or null", hint)
    return message


def _role(fields: dict[str, Any], path: str) -> str:
    """The role, after ShareGPT's `from` and `value` have become `role` and `content`."""
    if "role" not in fields and "from" in fields:
        fields["role"] = fields.pop("from")
        if fields["role"] not in SHAREGPT_ROLES:
            hint = "give human, gpt, system or tool; a tool call is a message of role assistant with tool_calls"
            raise RowProblem(f"{path}.from", f"is {shown(fields['role'])}", hint)
        if "value" in fields and "content" not in fields:
            fields["content"] = fields.pop("value")
    role = fields.get("role")
    if not isinstance(role, str) or not role:
        problem = "is missing" if role is None else f"is {json_name(role)}"
        raise RowProblem(f"{path}.role", problem, "give system, user, assistant or tool")
    plain = role.strip().lower()
    if role not in SHAREGPT_ROLES and plain in {*SHAREGPT_ROLES, "ai"}:
        # Templates compare roles letter by letter: a turn of "Assistant" would be written, and never learned.
        known = {**ROLES, "ai": "assistant"}.get(plain, plain)
        raise RowProblem(f"{path}.role", f"is {shown(role)}", f"write {known}")
    return ROLES.get(role, role)


def _demand_honoured(fields: Mapping[str, Any], path: str, role: str) -> None:
    """Refuses the fields that have a meaning that nobody here gives them."""
    hints = {
        **dict.fromkeys(_MEDIA, "only text is read; drop the row"),
        **dict.fromkeys(_DETAIL, "parts of a turn cannot be left out; split it, with weight 0 for one of them"),
        "refusal": "give the words of the refusal as content",
    }
    for name, hint in hints.items():
        if fields.get(name) not in (None, [], {}, ""):
            raise RowProblem(f"{path}.{name}", "is not honoured", hint)
    for name in ("name", "tool_call_id", *REASONING):
        if name in fields and not isinstance(fields[name], str):
            raise RowProblem(f"{path}.{name}", f"is {json_name(fields[name])}", "give a text")
    reasoning = {name: fields[name] for name in REASONING if fields.get(name)}
    if reasoning and role != "assistant":
        raise RowProblem(
            f"{path}.{next(iter(reasoning))}", f"is of a message of role {role}", "only an assistant has it"
        )
    if len(set(reasoning.values())) > 1:
        raise RowProblem(path, f"has different texts as {' and '.join(reasoning)}", "keep one of them")


def _weighs(fields: Mapping[str, Any], path: str, role: str) -> bool:
    """True if the message counts when its turn is learned."""
    flags = []
    for name in LEARNING:
        if name not in fields:
            continue
        value, place = fields[name], f"{path}.{name}"
        if name == "weight" and (isinstance(value, bool) or value not in (0, 1)):
            raise RowProblem(place, f"is {shown(value)}", "give 0 (read) or 1 (learned)")
        if name != "weight" and not isinstance(value, bool):
            raise RowProblem(place, f"is {shown(value)}", "give true (learned) or false (read)")
        if value and role != "assistant":
            raise RowProblem(place, f"asks to learn a message of role {role}", "only an assistant's turns are learned")
        flags.append(bool(value))
    return all(flags)


def _content(value: object, path: str) -> str | list[dict[str, str]]:
    """A text, or parts of text; an empty list is an empty text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RowProblem(path, f"is {json_name(value)}", "give a text, or a list of parts of type text")
    return [_part(part, f"{path}.{index}") for index, part in enumerate(value)] or ""


def _part(value: object, path: str) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise RowProblem(path, f"is {json_name(value)}", 'give {"type": "text", "text": ...}')
    given = {name: each for name, each in value.items() if each is not None}
    if given.get("type") != "text":
        raise RowProblem(f"{path}.type", f"is {shown(given.get('type'))}", "only parts of type text are read")
    if not isinstance(given.get("text"), str):
        raise RowProblem(f"{path}.text", f"is {json_name(given.get('text'))}", "give a text")
    for name in sorted(given.keys() - {"type", "text"}):
        raise RowProblem(f"{path}.{name}", "is not honoured", "drop it")
    return {"type": "text", "text": given["text"]}


def _calls(fields: Mapping[str, Any], path: str) -> Iterator[dict[str, Any]]:
    """Tool calls in one form: `type`, `function` with `name` and `arguments` as an object, and what else there is."""
    value = fields.get("tool_calls") or []
    if "function_call" in fields:
        if value:
            raise RowProblem(f"{path}.function_call", "stands beside tool_calls", "keep tool_calls")
        yield _call({"function": fields["function_call"]}, f"{path}.function_call")
        return
    if not isinstance(value, list):
        raise RowProblem(f"{path}.tool_calls", f"is {json_name(value)}", "give a list of calls")
    for index, each in enumerate(value):
        yield _call(each, f"{path}.tool_calls.{index}")


def _call(value: object, path: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise RowProblem(path, f"is {json_name(value)}", 'give {"type": "function", "function": {...}}')
    given = {name: each for name, each in value.items() if each is not None}
    if given.get("type", "function") != "function":
        raise RowProblem(f"{path}.type", f"is {shown(given['type'])}", "only calls of functions are read")
    called = given.pop("function", None)
    if called is None:  # the short form, without the level between
        called = {name: given.pop(name) for name in ("name", "arguments") if name in given}
    if not isinstance(called, Mapping) or not isinstance(called.get("name"), str) or not called["name"]:
        raise RowProblem(f"{path}.function.name", "is missing or no text", "name the function that is called")
    arguments = _arguments(called.get("arguments"), f"{path}.function.arguments")
    return {"type": "function", **given, "function": {**called, "arguments": arguments}}


def _arguments(value: object, path: str) -> Mapping[str, Any]:
    arguments = value
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise RowProblem(path, f"is no JSON: {error}", "give an object, or JSON of one") from error
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping):
        raise RowProblem(path, f"is {json_name(arguments)}", "give an object, or JSON of one")
    return arguments


def _objects(value: object, path: str) -> tuple[Mapping[str, Any], ...]:
    """A list of objects, where it or each of them may be JSON."""
    loaded = _loaded(value, path)
    if loaded in (None, [], {}, ""):
        return ()
    if not isinstance(loaded, list):
        raise RowProblem(path, f"is {json_name(loaded)}", "give a list of functions, each with name and parameters")
    objects = [_loaded(each, f"{path}.{index}") for index, each in enumerate(loaded)]
    for index, each in enumerate(objects):
        if not isinstance(each, Mapping):
            raise RowProblem(f"{path}.{index}", f"is {json_name(each)}", "give an object with name and parameters")
    return tuple(objects)  # type: ignore[arg-type]


def _loaded(value: object, path: str) -> object:
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowProblem(path, f"is no JSON: {error}", "give objects, or JSON of them") from error


def shown(value: object) -> str:
    """A value in a message, cut short."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:39] + "…"
