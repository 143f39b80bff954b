"""Where texts come from: the running Python's own reference text, or a JSONL file; each split in two by hash.

The split is by the text itself: a document's sha256 puts it into the calibration half or the evaluation half, always
the same one, so that no evaluation ever reads what calibrated.
"""

import ast
import hashlib
import json
import pydoc_data.topics
import sysconfig
from collections.abc import Iterator, Mapping
from copy import copy
from enum import StrEnum
from functools import cache
from itertools import tee
from pathlib import Path
from typing import Any

from app.domain.errors import InvalidDataset
from app.domain.jsonl import numbered_records

SHORTEST_DOCSTRING = 100
"""Characters; shorter ones say little."""
SKIPPED_FOLDERS = frozenset({"test", "tests", "site-packages", "dist-packages", "__pycache__", "idlelib", "pydoc_data"})

Document = str | list[dict[str, Any]]
"""Plain text, or the messages of a conversation."""


class Half(StrEnum):
    CALIBRATION = "calibration"
    EVALUATION = "evaluation"


def half_of(document: Document) -> Half:
    """The half that a document belongs to, by its content alone."""
    return Half.CALIBRATION if hash_of(document)[0] % 2 == 0 else Half.EVALUATION


def hash_of(document: Document) -> bytes:
    """sha256 of the content."""
    content = document if isinstance(document, str) else json.dumps(document, sort_keys=True)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()


def builtin_documents() -> Iterator[str]:
    """The language reference of `pydoc_data.topics`, then the standard library's docstrings; each text once.

    All of it takes seconds to find, so that a process looks no farther than somebody has read, and once.
    """
    return copy(_builtin())


@cache
def _builtin() -> Iterator[str]:
    """Never advanced itself; its copies share what they have found."""
    return tee(_once(_reference_texts()), 1)[0]


def _once(texts: Iterator[str]) -> Iterator[str]:
    seen = set()
    for text in texts:
        if text not in seen:
            seen.add(text)
            yield text


def _reference_texts() -> Iterator[str]:
    topics = pydoc_data.topics.topics
    yield from (topics[name] for name in sorted(topics))
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        if not SKIPPED_FOLDERS & set(file.relative_to(root).parts):
            yield from _docstrings(file)


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= SHORTEST_DOCSTRING:
                yield text
            pending.extend(reversed(node.body))


def read_jsonl(file: Path, name: str) -> Iterator[Document]:
    """The documents of a JSONL file (`app.domain.jsonl`); `name` is the request's name for it, for messages.

    Raises:
        InvalidDataset: the file is missing or empty, or a line is no record.
    """
    return (document_of(record) for _, record in read_rows(file, name))


def read_rows(file: Path, name: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    """The records of a JSONL file with the numbers of their lines. Raises as `read_jsonl`."""
    if not file.is_file():
        hint = "name a JSONL file that is there"
        raise InvalidDataset(f"{name}: there is no file {file.name}", field=name, value=file.name, hint=hint)
    with file.open("rb") as stream:
        yield from numbered_records(stream, name)


def document_of(record: Mapping[str, object]) -> Document:
    """What a record holds: its text, prompt and completion as one, or its messages."""
    messages = record.get("messages")
    if isinstance(record.get("text"), str):
        return str(record["text"])
    if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        return str(record["prompt"]) + str(record["completion"])
    assert isinstance(messages, list)  # noqa: S101 (else it would be no record)
    return messages
