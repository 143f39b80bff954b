"""Rows of tasks as tokens, as lm-eval makes them (EleutherAI's lm-evaluation-harness, 0.4).

Multiple choice: a continuation is a space and the choice. Question and continuation are tokenized as one text, of which
the question's own number of tokens is cut off; spaces at the question's end go to the continuation. A text without one
before it follows the beginning-of-sequence token, or the end-of-sequence token where there is none. Special tokens are
written where the tokenizer writes them by itself, unless the text begins with them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from app.domain.inputs.jsonl import Parse, Record, RowT, parsed_records
from app.domain.inputs.messages import Message
from app.domain.inputs.rows import Conversation, Row, parse_row
from app.domain.inputs.task_rows import AnswerRow, ChoiceRow, parse_answer, parse_choices
from app.domain.request.evaluation_tasks import EvaluationTask, TaskKind
from bitwright.errors import InvalidDataset
from workers.disk.task_rows import AskedRow, AskedTask, Call, Continuation
from workers.engine.text.conversations import PROBE, ChatTemplate, readable
from workers.engine.text.documents import document_of
from workers.engine.text.sequences import source_label, without_start

MOST_TOKENS = 20_000_000
"""Of a task."""


def read_task(tokenizer: PreTrainedTokenizerBase, task: EvaluationTask, file: Path, number: int) -> AskedTask:
    """The rows of a task.

    number   of the task in its request, for messages

    Raises:
        InvalidDataset: a row is not as documented, or the model cannot be asked it; names its line.
    """
    reader = _Reader(tokenizer, task, f"evaluation.tasks.{number}")
    rows = tuple(islice(reader.rows(file), task.limit))
    tokens = sum(_tokens(row) for row in rows)
    if tokens > MOST_TOKENS:
        hint = f"set {reader.name}.limit lower"
        raise InvalidDataset(f"{reader.name} has {tokens} tokens", field=reader.name, value=tokens, hint=hint)
    ends, stops = reader.ends()
    return AskedTask(rows=rows, source=source_label(task.dataset), first=reader.first, ends=ends, stops=stops)


def _tokens(row: AskedRow) -> int:
    return len(row.text) + len(row.prompt) + sum(len(each.context) + len(each.tokens) for each in row.choices)


class _Reader:
    """Makes requests of a task's rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, task: EvaluationTask, name: str) -> None:
        self.tokenizer, self.task, self.name = tokenizer, task, name
        self.template = ChatTemplate(tokenizer, f"{name}.dataset")
        ids = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        self.first: int | None = next((each for each in ids if each is not None), None)
        self._turn_end: str | None = None

    def rows(self, file: Path) -> Iterator[AskedRow]:
        """All rows of a file, one after the other."""
        match self.task.kind:
            case TaskKind.MULTIPLE_CHOICE:
                yield from map(self._choices, self._records(file, parse_choices))
            case TaskKind.EXACT_MATCH:
                yield from map(self._answer, self._records(file, parse_answer))
            case TaskKind.PERPLEXITY:
                yield from map(self._text, self._records(file, parse_row))
            case TaskKind.CHAT:
                yield from map(self._turn, self._records(file, parse_row))

    def ends(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Tokens and texts that end a greedy text."""
        own = () if self.tokenizer.eos_token_id is None else (int(self.tokenizer.eos_token_id),)
        if self.task.kind is TaskKind.EXACT_MATCH:
            return own, self.task.stop
        if not self._turn_end:
            return own, ()
        token = next(iter(self._plain(self._turn_end)), None)
        if token in self.tokenizer.all_special_ids:
            return tuple(dict.fromkeys((*own, int(token or 0)))), ()
        return own, (self._turn_end,)

    def _records(self, file: Path, parse: Parse[RowT]) -> Iterator[Record[RowT]]:
        with file.open("rb") as stream:
            for record in parsed_records(stream, f"{self.name}.dataset", parse):
                if not record.row.is_blank:
                    yield record

    def _choices(self, record: Record[ChoiceRow]) -> AskedRow:
        row, question = record.row, readable(record.row.question)
        choices = tuple(readable(choice) for choice in row.choices)
        return AskedRow(
            line=record.number,
            choices=tuple(self._continuation(question, f" {choice}", record.number) for choice in choices),
            characters=tuple(map(len, choices)),
            bytes=tuple(len(choice.encode()) for choice in choices),
            right=row.answer,
        )

    def _continuation(self, context: str, text: str, line: int) -> Continuation:
        spaces = len(context) - len(context.rstrip())
        if not context.strip():
            tokens = self._plain(text)
            before = [self._demand_first(line)]
            if tokens[:1] == before:
                before, tokens = tokens[:1], tokens[1:]
        else:
            text = context[len(context) - spaces :] + text
            context = context[: len(context) - spaces]
            before = self._encoded(context)
            tokens = self._encoded(context + text)[len(before) :]
        if not before or not tokens:
            raise self._error(line, "the tokenizer leaves nothing of the question, or of a choice", text)
        return Continuation(context=tuple(before), tokens=tuple(tokens))

    def _answer(self, record: Record[AnswerRow]) -> AskedRow:
        prompt, answer = readable(record.row.prompt), readable(record.row.answer)
        return AskedRow(line=record.number, prompt=tuple(self._encoded(prompt)), answer=answer.strip())

    def _text(self, record: Record[Row]) -> AskedRow:
        self._demand_first(record.number)
        document = document_of(record.row)
        if isinstance(document, Conversation):
            written = self.template.write(self._placed(document, record.number)).text
            tokens, text = self._plain(without_start(self.tokenizer, written)), written
        else:
            text = readable(document)
            tokens = self._encoded(text)
        if not tokens:
            raise self._error(record.number, "the tokenizer leaves nothing of the text", text[:40])
        return AskedRow(
            line=record.number, text=tuple(tokens), words=len(re.split(r"\s+", text)), bytes=(len(text.encode()),)
        )

    def _turn(self, record: Record[Row]) -> AskedRow:
        row = record.row
        if not isinstance(row, Conversation):
            raise self._error(record.number, "a row of a chat has no messages", "")
        talk = self._placed(row, record.number)
        known = talk.messages[-1] if talk.messages[-1].role == "assistant" else None
        asked = talk if known is None else replace(talk, messages=talk.messages[:-1])
        if not asked.messages:
            raise self._error(record.number, "messages ask for nothing: there is an answer alone", "")
        form = self.template.write(asked).shape.form
        text = self.template.render(asked, self.template.put(asked, form), asks=True)
        if self._turn_end is None:
            self._turn_end = self._after_turn(asked, text)
        calls = None if known is None else tuple(_calls(known))
        return AskedRow(
            line=record.number, prompt=tuple(self._plain(text)), tools=tuple(map(dict, talk.tools)), calls=calls
        )

    def _after_turn(self, asked: Conversation, text: str) -> str:
        """Text that the template writes after an assistant's words; "" where it does not go on as it asks."""
        said = Message("assistant", {"role": "assistant", "content": PROBE})
        answered = replace(asked, messages=(*asked.messages, said))
        form = self.template.write(answered).shape.form
        whole = self.template.render(answered, self.template.put(answered, form))
        return whole.rpartition(PROBE)[2] if text.strip() in whole else ""

    def _placed(self, talk: Conversation, line: int) -> Conversation:
        return replace(talk, place=f"{self.name}.dataset: line {line}")

    def _encoded(self, text: str) -> list[int]:
        """Tokens of a text with those that the tokenizer writes by itself."""
        begins = "" if self.first is None else self.tokenizer.decode([self.first])
        specials = not (begins and text.startswith(begins))
        ids: list[int] = self.tokenizer(text, add_special_tokens=specials, verbose=False)["input_ids"]
        return ids

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _demand_first(self, line: int) -> int:
        if self.first is None:
            raise self._error(line, "a text has nothing before it, and the tokenizer has no token that begins one", "")
        return self.first

    def _error(self, line: int, problem: str, value: str) -> InvalidDataset:
        place = f"{self.name}.dataset: line {line}"
        return InvalidDataset(f"{place}: {problem}", field=f"{self.name}.dataset", value=value, hint="drop the row")


def _calls(message: Message) -> Iterator[Call]:
    for call in message.fields.get("tool_calls", ()):
        function: Mapping[str, Any] = call["function"]
        yield Call(name=function["name"], arguments=dict(function["arguments"]))


def check_rows(task: AskedTask, number: int, most: Sequence[int | None], room: int) -> None:
    """Refuses rows that are longer than the model's positions, and tokens that it does not know.

    most   positions (None: any) and tokens of the model
    room   tokens of a greedy text

    Raises:
        InvalidDataset: names the row's line.
    """
    positions, known = most
    name = f"evaluation.tasks.{number}"
    for row in task.rows:
        asked = [(*each.context, *each.tokens[:-1]) for each in row.choices]
        length = max([*map(len, asked), len(row.prompt) + room if row.prompt else 0])
        place = f"{name}.dataset: line {row.line}"
        if positions is not None and length > positions:
            raise InvalidDataset(
                f"{place}: it takes {length} tokens, and the model has {positions} positions",
                field=f"{name}.dataset",
                value=length,
                hint="shorten the row or drop it" + (f", or set {name}.max_new_tokens lower" if row.prompt else ""),
            )
        highest = max((token for ids in (*asked, row.text, row.prompt) for token in ids), default=0)
        if known is not None and highest >= known:
            raise InvalidDataset(
                f"{place}: the tokenizer makes the token id {highest}; the model knows {known}",
                field="model",
                value=highest,
                hint="give the tokenizer that belongs to the model",
            )
