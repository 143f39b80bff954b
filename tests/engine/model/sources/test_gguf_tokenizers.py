"""Tokenizers of GGUF files that are sources: the rules that a file names, where transformers splits as GPT-2 does."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from tokenizers import Tokenizer

from bitwright.errors import UnsupportedCheckpoint
from tests.engine.ships.gguf.tokenizers import KINDS, save
from workers.engine.model.sources.gguf import GgufSource, gguf_header
from workers.engine.model.sources.opening import _save_tokenizer
from workers.formats.gguf.tokenizer import add_tokenizer
from workers.formats.gguf.tokenizers.named_rules import RULES, check_rules
from workers.formats.library_config import library_tokenizer

TEXT = (
    "The 3 quick foxes, aged 12 and 345, don't jump over 6789 dogs: naïve cafe\u0301, Größe, 東京で2026年。 "
    "x9876543210y They'LL see 1234567 is 50% off $5\n\n\tdef f(x):  return x**2  # über\r\n"
    "   CamelÉCase، a.b/c trailing   "
)
QUICK = ["deepseek-v3", "llama-bpe", "falcon", "smollm", "llama, never"]
"""Rules that transformers does not know, those that it knows, and a space that is not put before a text."""


def _kinds() -> Iterator[object]:
    for name in KINDS:
        yield pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)


def _written(folder: Path, kind: str) -> tuple[Tokenizer, Path]:
    """A tokenizer, and a GGUF file of it."""
    made = KINDS[kind]()
    source = save(folder / "source", made)
    vocabulary = made.get_vocab_size()
    writer = GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_vocab_size(vocabulary)
    add_tokenizer(writer, source, vocabulary)
    writer.add_tensor("a.weight", np.zeros((2, 32), np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return made, folder / "model.gguf"


@pytest.mark.parametrize("kind", [each for each in _kinds() if "gemma4" not in str(each)])
def test_a_files_tokenizer_splits_and_reads_text_as_the_one_that_it_was_made_of(kind: str, tmp_path: Path) -> None:
    original, file = _written(tmp_path, kind)
    config: dict[str, object] = {"vocab_size": original.get_vocab_size()}
    source = GgufSource(config, {}, "", True, gguf_header(file).metadata, {})
    (tmp_path / "made").mkdir()
    _save_tokenizer(file, source, tmp_path / "made")
    made = Tokenizer.from_file(str(tmp_path / "made" / "tokenizer.json"))
    loaded = library_tokenizer(tmp_path / "made")
    if made.pre_tokenizer is not None and original.pre_tokenizer is not None and not kind.startswith("llama,"):
        assert made.pre_tokenizer.pre_tokenize_str(TEXT) == original.pre_tokenizer.pre_tokenize_str(TEXT)
    assert loaded(TEXT, add_special_tokens=False).input_ids == original.encode(TEXT, add_special_tokens=False).ids


def test_rules_of_an_unknown_name_are_refused_with_the_way_out() -> None:
    with pytest.raises(UnsupportedCheckpoint, match="'of-tomorrow'") as raised:
        check_rules({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "of-tomorrow"}, "model.gguf")
    assert "tokenizer.json" in str(raised.value.hint)
    for name in (None, "default", *RULES):
        check_rules({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name}, "model.gguf")
    check_rules({"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}, "model.gguf")


def test_a_name_that_this_writes_is_read_again() -> None:
    written = {name for name in KINDS if not name.startswith("llama,") and name != "gemma4"}
    assert written <= RULES.keys()
    assert all(json.dumps(steps) for steps, _ in RULES.values())
