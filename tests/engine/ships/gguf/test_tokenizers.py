"""Token ids of a mixed text, by a real llama.cpp and by the tokenizer that transformers loads.

`make test-llama-cpp` installs it and runs these.
"""

import os
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from app.domain.formats import ExportFormat
from tests.engine.ships.gguf.tokenizers import KINDS, MIXED, SPECIAL, VOCABULARY, save
from tests.engine.ships.gguf_models import SHAPE
from tests.engine.ships.llama_cpp import Answer, ask
from workers.engine.model.checkpoint import Checkpoint
from workers.formats.registry import open_writer

FOLDER = os.environ.get("BITWRIGHT_TEST_LLAMA_CPP", "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FOLDER, reason="make test-llama-cpp installs llama.cpp")]
AFTER_SPECIAL = frozenset({"llama, first"})
"""Whose texts after a special token have no space in front, which llama.cpp puts there; a warning says so."""


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_makes_the_tokens_of_the_source(kind: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **(SHAPE | {"vocab_size": VOCABULARY, "eos_token_id": 2}))
    source = tmp_path / "source"
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    save(source, KINDS[kind](), chat_template="{{ messages[0]['content'] }}")
    writer = open_writer(tmp_path / "out", ExportFormat.GGUF, Checkpoint.open(source))
    writer.finish()
    texts = [text for text in MIXED if kind not in AFTER_SPECIAL or not any(token in text for token in SPECIAL)]
    answer = ask(Path(FOLDER), tmp_path / "out" / "model.gguf", [1, 2, 3], texts)
    assert isinstance(answer, Answer), answer
    expected = AutoTokenizer.from_pretrained(source)
    assert answer.tokens == [expected(text)["input_ids"] for text in texts]
    assert bool(writer.warnings) is (kind in {"tekken", "gpt-4o", "llama, first", "llama, always"})
