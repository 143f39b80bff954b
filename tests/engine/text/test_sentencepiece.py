"""A tokenizer that is a tokenizer.model alone gives the tokens of the library that made it."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from safetensors.torch import load_file

from tests.engine.conftest import run_job
from workers.engine.text.sequences import load_tokenizer

TEXT = "Weights of a language model, rounded: 13 times, é and 猫, and\n  two spaces."


@pytest.fixture
def sentencepiece_alone(small_model: Path, tmp_path: Path) -> Path:
    """The small model with a byte-fallback BPE of SentencePiece in place of its tokenizer."""
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*", "chat*"))
    text = tmp_path / "text.txt"
    text.write_text((Path(__file__).parents[3] / "README.md").read_text() * 2)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=390,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",  # as Llama's
        remove_extra_whitespaces=False,
        character_coverage=0.99,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_tokens_are_those_of_sentencepiece_and_the_result_has_the_tokenizer(
    sentencepiece_alone: Path, tmp_path: Path
) -> None:
    oracle = sentencepiece.SentencePieceProcessor(str(sentencepiece_alone / "tokenizer.model"))
    ours = load_tokenizer(sentencepiece_alone)(TEXT, add_special_tokens=False)["input_ids"]
    assert ours == oracle.encode(TEXT)
    result = run_job(sentencepiece_alone, tmp_path / "job", formats=["merged"])
    assert result.report.quality is not None
    merged = tmp_path / "job" / "output" / "merged"
    assert (merged / "tokenizer.model").read_bytes() == (sentencepiece_alone / "tokenizer.model").read_bytes()
    assert load_tokenizer(merged)(TEXT, add_special_tokens=False)["input_ids"] == ours
    assert load_file(merged / "model.safetensors")
