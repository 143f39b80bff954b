"""Rows of an evaluation's tasks: what a model is asked, and the answer that is known.

    {"question": ..., "choices": [...], "answer": 0}   multiple choice; the answer by index, or as one of the choices
    {"prompt": ..., "answer": ...}                     an exact match of the text that follows

Texts whose perplexity is measured and conversations are rows of a dataset (`app.domain.inputs.rows`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.domain.inputs.messages import RowProblem, json_name, shown

MOST_CHOICES = 64


@dataclass(frozen=True)
class ChoiceRow:
    """A question, answers to choose from, and the index of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int

    is_blank = False


@dataclass(frozen=True)
class AnswerRow:
    """A prompt, and the text that should follow."""

    prompt: str
    answer: str

    is_blank = False


AskedRow = ChoiceRow | AnswerRow


def is_asked(row: Mapping[str, Any]) -> bool:
    """True if a row has an answer that is known, rather than text to read."""
    return row.get("choices") is not None or (row.get("answer") is not None and row.get("prompt") is not None)


def parse_asked(row: Mapping[str, Any]) -> tuple[AskedRow, tuple[str, ...]]:
    """The contents of a row of a task, and the names of the columns that were not read.

    Raises:
        RowProblem: a field is not as documented.
    """
    return parse_choices(row) if row.get("choices") is not None else parse_answer(row)


def parse_choices(row: Mapping[str, Any]) -> tuple[ChoiceRow, tuple[str, ...]]:
    """A row of multiple choice, and the names of the columns that were not read. Raises as `parse_asked`."""
    question, choices = _text(row, "question"), row.get("choices")
    if not isinstance(choices, list) or not 2 <= len(choices) <= MOST_CHOICES:
        raise RowProblem("choices", f"is {_name(choices)}", f"give a list of 2 to {MOST_CHOICES} texts")
    for index, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice.strip():
            raise RowProblem(f"choices.{index}", f"is {_name(choice)}", "give a text that is not empty")
    return ChoiceRow(question, tuple(choices), _index(row.get("answer"), choices)), _rest(
        row, "question", "choices", "answer"
    )


def parse_answer(row: Mapping[str, Any]) -> tuple[AnswerRow, tuple[str, ...]]:
    """A row of exact match, and the names of the columns that were not read. Raises as `parse_asked`."""
    prompt, answer = _text(row, "prompt"), _text(row, "answer")
    for name, text in (("prompt", prompt), ("answer", answer)):
        if not text.strip():
            raise RowProblem(name, "is empty", "give a text, or drop the row")
    return AnswerRow(prompt, answer), _rest(row, "prompt", "answer")


def _index(answer: object, choices: list[str]) -> int:
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    problem = "is missing" if answer is None else f"is {shown(answer)}"
    raise RowProblem("answer", problem, f"give an index from 0 to {len(choices) - 1}, or one of the choices")


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise RowProblem(name, f"is {_name(value)}", "give a text")
    return value


def _name(value: object) -> str:
    return "missing" if value is None else f"a list of {len(value)}" if isinstance(value, list) else json_name(value)


def _rest(row: Mapping[str, Any], *read: str) -> tuple[str, ...]:
    return tuple(name for name, value in row.items() if name not in read and value is not None)
