"""Tokenizers that are SentencePiece's file alone, as in Llama 2's checkpoints: against its library."""

import json
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from tests.engine.conftest import run_job
from tests.engine.model.random_models import save_random_model
from workers.engine.text.sequences import has_tokenizer, load_tokenizer
from workers.tiny_model import training_text

SAMPLES = ("Hello world, how are you? 12", "two  spaces\n", "naïve 漢字 \N{GRINNING FACE}", "")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def save_sentencepiece(folder: Path) -> None:
    """`tokenizer.model` and the configuration that names its class; no tokenizer.json."""
    SentencePieceTrainer.train(
        sentence_iterator=iter(training_text().splitlines()[:1000]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",  # as Llama 2 has it
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def test_tokens_are_those_of_sentencepiece(tmp_path: Path) -> None:
    save_random_model(tmp_path, "llama")
    save_sentencepiece(tmp_path)
    assert has_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    oracle = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for sample in SAMPLES:
        assert tokenizer(sample, add_special_tokens=False)["input_ids"] == oracle.encode(sample), sample


def test_a_job_reads_its_text_with_it_and_the_result_has_it(tmp_path: Path) -> None:
    save_random_model(tmp_path / "model", "llama", vocab_size=400)
    save_sentencepiece(tmp_path / "model")
    result = run_job(tmp_path / "model", tmp_path / "job", formats=["merged"], group_size=16)
    assert result.report.quality is not None
    merged = tmp_path / "job" / "output" / "merged"
    assert (merged / "tokenizer.model").read_bytes() == (tmp_path / "model" / "tokenizer.model").read_bytes()
    assert not (merged / "tokenizer.json").exists()
