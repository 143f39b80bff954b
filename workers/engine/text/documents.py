"""Documents of a text, builtin (`workers.engine.text.builtin`) or of a JSONL file; each text split in two by hash.

The split is by the text itself: a document's sha256 puts it into the calibration half or the evaluation half, always
the same one, so that no evaluation ever reads what calibrated.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from app.domain.inputs.jsonl import Record, numbered_records
from app.domain.inputs.rows import Conversation, PlainText, Row, TextPair
from bitwright.errors import InvalidDataset

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


@dataclass
class LeftOut:
    """Rows of a text that a job does not read as this text, by the reason: where too little is left, it is told.

    halved     those of the other half, which another part of the job reads
    repeated   those that another dataset of the job has, too
    """

    halved: int = 0
    repeated: int = 0

    def half(self, documents: Iterable[Document], half: Half) -> Iterator[Document]:
        """The documents of a half."""
        for document in documents:
            if half_of(document) is half:
                yield document
            else:
                self.halved += 1

    def known(self, documents: Iterable[Document], keys: Collection[bytes]) -> Iterator[Document]:
        """The documents whose hashes are none of `keys`."""
        for document in documents:
            if hash_of(document) in keys:
                self.repeated += 1
            else:
                yield document

    def words(self) -> str:
        """A text of what is left out, for after a number of tokens."""
        reasons = []
        if self.repeated:
            reasons.append(f"{self.repeated} rows that other datasets of the job hold, too")
        if self.halved:
            reasons.append(f"{self.halved} rows that fall to the job's other part, which reads the same text")
        return f" without {' and '.join(reasons)}" if reasons else ""


def _said(document: Conversation) -> object:
    messages = [message.fields for message in document.messages]
    if not document.tools and not document.settings:
        return messages
    return {"messages": messages, "tools": document.tools, "settings": document.settings}


@dataclass
class Notes:
    """Counts kept while rows are read: rows without text, and columns that nobody reads.

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


def read_rows(file: Path, name: str, notes: Notes | None = None) -> Iterator[Record[Row]]:
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
    """The text of a row, its prompt and completion as one, or its conversation."""
    match row:
        case PlainText(text):
            return text
        case TextPair(prompt, completion):
            return prompt + completion
        case Conversation():
            return row
