"""Names of rules by which byte-level tokenizers split text."""

import json

import pytest
from tokenizers import Tokenizer

from bitwright.errors import FormatCannotHold
from tests.engine.ships.gguf.tokenizers import GPT_4O, KINDS, LLAMA_3, TEKKEN, byte_level
from workers.formats.gguf.tokenizers.byte_level import byte_level as rules
from workers.formats.gguf.tokenizers.byte_level import pre_name

NAMED = [name for name in KINDS if name not in ("gemma4",) and not name.startswith("llama,")]


def described(made: Tokenizer) -> dict:  # type: ignore[type-arg]
    return dict(json.loads(made.to_str()))


@pytest.mark.parametrize("name", NAMED)
def test_rules_have_llama_cpps_names(name: str) -> None:
    assert pre_name(described(KINDS[name]())) == name


def test_rules_for_capital_letters_are_said_to_be_simpler() -> None:
    assert rules(described(byte_level(TEKKEN, whole_words=True))).warnings
    assert not rules(described(byte_level(LLAMA_3))).warnings


@pytest.mark.parametrize("pattern", [TEKKEN, GPT_4O])
def test_whole_words_make_no_difference_where_merges_reach_every_token(pattern: str) -> None:
    """Tekken's name takes words that are tokens as they are, and GPT-4o's does not: both know a tokenizer of merges."""
    names = {pre_name(described(byte_level(pattern, whole_words=whole))) for whole in (False, True)}
    assert len(names) == 1


def test_whole_words_that_no_merge_makes_need_the_name_that_takes_them() -> None:
    made = described(byte_level(GPT_4O, whole_words=True))
    made["model"]["vocab"]["zqzqzq"] = len(made["model"]["vocab"])
    with pytest.raises(FormatCannotHold, match="no name for"):
        pre_name(made)


def test_matches_that_are_kept_and_what_is_between_thrown_away_are_the_same_rule() -> None:
    made = described(byte_level(LLAMA_3))
    made["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}
    assert pre_name(made) == "dbrx"


@pytest.mark.parametrize(
    ("name", "pair"), [("deepseek-coder", "12"), ("deepseek-llm", "a1"), ("falcon", "Ġ1"), ("falcon", "1234")]
)
def test_merges_across_digits_that_llama_cpp_does_not_take_apart_are_refused(name: str, pair: str) -> None:
    made = described(KINDS[name]())
    made["model"]["merges"].append([pair[:1], pair[1:]])
    with pytest.raises(FormatCannotHold, match="reaches across digits"):
        pre_name(made)
