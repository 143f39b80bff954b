"""Sources of text: the running Python's own reference text, or a JSONL file; each split in two by hash.

The split is by the text itself: a document's sha256 puts it into the calibration half or the evaluation half, always
the same one, so that no evaluation ever reads what calibrated.
"""

import ast
import hashlib
import json
import pydoc_data.topics
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache
from itertools import tee
from pathlib import Path

from app.domain.inputs.jsonl import Record, numbered_records
from app.domain.inputs.rows import Conversation, PlainText, Row, TextPair
from bitwright.errors import InvalidDataset

SHORTEST_DOCSTRING = 100
"""Characters; shorter ones say little."""
SKIPPED_FOLDERS = frozenset({"test", "tests", "site-packages", "dist-packages", "__pycache__", "idlelib", "pydoc_data"})

Document = str | Conversation
"""Plain text, or what a chat template makes one of."""


class Half(StrEnum):
    CALIBRATION = "calibration"
    EVALUATION = "evaluation"


def half_of(document: Document) -> Half:
    """The half that a document belongs to, by its content alone."""
    return Half.CALIBRATION if hash_of(document)[0] % 2 == 0 else Half.EVALUATION


def hash_of(document: Document) -> bytes:
    """sha256 of the content; of a conversation's messages alone where nothing else decides its text."""
    content = document if isinstance(document, str) else json.dumps(_said(document), sort_keys=True)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()


def _said(document: Conversation) -> object:
    messages = [message.fields for message in document.messages]
    if not document.tools and not document.settings:
        return messages
    return {"messages": messages, "tools": document.tools, "settings": document.settings}


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


@dataclass
class Notes:
    """What was left while rows were read: how many held no text, and how many had columns that nobody reads.

    left_out   rows of which the chat template leaves out reasoning, or words beside a call, of an earlier turn
    """

    rows: int = 0
    empty: int = 0
    ignored: Counter[str] = field(default_factory=Counter)
    left_out: int = 0

    def add(self, left_out: bool, unread: Iterable[str]) -> None:
        """Counts what a chat template did not write of a row."""
        self.left_out += left_out
        self.ignored.update(unread)

    def warnings(self, name: str) -> Iterator[tuple[str, str]]:
        """Codes and texts of warnings; `name` is the request's name for the dataset."""
        if self.empty:
            yield "empty_rows", f"{name}: {self.empty} of {self.rows} rows hold no text; they are left out"
        if self.ignored:
            counts = ", ".join(f"{column} ({count} rows)" for column, count in sorted(self.ignored.items()))
            yield "ignored_columns", f"{name}: columns that are not read: {counts}"
        if self.left_out:
            yield (
                "template_leaves_out",
                f"{name}: the chat template leaves out what was thought in earlier turns of {self.left_out} rows",
            )


def read_jsonl(file: Path, name: str, notes: Notes | None = None) -> Iterator[Document]:
    """The documents of a JSONL file (`app.domain.inputs.jsonl`); `name` is the request's name for it, for messages.

    Raises:
        InvalidDataset: the file is missing or empty, or a line is no record.
    """
    return (document_of(record.row) for record in read_rows(file, name, notes))


def read_rows(file: Path, name: str, notes: Notes | None = None) -> Iterator[Record]:
    """The records of a JSONL file that hold text; the others are counted in `notes`. Raises as `read_jsonl`."""
    if not file.is_file():
        hint = "name a JSONL file that is there"
        raise InvalidDataset(f"{name}: there is no file {file.name}", field=name, value=file.name, hint=hint)
    notes = Notes() if notes is None else notes
    with file.open("rb") as stream:
        for record in numbered_records(stream, name):
            notes.rows += 1
            notes.empty += record.row.is_blank
            notes.ignored.update(record.ignored)
            if record.row.is_blank:
                continue
            if isinstance(record.row, Conversation):
                yield replace(record, row=replace(record.row, place=f"{name}: line {record.number}"))
            else:
                yield record


def document_of(row: Row) -> Document:
    """What a row holds: its text, prompt and completion as one, or its conversation."""
    match row:
        case PlainText(text):
            return text
        case TextPair(prompt, completion):
            return prompt + completion
        case Conversation():
            return row
