"""Texts that another process has read: tokens in a safetensors file, all else as a line of JSON."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.domain.request.job_request import Calibration, Evaluation
from workers.disk.input_orders import StoredFinetuning, StoredNotes, StoredProbe, StoredSequences, TextsLine
from workers.engine.text.documents import Notes
from workers.engine.text.examples import Examples
from workers.engine.text.finetuning_texts import FinetuningTexts
from workers.engine.text.mixture import Probe
from workers.engine.text.packing import PackedSequences
from workers.engine.text.sequences import Sequences

PACKED = ("ids", "documents", "targets")
DTYPES = {"ids": torch.int32, "documents": torch.int32, "targets": torch.bool}


def save_texts(
    file: Path,
    calibration: Sequences | None,
    evaluation: Sequences | None,
    finetuning: FinetuningTexts | None,
    probes: tuple[Probe, ...] = (),
) -> TextsLine:
    """Write the tokens of texts to a file; the rest of them."""
    tensors = {f"probe.{number}": probe.ids for number, probe in enumerate(probes)}
    for name, sequences in (("calibration", calibration), ("evaluation", evaluation)):
        if sequences is not None:
            tensors[name] = sequences.ids
            if sequences.further is not None:
                tensors[f"{name}.further"] = sequences.further
    if finetuning is not None:
        for name, packed in (("training", finetuning.training), ("held_out", finetuning.held_out)):
            if packed is not None:
                tensors |= {f"{name}.{part}": getattr(packed, part) for part in PACKED}
    save_file(tensors, file)
    return TextsLine(
        calibration=None if calibration is None else _stored(calibration),
        evaluation=None if evaluation is None else _stored(evaluation),
        finetuning=None if finetuning is None else _stored_finetuning(finetuning),
        probes=tuple(StoredProbe(name=p.name, share=p.share, sequences=p.sequences, whole=p.whole) for p in probes),
    )


def _stored(sequences: Sequences) -> StoredSequences:
    return StoredSequences(
        source=sequences.source,
        overlapping=sequences.overlapping,
        text_tokens=sequences.text_tokens,
        notes=_stored_notes(sequences.notes),
    )


def _stored_finetuning(texts: FinetuningTexts) -> StoredFinetuning:
    examples = texts.examples
    notes = _stored_notes(examples.notes)
    return StoredFinetuning(sha256=texts.sha256, cut=examples.cut, dropped=examples.dropped, notes=notes)


def _stored_notes(notes: Notes) -> StoredNotes:
    return StoredNotes(rows=notes.rows, empty=notes.empty, ignored=dict(notes.ignored), left_out=notes.left_out)


def _notes(stored: StoredNotes) -> Notes:
    return Notes(stored.rows, stored.empty, Counter(stored.ignored), stored.left_out)


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
        ids, further = self._tensors[name], self._tensors.get(f"{name}.further")
        _demand_tokens(name, ids, asked.sequences, asked.sequence_length)
        if further is not None:
            most = asked.further_samples if isinstance(asked, Calibration) else 0
            _demand_tokens(f"{name}.further", further, min(max(1, len(further)), most), asked.sequence_length)
        return Sequences(ids, stored.source, stored.overlapping, _notes(stored.notes), stored.text_tokens, further)

    def probes(self, length: int) -> tuple[Probe, ...]:
        """Those that are measured beside the evaluation text, in sequences of `length` tokens."""
        probes = []
        for number, stored in enumerate(self._line.probes):
            ids = self._tensors[f"probe.{number}"]
            if ids.dtype != torch.int64 or ids.ndim != 2 or ids.shape[1] != length or bool((ids < 0).any()):
                raise ValueError(f"probe.{number} is {ids.dtype} {tuple(ids.shape)}, not sequences of {length}")
            probes.append(Probe(stored.name, ids, False, stored.share, stored.sequences, stored.whole))
        return tuple(probes)

    def finetuning(self, length: int) -> FinetuningTexts | None:
        """Those that are learned, in sequences of `length` tokens."""
        stored = self._line.finetuning
        if stored is None:
            return None
        training, held_out = (self._packed(name, length) for name in ("training", "held_out"))
        if training is None:
            raise ValueError("there is nothing to learn")
        examples = Examples(cut=stored.cut, dropped=stored.dropped, notes=_notes(stored.notes))
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


def _demand_tokens(name: str, ids: Tensor, count: int, length: int) -> None:
    if ids.dtype != torch.int64 or tuple(ids.shape) != (count, length) or int(ids.min()) < 0:
        raise ValueError(f"{name} is {ids.dtype} {tuple(ids.shape)}, where {(count, length)} tokens were asked for")
