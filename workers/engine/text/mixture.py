"""Calibration text of several parts with shares, and text that shows how near the result is on each of them.

A row belongs to a part by its dataset and its kind. One row in eight of each part, chosen by its hash, never
calibrates: its sequences go through both models with the evaluation text, so that a report has a distance of each part.
A part with fewer rows than its share asks for gives overlapping sequences, and the report warns.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from app.domain.inputs.rows import PlainText, RowKind
from app.domain.request.job_request import Calibration, Evaluation
from app.domain.request.mixtures import MixedPart, sequences_of
from bitwright.errors import InvalidDataset
from workers.engine.text.builtin import builtin_documents
from workers.engine.text.documents import Document, Half, Notes, document_of, half_of, hash_of, read_rows
from workers.engine.text.sequences import (
    SURPLUS,
    Sequences,
    cut,
    cut_twice,
    encoder,
    is_separators,
    only_separators,
    start_tokens,
    token_stream,
)

HELD_OUT_BYTE, HELD_OUT_BELOW = 2, 32
"""Of a row's sha256: the byte, and the number below which it holds the row out. One row in eight."""
MOST_HELD_OUT = 8
"""Sequences of a part that measure."""
FEW = 0.25
"""Of an even share, below which a part is starved."""


@dataclass(frozen=True)
class Probe:
    """Sequences of one kind that are measured beside the evaluation text, int64 (sequences, length), on the host.

    name         of the kind
    calibrates   whether the same sequences calibrated; else they were held out
    share        of the calibration's sequences that this kind has; None: of the whole text
    sequences    so many; of these the text holds without overlaps `whole`
    """

    name: str
    ids: Tensor
    calibrates: bool = False
    share: float | None = None
    sequences: int = 0
    whole: int = 0


def mixed_sequences(
    tokenizer: PreTrainedTokenizerBase,
    config: Calibration,
    files: Mapping[int, Path],
    seed: int,
    evaluation: Evaluation | None,
    evaluation_file: Path | None,
) -> tuple[Sequences, tuple[Probe, ...]]:
    """The sequences that calibrate, in a seeded order, and those of each part that are held out.

    files   of the parts by their numbers; one without is builtin text

    Raises:
        InvalidDataset: a part has no row, or too little text for one sequence.
    """
    parts, probes, notes = config.mixture, list[Probe](), Notes()
    rows, further = list[Tensor](), list[Tensor]()
    counts = zip(sequences_of(parts, config.num_samples), sequences_of(parts, config.further_samples), strict=True)
    for number, (count, more) in enumerate(counts):
        reader = _Part(tokenizer, parts[number], number, files.get(number), notes)
        half = Half.CALIBRATION if evaluation is not None and reader.shares(evaluation_file) else None
        given, whole = reader.sequences(
            config.sequence_length, (count, more), seed, half, holds_out=evaluation is not None
        )
        rows.append(given[:count])
        further.append(given[count:])
        if evaluation is not None:
            held = reader.held_out(evaluation, seed, half)
            probes.append(Probe(parts[number].label, held, False, parts[number].share, count, whole))
    ids = torch.cat(rows)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    labels = ", ".join(f"{part.share:g} {part.label}" for part in parts)
    rest = torch.cat(further)
    return Sequences(ids[order], labels, notes=notes, further=rest if len(rest) else None), tuple(probes)


class _Part:
    """One part of a mixture: its documents as tokens."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, part: MixedPart, number: int, file: Path | None, notes: Notes
    ) -> None:
        self._tokenizer, self._part, self._file, self._notes = tokenizer, part, file, notes
        self._name = f"calibration.mixture.{number}"

    def shares(self, evaluation_file: Path | None) -> bool:
        """True if the evaluation reads the same text."""
        if self._file is None or evaluation_file is None:
            return self._file is evaluation_file
        return self._file.samefile(evaluation_file)

    def sequences(
        self, length: int, counts: tuple[int, int], seed: int, half: Half | None, *, holds_out: bool
    ) -> tuple[Tensor, int]:
        """Sequences that calibrate and, behind them, up to so many further ones; how many the text has apart."""
        start, (count, further) = start_tokens(self._tokenizer), counts
        stream = self._stream(self._documents(half, held_out=False if holds_out else None), length, count, further)
        if stream and is_separators(self._tokenizer, stream):
            raise only_separators(self._name, len(stream))
        inner = length - len(start)
        rows, more = cut_twice(stream, inner, count, further, seed, overlap=True)
        if len(rows) < count:
            raise InvalidDataset(
                f"{self._name} has {len(stream)} tokens, less than a sequence of {length}",
                field=self._name,
                value=len(stream),
                hint="give more rows of it, or a smaller calibration.sequence_length, or leave it out",
            )
        all_rows = [start + row for row in (*rows, *more)]
        return torch.tensor(all_rows, dtype=torch.int64).view(-1, length), len(stream) // inner

    def held_out(self, evaluation: Evaluation, seed: int, half: Half | None) -> Tensor:
        """Sequences as long as those of the evaluation that never calibrate; none where the rows are too few."""
        start, length = start_tokens(self._tokenizer), evaluation.sequence_length
        count = max(1, min(MOST_HELD_OUT, evaluation.num_samples))
        stream = self._stream(self._documents(half, held_out=True), length, count)
        rows = cut(stream, length - len(start), count, seed)
        return torch.tensor([start + row for row in rows], dtype=torch.int64).view(-1, length)

    def _stream(self, documents: Iterator[Document], length: int, count: int, further: int = 0) -> list[int]:
        encode = encoder(self._tokenizer, self._name, self._notes)
        return token_stream(documents, encode, enough=max(SURPLUS * count, count + further) * length)

    def _documents(self, half: Half | None, held_out: bool | None) -> Iterator[Document]:
        """Documents of the part's kind and half, those that are held out or those that are not; None: both.

        Raises:
            InvalidDataset: there is none of its kind.
        """
        rows = 0
        for kind, document in self._all():
            if self._part.kind is not None and kind is not self._part.kind:
                continue
            rows += 1
            digest = hash_of(document)
            held = digest[HELD_OUT_BYTE] < HELD_OUT_BELOW
            if (half is None or half_of(document) is half) and (held_out is None or held is held_out):
                yield document
        if not rows:
            kind_name = "text" if self._part.kind is None else self._part.kind.value
            raise InvalidDataset(
                f"{self._name} has no row of kind {kind_name}",
                field=self._name,
                value=self._part.label,
                hint="leave the part out, name the dataset that has such rows, or leave its kind out",
            )

    def _all(self) -> Iterator[tuple[RowKind, Document]]:
        if self._file is None:
            yield from ((RowKind.of(PlainText(text)), text) for text in builtin_documents())
            return
        for record in read_rows(self._file, self._name, self._notes):
            yield RowKind.of(record.row), document_of(record.row)


def starved_parts(probes: Sequence[Probe], count: int) -> Iterator[str]:
    """Warnings on parts of a mixture that have too little text, or too few of its `count` sequences."""
    even = count / max(1, len(probes))
    for probe in probes:
        if probe.whole < probe.sequences:
            yield (
                f"calibration: {probe.name} has text for {probe.whole} of its {probe.sequences} sequences; they "
                "overlap: give more rows of it, or a smaller share"
            )
        elif probe.sequences < FEW * even:
            yield (
                f"calibration: {probe.name} has {probe.sequences} of {count} sequences, less than a quarter of an even "
                "share; see its KL in the report"
            )
        if not len(probe.ids):
            yield f"calibration: {probe.name} has too few rows to hold one sequence out, so that its KL is not known"
