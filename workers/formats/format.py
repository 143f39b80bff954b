"""The seam between the engine and a format: the definitions in a format's file, and its inputs.

`workers/formats/<name>.py` (or a package of that name), with `-` as `_`, has a `FORMAT`; `registry` finds it by the
rows of `app.domain.formats`.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from app.domain.formats import ExportFormat
from app.domain.methods import Scheme
from bitwright.report import Report
from workers.contracts.input_squares import InputSquares
from workers.contracts.kv_cache import KVScales
from workers.formats.cards.identity import Identity
from workers.formats.cards.loading import AdapterBase, Lines
from workers.formats.shards import HELD_BYTES, SHARD_BYTES, Pieces
from workers.formats.source_files import SourceCheckpoint
from workers.formats.stored_linear import StoredLinear, StoredPart
from workers.formats.written_part import WrittenPart
from workers.numerics.quantized import AffineWeight, LinearResult


class Writer(Protocol):
    """One export of a job. The folder is the writer's own: anything that a previous attempt left in it is removed."""

    def add_linear(
        self, name: str, result: LinearResult, *, module: str | None = None, part: StoredPart | None = None
    ) -> None:
        """Store a quantized linear.

        name      of the linear in the source checkpoint, without `.weight`
        module    its name in the transformers model, where that differs
        part      its place in a tensor of the source, where it has none of that name and shape

        Raises:
            FormatCannotHold: the format would have to change the weight.
        """
        ...

    def add_part(self, name: str, tensor: Tensor, part: StoredPart) -> None:
        """Store the weight of a linear that is not quantized, but lies in one tensor with linears that are."""
        ...

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Store a tensor that quantization changed in place of the source's tensor of that name and shape."""
        ...

    def add_kv_scales(self, attention: str, scales: KVScales) -> None:
        """Store the scales of an attention's key-value cache; `attention` is its name in the source checkpoint.

        A format whose row does not say `kv_cache` leaves them out.
        """
        ...

    def finish(self, *, ignored: Collection[str] = ()) -> None:
        """Write everything else; `ignored` are the module names of linears that were not quantized."""
        ...

    def describe(self, report: Report) -> list[Path]:
        """Add the report and the model card, after `finish`; all files of the folder."""
        ...

    @property
    def warnings(self) -> Mapping[str, str]:
        """Code and message of each warning for the caller, after the last linear."""
        ...


@runtime_checkable
class InputWriter(Protocol):
    """A writer that keeps what calibration text put into linears, beside what it made of them."""

    def add_inputs(self, name: str, squares: InputSquares) -> None:
        """Keep the sums of a linear's squared inputs; `name` as in `add_linear`. Before `finish`."""
        ...


class PartWriter(Writer, Protocol):
    """A writer of a checkpoint that is made part by part, by one process after another; see `CheckpointWriter`."""

    def growing(self, name: str, dtype: torch.dtype) -> AbstractContextManager[Pieces]: ...
    def seal(self) -> WrittenPart: ...
    def holds(self, part: WrittenPart) -> bool: ...
    def adopt(self, part: WrittenPart) -> None: ...
    def abandon(self) -> None: ...


@dataclass(frozen=True)
class Opening:
    """The arguments of a new writer.

    name       name of its format
    formats    all of the job's
    identity   the job's result, for files that name it before there is a report
    embeddings module name of the quantized embeddings; None: they stay as they are
    parts      folder for shards before they are the checkpoint's, where another writer finds them (`WrittenPart`)
    base       schemes by module name -> the checkpoint of the job beside which its adapter is loaded
    """

    name: ExportFormat
    source: SourceCheckpoint
    formats: Collection[ExportFormat]
    base: Callable[[Mapping[str, Scheme]], AdapterBase]
    identity: Identity | None = None
    shard_bytes: int = SHARD_BYTES
    held_bytes: int = HELD_BYTES
    parts: Path | None = None
    embeddings: str | None = None


Compress = Callable[[str, LinearResult], dict[str, Tensor]]
"""Name of a linear, its result -> its stored tensors, by full name, which begins with the linear's."""
Decompress = Callable[[str, Mapping[str, Tensor], StoredLinear], LinearResult]
"""Name of a linear, stored tensors by full name, its description -> the result, bit for bit; a scale that is stored in
a wider dtype may come back in that."""


@dataclass(frozen=True)
class Format:
    """The definition of a format in its file.

    open           a writer in a folder
    loading        paragraphs of the card's section "Load"
    compress       tensors of one linear; None for an adapter's format, whose configuration is part of them
    decompress     the inverse of `compress`; None: the format is `dense` and has no codes to come back, or an adapter's
    adapter_base   schemes by module name -> the checkpoint as the base of the job's adapter; None: it is none
    check_source   raises `FormatCannotHold` for a source that the format cannot hold, before anything is computed
    held           module name, weight -> the weight with the numbers that the format stores; None: the same
    """

    open: Callable[[Path, Opening], Writer]
    loading: Lines
    compress: Compress | None = None
    decompress: Decompress | None = None
    adapter_base: Callable[[Mapping[str, Scheme]], AdapterBase] | None = None
    check_source: Callable[[SourceCheckpoint], None] | None = None
    held: Callable[[str, AffineWeight], AffineWeight] | None = None
