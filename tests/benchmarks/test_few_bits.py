"""Texts and generations of measurements at few bits, against whole passes without a cache and brute force."""

import string
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.against_auto_round import QualityMeter, windows
from benchmarks.few_bits.generations import GRAM, Prompts, first_difference, greedy, repeated
from benchmarks.few_bits.texts import cut, free_sequences, sequences_of, written_sequences
from tests.engine.model.random_models import VOCABULARY, save_random_model
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.text.generated import Generation

BEGIN = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in fp32 beside a tokenizer of letters, which begins each text with a token."""
    folder = tmp_path_factory.mktemp("model")
    save_random_model(folder, "llama")
    words = {"<s>": BEGIN} | {letter: place for place, letter in enumerate(string.ascii_lowercase, 1)}
    letters = Tokenizer(WordLevel(words, unk_token="<s>"))
    letters.pre_tokenizer = Whitespace()
    letters.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    found = PreTrainedTokenizerFast.from_pretrained(folder)
    assert isinstance(found, PreTrainedTokenizerFast)
    return found


def text_of(count: int) -> str:
    order = torch.randint(26, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return " ".join(string.ascii_lowercase[letter] for letter in order)


def test_windows_are_the_texts_at_other_offsets(tokenizer: PreTrainedTokenizerFast) -> None:
    text, length = text_of(100), 16
    stream = tokenizer(text, add_special_tokens=False).input_ids
    rows = cut(tokenizer, text, length, 14)
    assert rows.shape == (14, length)
    assert (rows[:, 0] == BEGIN).all()
    starts = []
    for row in rows[:, 1:].tolist():
        (start,) = [s for s in range(100) if stream[s : s + length - 1] == row]
        starts.append(start)
    assert starts[:6] == [0, 15, 30, 45, 60, 75]
    assert len(set(starts)) == 14
    assert sorted({start % 15 for start in starts}) == [0, 5, 10]


def test_rows_tokenized_together_are_the_windows_of_their_text(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [text_of(count) for count in (50, 3, 90, 7)]
    whole = windows(tokenizer, " ".join(rows), 16)[:, 0]
    assert torch.equal(sequences_of(tokenizer, rows, 16, 100), whole)
    assert torch.equal(sequences_of(tokenizer, rows, 16, 4), whole[:4])


@pytest.mark.slow
def test_sequences_are_pieces_that_begin_as_they_say(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    by = Generation(Checkpoint.open(folder), tokenizer, torch.device("cpu"), Path(), True, lambda *_: None)
    text = cut(tokenizer, text_of(400), 24, 12)
    rows = written_sequences(by, text, 24, 12, seed=3)
    assert rows.shape == (12, 24)
    stream = [row[place : place + 12].tolist() for row in text for place in range(13)]
    assert all(row[1:13].tolist() in stream for row in rows)
    free = free_sequences(by, 24, 12, seed=3)
    assert free.shape == (12, 24)
    assert (free[:, 0] == BEGIN).all()
    assert BEGIN not in free[:, 1]
    assert len(set(free[:, 1].tolist())) > 4
    assert not any(row[1:13].tolist() in stream for row in free)


def test_generations_are_those_of_transformers_and_compared_token_by_token(folder: Path, model: Any) -> None:
    prompts = torch.randint(VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(4))
    found = greedy(model, prompts, 6)
    theirs = model.generate(prompts, do_sample=False, min_new_tokens=6, max_new_tokens=6, eos_token_id=None)
    assert torch.equal(found, theirs[:, 8:])
    other = found.clone()
    other[1, 2] += 1
    other[2, 0] += 1
    assert first_difference(found, other).tolist() == [6, 2, 0]
    rows = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4, 1], [1, 2, 3, 4, 5, 6, 7, 8, 9]])
    again = [[tuple(row[i : i + GRAM]) for i in range(len(row) - GRAM + 1)] for row in rows.tolist()]
    by_hand = sum(sum(gram in grams[:i] for i, gram in enumerate(grams)) / len(grams) for grams in again) / 2
    assert repeated(rows) == pytest.approx(by_hand)
    assert by_hand > 0.1
    of = Prompts.of(str(folder), [text_of(40), "a b", text_of(50)[20:]], torch.device("cpu"))
    assert of.ids.shape == (2, 32)
    line = of.compared(AutoModelForCausalLM.from_pretrained(folder))
    assert "2 generations: first difference 64.0 of 64 (median 64), 2 equal, tokens 1.000" in line


def test_the_original_has_no_distance_from_itself(folder: Path) -> None:
    meter = QualityMeter(str(folder), text_of(2100), 2, "cpu")
    assert meter(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))["kl"] == 0
    whole = AutoModelForCausalLM.from_pretrained(folder)
    whole.lm_head.weight.data[0] += 1
    far = meter(whole)["kl"]
    assert far > 0
    assert [meter(whole, keep=True)["kl"] for _ in range(2)] == [far, far]
