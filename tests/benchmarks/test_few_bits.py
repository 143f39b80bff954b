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

from benchmarks.against_auto_round import QualityMeter
from benchmarks.few_bits.generations import GRAM, Prompts, first_difference, greedy, repeated
from benchmarks.few_bits.texts import SHORTEST, cut, free_sequences, written, written_sequences
from tests.engine.model.random_models import VOCABULARY, save_random_model

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


@pytest.mark.slow
def test_what_is_written_follows_its_prefix_by_the_models_odds(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    prefixes, given = torch.randint(VOCABULARY, (6, 9), generator=generator), torch.tensor([3, 4, 5, 6, 7, 9])
    surely = written(model, prefixes, given, 14, seed=0, sure=14)
    with torch.no_grad():
        likeliest = model(surely).logits.argmax(-1)
    for row, count in enumerate(given.tolist()):
        assert torch.equal(surely[row, :count], prefixes[row, :count])
        assert torch.equal(surely[row, count:], likeliest[row, count - 1 : -1])
    same = written(model, prefixes[:1].expand(4000, -1), torch.full((4000,), 9), 10, seed=2)
    with torch.no_grad():
        odds = model(prefixes[:1]).logits[0, -1].softmax(-1)
    seen = torch.bincount(same[:, 9], minlength=VOCABULARY) / 4000
    assert (seen - odds).abs().max() < 4 * float((odds * (1 - odds) / 4000).sqrt().max())
    assert (seen > 0).sum() > 2


@pytest.mark.slow
def test_sequences_are_pieces_that_begin_as_they_say(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    text = text_of(400)
    rows = written_sequences(model, tokenizer, text, 24, 12, seed=3)
    assert rows.shape == (12, 24)
    starts = {tuple(row[:SHORTEST].tolist()) for row in cut(tokenizer, text, 24, 12)}
    assert {tuple(row[:SHORTEST].tolist()) for row in rows} == starts
    free = free_sequences(model, tokenizer, 24, 12, seed=3)
    assert free.shape == (12, 24)
    assert (free[:, 0] == BEGIN).all()
    assert BEGIN not in free[:, 1]
    assert len(set(free[:, 1].tolist())) > 4
    with torch.no_grad():
        likeliest = model(free).logits.argmax(-1)
    assert torch.equal(free[:, 2:5], likeliest[:, 1:4])
    assert not torch.equal(free[:, 5:], likeliest[:, 4:-1])


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
    assert meter(whole)["kl"] > 0
