"""Rows of tasks as tokens: read by a limited child, and asked by the attempt. One JSON file holds those of a job."""

from typing import Any

from pydantic import Field

from bitwright.events import Message


class Continuation(Message):
    """Tokens whose likelihood is asked for, and those before them."""

    context: tuple[int, ...] = Field(min_length=1)
    tokens: tuple[int, ...] = Field(min_length=1)


class Call(Message):
    """A call of a tool."""

    name: str
    arguments: dict[str, Any]


class AskedRow(Message):
    """A row of a task; which fields it has depends on the task's kind.

    line       in its file, from 1
    choices    continuations to choose from, with their characters and bytes, and `right`, the index of the right one
    text       tokens of a text, with its words and bytes
    prompt     tokens before a greedy text, and the `answer` that it should be
    tools      that a conversation offers, and the `calls` of its last turn; None: that is not known
    """

    line: int
    choices: tuple[Continuation, ...] = ()
    characters: tuple[int, ...] = ()
    bytes: tuple[int, ...] = ()
    right: int = 0
    text: tuple[int, ...] = ()
    words: int = 0
    prompt: tuple[int, ...] = ()
    answer: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    calls: tuple[Call, ...] | None = None


class AskedTask(Message):
    """The rows of a task.

    first   token before a text that has none before it
    ends    tokens that end a greedy text; `stops`, texts that do
    """

    rows: tuple[AskedRow, ...] = Field(min_length=1)
    source: str
    first: int | None = None
    ends: tuple[int, ...] = ()
    stops: tuple[str, ...] = ()


class AskedTasks(Message):
    """The tasks of a job, in the order of its request."""

    tasks: tuple[AskedTask, ...] = ()
