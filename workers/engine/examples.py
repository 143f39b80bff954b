"""What an adapter learns from: rows of text as tokens, each of which is learned or only read.

    {"text": ...}                       learned whole
    {"prompt": ..., "completion": ...}  the completion is learned, with the end-of-sequence token
    {"messages": [...]}                 the assistant's turns are learned, through the model's chat template

A row begins with the beginning-of-sequence token where the tokenizer writes one. Prompt and completion are tokenized
as one text; a token belongs to where its last character is. Rows are split by the hash of what they hold: some judge
and are never learned.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from app.domain.errors import InvalidDataset
from app.domain.finetuning import Finetune
from workers.engine.calibration import conversation, readable, start_tokens
from workers.engine.documents import Half, builtin_documents, document_of, half_of, hash_of, read_rows

NAME = "finetune.dataset"
ROWS_AT_ONCE = 256
"""Given to the tokenizer together."""

Span = tuple[int, int]
"""First character, and the one after the last."""


@dataclass(frozen=True)
class Example:
    """A row, or a piece of one: `ids` int32 (tokens,), and which of them are learned, bool (tokens,)."""

    ids: Tensor
    learned: Tensor


@dataclass
class Examples:
    """All rows of a dataset.

    cut       rows whose completion was longer than a sequence and lost its end
    dropped   rows with nothing to learn in a sequence: the prompt alone is longer
    """

    training: list[Example] = field(default_factory=list)
    validation: list[Example] = field(default_factory=list)
    cut: int = 0
    dropped: int = 0

    @property
    def sha256(self) -> str:
        """Of all tokens in order, and of which are learned."""
        digest = hashlib.sha256()
        for part in (self.training, self.validation):
            digest.update(f"{len(part)}:".encode())
            for example in part:
                digest.update(f"{len(example.ids)}:".encode())
                digest.update(example.ids.numpy().tobytes() + example.learned.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Row:
    """A row as text: what of it is learned, whether it ends with the end-of-sequence token, and where it belongs."""

    text: str
    spans: tuple[Span, ...]
    ends: bool
    whole: bool
    validates: float


def read_examples(
    tokenizer: PreTrainedTokenizerBase, part: Finetune, path: Path | None, half: Half | None = None
) -> Examples:
    """The rows of a JSONL file, or builtin text where there is none; of one half only where another text reads it, too.

    Raises:
        InvalidDataset: the file is not as documented, names its line; or nothing is left to learn.
    """
    found = Examples()
    rows = iter(_rows(tokenizer, part, path, half))
    start, limit = start_tokens(tokenizer), part.sequence_length
    while batch := list(islice(rows, ROWS_AT_ONCE)):
        for row, example in zip(batch, _tokenized(tokenizer, batch, start), strict=True):
            pieces = list(_pieces(example, limit, whole=row.whole))
            found.cut += int(not row.whole and len(example.ids) > limit)
            found.dropped += int(not pieces)
            judges = row.validates < part.validation_share
            (found.validation if judges else found.training).extend(pieces)
    _demand_training(found, part)
    return found


def _demand_training(found: Examples, part: Finetune) -> None:
    if found.training:
        return
    if found.validation:
        detail = f"{NAME}: all of its {len(found.validation)} sequences fall into the validation share"
        raise InvalidDataset(detail, field=NAME, hint="give more rows, or set finetune.validation_share to 0")
    detail = (
        f"{NAME} has nothing to learn: {found.dropped} rows have no completion within {part.sequence_length} tokens"
    )
    raise InvalidDataset(detail, field=NAME, hint="set finetune.sequence_length higher, or shorten the prompts")


def _rows(tokenizer: PreTrainedTokenizerBase, part: Finetune, path: Path | None, half: Half | None) -> Iterator[_Row]:
    records: Iterable[tuple[int, Mapping[str, object]]]
    if path is None:
        records = enumerate(({"text": text} for text in builtin_documents()), start=1)
        half = Half.CALIBRATION
    else:
        records = read_rows(path, NAME)
    for number, record in records:
        document = document_of(record)
        if half is None or half_of(document) is half:
            yield _row(tokenizer, record, part, f"{NAME}: line {number}", _share(hash_of(document)))


def _share(digest: bytes) -> float:
    """A number from 0 to 1 that says where a row stands between training and validation.

    Not of the first byte, which says to which half it belongs.
    """
    return int.from_bytes(digest[1:9], "big") / 2**64


def _row(
    tokenizer: PreTrainedTokenizerBase, record: Mapping[str, Any], part: Finetune, place: str, validates: float
) -> _Row:
    if isinstance(record.get("text"), str):
        text = readable(record["text"])
        return _Row(text, ((0, len(text)),), ends=True, whole=True, validates=validates)
    if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        prompt, completion = readable(record["prompt"]), readable(record["completion"])
        if not completion:
            raise InvalidDataset(f"{place}: completion is empty", field=NAME, hint="drop the row")
        text, ends = prompt + completion, True
        spans: tuple[Span, ...] = ((len(prompt), len(text)),)
    else:
        text, spans = _turns(tokenizer, record["messages"], place, asks=part.loss_on == "completion")
        ends = False
    if part.loss_on == "all":
        spans = ((0, len(text)),)
    return _Row(text, spans, ends=ends, whole=part.loss_on == "all", validates=validates)


def _turns(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], place: str, *, asks: bool
) -> tuple[str, tuple[Span, ...]]:
    """A conversation as text, and where the assistant speaks in it, if that is asked for.

    A turn begins where the template, given the messages before it, asks for an answer, and ends with what the template
    writes after it: often the token that ends a turn.
    """
    text = readable(conversation(tokenizer, messages, place))
    spans: list[Span] = []
    for index, message in enumerate(messages if asks else ()):
        if message["role"] != "assistant":
            continue
        before = readable(conversation(tokenizer, messages[:index], place, asks_for_answer=True)) if index else ""
        through = readable(conversation(tokenizer, messages[: index + 1], place))
        if not (text.startswith(through) and through.startswith(before)):
            detail = f"{place}: the chat template writes messages.{index} in another way where messages follow"
            hint = 'give a row for each turn that is learned, as its last message, or set finetune.loss_on to "all"'
            raise InvalidDataset(detail, field=NAME, hint=hint)
        spans.append((len(before), len(through)))
    if asks and not spans:
        detail = f"{place}: messages has no message whose role is assistant"
        raise InvalidDataset(detail, field=NAME, hint='add one, or set finetune.loss_on to "all"')
    return text, tuple(spans)


def _tokenized(tokenizer: PreTrainedTokenizerBase, rows: list[_Row], start: list[int]) -> Iterator[Example]:
    partly = [row.spans != ((0, len(row.text)),) for row in rows]
    if any(partly) and not tokenizer.is_fast:
        detail = f"{NAME}: the model's tokenizer does not say where its tokens lie in a text"
        raise InvalidDataset(detail, field=NAME, hint='set finetune.loss_on to "all", or add tokenizer.json')
    found = tokenizer(
        [row.text for row in rows],
        add_special_tokens=False,
        verbose=False,
        return_offsets_mapping=any(partly),
    )
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for index, row in enumerate(rows):
        ids = found["input_ids"][index]
        if partly[index]:
            learned = [_is_within(last, row.spans) for _, last in found["offset_mapping"][index]]
        else:
            learned = [True] * len(ids)
        ends = end if row.ends else []
        yield Example(
            ids=torch.tensor(start + ids + ends, dtype=torch.int32),
            learned=torch.tensor([False] * len(start) + learned + [True] * len(ends), dtype=torch.bool),
        )


def _is_within(last: int, spans: tuple[Span, ...]) -> bool:
    """Whether the character before `last` lies in a span."""
    return any(first < last <= stop for first, stop in spans)


def _pieces(example: Example, limit: int, *, whole: bool) -> Iterator[Example]:
    """The example in sequences of `limit` tokens at the most that have something to learn.

    What is learned whole is cut into pieces that share one token, so that each but the first is learned once. Of what
    is learned in part only the beginning is kept: a piece without its prompt would teach something else.
    """
    last = len(example.ids) - 1 if whole else 1
    for first in range(0, max(last, 1), limit - 1):
        piece = Example(example.ids[first : first + limit], example.learned[first : first + limit])
        if bool(piece.learned[1:].any()):
            yield piece
