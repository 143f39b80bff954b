"""Scores that llama.cpp merges by, made of merges: SentencePiece by brute force merges as the tokenizers library."""

import json
from itertools import pairwise
from typing import Any

import pytest

from bitwright.errors import FormatCannotHold
from tests.engine.ships.gguf.tokenizers import MIXED, SPACE, sentencepiece
from workers.formats.gguf.tokenizers.byte_fallback import byte_fallback, scores_of


def merged_by_score(text: str, scores: dict[str, float]) -> list[str]:
    """Pieces of a text: the best pair of neighbours first, of equal ones the leftmost, until none is a piece."""
    pieces = list(text)
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in scores]
        if not pairs:
            return pieces
        place = -max(pairs)[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]


def test_scores_merge_as_the_merges_do() -> None:
    made = sentencepiece("never", around="$A")
    scores = byte_fallback(json.loads(made.to_str())).scores
    assert scores is not None
    for text in (*MIXED[2:4], MIXED[5]):
        ours = [piece for piece in merged_by_score(text.replace(" ", SPACE), dict(scores)) if piece in made.get_vocab()]
        theirs = [token for token in made.encode(text).tokens if not token.startswith("<0x")]
        assert ours == theirs


@pytest.mark.parametrize(
    ("pairs", "known", "scores"),
    [
        ([("a", "b"), ("ab", "c")], ["a", "b", "c", "ab", "abc"], {"ab": 0, "abc": -1}),
        ([("a", "b"), ("ab", "c"), ("a", "bc")], ["a", "b", "c", "ab", "abc"], {"ab": 0, "abc": -1}),
        ([("a", "b"), ("ab", "c")], ["a", "b", "c", "ab", "bc", "abc"], None),
        (
            [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")],
            ["a", "b", "c", "ab", "bc", "abc"],
            {"ab": 0, "bc": -1, "abc": -2},
        ),
        ([("a", "bc"), ("b", "c"), ("ab", "c")], ["a", "b", "c", "bc", "abc"], None),
    ],
    ids=["one way", "two ways together", "a way that is no merge", "all ways", "ways apart"],
)
def test_merges_that_no_scores_stand_for_have_none(
    pairs: list[tuple[str, str]], known: list[str], scores: dict[str, float] | None
) -> None:
    assert scores_of(pairs, {token: index for index, token in enumerate(known)}, set()) == scores


@pytest.mark.parametrize(
    ("prefix", "complete", "model", "space"),
    [
        ("prepend", True, "llama", True),
        ("always", True, "llama", True),
        ("never", True, "llama", False),
        ("never", False, "gemma4", False),
    ],
)
def test_the_algorithm_and_the_space_in_front(prefix: str, complete: bool, model: str, space: bool) -> None:
    found = byte_fallback(json.loads(sentencepiece(prefix, complete=complete).to_str()))
    assert (found.model, found.space_prefix, found.merges is None) == (model, space, model == "llama")
    assert bool(found.warnings) is (prefix == "always"), "Metaspace puts none before a text that begins with one"


def changed(**changes: Any) -> dict[str, Any]:
    described = json.loads(sentencepiece("never").to_str())
    return {**described, **changes}


@pytest.mark.parametrize(
    ("described", "words"),
    [
        (lambda: changed(normalizer=None), "takes spaces as they are"),
        (lambda: changed(normalizer={"type": "NFKC"}), "normalizes text .NFKC."),
        (lambda: changed(pre_tokenizer={"type": "Digits", "individual_digits": True}), "splits text by Digits"),
        (lambda: json.loads(sentencepiece("prepend", complete=False).to_str()), "merges are not those that scores"),
    ],
)
def test_what_llama_cpp_does_not_do_is_refused(described: Any, words: str) -> None:
    with pytest.raises(FormatCannotHold, match=words):
        byte_fallback(described())


def test_all_bytes_must_be_tokens() -> None:
    described = changed()
    described["model"]["vocab"].pop("<0x41>")
    with pytest.raises(FormatCannotHold, match="not all 256"):
        byte_fallback(described)
