"""Judge a GGUF file by its header, before anything trusts it: no gguf library, no copy of the weights.

    "GGUF", version u32, tensors u64, metadata u64
    metadata    key string, type u32, value          a string is its length u64 and bytes; an array type, length, values
    tensors     name string, dimensions u32, sides u64 (fastest first), type u32, offset u64 from the data's start
    padding to general.alignment, then the data

Every length is held against the bytes that the file has left, every tensor against the file's size, its block size and
its neighbours. Written after the specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

from app.domain.inputs.mistaken_files import TOLD_BY, Mistaken, mistaken
from app.domain.inputs.quantized.stored import SEND_AGAIN
from bitwright.errors import CorruptCheckpoint, UnsupportedCheckpoint

Read = Callable[[int, int], bytes]
"""Start and length -> up to as many bytes of the file."""

MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_HEADER_BYTES = 256 << 20
MAX_TENSORS, MAX_METADATA, MAX_ARRAY = 1 << 20, 1 << 16, 1 << 22
MAX_NAME, MAX_KEY, MAX_DIMENSIONS, MAX_ALIGNMENT = 255, (1 << 16) - 1, 4, 1 << 20
KEPT_TEXT, KEPT_ARRAY = 1 << 16, 1 << 12
"""The longest string and the longest array of numbers that are kept; longer ones are stepped over and counted."""
CHUNK = 1 << 20
TEXT, ARRAY = 8, 9
SCALARS: Mapping[int, str] = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
)

BLOCKS: Mapping[int, tuple[str, int, int]] = MappingProxyType(
    {
        0: ("F32", 1, 4),
        1: ("F16", 1, 2),
        2: ("Q4_0", 32, 18),
        3: ("Q4_1", 32, 20),
        6: ("Q5_0", 32, 22),
        7: ("Q5_1", 32, 24),
        8: ("Q8_0", 32, 34),
        10: ("Q2_K", 256, 84),
        11: ("Q3_K", 256, 110),
        12: ("Q4_K", 256, 144),
        13: ("Q5_K", 256, 176),
        14: ("Q6_K", 256, 210),
        16: ("IQ2_XXS", 256, 66),
        17: ("IQ2_XS", 256, 74),
        18: ("IQ3_XXS", 256, 98),
        19: ("IQ1_S", 256, 50),
        20: ("IQ4_NL", 32, 18),
        21: ("IQ3_S", 256, 110),
        22: ("IQ2_S", 256, 82),
        23: ("IQ4_XS", 256, 136),
        29: ("IQ1_M", 256, 56),
        30: ("BF16", 1, 2),
        34: ("TQ1_0", 256, 54),
        35: ("TQ2_0", 256, 66),
        39: ("MXFP4", 32, 17),
        40: ("NVFP4", 64, 36),
    }
)
"""Number of a GGML type -> its name, numbers in a block, bytes of a block; those that gguf-py dequantizes."""


@dataclass(frozen=True)
class GgufEntry:
    """A tensor of a file: `shape` with the fastest side last, `begin` in bytes from the file's start."""

    kind: int
    shape: tuple[int, ...]
    begin: int
    size: int

    @property
    def dtype(self) -> str:
        """Name of its GGML type."""
        return BLOCKS[self.kind][0]


@dataclass(frozen=True)
class GgufHeader:
    """A file's description.

    metadata   key -> number, text or tuple of numbers, where it is short
    counts     key -> length, of arrays of text and of long arrays
    data       first byte after the header
    """

    metadata: Mapping[str, object]
    counts: Mapping[str, int]
    tensors: Mapping[str, GgufEntry]
    data: int


def parse_gguf(read: Read, file_size: int, name: str) -> GgufHeader:
    """The header of a GGUF file.

    Raises:
        CorruptCheckpoint: counts, lengths, sides, offsets or types cannot be true.
        UnsupportedCheckpoint: another version or byte order, or a type that is not read.
    """
    cursor = _Cursor(read, file_size, name)
    if (begins := cursor.take(4)) != MAGIC:
        kind = mistaken(begins + read(len(begins), TOLD_BY - len(begins)))
        raise _corrupt(name, "does not begin with GGUF") if kind is None else _other(name, kind)
    version = cursor.number("I")
    if version not in VERSIONS:
        detail = f"{name} is GGUF of version {version}; read are {VERSIONS[0]} and {VERSIONS[1]}, little-endian"
        hint = "convert the model again with a current llama.cpp"
        raise UnsupportedCheckpoint(detail, field="model", value=name, hint=hint)
    tensors, pairs = cursor.count("Q", MAX_TENSORS, "tensors"), cursor.count("Q", MAX_METADATA, "pairs of metadata")
    metadata: dict[str, object] = {}
    counts: dict[str, int] = {}
    for _ in range(pairs):
        key = cursor.text(MAX_KEY, "a key")
        if key in metadata or key in counts:
            raise _corrupt(name, f"has the key {key!r} twice")
        value = cursor.value(cursor.number("I"), key)
        if isinstance(value, _Length):
            counts[key] = value.count
        else:
            metadata[key] = value
    described = [cursor.tensor() for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise _corrupt(name, f"has general.alignment = {alignment!r}; it must be a power of two")
    data = -(-cursor.position // alignment) * alignment
    placed = {
        tensor: _placed(name, tensor, kind, shape, offset, data, alignment, file_size)
        for tensor, kind, shape, offset in described
    }
    if len(placed) != len(described):
        raise _corrupt(name, "names a tensor twice")
    _demand_apart(name, placed)
    return GgufHeader(metadata, counts, placed, data)


def _placed(
    name: str,
    tensor: str,
    kind: int,
    shape: tuple[int, ...],
    offset: int,
    data: int,
    alignment: int,
    file_size: int,
) -> GgufEntry:
    if kind not in BLOCKS:
        detail = f"{name} holds {tensor} in the GGML type {kind}, which is not read"
        known = ", ".join(title for title, _, _ in BLOCKS.values())
        raise UnsupportedCheckpoint(detail, field="model", value=tensor, hint=f"give a file of these types: {known}")
    title, numbers, size = BLOCKS[kind]
    if shape[-1] % numbers:
        raise _corrupt(name, f"holds {tensor} with rows of {shape[-1]}, and {title} has blocks of {numbers}")
    begin, length = data + offset, prod(shape) // numbers * size
    if offset % alignment:
        raise _corrupt(name, f"puts {tensor} at the offset {offset}, which is not aligned to {alignment}")
    if begin + length > file_size:
        detail = f"puts {tensor} at the bytes {begin} to {begin + length}, and has {file_size}: it is truncated or lies"
        raise _corrupt(name, detail)
    return GgufEntry(kind, shape, begin, length)


def _demand_apart(name: str, tensors: Mapping[str, GgufEntry]) -> None:
    end, before = 0, ""
    for tensor, entry in sorted(tensors.items(), key=lambda item: item[1].begin):
        if entry.begin < end:
            raise _corrupt(name, f"puts {tensor} over {before}")
        end, before = entry.begin + entry.size, tensor


def _corrupt(name: str, detail: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(f"{name} {detail}", field="model", value=name, hint=SEND_AGAIN)


def _other(name: str, kind: Mistaken) -> CorruptCheckpoint:
    return CorruptCheckpoint(f"{name} is {kind.what}", field="model", value=name, hint=kind.hint)


@dataclass(frozen=True)
class _Length:
    """An array that was stepped over."""

    count: int


class _Cursor:
    """Reads on in a file's beginning, a chunk at a time, and never beyond the file or the longest header."""

    def __init__(self, read: Read, file_size: int, name: str) -> None:
        self._read, self._name = read, name
        self._end = min(file_size, MAX_HEADER_BYTES)
        self._chunk, self._first = b"", 0
        self.position = 0

    def take(self, length: int) -> bytes:
        """The next bytes."""
        begin = self.position
        self.skip(length)
        if begin < self._first or begin + length > self._first + len(self._chunk):
            self._chunk, self._first = self._read(begin, max(length, CHUNK)), begin
        taken = self._chunk[begin - self._first :][:length]
        if len(taken) != length:
            raise _corrupt(self._name, f"ends at byte {begin + len(taken)}, within its header")
        return taken

    def skip(self, length: int) -> None:
        """Steps over bytes."""
        if length > self._end - self.position:
            detail = f"claims {length} bytes at byte {self.position} of its header, which ends at {self._end}"
            raise _corrupt(self._name, detail)
        self.position += length

    def number(self, code: str) -> int:
        """A whole number of a format of `struct`."""
        return int(struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0])

    def count(self, code: str, most: int, what: str) -> int:
        """A number of things that follow."""
        count = self.number(code)
        if count > most:
            raise _corrupt(self._name, f"claims {count} {what}; at most {most} are read")
        return count

    def text(self, most: int, what: str) -> str:
        """A string that is kept."""
        length = self.count("Q", most, f"bytes of {what}")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise _corrupt(self._name, f"has {what} that is not UTF-8") from error

    def value(self, kind: int, key: str) -> object:
        """A value of metadata, or its length where it is long."""
        if kind in SCALARS:
            return struct.unpack("<" + SCALARS[kind], self.take(struct.calcsize("<" + SCALARS[kind])))[0]
        if kind == TEXT:
            length = self.number("Q")
            if length > KEPT_TEXT:
                self.skip(length)
                return _Length(length)
            return self.take(length).decode(errors="replace")
        if kind == ARRAY:
            return self._array(key)
        raise _corrupt(self._name, f"has {key!r} of the type {kind}, which there is not")

    def _array(self, key: str) -> object:
        kind, count = self.number("I"), self.count("Q", MAX_ARRAY, f"values of {key!r}")
        if kind == TEXT:
            self._skip_texts(count)
            return _Length(count)
        if kind not in SCALARS:
            raise _corrupt(self._name, f"has {key!r}, an array of the type {kind}")
        size = struct.calcsize("<" + SCALARS[kind])
        if count > KEPT_ARRAY:
            self.skip(count * size)
            return _Length(count)
        return struct.unpack(f"<{count}{SCALARS[kind]}", self.take(count * size))

    def _skip_texts(self, count: int) -> None:
        """Steps over strings; a vocabulary has hundreds of thousands, so that each costs one look at the chunk."""
        while count:
            self.skip(self.number("Q"))
            count -= 1
            chunk, at = self._chunk, self.position - self._first
            while count and at + 8 <= len(chunk):
                ahead = at + 8 + int.from_bytes(chunk[at : at + 8], "little")
                if ahead > len(chunk):
                    break
                at, count = ahead, count - 1
            self.position = max(self.position, min(self._first + at, self._end))

    def tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        """Name, type, sides with the fastest last, and offset of a tensor."""
        name = self.text(MAX_NAME, "a tensor's name")
        dimensions = self.count("I", MAX_DIMENSIONS, f"dimensions of {name}")
        shape = struct.unpack(f"<{dimensions}Q", self.take(8 * dimensions))[::-1]
        if not shape or 0 in shape or prod(shape) > 1 << 48:
            raise _corrupt(self._name, f"gives {name} the shape {shape}")
        kind, offset = self.number("I"), self.number("Q")
        return name, kind, shape, offset
