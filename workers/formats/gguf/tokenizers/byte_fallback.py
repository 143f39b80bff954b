"""BPE over characters with bytes to fall back on: SentencePiece as tokenizer.json has it (Llama 2, Mistral, Gemma).

llama.cpp has two algorithms for it. `llama` merges two neighbours whenever together they are a token, that of the best
score first, and of equal ones the leftmost. Scores are made of the merges: the less, the later a piece is first made.
That is the tokenizer's own order if every way to put a piece together is a merge, and those of a piece follow each
other, as in all that were made from SentencePiece's own models. `gemma4` follows the merges, without a space in front,
and takes newlines apart. Read in llama.cpp v0.5.0 (`src/llama-vocab.cpp`).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from workers.formats.gguf.tokenizers.source import Vocabulary, pairs_of, refusal, steps_of

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
BYTE = re.compile("<0x[0-9A-F]{2}>")
FOLLOWS_SPACE = (
    "a text that begins with a space, or follows a special token, may become other tokens in llama.cpp, which puts a "
    "space before each"
)


def is_byte_fallback(described: Mapping[str, Any]) -> bool:
    """True for BPE over characters, whose unknown ones are bytes."""
    return described["model"].get("type") == "BPE" and bool(described["model"].get("byte_fallback"))


def byte_fallback(described: Mapping[str, Any]) -> Vocabulary:
    """The rules of such a tokenizer.

    Raises:
        FormatCannotHold: it does something to a text that llama.cpp does not, or its merges are not those of scores.
    """
    vocabulary: Mapping[str, int] = described["model"]["vocab"]
    if sum(bool(BYTE.fullmatch(token)) for token in vocabulary) != 256:
        raise refusal("it falls back on bytes, and not all 256 are tokens")
    prefix, warnings = _spaces(described, vocabulary)
    pairs = pairs_of(described)
    scores = scores_of(pairs, vocabulary, {token["content"] for token in described.get("added_tokens", ())})
    if scores is not None:
        return Vocabulary("llama", "default", None, scores, prefix, bytes_by_name=True, warnings=warnings)
    if prefix or any("\n" in first + second for first, second in pairs):
        raise refusal(
            "its merges are not those that scores of its pieces would make, which llama.cpp's algorithm needs"
        )
    merges = [f"{first} {second}" for first, second in pairs]
    return Vocabulary("gemma4", "gemma4", merges, {}, prefix, bytes_by_name=True, warnings=warnings)


def scores_of(
    pairs: Sequence[tuple[str, str]], vocabulary: Mapping[str, int], added: set[str]
) -> dict[str, float] | None:
    """Score of each merged piece, by which llama.cpp merges as the pairs do; None if there are no such scores."""
    scores: dict[str, float] = {}
    last = ""
    for rank, (first, second) in enumerate(pairs):
        made = first + second
        if made in scores and made != last:
            return None  # other pieces come between two ways to make this one
        scores.setdefault(made, -float(rank))
        last = made
    known, merges = vocabulary.keys() - added, set(pairs)
    for token in known:
        if len(token) > 1 and not BYTE.fullmatch(token) and any(pair not in merges for pair in _ways(token, known)):
            return None
    return scores


def _ways(token: str, known: set[str]) -> Iterator[tuple[str, str]]:
    """Two tokens that are this one together."""
    for place in range(1, len(token)):
        if token[:place] in known and token[place:] in known:
            yield token[:place], token[place:]


def _spaces(described: Mapping[str, Any], vocabulary: Mapping[str, int]) -> tuple[bool, tuple[str, ...]]:
    """The truth of whether a space comes before a text, and words on texts of which llama.cpp has another idea."""
    escaped, prefix = False, False
    warnings: tuple[str, ...] = ()
    for step in steps_of(described.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            prefix = True
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE:
            escaped = True
        else:
            raise refusal(f"it normalizes text ({step['type']}), which llama.cpp does not")
    for step in steps_of(described.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace" and step["replacement"] == SPACE:
            escaped = True
            if step.get("prepend_scheme", "always") != "never" and not prefix:
                prefix, warnings = True, (FOLLOWS_SPACE,)
            if step.get("split", True):
                _check_words(vocabulary)
        elif step["type"] != "Split" or step["pattern"] != {"String": " "} or not escaped:
            raise refusal(f"it splits text by {step['type']}, which llama.cpp does not")
    if not escaped:
        raise refusal("it takes spaces as they are, and llama.cpp takes them for the sign that SentencePiece has")
    return prefix, warnings


def _check_words(vocabulary: Mapping[str, int]) -> None:
    """Refuses words split at spaces where tokens go across them: llama.cpp does not split."""
    for token in vocabulary:
        if SPACE in token[1:]:
            raise refusal(f"it splits text at spaces, and its token {token!r} goes across one")
