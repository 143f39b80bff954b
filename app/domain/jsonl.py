"""Texts as JSONL: what a line may be. An upload is judged by it when it is completed, a calibration when it reads."""

import json
from collections.abc import Iterator, Mapping
from typing import BinaryIO

from app.domain.errors import InvalidDataset

MAX_LINE_BYTES = 16 << 20
WANTED = 'give a JSON object a line, with "text", with "prompt" and "completion", or with "messages"'


def check_jsonl(stream: BinaryIO, name: str) -> int:
    """The number of records of a JSONL file. Raises as `read_records`."""
    return sum(1 for _ in read_records(stream, name))


def read_records(stream: BinaryIO, name: str) -> Iterator[Mapping[str, object]]:
    """The records of a JSONL file, one after the other; `name` is for messages. Raises as `numbered_records`."""
    return (record for _, record in numbered_records(stream, name))


def numbered_records(stream: BinaryIO, name: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    """The records with the numbers of their lines, from 1.

    A record holds `text`, or `prompt` and `completion`, or `messages`; of several, the first of these counts.

    Raises:
        InvalidDataset: a line, named by its number, is no record, or there is none at all.
    """
    found = False
    for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b""), start=1):
        if len(line) > MAX_LINE_BYTES:
            raise bad_line(name, number, f"longer than {MAX_LINE_BYTES} bytes", line)
        if line.strip():
            found = True
            yield number, parse_record(line, number, name)
    if not found:
        raise InvalidDataset(f"{name} holds no text", field=name, value=name, hint=WANTED)


def parse_record(line: bytes, number: int, name: str) -> Mapping[str, object]:
    """The object on a line.

    Raises:
        InvalidDataset: it is not one that holds text.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise bad_line(name, number, f"not JSON ({error})", line) from error
    if not isinstance(row, Mapping):
        raise bad_line(name, number, "not a JSON object", line)
    if isinstance(row.get("text"), str):
        return row
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return row
    messages = row.get("messages")
    if isinstance(messages, list) and messages and all(_is_message(message) for message in messages):
        return row
    raise bad_line(name, number, f"an object without text; its fields are {sorted(map(str, row))[:8]}", line)


def bad_line(name: str, number: int, problem: str, line: bytes) -> InvalidDataset:
    """The error for a line that is no record."""
    shown = line[:200].decode("utf-8", "replace").rstrip()
    return InvalidDataset(f"{name}: line {number} is {problem}", field=name, value=shown, hint=WANTED)


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and "content" in value
