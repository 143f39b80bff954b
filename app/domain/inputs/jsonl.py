"""Texts as JSONL: what a line may be. An upload is judged by it when it is completed, a calibration when it reads."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Generic, Protocol, TypeVar

from app.domain.inputs.messages import RowProblem
from app.domain.inputs.mistaken_files import mistaken
from app.domain.inputs.rows import Row, parse_row
from app.domain.inputs.side_files import MOST_LEVELS, is_deep
from app.domain.inputs.task_rows import AskedRow, is_asked, parse_asked
from bitwright.errors import InvalidDataset

MAX_LINE_BYTES = 16 << 20
MAX_ROWS, MAX_TEXT_BYTES = 1_000_000, 1_000_000_000
"""Of a file."""
LESS = "give fewer rows: calibration and evaluation read a few thousand sequences, or split the file into several jobs"
SPREAD = {
    b"[": "write each row of the array on a line of its own: jq -c '.[]' rows.json > rows.jsonl",
    b"{": "write each object on a line of its own: jq -c . rows.json > rows.jsonl",
}
"""First lines of JSON that is spread over several, with the way out."""
COLUMNS = frozenset({"text", "prompt", "completion", "question", "answer", "instruction", "input", "output"})
"""Names in the first line of a table by which it is told; each is a row's field, or one that others name so."""
WANTED = 'give a JSON object a line, with "text", with "prompt" and "completion", or with "messages"'


class HasText(Protocol):
    """A row of any kind, as far as a reader of files knows it."""

    @property
    def is_blank(self) -> bool: ...


RowT = TypeVar("RowT", bound=HasText)
Parse = Callable[[Mapping[str, Any]], tuple[RowT, tuple[str, ...]]]
"""The contents of a row, and the names of the columns that were not read."""


@dataclass(frozen=True)
class Record(Generic[RowT]):
    """A line of a file: its number from 1, what it holds, and the columns that were not read."""

    number: int
    row: RowT
    ignored: tuple[str, ...] = ()


def check_jsonl(stream: BinaryIO, name: str) -> int:
    """The number of records of a JSONL file that hold text or ask for an answer. Raises as `numbered_records`."""
    return sum(not record.row.is_blank for record in parsed_records(stream, name, _parse_any))


def _parse_any(row: Mapping[str, Any]) -> tuple[Row | AskedRow, tuple[str, ...]]:
    return parse_asked(row) if is_asked(row) else parse_row(row)


def numbered_records(stream: BinaryIO, name: str) -> Iterator[Record[Row]]:
    """The records of a JSONL file of texts, one after the other, those without text too. Raises as `parsed_records`."""
    return parsed_records(stream, name, parse_row)


def parsed_records(stream: BinaryIO, name: str, parse: Parse[RowT]) -> Iterator[Record[RowT]]:
    """The records of a JSONL file, one after the other, those without text too; `name` is for messages.

    Raises:
        InvalidDataset: a line, named by its number, is no record, or none of them holds text.
    """
    blank = records = size = 0
    for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b""), start=1):
        size += len(line)
        if number > MAX_ROWS:
            raise InvalidDataset(f"{name} has more than {MAX_ROWS} rows", field=name, value=number, hint=LESS)
        if size > MAX_TEXT_BYTES:
            raise InvalidDataset(f"{name} has more than {MAX_TEXT_BYTES} bytes", field=name, value=size, hint=LESS)
        if len(line) > MAX_LINE_BYTES:
            raise bad_line(name, number, f"longer than {MAX_LINE_BYTES} bytes", line)
        if line.strip():
            record = parse_record(line, number, name, parse)
            blank, records = blank + record.row.is_blank, records + 1
            yield record
    if blank == records:
        detail = f"{name} holds no text" + (f": its {records} rows are empty" if records else "")
        raise InvalidDataset(detail, field=name, value=name, hint=WANTED)


def parse_record(line: bytes, number: int, name: str, parse: Parse[RowT]) -> Record[RowT]:
    """The record on a line.

    Raises:
        InvalidDataset: it is none, or one of its fields has a meaning that is not honoured.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        if number == 1 and (kind := mistaken(line)):
            raise InvalidDataset(f"{name} is {kind.what}", field=name, value=_shown(line), hint=kind.hint) from error
        if number == 1 and line.strip() in SPREAD:
            detail = f"{name} is JSON over several lines, not a JSON object a line"
            raise InvalidDataset(detail, field=name, value=_shown(line), hint=SPREAD[line.strip()]) from error
        if number == 1 and (separator := _table_separator(line)):
            detail = f"{name} is a table of columns (CSV), not a JSON object a line"
            raise InvalidDataset(detail, field=name, value=_shown(line), hint=_as_jsonl(separator)) from error
        raise bad_line(name, number, f"not JSON ({error})", line) from error
    if isinstance(row, list):
        detail = f"{name}: line {number} is not a JSON object but an array"
        raise InvalidDataset(detail, field=name, value=_shown(line), hint=SPREAD[b"["])
    if not isinstance(row, Mapping):
        raise bad_line(name, number, "not a JSON object", line)
    if is_deep(row):
        raise bad_line(name, number, f"nested more than {MOST_LEVELS} levels deep", line)
    try:
        parsed, ignored = parse(row)
    except RowProblem as problem:
        raise bad_field(name, number, problem, row) from problem
    return Record(number, parsed, ignored)


def _table_separator(header: bytes) -> str | None:
    """The separator of a table with this first line; None where the line names no column of ours."""
    names = header.decode("utf-8-sig", errors="replace").strip()
    for separator in (",", "\t", ";"):
        if COLUMNS & {each.strip().strip('"').lower() for each in names.split(separator)}:
            return separator
    return None


def _as_jsonl(separator: str) -> str:
    sep = "" if separator == "," else f", sep={separator!r}"
    return f"""write its rows as JSONL: datasets.Dataset.from_csv("rows.csv"{sep}).to_json("rows.jsonl")"""


def bad_line(name: str, number: int, problem: str, line: bytes) -> InvalidDataset:
    """The error for a line that is no record."""
    return InvalidDataset(f"{name}: line {number} is {problem}", field=name, value=_shown(line), hint=WANTED)


def _shown(line: bytes) -> str:
    return line[:200].decode("utf-8", "replace").rstrip()


def bad_field(name: str, number: int, problem: RowProblem, row: Mapping[str, Any]) -> InvalidDataset:
    """The error for a field of a row, by the number of its line and its path."""
    place = f"{name}: line {number}" + (f": {problem.path}" if problem.path else "")
    value: Any = row
    for step in problem.path.split(".") if problem.path else ():
        if isinstance(value, list):
            value = value[int(step)] if step.isdigit() and int(step) < len(value) else None
        else:
            value = value.get(step) if isinstance(value, Mapping) else None
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)[:200]
    return InvalidDataset(f"{place} {problem.problem}", field=name, value=shown, hint=problem.hint)
