"""The quick reader of a file's metadata, against gguf-py's own."""

from pathlib import Path

import gguf
import numpy as np

from workers.formats.gguf.read_back import LONG, _Reader

LISTS = {
    "texts": ["", "a", "naïve", "東京", "b" * 300],
    "numbers": [1, 2, 300],
    "reals": [0.5, -1.25],
    "flags": [True, False],
}


def test_fields_and_tensors_are_those_of_the_package(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    for name, values in LISTS.items():
        writer.add_array(f"test.{name}", values)
    writer.add_string("test.text", "one text")
    writer.add_float32("test.real", 0.1)
    writer.add_tensor("some.weight", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    quick, stock = _Reader(file), gguf.GGUFReader(file)
    assert list(quick.fields) == list(stock.fields)
    for name, field in stock.fields.items():
        found = quick.fields[name]
        assert (found.types, found.data) == (field.types, field.data)
        assert found.contents() == field.contents()
        assert all(np.array_equal(one, other) for one, other in zip(found.parts, field.parts, strict=True))
    assert quick.fields["test.texts"].contents() == LISTS["texts"]
    assert np.array_equal(quick.tensors[0].data, stock.tensors[0].data)


def test_of_a_vocabulary_it_shows_nothing_and_goes_past_it(tmp_path: Path) -> None:
    file, count = tmp_path / "model.gguf", LONG + 3
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_array("test.texts", [f"text {index}" for index in range(count)])
    writer.add_array("test.numbers", [7] * count)
    writer.add_string("test.last", "what follows")
    writer.add_tensor("some.weight", np.ones((2, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    quick = _Reader(file)
    assert quick.fields["test.texts"].contents() == quick.fields["test.numbers"].contents() == []
    assert quick.fields["test.last"].contents() == "what follows"
    assert np.array_equal(quick.tensors[0].data, np.ones((2, 4), np.float32))
