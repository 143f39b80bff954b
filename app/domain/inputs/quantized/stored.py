"""Vocabulary of quantized sources: the tensors of a file, the weights that they mean, and the words of their refusal.

Everything here comes from headers. A weight is described only after its parts were held against each other, so that
whoever dequantizes it allocates what the files can fill, and indexes nothing beyond them.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Protocol

from bitwright.errors import CorruptCheckpoint

SEND_AGAIN = "fetch or send the checkpoint again, with the config.json that was saved with these weights"
MOST_SMALL_BYTES = 1 << 16
"""The longest content of a tensor that is read to learn a weight's shape."""
FLOATS = frozenset({"F32", "F16", "BF16"})


class Stored(Protocol):
    """A tensor as its file's header describes it."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight that is stored as codes and what turns them into numbers.

    name     of the weight that they mean, e.g. `model.layers.0.mlp.up_proj.weight`
    shape    of that weight
    kind     the arithmetic, a key of `workers.engine.model.sources.registry.DEQUANTIZERS`
    parts    role in the arithmetic -> name of the stored tensor
    numbers  what the arithmetic needs besides: bits, group sizes, sides of blocks
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    parts: Mapping[str, str]
    numbers: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    def number(self, name: str) -> int:
        """A whole number of the arithmetic."""
        return int(self.numbers[name])


@dataclass(frozen=True)
class Reading:
    """A quantized checkpoint before it is understood.

    settings   quantization_config of config.json
    entries    stored name -> header's entry
    small      content of a stored tensor of few bytes
    """

    settings: Mapping[str, object]
    entries: Mapping[str, Stored]
    small: Callable[[str], bytes]

    def number(self, name: str, least: int, most: int, default: int | None = None) -> int:
        """A whole number of the quantization_config.

        Raises:
            CorruptCheckpoint: it is missing, no whole number, or out of range.
        """
        return whole(self.settings.get(name, default), f"quantization_config.{name}", least, most)

    def content(self, name: str) -> bytes:
        """The bytes of a small tensor.

        Raises:
            CorruptCheckpoint: it is not small.
        """
        size = prod(self.entries[name].shape)
        if size > MOST_SMALL_BYTES // 8:
            raise corrupt(name, f"has {size} elements, where a few describe a weight")
        return self.small(name)

    def part(self, name: str, owner: str) -> Stored:
        """A tensor that another needs.

        Raises:
            CorruptCheckpoint: it is missing.
        """
        if name not in self.entries:
            raise corrupt(owner, f"has no {name} beside it")
        return self.entries[name]


def corrupt(name: str, detail: str) -> CorruptCheckpoint:
    """The error of a tensor that cannot be what it says."""
    return CorruptCheckpoint(f"{name} {detail}", field="model", value=name, hint=SEND_AGAIN)


def whole(value: object, name: str, least: int, most: int) -> int:
    """A stranger's number, if it is whole and within the range.

    Raises:
        CorruptCheckpoint: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        detail = f"{name} is {value!r}; it must be a whole number from {least} to {most}"
        raise CorruptCheckpoint(detail, field="model", value=name, hint=SEND_AGAIN)
    return value


def demand_shape(name: str, entry: Stored, shape: tuple[int, ...], of: str) -> None:
    """Holds a shape against the one that another tensor asks for.

    Raises:
        CorruptCheckpoint: they differ.
    """
    if entry.shape != shape:
        raise corrupt(name, f"has the shape {entry.shape}; {of} needs {shape}")


def demand_dtype(name: str, entry: Stored, known: Set[str]) -> None:
    """Holds a dtype against those that are read.

    Raises:
        CorruptCheckpoint: it is another one.
    """
    if entry.dtype not in known:
        raise corrupt(name, f"is {entry.dtype}; {', '.join(sorted(known))} are read there")


def matrix(name: str, entry: Stored) -> tuple[int, int]:
    """Rows and columns.

    Raises:
        CorruptCheckpoint: it is no matrix, or an empty one.
    """
    if len(entry.shape) != 2 or 0 in entry.shape:
        raise corrupt(name, f"has the shape {entry.shape}; it must be a matrix with rows and columns")
    return entry.shape[0], entry.shape[1]


def ceil_div(count: int, size: int) -> int:
    """Pieces of a size that cover a count."""
    return -(-count // size)
