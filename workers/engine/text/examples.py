"""Training examples of an adapter: rows of text as tokens, each of which is learned or only read.

    {"text": ...}                       learned whole
    {"prompt": ..., "completion": ...}  the completion is learned, with the end-of-sequence token
    {"messages": [...]}                 the assistant's turns are learned, through the model's chat template

A text begins with the beginning-of-sequence token where the tokenizer writes one and ends with the end-of-sequence
token, each once; a conversation is what its template writes. Prompt and completion are tokenized as one text; a token
belongs to where its last character is. Rows are split by a hash of their contents: some validate and are never learned.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from app.domain.inputs.jsonl import Record
from app.domain.inputs.rows import Conversation, PlainText, Row
from app.domain.request.finetuning import Finetune
from bitwright.errors import InvalidDataset
from workers.engine.text.builtin import builtin_documents
from workers.engine.text.conversations import ChatTemplate, readable
from workers.engine.text.documents import Half, Notes, document_of, half_of, hash_of, read_rows
from workers.engine.text.sequences import has_end, is_separators, only_separators, start_tokens, without_start
from workers.engine.text.turns import Span, Turns

NAME = "finetune.dataset"
ROWS_AT_ONCE = 256
"""Given to the tokenizer together."""


@dataclass(frozen=True)
class Example:
    """A row, or a piece of one: `ids` int32 (tokens,), and which of them are learned, bool (tokens,)."""

    ids: Tensor
    loss_mask: Tensor


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
    notes: Notes = field(default_factory=Notes)

    @property
    def sha256(self) -> str:
        """Of all tokens in order, and of which are learned."""
        digest = hashlib.sha256()
        for examples in (self.training, self.validation):
            digest.update(f"{len(examples)}:".encode())
            for example in examples:
                digest.update(f"{len(example.ids)}:".encode())
                digest.update(example.ids.numpy().tobytes() + example.loss_mask.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Row:
    """A row as text: what of it is learned, whether tokens are put at its two ends, and where it belongs."""

    text: str
    spans: tuple[Span, ...]
    starts: bool
    ends: bool
    whole: bool
    validates: float


def read_examples(
    tokenizer: PreTrainedTokenizerBase, config: Finetune, path: Path | None, half: Half | None = None
) -> Examples:
    """The rows of a JSONL file, or builtin text where there is none; of one half only where another text reads it, too.

    Raises:
        InvalidDataset: the file is not as documented, names its line; or nothing is left to learn.
    """
    examples = Examples()
    rows = iter(_rows(_Reader(tokenizer, config, examples.notes), path, half))
    start, limit = start_tokens(tokenizer), config.sequence_length
    while batch := list(islice(rows, ROWS_AT_ONCE)):
        for row, example in zip(batch, _tokenized(tokenizer, batch, start), strict=True):
            pieces = list(_pieces(example, limit, whole=row.whole))
            examples.cut += int(not row.whole and len(example.ids) > limit)
            examples.dropped += int(not pieces)
            for_validation = row.validates < config.validation_share
            (examples.validation if for_validation else examples.training).extend(pieces)
    _demand_training(examples, config)
    kept = [*examples.training, *examples.validation]
    if all(is_separators(tokenizer, example.ids.tolist()) for example in kept):
        raise only_separators(NAME, sum(len(example.ids) for example in kept))
    return examples


def _demand_training(examples: Examples, config: Finetune) -> None:
    if examples.training:
        return
    if examples.validation:
        detail = f"{NAME}: all of its {len(examples.validation)} sequences fall into the validation share"
        raise InvalidDataset(detail, field=NAME, hint="give more rows, or set finetune.validation_share to 0")
    detail = (
        f"{NAME} has nothing to learn: {examples.dropped} rows have no completion within "
        f"{config.sequence_length} tokens"
    )
    raise InvalidDataset(detail, field=NAME, hint="set finetune.sequence_length higher, or shorten the prompts")


class _Reader:
    """Makes rows of records: the template that writes conversations, and where their turns are."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: Finetune, notes: Notes) -> None:
        self.tokenizer, self.config, self.notes = tokenizer, config, notes
        self.template = ChatTemplate(tokenizer, NAME)
        self.turns = Turns(self.template)

    def row(self, record: Record[Row], validates: float) -> _Row:
        """A record as text.

        Raises:
            InvalidDataset: it cannot be learned.
        """
        whole = self.config.loss_on == "all"
        if isinstance(record.row, Conversation):
            text, spans = self._conversation(record.row, whole)
            return _Row(text, spans, starts=False, ends=False, whole=whole, validates=validates)
        if isinstance(record.row, PlainText):
            prompt, completion, whole = "", readable(record.row.text), True
        else:
            prompt, completion = readable(record.row.prompt), readable(record.row.completion)
            if not completion.removesuffix(self.tokenizer.eos_token or "").strip():
                detail = f"{NAME}: line {record.number}: completion is empty"
                raise InvalidDataset(detail, field=NAME, hint="drop the row")
        text = without_start(self.tokenizer, prompt + completion)
        spans = ((0 if whole else max(0, len(text) - len(completion)), len(text)),)
        return _Row(text, spans, starts=True, ends=not has_end(self.tokenizer, text), whole=whole, validates=validates)

    def _conversation(self, talk: Conversation, whole: bool) -> tuple[str, tuple[Span, ...]]:
        written = self.template.write(talk)
        self.notes.add(written.shape.left_out, written.shape.unread)
        if whole:
            return written.text, self.turns.unweighted(talk, written)
        if not any(message.learned for message in talk.messages):
            assistants = any(message.role == "assistant" for message in talk.messages)
            problem = "that is learned" if assistants else "whose role is assistant"
            hint = "drop the row, or give one of them weight 1" if assistants else "add one, or drop the row"
            raise self.template.error(talk, f"messages has no message {problem}", hint)
        return written.text, self.turns.learned_spans(talk, written)


def _rows(reader: _Reader, path: Path | None, half: Half | None) -> Iterator[_Row]:
    records: Iterable[Record[Row]]
    if path is None:
        records = (Record(number, PlainText(text)) for number, text in enumerate(builtin_documents(), start=1))
        half = Half.CALIBRATION
    else:
        records = read_rows(path, NAME, reader.notes)
    for record in records:
        document = document_of(record.row)
        if half is None or half_of(document) is half:
            yield reader.row(record, _share(hash_of(document)))


def _share(digest: bytes) -> float:
    """A number from 0 to 1 that says where a row stands between training and validation.

    Not of the first byte, which says to which half it belongs.
    """
    return int.from_bytes(digest[1:9], "big") / 2**64


def _tokenized(tokenizer: PreTrainedTokenizerBase, rows: list[_Row], start: list[int]) -> Iterator[Example]:
    partly = [row.spans != ((0, len(row.text)),) for row in rows]
    if any(partly) and not tokenizer.is_fast:
        detail = f"{NAME}: the model's tokenizer does not say where its tokens lie in a text"
        raise InvalidDataset(detail, field=NAME, hint='set finetune.loss_on to "all", or add tokenizer.json')
    encoded = tokenizer(
        [row.text for row in rows],
        add_special_tokens=False,
        verbose=False,
        return_offsets_mapping=any(partly),
    )
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for index, row in enumerate(rows):
        ids = encoded["input_ids"][index]
        if partly[index]:
            loss_mask = [_is_within(last, row.spans) for _, last in encoded["offset_mapping"][index]]
        else:
            loss_mask = [True] * len(ids)
        begins, ends = start if row.starts else [], end if row.ends else []
        yield Example(
            ids=torch.tensor(begins + ids + ends, dtype=torch.int32),
            loss_mask=torch.tensor([False] * len(begins) + loss_mask + [True] * len(ends), dtype=torch.bool),
        )


def _is_within(last: int, spans: tuple[Span, ...]) -> bool:
    """True if the character before `last` lies in a span."""
    return any(first < last <= stop for first, stop in spans)


def _pieces(example: Example, limit: int, *, whole: bool) -> Iterator[Example]:
    """The example in sequences of `limit` tokens at the most that have something to learn.

    What is learned whole is cut into pieces that share one token, so that each but the first is learned once. Of what
    is learned in part only the beginning is kept: a piece without its prompt would teach something else.
    """
    last = len(example.ids) - 1 if whole else 1
    for first in range(0, max(last, 1), limit - 1):
        piece = Example(example.ids[first : first + limit], example.loss_mask[first : first + limit])
        if bool(piece.loss_mask[1:].any()):
            yield piece
