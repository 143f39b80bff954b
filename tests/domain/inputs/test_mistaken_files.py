"""Files that are something else than their names say, written by those who write them: each is told what it is."""

import gzip
import hashlib
import io
import json
import zipfile
from pathlib import Path

import pytest

from app.domain.inputs.jsonl import check_jsonl
from app.domain.inputs.mistaken_files import TOLD_BY, mistaken
from app.domain.inputs.quantized.gguf_header import parse_gguf
from app.domain.inputs.safetensors_header import LENGTH_BYTES, header_length
from app.domain.inputs.side_files import read_object
from bitwright.errors import CorruptCheckpoint, InvalidDataset


def pointer(data: bytes = b"weights") -> bytes:
    """As git-lfs's specification has it: the keys in alphabetical order after the version, a space, a line feed."""
    digest = hashlib.sha256(data).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(data)}\n".encode()


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("data.pkl", b"")
    return buffer.getvalue()


def parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["a"]}), buffer)
    return buffer.getvalue()


KINDS = {
    "git lfs pull": pointer(),
    "gunzip": gzip.compress(b'{"text": "a"}\n'),
    "unpack": archive(),
    "to_json": parquet(),
    "gated": b"<!DOCTYPE html>\n<html></html>",
    "again": b"\n<html><body>404</body></html>",
    "utf-8": '{"text":\n"a"}\n'.encode("utf-16") + b"\n",
}


@pytest.mark.parametrize("hint", KINDS)
def test_each_kind_has_a_way_out_wherever_it_is_met(hint: str) -> None:
    data = KINDS[hint]
    with pytest.raises(CorruptCheckpoint) as weights:
        header_length(data[:LENGTH_BYTES], len(data), "model.safetensors")
    with pytest.raises(CorruptCheckpoint) as config:
        read_object(data, "config.json", "config.json")
    with pytest.raises(InvalidDataset) as text:
        check_jsonl(io.BytesIO(data.lstrip()), "rows.jsonl")
    with pytest.raises(CorruptCheckpoint) as gguf:
        parse_gguf(lambda start, length: data[start : start + length], len(data), "model.gguf")
    for caught in (weights, config, text, gguf):
        assert hint in str(caught.value.hint)
        assert " is a" in str(caught.value)


def test_files_that_are_what_they_say_are_taken_for_nothing_else() -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    for length in (2, 0x7B22, len(header), 99_999_999):
        assert mistaken(length.to_bytes(LENGTH_BYTES, "little")) is None
    for text in (b'{"text": "a"}', b"[1]", b"", b"\n", b"{", b"version 1.0 of it", b"\xef\xbb\xbf{}"):
        assert mistaken(text) is None
        assert mistaken(text[:TOLD_BY]) is None or text.startswith(b"version ")


@pytest.mark.parametrize(("rows", "tool"), [([{"text": "a"}, {"text": "b"}], "'.[]'"), ({"text": "a"}, "-c .")])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_over_several_lines_is_told_how_to_be_one_a_line(rows: object, tool: str, indent: int | None) -> None:
    data = json.dumps(rows, indent=indent).encode()
    if isinstance(rows, dict) and indent is None:
        assert check_jsonl(io.BytesIO(data), "rows.jsonl") == 1
        return
    with pytest.raises(InvalidDataset) as caught:
        check_jsonl(io.BytesIO(data), "rows.jsonl")
    assert f"jq {'' if tool.startswith('-') else '-c '}{tool} rows.json" in str(caught.value.hint)


def test_a_tokenizer_that_is_a_pointer_is_told_so(tmp_path: Path) -> None:
    from workers.engine.text.sequences import load_tokenizer

    (tmp_path / "tokenizer.json").write_bytes(pointer())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(CorruptCheckpoint) as caught:
        load_tokenizer(tmp_path)
    assert "tokenizer.json is a Git LFS pointer" in str(caught.value)
    assert "git lfs pull" in str(caught.value.hint)
