"""Conversations as text: what the checkpoint's chat template makes of messages, and whether it writes all of them.

The text is that of `apply_chat_template` for the row's messages, tools and variables. Where templates differ in what
they take, the messages are put as theirs takes them: content as a text or as parts, arguments of calls as an object or
as JSON. The same conversation with marked words in place of its own then tells what the template writes. What it never
writes is an error, never a row without it. The answer holds for all rows of the same shape.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from app.domain.inputs.messages import REASONING, Message, json_name
from app.domain.inputs.rows import Conversation
from bitwright.errors import InvalidDataset

Fields = dict[str, Any]
PROBE = "zqprobe"
"""A word that no template writes by itself, and that survives trimming, quoting and JSON."""


@dataclass(frozen=True)
class Form:
    """Form of messages: arguments of tool calls as an object or as JSON, absent content as nothing or as a text."""

    json_arguments: bool = False
    empty_content: bool = False


KNOWN = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", *REASONING})
FORMS = (Form(), Form(empty_content=True), Form(json_arguments=True), Form(json_arguments=True, empty_content=True))


@dataclass(frozen=True)
class Shape:
    """Properties of all conversations of one shape.

    answers    for each message, whether it is an assistant's whose answer, call or reasoning is in the text
    left_out   whether the template leaves out something of an earlier turn that it writes in a last one
    unread     fields of messages that it does not read
    """

    form: Form
    answers: tuple[bool, ...]
    left_out: bool
    unread: tuple[str, ...]


@dataclass(frozen=True)
class Written:
    """A conversation as text, and as the template was given it."""

    text: str
    messages: list[Fields]
    shape: Shape


class ChatTemplate:
    """The chat template of a tokenizer, for the rows of one dataset; `name` is the request's name for that."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.tokenizer, self.name = tokenizer, name
        self._shapes: dict[str, Shape] = {}
        self._parts: dict[str, tuple[bool, bool]] = {}

    def write(self, talk: Conversation) -> Written:
        """The text of a conversation.

        Raises:
            InvalidDataset: there is no template, it refuses the messages, or it does not write all of them.
        """
        if not self.tokenizer.chat_template:
            raise self.error(
                talk,
                "a row has messages, but the model's tokenizer has no chat template",
                'give rows with "text", or an instruction-tuned model',
            )
        key = json.dumps(_outline(talk), sort_keys=True)
        if key not in self._shapes:
            self._shapes[key] = self._shape(talk)
        shape = self._shapes[key]
        messages = self.put(talk, shape.form)
        text = self.render(talk, messages)
        if any(thought not in text for message in talk.messages for thought in _inner_thoughts(message)):
            shape = replace(shape, left_out=True)
        return Written(text, messages, shape)

    def put(self, talk: Conversation, form: Form) -> list[Fields]:
        """The messages of a conversation as the template takes them, in texts that tokenizers take."""
        takes = self._takes(talk)
        return [readable(_put(message, form, takes)) for message in talk.messages]

    def render(
        self, talk: Conversation, messages: Sequence[Fields], *, asks: bool = False, template: str | None = None
    ) -> str:
        """Messages through the template, which transformers renders in a sandbox; `asks` for an assistant's turn.

        Raises:
            InvalidDataset: it refuses them.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tools=readable(list(talk.tools)) or None,
                chat_template=template,
                add_generation_prompt=asks,
                tokenize=False,
                **readable(dict(talk.settings)),
            )
        except MemoryError:
            raise
        except Exception as error:  # a template is the checkpoint's own program and may raise anything
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise self.error(
                talk,
                f"the chat template refuses a conversation: {error}",
                f"change the row as the template wants it, or drop it; its roles are {roles}"[:400],
                value=roles,
            ) from error
        return str(text)

    def source(self, talk: Conversation) -> str:
        """The template's own text: some checkpoints have one for tools besides."""
        return str(self.tokenizer.get_chat_template(None, list(talk.tools) or None))

    def error(self, talk: Conversation, problem: str, hint: str, value: object = None) -> InvalidDataset:
        """The error for a row, by its line."""
        return InvalidDataset(f"{talk.place or self.name}: {problem}", field=self.name, value=value, hint=hint)

    def _takes(self, talk: Conversation) -> tuple[bool, bool]:
        """True if the template takes contents as texts, and as parts."""
        source = self.source(talk)
        if source not in self._parts:
            text, parts = (self._probed(each, source) for each in (PROBE, [{"type": "text", "text": PROBE}]))
            takes_parts = parts is not None and (parts == text if text is not None else parts.count(PROBE) == 2)
            takes_texts = text is not None and text.count(PROBE) == 2
            if not takes_texts and parts is not None:  # a template for images may take every text for a list of parts
                takes_parts = parts.count(PROBE) == 2
            self._parts[source] = takes_texts or not takes_parts, takes_parts
        return self._parts[source]

    def _probed(self, content: object, source: str) -> str | None:
        messages = [{"role": role, "content": content} for role in ("user", "assistant")]
        try:
            return self.render(Conversation(()), messages, template=source)
        except InvalidDataset:
            return None

    def _shape(self, talk: Conversation) -> Shape:
        """The shape of a conversation, by which it is put, and by what the template writes of it.

        Raises:
            InvalidDataset: there is no way in which it writes all that it should.
        """
        self._demand_variables(talk)
        has_calls = any("tool_calls" in message.fields for message in talk.messages)
        refused: list[InvalidDataset] = []
        unwritten: list[InvalidDataset] = []
        for form in FORMS if has_calls else FORMS[:1]:
            errors = refused
            try:
                self.render(talk, self.put(talk, form))
                errors = unwritten
                return self._proven(talk, form)
            except InvalidDataset as error:
                errors.append(error)
        raise [*unwritten, *refused][0]  # what a template leaves out says more than what it wants to be given

    def _demand_variables(self, talk: Conversation) -> None:
        for name in talk.settings:
            if name not in self.source(talk):
                detail = f"chat_template_kwargs.{name} is read by nothing in the model's chat template"
                raise self.error(talk, detail, "drop it", value=name)

    def _proven(self, talk: Conversation, form: Form) -> Shape:
        marked = _marked(talk)
        messages = self.put(marked, form)
        text = self.render(marked, messages)
        for index in range(len(talk.tools)):
            if _word(index, "tool") not in text:
                detail = f"tools.{index} is not written by the model's chat template"
                hint = (
                    'give it as {"type": "function", "function": {"name": ...}}, or drop tools if the model knows none'
                )
                raise self.error(talk, detail, hint)
        answers, left_out = [], False
        for index, message in enumerate(marked.messages):
            wanted = set(_words(message))
            missing = [word for word in wanted if word not in text]
            if missing:
                if message.role != "assistant" or not self._is_last_only(marked, messages, index, missing):
                    raise self._unwritten(talk, index, missing[0])
                left_out = True
            for call in message.fields.get("tool_calls", ()):
                self._demand_call(talk, index, call, text, form)
            answers.append(message.role == "assistant" and len(missing) < len(wanted))
        return Shape(form, tuple(answers), left_out, tuple(self._unread(talk, text)))

    def _unread(self, talk: Conversation, text: str) -> Iterator[str]:
        """Fields of messages that change nothing: names of speakers, and what nobody here knows."""
        unknown = {name for message in talk.messages for name in message.fields.keys() - KNOWN}
        source = self.source(talk)
        yield from (f"messages.*.{name}" for name in sorted(unknown) if name not in source)
        named = [index for index, message in enumerate(talk.messages) if _is_speaker(message)]
        if any(_word(index, "name") not in text for index in named):
            yield "messages.*.name"

    def _is_last_only(self, talk: Conversation, messages: list[Fields], index: int, words: list[str]) -> bool:
        """True if the template writes words of a message where that is the last: then it leaves them out on purpose."""
        if any("call" in word for word in words):
            return False
        try:
            text = self.render(talk, messages[: index + 1])
        except InvalidDataset:
            return False
        return all(word in text for word in words)

    def _unwritten(self, talk: Conversation, index: int, word: str) -> InvalidDataset:
        message = talk.messages[index]
        if "call" in word:
            field, hint = "tool_calls", "write the calls into content as the model writes them, or drop the row"
        elif "thought" in word:
            field = next(name for name in REASONING if message.fields.get(name))
            hint = "drop it, or write it into content as the model does"
        elif message.role == "assistant":
            field, hint = "content", "drop it, or say it in a message of its own; the template writes calls alone"
        else:
            field, hint = "content", "drop the message, or say it in one of role user or system"
        detail = f"{message.path}.{field} (role {message.role}) is not written by the model's chat template"
        if field == "tool_calls" and not "".join(message.texts).strip():
            detail += ", and the message has no content"
        return self.error(talk, detail, hint, value=message.role)

    def _demand_call(self, talk: Conversation, index: int, call: Mapping[str, Any], text: str, form: Form) -> None:
        """Refuses arguments that a template writes as Python's repr, or as JSON within JSON."""
        for key, value in call["function"]["arguments"].items():
            plain = f'"{key}": "{value}"' in text if form.json_arguments else f"'{key}': '" not in text
            if not plain or str(value) not in text:
                place = f"{talk.messages[index].path}.tool_calls"
                detail = f"{place}: the model's chat template does not write arguments as they are"
                hint = "write the calls into content as the model writes them, or drop the row"
                raise self.error(talk, detail, hint)


def readable(value: Any) -> Any:
    """A text that tokenizers take: JSON may hold half of a surrogate pair, which becomes U+FFFD, as in any reader.

    Of lists and objects all their texts, and copies.
    """
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, Mapping):
        return {readable(key): readable(each) for key, each in value.items()}
    return [readable(each) for each in value] if isinstance(value, list | tuple) else value


def _put(message: Message, form: Form, takes: tuple[bool, bool]) -> Fields:
    fields, content = dict(message.fields), message.fields.get("content")
    takes_texts, takes_parts = takes
    if content is None and form.empty_content:
        content = ""
    if isinstance(content, list) and (not takes_parts or (message.role == "tool" and takes_texts)):
        content = "\n".join(message.texts)
    elif isinstance(content, str) and not takes_texts and takes_parts:
        content = [{"type": "text", "text": content}]
    if content is not None:
        fields["content"] = content
    if form.json_arguments and "tool_calls" in fields:
        fields["tool_calls"] = [_with_json(call) for call in fields["tool_calls"]]
    return fields


def _with_json(call: Mapping[str, Any]) -> Fields:
    function = dict(call["function"])
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _is_speaker(message: Message) -> bool:
    """True if a message has a name that says who speaks; that of a tool's answer says what a call said before."""
    return message.role != "tool" and "name" in message.fields


def _outline(talk: Conversation) -> list[object]:
    """The properties of a conversation by which a template treats it: all but its words."""
    messages = []
    for message in talk.messages:
        fields: Fields = {name: json_name(value) for name, value in message.fields.items()}
        fields |= {name: bool(message.fields[name].strip()) for name in REASONING if name in message.fields}
        fields |= {"role": message.role, "texts": [bool(text.strip()) for text in message.texts]}
        fields["tool_calls"] = [bool(call["function"]["arguments"]) for call in message.fields.get("tool_calls", ())]
        messages.append(fields)
    return [messages, [json_name(tool.get("function")) for tool in talk.tools], talk.settings]


def _inner_thoughts(message: Message) -> Iterator[str]:
    """An assistant's thoughts within its content, which some templates cut off."""
    for text in message.texts if message.role == "assistant" else ():
        before, tag, _ = text.partition("</think>")
        yield readable(before.rpartition("<think>")[2].strip()) if tag else ""


def _word(index: int, kind: str, number: int = 0) -> str:
    return f"zq{index}{kind}{number}qz"


def _words(message: Message) -> Iterator[str]:
    """The marked words of a message."""
    yield from (text for text in message.texts if text.strip())
    if message.reasoning.strip():
        yield message.reasoning
    yield from (call["function"]["name"] for call in message.fields.get("tool_calls", ()))


def _marked(talk: Conversation) -> Conversation:
    """The conversation with words that tell where they come from."""
    messages = tuple(_marked_message(message, index) for index, message in enumerate(talk.messages))
    tools = []
    for index, tool in enumerate(talk.tools):
        function = tool.get("function")
        name = {"name": _word(index, "tool")}
        tools.append({**tool, "function": {**function, **name}} if isinstance(function, Mapping) else {**tool, **name})
    return Conversation(messages, tuple(tools), talk.settings, talk.place)


def _marked_message(message: Message, index: int) -> Message:
    fields = dict(message.fields)
    content = fields.get("content")
    if isinstance(content, str):
        fields["content"] = _word(index, "said") if content.strip() else content
    elif content is not None:
        fields["content"] = [
            {**part, "text": _word(index, "said", number) if part["text"].strip() else part["text"]}
            for number, part in enumerate(content)
        ]
    for name in REASONING:
        if fields.get(name, "").strip():
            fields[name] = _word(index, "thought")
    if _is_speaker(message):
        fields["name"] = _word(index, "name")
    if "tool_calls" in fields:
        fields["tool_calls"] = [_marked_call(call, index, number) for number, call in enumerate(fields["tool_calls"])]
    return Message(message.role, fields, message.learned)


def _marked_call(call: Mapping[str, Any], index: int, number: int) -> Fields:
    key, value = (_word(index, kind, number) for kind in ("key", "value"))
    arguments = {key: value} if call["function"]["arguments"] else {}
    return {**call, "function": {**call["function"], "name": _word(index, "call", number), "arguments": arguments}}
