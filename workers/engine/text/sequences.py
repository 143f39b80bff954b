"""Texts as token sequences: text that a method observes (calibration) and text that validates it (evaluation).

Documents are tokenized, joined with the end-of-sequence token, and cut into sequences of one length without padding, so
that no token is dropped or masked. Each sequence starts with the beginning-of-sequence token where the tokenizer writes
one: models such as Gemma are far off without it. Sequences are chosen from those read by a seeded permutation.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from app.domain.inputs.mistaken_files import TOLD_BY, Mistaken, mistaken
from app.domain.request.job_request import Calibration, Evaluation
from app.domain.request.sources import CalibrationSource, DatasetSource, ModelSource
from bitwright.errors import CorruptCheckpoint, InvalidDataset
from bitwright.report import TextReport
from workers.engine.text.builtin import builtin_documents
from workers.engine.text.conversations import ChatTemplate, readable
from workers.engine.text.documents import Document, Half, LeftOut, Notes, hash_of, read_jsonl
from workers.formats.library_config import library_tokenizer

PROBE = "The `with` statement is used to wrap the execution of a block with methods."
"""A short text, of which any tokenizer makes tokens."""
SURPLUS = 2
"""Sequences read for each one chosen: enough to choose from, without tokenizing a whole corpus."""
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "tekken.json", "*.tiktoken")
DOCUMENTS_AT_ONCE = 256
"""At the most, given to the tokenizer together: it works on them in as many threads as there are processors."""


@dataclass(frozen=True)
class Sequences:
    """Token sequences and how to name them: `ids` int64 (sequences, length), on the host."""

    ids: Tensor
    source: str
    overlapping: bool = False
    """True if sequences overlap because the text is short; only builtin text may."""
    notes: Notes = dataclasses.field(default_factory=Notes)
    """Notes on the file's rows that were left out or cut."""
    text_tokens: int | None = None
    """Tokens of the whole text, where sequences overlap."""
    further: Tensor | None = None
    """Sequences of the same length besides, that only end-to-end steps see: of the same text, then written ones."""
    written: int = 0
    """Those of them that the model wrote itself."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()

    @property
    def further_sha256(self) -> str | None:
        return None if self.further is None else hashlib.sha256(self.further.numpy().tobytes()).hexdigest()

    @property
    def tokens(self) -> Tensor:
        """The further ones, too."""
        return self.ids if self.further is None else torch.cat([self.ids, self.further])

    def report(self) -> TextReport:
        count, length = self.ids.shape
        return TextReport(
            source=self.source, sha256=self.sha256, num_samples=count, sequence_length=length, tokens=count * length
        )


def load_tokenizer(folder: Path, needed_for: str = "its text") -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer; code in the folder is never run. `needed_for` says what of the request reads text.

    Raises:
        CorruptCheckpoint: there is none that transformers can read.
    """
    try:
        return library_tokenizer(folder)
    except MemoryError:
        raise
    except Exception as error:  # transformers raises whatever its parsers raise
        if there := _tokenizer_files(folder):
            detail = f"the tokenizer ({', '.join(there)}) cannot be read: {_first_line(error, folder)}"
            hint = "save it as tokenizer.json: AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
            for name, kind in _mistaken(folder, there):
                detail, hint = f"the tokenizer's {name} is {kind.what}", kind.hint
        else:
            detail = f"the model has no tokenizer, and {needed_for} needs one"
            hint = "add tokenizer.json and tokenizer_config.json of the model; or ask for a job that reads no text"
        raise CorruptCheckpoint(detail, field="model", hint=hint) from error


def has_tokenizer(folder: Path) -> bool:
    """True if a folder has files that are a tokenizer's."""
    return bool(_tokenizer_files(folder))


def _tokenizer_files(folder: Path) -> list[str]:
    return sorted({file.name for pattern in TOKENIZER_FILES for file in folder.glob(pattern)})


def _mistaken(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Mistaken]]:
    """Those of a folder's files that are something else than their names say."""
    for name in names:
        with (folder / name).open("rb") as file:
            kind = mistaken(file.read(TOLD_BY))
        if kind is not None:
            yield name, kind


def _first_line(error: Exception, folder: Path) -> str:
    """An error's own words, short, and without the folder of this machine."""
    words = str(error).strip().replace(f"{folder}/", "").replace(str(folder), "the model's folder")
    return (words.splitlines() or [type(error).__name__])[0][:300]


def calibration_sequences(
    tokenizer: PreTrainedTokenizerBase, config: Calibration, path: Path | None, seed: int, evaluation_path: Path | None
) -> Sequences:
    """The sequences that calibrate; of the calibration half where the evaluation reads the same text.

    Raises:
        InvalidDataset: the file is not as documented, or too short.
    """
    shared = path is None or (evaluation_path is not None and path.samefile(evaluation_path))
    notes, left_out = Notes(), LeftOut()
    documents = _documents(path, "calibration.dataset", Half.CALIBRATION if shared else None, notes, left_out)
    overlap = path is None
    return _sequences(
        tokenizer, documents, config, name="calibration", seed=seed, overlap=overlap, notes=notes, left_out=left_out
    )


def evaluation_sequences(
    tokenizer: PreTrainedTokenizerBase, config: Evaluation, path: Path | None, seed: int, *used: Path | None
) -> Sequences:
    """The sequences that validate. Text of the files that are `used` otherwise is left out, wherever else it stands.

    Raises:
        InvalidDataset: the file is not as documented, or too short without the other files' text.
    """
    others = [other for other in used if path is not None and other is not None]
    shared = path is None or any(path.samefile(other) for other in others)
    notes, left_out = Notes(), LeftOut()
    documents = _documents(path, "evaluation.dataset", Half.EVALUATION if shared else None, notes, left_out)
    apart = [other for other in others if path is not None and not path.samefile(other)]
    if apart:
        keys = {hash_of(document) for other in apart for document in read_jsonl(other, "the job's other dataset")}
        documents = left_out.known(documents, keys)
    overlap = path is None
    return _sequences(
        tokenizer, documents, config, name="evaluation", seed=seed, overlap=overlap, notes=notes, left_out=left_out
    )


def _documents(path: Path | None, name: str, half: Half | None, notes: Notes, left_out: LeftOut) -> Iterable[Document]:
    documents: Iterable[Document] = builtin_documents() if path is None else read_jsonl(path, name, notes)
    return documents if half is None else left_out.half(documents, half)


def source_label(source: CalibrationSource | DatasetSource | ModelSource) -> str:
    """A source in shorthand, for the report."""
    for field in ("id", "path"):
        if hasattr(source, field):
            return str(getattr(source, field))
    return source.source


def _sequences(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[Document],
    config: Calibration | Evaluation,
    *,
    name: str,
    seed: int,
    overlap: bool,
    notes: Notes,
    left_out: LeftOut,
) -> Sequences:
    start = start_tokens(tokenizer)
    length = config.sequence_length - len(start)
    encode = encoder(tokenizer, f"{name}.dataset", notes)
    count, further = config.sequences, config.further_samples if isinstance(config, Calibration) else 0
    stream = token_stream(documents, encode, enough=max(SURPLUS * count, count + further) * length)
    if stream and is_separators(tokenizer, stream):
        raise only_separators(f"{name}.dataset", len(stream))
    rows, more = cut_twice(stream, length, count, further, seed, overlap=overlap)
    if len(rows) < count:
        raise _too_short(config, name, len(stream), len(rows), left_out)
    short = len(stream) // length < count
    return Sequences(
        torch.tensor([start + row for row in rows], dtype=torch.int64),
        source_label(config.dataset),
        overlapping=short,
        text_tokens=len(stream) if short else None,
        notes=notes,
        further=torch.tensor([start + row for row in more], dtype=torch.int64) if more else None,
    )


def cut(stream: list[int], length: int, count: int, seed: int, *, overlap: bool = False) -> list[list[int]]:
    """Up to `count` pieces of `length` tokens, chosen by a seeded permutation.

    overlap   lets pieces overlap where the text is too short
    """
    offsets = list(range(0, len(stream) - length + 1, length))
    if len(offsets) < count and overlap and len(stream) > length:
        offsets = _spread(len(stream) - length, count)
    chosen = torch.randperm(len(offsets), generator=torch.Generator().manual_seed(seed))[:count]
    return [stream[offsets[i] : offsets[i] + length] for i in chosen.tolist()]


def cut_twice(
    stream: list[int], length: int, count: int, further: int, seed: int, *, overlap: bool = False
) -> tuple[list[list[int]], list[list[int]]]:
    """`count` pieces as `cut` gives them, and up to `further` ones of what they leave of the text."""
    whole = len(stream) // length
    if whole <= count:
        return cut(stream, length, count, seed, overlap=overlap), []
    rows = cut(stream, length, min(whole, count + further), seed)
    return rows[:count], rows[count:]


def _spread(last: int, count: int) -> list[int]:
    """`count` offsets from 0 to `last`, evenly apart; all different where there is room."""
    return [round(i * last / max(1, count - 1)) for i in range(count)]


def token_stream(
    documents: Iterable[Document], encode: Callable[[list[Document]], list[list[int]]], enough: int
) -> list[int]:
    """Tokens of documents one after the other, `enough` of them or all."""
    stream: list[int] = []
    rest, size = iter(documents), 1  # a few sequences need only a few documents
    while batch := list(islice(rest, size)):
        size = min(2 * size, DOCUMENTS_AT_ONCE)
        for ids in encode(batch):
            stream += ids
            if len(stream) >= enough:
                return stream
    return stream


def encoder(tokenizer: PreTrainedTokenizerBase, name: str, notes: Notes) -> Callable[[list[Document]], list[list[int]]]:
    """Documents as tokens, each with the end-of-sequence token at its end, once."""
    template = ChatTemplate(tokenizer, name)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def text_of(document: Document) -> str:
        if isinstance(document, str):
            return without_start(tokenizer, readable(document))
        written = template.write(document)
        notes.add(written.shape.left_out, written.shape.unread)
        return without_start(tokenizer, written.text)

    def encode(documents: list[Document]) -> list[list[int]]:
        texts = [text_of(document) for document in documents]
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [each if has_end(tokenizer, text) else each + end for text, each in zip(texts, ids, strict=True)]

    return encode


def is_separators(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> bool:
    """True if tokens are none but those that stand between texts."""
    return set(ids) <= {tokenizer.bos_token_id, tokenizer.eos_token_id}


def only_separators(name: str, count: int) -> InvalidDataset:
    """The error for a text of which the tokenizer leaves nothing."""
    return InvalidDataset(
        f"{name} has {count} tokens, and all of them stand between texts: the model's tokenizer leaves nothing of it",
        field=name,
        value=count,
        hint="give text in the script that the tokenizer knows, or the tokenizer that belongs to the model",
    )


def has_end(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """True if a text ends with the end-of-sequence token already, but for whitespace."""
    return bool(tokenizer.eos_token) and text.rstrip().endswith(tokenizer.eos_token)


def without_start(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text without the beginning-of-sequence token that it begins with, where the tokenizer writes one itself."""
    return text.removeprefix(tokenizer.bos_token) if writes_start(tokenizer) else text


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token, where the tokenizer puts it before a text."""
    return [tokenizer.bos_token_id] if writes_start(tokenizer) else []


def writes_start(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the tokenizer puts the beginning-of-sequence token before a text."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def _too_short(
    config: Calibration | Evaluation, name: str, tokens: int, sequences: int, left_out: LeftOut
) -> InvalidDataset:
    if sequences:
        hint = f"give more text, or set {name}.num_samples to at most {sequences} or {name}.sequence_length lower"
    elif left_out.repeated:
        hint = f"give rows for {name}.dataset that no other dataset of the job has, or the other dataset without them"
    else:
        hint = f"give more text, or set {name}.sequence_length lower"
    return InvalidDataset(
        f"{name}.dataset has {tokens} tokens{left_out.words()}, {sequences} sequences of {config.sequence_length}; "
        f"{config.sequences} are asked for",
        field=f"{name}.dataset",
        value=tokens,
        hint=hint,
    )
