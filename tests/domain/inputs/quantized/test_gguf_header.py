"""Headers of GGUF files from strangers: every lie is refused by name, before anything is allocated for it."""

import struct
import tracemalloc
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.inputs.quantized import gguf_header
from app.domain.inputs.quantized.gguf_header import GgufEntry, GgufHeader, parse_gguf
from bitwright.errors import CorruptCheckpoint, InputError, UnsupportedCheckpoint
from tests.domain.inputs.quantized.gguf_bytes import ARCHITECTURE, File, Tensor, array, number, text


def parsed(content: bytes, size: int | None = None) -> GgufHeader:
    """The header of these bytes."""
    return parse_gguf(lambda start, length: content[start : start + length], size or len(content), "m.gguf")


def test_a_header_says_what_the_file_holds() -> None:
    pairs = (
        ARCHITECTURE,
        number(b"llama.block_count", 4, 2),
        number(b"llama.rope.freq_base", 6, 0.5),
        array(b"tokenizer.ggml.tokens", 8, 3, text(b"a") + text(b"\xff\xfe") + text(b"")),
        array(b"llama.attention.head_count_kv", 4, 2, struct.pack("<2I", 7, 8)),
    )
    q4_0 = Tensor(b"b", sides=(32, 3), kind=2, offset=512)
    header = parsed(File(pairs=pairs, tensors=(Tensor(b"a"), q4_0)).bytes())
    assert header.metadata == {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.rope.freq_base": 0.5,
        "llama.attention.head_count_kv": (7, 8),
    }
    assert header.counts == {"tokenizer.ggml.tokens": 3}
    assert header.tensors == {
        "a": GgufEntry(0, (2, 64), header.data, 512),
        "b": GgufEntry(2, (3, 32), header.data + 512, 54),
    }
    assert header.data % 32 == 0


HUGE = 1 << 62
LIES: dict[str, tuple[File, str]] = {
    "magic": (File(magic=b"GGML"), "does not begin with GGUF"),
    "tensors that are not there": (File(tensor_count=3), "claims|ends|shape"),
    "countless tensors": (File(tensor_count=HUGE), "tensors; at most"),
    "countless pairs": (File(pair_count=HUGE), "pairs of metadata; at most"),
    "a key of any length": (File(pairs=(text(b"general", HUGE),)), "bytes of a key; at most"),
    "a text of any length": (File(pairs=(text(b"a") + struct.pack("<I", 8) + text(b"b", HUGE),)), "claims"),
    "an array of any length": (File(pairs=(array(b"a", 4, HUGE, b""),)), "values of 'a'; at most"),
    "an array longer than the file": (File(pairs=(array(b"a", 10, 1 << 20, b""),)), "claims"),
    "a short array longer than the file": (File(pairs=(array(b"a", 10, 4000, b""),)), "claims"),
    "texts of any length": (File(pairs=(array(b"a", 8, 2, text(b"b", HUGE)),)), "claims"),
    "an array of arrays": (File(pairs=(array(b"a", 9, 1, b""),)), "an array of the type 9"),
    "a type of value": (File(pairs=(text(b"a") + struct.pack("<I", 13),)), "type 13"),
    "a key twice": (File(pairs=(ARCHITECTURE, ARCHITECTURE)), "twice"),
    "a tensor twice": (File(tensors=(Tensor(b"a"), Tensor(b"a", offset=512))), "twice"),
    "a name of any length": (File(tensors=(Tensor(b"a" * 300),)), "bytes of a tensor's name; at most"),
    "a name that is no text": (File(tensors=(Tensor(b"\xff"),)), "UTF-8"),
    "countless dimensions": (File(tensors=(Tensor(b"a", dimensions=1 << 31),)), "dimensions of a; at most"),
    "no dimensions": (File(tensors=(Tensor(b"a", sides=()),)), "the shape"),
    "an empty side": (File(tensors=(Tensor(b"a", sides=(64, 0)),)), "the shape"),
    "sides whose product wraps around": (File(tensors=(Tensor(b"a", sides=(1 << 32, 1 << 32)),)), "the shape"),
    "more numbers than bytes": (File(tensors=(Tensor(b"a", sides=(1 << 20, 1 << 20)),)), "truncated or lies"),
    "an offset beyond the file": (File(tensors=(Tensor(b"a", offset=1 << 40),)), "truncated or lies"),
    "an offset that wraps around": (File(tensors=(Tensor(b"a", offset=(1 << 64) - 32),)), "truncated or lies"),
    "an offset between alignments": (File(tensors=(Tensor(b"a", offset=16),)), "not aligned"),
    "two tensors at one place": (File(tensors=(Tensor(b"a"), Tensor(b"b", offset=480))), "over"),
    "half a block": (File(tensors=(Tensor(b"a", sides=(48, 2), kind=2),)), "blocks of 32"),
    "no alignment": (File(pairs=(number(b"general.alignment", 4, 0),)), "power of two"),
    "an odd alignment": (File(pairs=(number(b"general.alignment", 4, 24),)), "power of two"),
    "an alignment as large as the file": (File(pairs=(number(b"general.alignment", 4, 1 << 31),)), "power of two"),
}


@pytest.mark.parametrize(("file", "told"), LIES.values(), ids=LIES)
def test_a_lie_is_refused_by_name_and_costs_nothing(file: File, told: str) -> None:
    content = file.bytes()
    tracemalloc.start()
    with pytest.raises(CorruptCheckpoint, match=told) as refused:
        parsed(content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20, "no more than a chunk of the file"
    assert "m.gguf" in refused.value.detail
    assert refused.value.hint


@pytest.mark.parametrize("version", [0, 1, 4, 3 << 24])
def test_other_versions_and_byte_orders_are_refused_by_name(version: int) -> None:
    with pytest.raises(UnsupportedCheckpoint, match="read are 2 and 3"):
        parsed(File(version=version).bytes())


@pytest.mark.parametrize("kind", [4, 5, 9, 24, 31, 41, 1000])
def test_types_that_are_not_read_are_refused_by_name(kind: int) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=f"a in the GGML type {kind}") as refused:
        parsed(File(tensors=(Tensor(b"a", kind=kind),)).bytes())
    assert "Q4_K" in str(refused.value.hint)


def test_a_header_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    content = File(pairs=(array(b"a", 8, 1000, text(b"b") * 1000),)).bytes()
    parsed(content)
    monkeypatch.setattr(gguf_header, "MAX_HEADER_BYTES", 4000)
    with pytest.raises(CorruptCheckpoint, match="its header, which ends at 4000"):
        parsed(content)


def sound(header: GgufHeader, size: int) -> bool:
    """True if all tensors lie within the file and apart from each other."""
    places = sorted((entry.begin, entry.begin + entry.size) for entry in header.tensors.values())
    inside = all(header.data <= begin and end <= size for begin, end in places)
    return inside and all(one[1] <= other[0] for one, other in pairwise(places))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_is_changed_in_a_header_it_is_refused_or_sound(data: st.DataObject) -> None:
    pairs = (ARCHITECTURE, number(b"general.alignment", 4, 32), array(b"a", 8, 2, text(b"bc") + text(b"")))
    content = bytearray(File(pairs=pairs).bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1025))
        value = data.draw(
            st.sampled_from([b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 1 << 40), b"\x01", b"\x80", b"\x09"])
        )
        content[place : place + len(value)] = value
    cut = data.draw(st.integers(0, len(content)))
    kept = bytes(content[:cut]) if data.draw(st.booleans()) else bytes(content)
    with suppress(InputError):
        assert sound(parsed(kept, len(kept) or 1), len(kept))
