"""Texts that another process has read: tokens in a safetensors file, all else as a line of JSON."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.domain.request.job_request import Calibration, Evaluation
from bitwright.events import Message
from workers.engine.text.documents import Notes
from workers.engine.text.examples import Examples
from workers.engine.text.finetuning_texts import FinetuningTexts
from workers.engine.text.packing import PackedSequences
from workers.engine.text.sequences import Sequences

PACKED = ("ids", "documents", "targets")
DTYPES = {"ids": torch.int32, "documents": torch.int32, "targets": torch.bool}


class StoredNotes(Message):
    """`Notes`, as a line of JSON."""

    rows: int = 0
    empty: int = 0
    ignored: dict[str, int] = Field(default_factory=dict)
    left_out: int = 0

    @classmethod
    def of(cls, notes: Notes) -> "StoredNotes":
        return cls(rows=notes.rows, empty=notes.empty, ignored=dict(notes.ignored), left_out=notes.left_out)

    def notes(self) -> Notes:
        return Notes(self.rows, self.empty, Counter(self.ignored), self.left_out)


class StoredSequences(Message):
    """`Sequences` without their tokens."""

    source: str
    overlapping: bool
    text_tokens: int | None
    notes: StoredNotes

    @classmethod
    def of(cls, sequences: Sequences) -> "StoredSequences":
        notes = StoredNotes.of(sequences.notes)
        return cls(
            source=sequences.source,
            overlapping=sequences.overlapping,
            text_tokens=sequences.text_tokens,
            notes=notes,
        )

    def sequences(self, ids: Tensor) -> Sequences:
        return Sequences(ids, self.source, self.overlapping, self.notes.notes(), self.text_tokens)


class StoredFinetuning(Message):
    """`FinetuningTexts` without their tokens."""

    sha256: str
    cut: int
    dropped: int
    notes: StoredNotes

    @classmethod
    def of(cls, texts: FinetuningTexts) -> "StoredFinetuning":
        examples = texts.examples
        notes = StoredNotes.of(examples.notes)
        return cls(sha256=texts.sha256, cut=examples.cut, dropped=examples.dropped, notes=notes)


class TextsLine(Message):
    """The texts of a job without their tokens."""

    calibration: StoredSequences | None = None
    evaluation: StoredSequences | None = None
    finetuning: StoredFinetuning | None = None


def save_texts(
    file: Path, calibration: Sequences | None, evaluation: Sequences | None, finetuning: FinetuningTexts | None
) -> TextsLine:
    """Write the tokens of texts to a file; the rest of them."""
    tensors = dict[str, Tensor]()
    for name, sequences in (("calibration", calibration), ("evaluation", evaluation)):
        if sequences is not None:
            tensors[name] = sequences.ids
    if finetuning is not None:
        for name, packed in (("training", finetuning.training), ("held_out", finetuning.held_out)):
            if packed is not None:
                tensors |= {f"{name}.{part}": getattr(packed, part) for part in PACKED}
    save_file(tensors, file)
    return TextsLine(
        calibration=None if calibration is None else StoredSequences.of(calibration),
        evaluation=None if evaluation is None else StoredSequences.of(evaluation),
        finetuning=None if finetuning is None else StoredFinetuning.of(finetuning),
    )


class LoadedTexts:
    """Texts of a file, checked: whoever wrote it may have been made to write anything.

    Raises:
        ValueError: a tensor has another shape or dtype than texts have, or a token that no vocabulary has.
    """

    def __init__(self, file: Path, line: TextsLine) -> None:
        self._tensors, self._line = load_file(file), line

    def sequences(self, name: str, asked: Calibration | Evaluation) -> Sequences | None:
        """Those of a role, of as many tokens as were asked for."""
        stored: StoredSequences | None = getattr(self._line, name)
        if stored is None:
            return None
        ids, shape = self._tensors[name], (asked.num_samples, asked.sequence_length)
        if ids.dtype != torch.int64 or tuple(ids.shape) != shape or int(ids.min()) < 0:
            raise ValueError(f"{name} is {ids.dtype} {tuple(ids.shape)}, where {shape} tokens were asked for")
        return stored.sequences(ids)

    def finetuning(self, length: int) -> FinetuningTexts | None:
        """Those that are learned, in sequences of `length` tokens."""
        stored = self._line.finetuning
        if stored is None:
            return None
        training, held_out = (self._packed(name, length) for name in ("training", "held_out"))
        if training is None:
            raise ValueError("there is nothing to learn")
        examples = Examples(cut=stored.cut, dropped=stored.dropped, notes=stored.notes.notes())
        return FinetuningTexts(examples, training, held_out, stored.sha256)

    def _packed(self, name: str, length: int) -> PackedSequences | None:
        if f"{name}.ids" not in self._tensors:
            return None
        parts: Mapping[str, Tensor] = {part: self._tensors[f"{name}.{part}"] for part in PACKED}
        rows = len(parts["ids"])
        for part, tensor in parts.items():
            if tensor.dtype != DTYPES[part] or tuple(tensor.shape) != (rows, length):
                raise ValueError(f"{name}.{part} is {tensor.dtype} {tuple(tensor.shape)}, not {(rows, length)}")
        if not rows or int(parts["ids"].min()) < 0 or not int(parts["documents"].min()) >= -1:
            raise ValueError(f"{name} holds numbers that are no tokens")
        return PackedSequences(**parts)
