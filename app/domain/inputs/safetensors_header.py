"""Judge a safetensors file by its header, before anything trusts it: no torch, no copy of the weights.

The format: 8 bytes little-endian length N, then N bytes of JSON `{name: {dtype, shape, data_offsets: [begin, end]}}`,
then the tensors' bytes. A file whose header promises bytes that it does not hold has leaked a process's memory into
artifacts of other quantizers, so every promise is checked against the file's size.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

from app.domain.inputs.mistaken_files import mistaken
from bitwright.errors import CorruptCheckpoint

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation."""
MAX_DIMENSIONS = 16
NAMED = "take config.json and weights of one model; it counts layers and experts, and they have so many tensors"

DTYPE_BITS: MappingProxyType[str, int] = MappingProxyType(
    {
        **{"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32},
        **{"F16": 16, "BF16": 16, "I16": 16, "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8},
        **{"I8": 8, "U8": 8, "BOOL": 8, "F4": 4},
    }
)


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a file: `begin` and `end` count bytes from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def header_length(prefix: bytes, file_size: int, name: str, most: int = MAX_HEADER_BYTES) -> int:
    """Length of the JSON header, from the file's first 8 bytes.

    most   bytes that the checkpoint's configuration can fill with names (`config_numbers.header_bytes`)

    Raises:
        CorruptCheckpoint: the file is too short, or the length does not fit into it.
    """
    if kind := mistaken(prefix):
        raise CorruptCheckpoint(f"{name} is {kind.what}", field=name, hint=kind.hint)
    if len(prefix) < LENGTH_BYTES:
        raise CorruptCheckpoint(f"{name} is truncated: {file_size} bytes hold no safetensors header", field=name)
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        detail = f"{name} claims a header of {length} bytes; at most {MAX_HEADER_BYTES} are read"
        raise CorruptCheckpoint(detail, field=name, value=length)
    if length > most:
        detail = f"{name} claims a header of {length} bytes; the tensors that config.json can name fill {most}"
        raise CorruptCheckpoint(detail, field=name, value=length, hint=NAMED)
    if length < 2 or LENGTH_BYTES + length > file_size:
        detail = (
            f"{name} claims a header of {length} bytes, but the file has {file_size} bytes: it is truncated or lies"
        )
        raise CorruptCheckpoint(detail, field=name, value=length)
    return length


def parse_header(header: bytes, file_size: int, name: str, most: int = MAX_HEADER_BYTES // 8) -> dict[str, TensorEntry]:
    """The tensors of a file whose JSON header is `header`; `name` is for messages.

    most   tensors that the checkpoint's configuration can name (`config_numbers.names_of`)

    Raises:
        CorruptCheckpoint: not a JSON object, an unknown dtype, a shape that disagrees with its bytes, or tensors that
            overlap, leave holes, or reach beyond the file.
    """
    try:
        decoded = json.loads(header, object_pairs_hook=_no_twice)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{name} has a header that is not JSON: {error}", field=name) from error
    if not isinstance(decoded, dict):
        raise CorruptCheckpoint(f"{name} has a header that is no JSON object", field=name)
    if len(decoded) > most + 1:
        detail = f"{name} has a header of {len(decoded)} tensors; config.json can name {most}"
        raise CorruptCheckpoint(detail, field=name, value=len(decoded), hint=NAMED)
    entries = {tensor: _entry(raw, tensor, name) for tensor, raw in decoded.items() if tensor != "__metadata__"}
    _check_coverage(entries, file_size - LENGTH_BYTES - len(header), name)
    return entries


def _no_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name stands twice")
    return entries


def _entry(raw: object, tensor: str, name: str) -> TensorEntry:
    where = f"{name}: tensor {tensor!r}"
    if not isinstance(raw, Mapping) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise CorruptCheckpoint(f"{where} needs exactly dtype, shape and data_offsets", field=name)
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CorruptCheckpoint(f"{where} has an unknown dtype {dtype!r}", field=name, value=dtype)
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise CorruptCheckpoint(f"{where} has a shape that is no list of whole numbers", field=name, value=shape)
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CorruptCheckpoint(f"{where} has bad data_offsets {offsets!r}", field=name, value=offsets)
    begin, end = offsets
    if prod(shape) * DTYPE_BITS[dtype] != (end - begin) * 8:
        detail = f"{where} of shape {list(shape)} in {dtype} does not fill its {end - begin} bytes"
        raise CorruptCheckpoint(detail, field=name, value=end - begin)
    return TensorEntry(dtype, tuple(shape), begin, end)


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_coverage(entries: Mapping[str, TensorEntry], data_size: int, name: str) -> None:
    """The tensors must tile the data: no overlap, no hole, nothing beyond the end."""
    position = 0
    for tensor, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            word = "overlaps the one before it" if entry.begin < position else "leaves a hole before it"
            detail = f"{name}: tensor {tensor!r} starts at byte {entry.begin} and {word}"
            raise CorruptCheckpoint(detail, field=name, value=entry.begin)
        position = entry.end
    if position != data_size:
        detail = f"{name} promises {position} bytes of tensors but holds {data_size}: it is truncated or lies"
        raise CorruptCheckpoint(detail, field=name, value=position)
