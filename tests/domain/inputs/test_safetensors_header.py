"""Every lie of a safetensors header is refused for what it is, and a header that says the truth is read."""

import json
import struct
from typing import Any

import pytest

from app.domain.inputs.safetensors_header import DTYPE_BITS, TensorEntry, header_length, parse_header
from bitwright.errors import CorruptCheckpoint


def refusal(header: bytes, file_size: int) -> str:
    with pytest.raises(CorruptCheckpoint) as refused:
        parse_header(header, file_size, "model.safetensors")
    assert refused.value.field == "model.safetensors"
    return refused.value.detail


def tensor(dtype: object = "F32", shape: object = (2, 2), begin: object = 0, end: object = 16) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def header(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


def judged(data_bytes: int, **tensors: Any) -> str:
    text = header(**tensors)
    return refusal(text, 8 + len(text) + data_bytes)


def test_the_widths_of_the_dtypes() -> None:
    assert dict(DTYPE_BITS) == {
        **{"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16},
        **{"U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4},
    }


def test_a_length_must_leave_room_for_itself() -> None:
    """Eight bytes of the file are the length: a header that ends just behind the file's end is no header."""

    def length(claimed: int, file_size: int, prefix: int = 8) -> int:
        return header_length(struct.pack("<Q", claimed)[:prefix], file_size, "m")

    assert length(92, 100) == 92
    assert length(2, 10) == 2
    for claimed in (93, 96, 100, 101):
        with pytest.raises(CorruptCheckpoint, match=rf"claims a header of {claimed} bytes.*100 bytes.*truncated"):
            length(claimed, 100)
    for claimed in (0, 1):
        with pytest.raises(CorruptCheckpoint, match="truncated or lies"):
            length(claimed, 100)
    with pytest.raises(CorruptCheckpoint, match="5 bytes hold no safetensors header"):
        length(2, 5, prefix=7)
    assert length(100_000_000, 1 << 40) == 100_000_000
    with pytest.raises(CorruptCheckpoint, match="at most 100000000 are read"):
        length(100_000_001, 1 << 40)
    with pytest.raises(CorruptCheckpoint, match="claims a header of 72057594037927936 bytes"):
        header_length(b"\0\0\0\0\0\0\0\1", 1 << 60, "m")


def test_a_true_header_is_read() -> None:
    tensors = {
        "b": tensor("BF16", [3], 16, 22),
        "a": tensor("F32", [2, 2], 0, 16),
        "empty": tensor("F32", [0, 7], 22, 22),
        "scalar": tensor("U8", [], 22, 23),
        "half": tensor("F4", [2, 3], 23, 26),
        "__metadata__": {"format": "pt"},
    }
    text = header(**tensors)
    assert parse_header(text, 8 + len(text) + 26, "m") == {
        "b": TensorEntry("BF16", (3,), 16, 22),
        "a": TensorEntry("F32", (2, 2), 0, 16),
        "empty": TensorEntry("F32", (0, 7), 22, 22),
        "scalar": TensorEntry("U8", (), 22, 23),
        "half": TensorEntry("F4", (2, 3), 23, 26),
    }


def test_a_name_stands_once() -> None:
    one = json.dumps(tensor("U8", [1], 0, 1))
    text = f'{{"a": {one}, "a": {one}}}'.encode()
    assert "a name stands twice" in refusal(text, 8 + len(text) + 1)
    inside = b'{"a": {"dtype": "U8", "dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}'
    assert "a name stands twice" in refusal(inside, 8 + len(inside) + 1)


@pytest.mark.parametrize("shape", [[True, 4], [4, True], [4.0], [-4], ["4"], [None], "4", 4, None, {"4": 1}, [1] * 17])
def test_a_shape_is_a_list_of_few_whole_numbers(shape: object) -> None:
    assert "a shape that is no list of whole numbers" in judged(16, a=tensor(shape=shape, end=16))


def test_a_shape_may_have_sixteen_dimensions() -> None:
    text = header(a=tensor("U8", [1] * 16, 0, 1))
    assert len(parse_header(text, 8 + len(text) + 1, "m")["a"].shape) == 16


@pytest.mark.parametrize("offsets", [[0], [0, 1, 2], [1, 0], [False, 1], [0, 1.0], [-1, 0], "01", None])
def test_offsets_are_two_rising_whole_numbers(offsets: object) -> None:
    entry = {"dtype": "U8", "shape": [1], "data_offsets": offsets}
    assert "bad data_offsets" in judged(1, a=entry)


@pytest.mark.parametrize("dtype", ["F31", "f32", 32, None, ["F32"], "C64"])
def test_a_dtype_is_known(dtype: object) -> None:
    assert "unknown dtype" in judged(16, a=tensor(dtype))


@pytest.mark.parametrize(
    "entry", [None, [], 1, {}, {"dtype": "U8", "shape": [1]}, {**tensor("U8", [1], 0, 1), "strides": [1]}]
)
def test_a_tensor_has_exactly_its_three_fields(entry: object) -> None:
    assert "exactly dtype, shape and data_offsets" in judged(1, a=entry)


@pytest.mark.parametrize(
    ("shape", "dtype", "end"),
    [([2, 2], "F32", 15), ([2, 2], "F32", 17), ([2, 2], "F16", 16), ([3], "F4", 1), ([3], "F4", 2)],
)
def test_a_tensor_fills_its_bytes(shape: list[int], dtype: str, end: int) -> None:
    assert f"does not fill its {end} bytes" in judged(end, a=tensor(dtype, shape, 0, end))


def test_tensors_tile_the_data() -> None:
    first, second = tensor("U8", [4], 0, 4), tensor("U8", [4], 4, 8)
    assert "overlaps the one before it" in judged(8, a=first, b=tensor("U8", [4], 3, 7))
    assert "leaves a hole before it" in judged(8, a=first, b=tensor("U8", [3], 5, 8))
    assert "starts at byte 1 and leaves a hole" in judged(5, a=tensor("U8", [4], 1, 5))
    for size, told in ((7, "promises 8 bytes of tensors but holds 7"), (9, "promises 8 bytes of tensors but holds 9")):
        assert told in judged(size, a=first, b=second)
    assert "promises 0 bytes of tensors but holds 1" in judged(1)


@pytest.mark.parametrize("text", [b"{", b"[1", b"\xff\xfe", b"[" * 100_000])
def test_what_is_not_json_is_said_to_be_none(text: bytes) -> None:
    assert "header that is not JSON" in refusal(text, 8 + len(text))


@pytest.mark.parametrize("text", [b"[]", b"1", b'"a"', b"null"])
def test_json_that_is_no_object_is_refused(text: bytes) -> None:
    assert "no JSON object" in refusal(text, 8 + len(text))
