"""A job's native checkpoint as the source that writers of other formats copy from.

Whatever was not quantized lies in it under the original's names, as do tokenizer, configuration and licence. A
quantized linear is shown as the original's tensor, by name, shape and dtype alone: writers take its codes from
`linear`, and never read it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from app.domain.inputs.architectures import HEAD
from app.domain.request.base_job import DESCRIPTION, INPUTS, REPORT
from app.domain.weight_targets import HEAD_TENSOR, is_embeddings
from bitwright.errors import CorruptCheckpoint, InternalError
from bitwright.report import Report
from workers.contracts.input_squares import COUNTS, InputSquares
from workers.contracts.kv_cache import KEY_SCALE, VALUE_SCALE, KVScales
from workers.engine.base_job import described, native_tensors, of_the_base
from workers.engine.model.checkpoint import FLOAT_DTYPES, MAX_JSON_BYTES, TIE, Checkpoint, read_json, with_tie
from workers.formats import native
from workers.formats.load_bitwright import PARTS
from workers.formats.stored_linear import StoredLinear, StoredPart
from workers.numerics.quantized import LinearResult

_PARTS = TypeAdapter(dict[str, StoredPart])
DTYPE_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in FLOAT_DTYPES.items()}


@dataclass(frozen=True)
class Shown:
    """A tensor of the original, as its header was."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class NativeSource:
    """The checkpoint, read when it is asked for.

    folder    of the native checkpoint
    config    config.json, decoded
    stored    every tensor of its files
    linears   quantized linears by name
    parts     places of linears, quantized or not, that lie in a larger tensor of the original
    caches    names of attentions whose scales of a key-value cache are stored
    """

    folder: Path
    config: Mapping[str, Any]
    stored: Checkpoint
    linears: Mapping[str, StoredLinear]
    parts: Mapping[str, StoredPart]
    caches: tuple[str, ...] = field(default=())

    @classmethod
    def open(cls, folder: Path, *, kv_cache: bool = False) -> "NativeSource":
        """Reads descriptions and headers.

        kv_cache   whether its job stored scales of key-value caches; if not, such names are the original's own

        Raises:
            CorruptCheckpoint: files are missing or contradict each other.
        """
        with of_the_base():
            stored = Checkpoint(folder, {}, native_tensors(folder))
            description = read_json(folder / DESCRIPTION)
            linears = described(folder / DESCRIPTION)
            try:
                parts = _PARTS.validate_python(description.get("parts", {}))
            except ValidationError as error:
                raise CorruptCheckpoint(f"{DESCRIPTION} has parts that cannot be read") from error
            end = f".{KEY_SCALE}"
            caches = [name.removesuffix(end) for name in stored.tensors if kv_cache and name.endswith(end)]
            return cls(folder, read_json(folder / "config.json"), stored, linears, parts, tuple(caches))

    def report(self) -> Report:
        """The report of the job that made it.

        Raises:
            CorruptCheckpoint: another version wrote it otherwise.
        """
        file = self.folder / REPORT
        with of_the_base():
            if file.stat().st_size > MAX_JSON_BYTES:
                raise CorruptCheckpoint(f"{REPORT} is larger than {MAX_JSON_BYTES} bytes")
            try:
                return Report.model_validate_json(file.read_bytes())
            except ValidationError as error:
                raise CorruptCheckpoint(f"{REPORT} is of another version: {error.error_count()} problems") from error

    @cached_property
    def tensors(self) -> Mapping[str, Shown]:
        """The tensors of the original, by name, without their numbers.

        Raises:
            CorruptCheckpoint: a linear has no shape.
        """
        wholes: dict[str, list[tuple[StoredPart, Shown]]] = {}
        shown: dict[str, Shown] = {}
        for name in dict.fromkeys([*self.linears, *self.parts]):
            part, one = self.parts.get(name), self._shown(name)
            if part is None:
                shown[f"{name}.weight"] = one
            else:
                wholes.setdefault(part.of, []).append((part, one))
        shown |= {name: _whole(parts) for name, parts in wholes.items()}
        own = {name: Shown(tensor.dtype, tensor.shape) for name, tensor in self.stored.tensors.items()}
        return shown | {name: tensor for name, tensor in own.items() if name not in self._taken}

    def read(self, name: str) -> Tensor:
        """A tensor that was not quantized, mapped from its file."""
        if name not in self.stored.tensors or name in self._taken:
            raise InternalError(f"{name} is quantized, and has no tensor to be read", field=name)
        return self.stored.read(name)

    def linear(self, name: str) -> LinearResult:
        """One quantized linear, on the host.

        Raises:
            CorruptCheckpoint: tensors are missing or do not fit.
        """
        with of_the_base():
            keys = [f"{name}.{suffix}" for suffix in PARTS]
            tensors = {key: self.stored.read(key) for key in keys if key in self.stored.tensors}
            return native.decompress(name, tensors, self.linears[name])

    def kept_parts(self) -> Iterator[tuple[str, Tensor, StoredPart]]:
        """Linears that are not quantized and lie in one tensor with some that are: name, weight, place."""
        for name, part in self.parts.items():
            if name not in self.linears:
                yield name, self.stored.read(f"{name}.weight"), part

    def kv_scales(self) -> Iterator[tuple[str, KVScales]]:
        """Attentions with the scales of their key-value caches.

        Raises:
            CorruptCheckpoint: one is missing, or is no positive number.
        """
        with of_the_base():
            for name in self.caches:
                keys = [f"{name}.{suffix}" for suffix in (KEY_SCALE, VALUE_SCALE)]
                yield (
                    name,
                    KVScales.read(name, {key: self.stored.read(key) for key in keys if key in self.stored.tensors}),
                )

    @cached_property
    def inputs(self) -> Mapping[str, InputSquares]:
        """Sums of squared inputs of its linears, where calibration text was read and a GGUF file can hold them.

        Raises:
            CorruptCheckpoint: the file cannot be read, or lacks numbers of a linear.
        """
        file = self.folder / INPUTS
        if not file.is_file():
            return {}
        with of_the_base():
            try:
                tensors = load_file(file)
                names = [name.removesuffix(f".{COUNTS}") for name in tensors if name.endswith(f".{COUNTS}")]
                return {name: InputSquares.read(name, tensors) for name in names if name in self.linears}
            except (SafetensorError, KeyError, ValueError) as error:
                raise CorruptCheckpoint(f"{INPUTS} cannot be read: {error}") from error

    @cached_property
    def embeddings(self) -> str | None:
        """Name of the quantized matrix of embeddings; None where that stayed as it was."""
        return next((name for name in self.linears if is_embeddings(name)), None)

    @property
    def tied(self) -> bool:
        """True if the head is the quantized embeddings."""
        texts = [self.config, *(part for part in self.config.values() if isinstance(part, Mapping))]
        said = any(text.get(TIE) is True for text in texts)
        apart = HEAD in self.linears or (HEAD_TENSOR in self.stored.tensors and not said)
        return self.embeddings is not None and not apart

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every quantized linear."""
        return {name: (shape[0], shape[1]) for name in self.linears for shape in [self._shown(name).shape]}

    @cached_property
    def _taken(self) -> frozenset[str]:
        """Stored names that the original does not have."""
        of_linears = (f"{name}.{suffix}" for name in self.linears for suffix in PARTS)
        of_caches = (f"{name}.{suffix}" for name in self.caches for suffix in (KEY_SCALE, VALUE_SCALE))
        return frozenset([*of_linears, *of_caches, *(f"{name}.weight" for name in self.parts)])

    def _shown(self, name: str) -> Shown:
        linear = self.linears.get(name)
        if linear is None:
            tensor = self.stored.tensors.get(f"{name}.weight")
            if tensor is None:
                raise CorruptCheckpoint(f"the tensor {name}.weight is missing", field="base_job")
            return Shown(tensor.dtype, tensor.shape)
        key = f"{name}.shape"
        place = self.stored.tensors.get(key)
        if place is None or place.shape != (2,) or place.dtype != "I64":
            raise CorruptCheckpoint(f"the tensor {key} is missing, or is no shape", field="base_job")
        sides = tuple(int(side) for side in self.stored.read(key))
        if min(sides) < 1:
            raise CorruptCheckpoint(f"{key} is {sides}", field="base_job")
        return Shown(DTYPE_NAMES.get(linear.dtype, "F32"), sides)


@dataclass(frozen=True)
class Untied:
    """A native checkpoint whose head is its quantized embeddings, as if that were stored besides."""

    source: NativeSource
    embeddings: str

    @property
    def folder(self) -> Path:
        return self.source.folder

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return with_tie(self.source.config, tied=False)

    @cached_property
    def tensors(self) -> Mapping[str, Shown]:
        own = self.source.tensors
        return {**own, HEAD_TENSOR: own[f"{self.embeddings}.weight"]}

    def read(self, name: str) -> Tensor:
        """A tensor that was not quantized; the head is no such."""
        return self.source.read(name)


def _whole(parts: list[tuple[StoredPart, Shown]]) -> Shown:
    """The tensor that these linears fill together."""
    columns, dtype = parts[0][1].shape[1], parts[0][1].dtype
    rows = max(max(range(*part.rows)) for part, _ in parts) + 1
    matrix = (columns, rows) if parts[0][0].transposed else (rows, columns)
    numbers = [part.index for part, _ in parts if part.index is not None]
    return Shown(dtype, (max(numbers) + 1, *matrix) if numbers else matrix)
