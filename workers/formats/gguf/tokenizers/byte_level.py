"""Byte-level BPE, which Llama 3, Qwen, OLMo and most others have.

llama.cpp splits text by rules of its own that a file only names (`tokenizer.ggml.pre`). The name is derived from the
pre-tokenizer, step by step: a tokenizer that no known name describes is refused, because a near miss would load and
tokenize wrongly. Read in llama.cpp v0.5.0 (`src/llama-vocab.cpp`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from tokenizers import Tokenizer

from workers.formats.gguf.tokenizers.source import Vocabulary, pairs_of, refusal, steps_of

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3, QWEN_2 = WORDS + r"\p{N}{1,3}" + REST, WORDS + r"\p{N}" + REST
QWEN_3_5 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASES = r"[^\r\n\p{L}\p{N}]?" + UPPER + "*" + LOWER + "+%s|" + r"[^\r\n\p{L}\p{N}]?" + UPPER + "+" + LOWER + "*%s|"
SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT_4O, TEKKEN = CASES % (ENDINGS, ENDINGS) + r"\p{N}{1,3}" + SLASHES, CASES % ("", "") + r"\p{N}" + SLASHES
SEED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^" + "\r\n" + r"\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}" + "\r\n" + r"]+"
    r"|\s*[" + "\r\n" + r"]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
    r"|[^" + "\r\n" + r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[" + "\r\n" + r"]*|\s*[" + "\r\n" + r"]+|\s+(?!\S)|\s+",
)

DIGIT = "\\p{N}"
"""Stands in these lists for the step that takes digits apart one by one."""
HAN = "[一-龥ࠀ-一가-퟿]+"
LETTERS_WITH_CASE = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅ"
    "ὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-"
    "ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN, DIGIT)
DEEPSEEK_LLM = (
    "[\r\n]",
    r"\s?[" + LETTERS_WITH_CASE + "]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    HAN,
    DIGIT,
)
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
FALCON: tuple[Mapping[str, Any], ...] = (
    {"type": "Punctuation", "behavior": "Contiguous"},
    {"type": "ByteLevel", "use_regex": True},
    {"type": "Digits", "individual_digits": False},
    {"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated"},
)
"""Falcon's steps: after GPT-2's rules, runs of digits apart from what is before them, in threes."""


@dataclass(frozen=True)
class Splitting:
    """llama.cpp's names of rules: for words that are tokens taken as they are (`ignore_merges`), and for others.

    approximate   whether llama.cpp's own expression differs from the original's, for letters with case outside ASCII
    """

    whole_words: str | None
    others: str | None
    approximate: bool = False


BY_PATTERNS: Mapping[tuple[str, ...], Splitting] = MappingProxyType(
    {
        (LLAMA_3,): Splitting("llama-bpe", "dbrx"),
        (QWEN_2,): Splitting(None, "qwen2"),
        (QWEN_3_5,): Splitting(None, "qwen35"),
        (GPT_4O,): Splitting(None, "gpt-4o", approximate=True),
        (TEKKEN,): Splitting("tekken", None, approximate=True),
        (SEED,): Splitting(None, "seed-coder"),
        DEEPSEEK: Splitting(None, "deepseek-v3"),
        DEEPSEEK_CODER: Splitting(None, "deepseek-coder"),
        DEEPSEEK_LLM: Splitting(None, "deepseek-llm"),
        (BLOOM,): Splitting(None, "bloom"),
    }
)
"""Regular expressions by which tokenizers split text one after another -> the names of the same rules."""
CASED = (
    "llama.cpp splits words with capital letters outside ASCII in their middle by a simpler rule: such text may become "
    "other tokens there"
)


def is_byte_level(described: Mapping[str, Any]) -> bool:
    """True for BPE over bytes as letters."""
    steps = steps_of(described.get("pre_tokenizer"), "pretokenizers")
    return described["model"].get("type") == "BPE" and any(step.get("type") == "ByteLevel" for step in steps)


def byte_level(described: Mapping[str, Any]) -> Vocabulary:
    """The rules of a byte-level tokenizer.

    Raises:
        FormatCannotHold: it splits text in a way that has no name, or does something that llama.cpp does not.
    """
    _check_rewriting(described)
    name, approximate = _name(described)
    merges = [" ".join(pair) for pair in pairs_of(described)]
    return Vocabulary("gpt2", name, merges, warnings=(CASED,) if approximate else ())


def pre_name(described: Mapping[str, Any]) -> str:
    """llama.cpp's name of the rules by which a tokenizer (tokenizer.json, decoded) splits text.

    Raises:
        FormatCannotHold: there is none.
    """
    return _name(described)[0]


def _name(described: Mapping[str, Any]) -> tuple[str, bool]:
    """The name, and whether the rules behind it are simpler than the tokenizer's."""
    if described["model"].get("type") != "BPE" or described["model"].get("byte_fallback"):
        raise refusal("it is not byte-level BPE")
    parts = steps_of(described.get("pre_tokenizer"), "pretokenizers") or [{}]
    if _is_falcon(parts):
        _demand_digits_apart(described)
        return "falcon", False
    last, first = parts[-1], parts[:-1]
    by_regex, whole_words = last.get("use_regex", True), bool(described["model"].get("ignore_merges"))
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise refusal("it is not byte-level BPE without a space in front")
    if by_regex and (not whole_words or not _whole_words_matter(described)):
        digits = [step.get("individual_digits") for step in first if step.get("type") == "Digits"]
        if not first:
            return "gpt-2", False
        if len(first) == 1 and digits == [True]:
            return "smollm", False
    patterns = tuple(_pattern(step, alone=len(first) == 1) for step in first)
    if not by_regex and first:
        found = BY_PATTERNS.get(patterns)
        name = None if found is None else _of_both(found, described, whole_words)
        if found is not None and name is not None:
            if DIGIT in patterns:
                _demand_digits_apart(described)
            return name, found.approximate
    raise refusal("it splits text in a way that llama.cpp has no name for")


def _of_both(found: Splitting, described: Mapping[str, Any], whole_words: bool) -> str | None:
    """The name for the tokenizer's way with words that are tokens, or the other one where it makes no difference."""
    own, other = (found.whole_words, found.others) if whole_words else (found.others, found.whole_words)
    return own if own is not None or other is None or _whole_words_matter(described) else other


def _pattern(step: Mapping[str, Any], *, alone: bool) -> str:
    """The expression whose matches a step takes apart, as in `BY_PATTERNS`; "" for another kind of step."""
    if step.get("type") == "Digits" and step.get("individual_digits"):
        return DIGIT
    return str(step["pattern"].get("Regex", "")) if _isolates(step, alone=alone) else ""


def _is_falcon(steps: list[Mapping[str, Any]]) -> bool:
    """True for Falcon's own steps."""
    same = len(steps) == len(FALCON)
    pairs = zip(steps, FALCON, strict=False)
    return (
        same
        and all(own.items() <= {"use_regex": True, **step}.items() for step, own in pairs)
        and not any(step.get("invert") or step.get("add_prefix_space") for step in steps)
    )


def _demand_digits_apart(described: Mapping[str, Any]) -> None:
    """Refuses merges across digits that the tokenizer takes apart.

    llama.cpp leaves what is before digits together with them, and runs of them whole: the tokens are the same where no
    merge reaches across, as where a vocabulary is trained by the tokenizer's own rules.
    """
    single = not _is_falcon(steps_of(described.get("pre_tokenizer"), "pretokenizers"))
    for first, second in pairs_of(described):
        made = first + second
        digits = sum(letter.isnumeric() for letter in made)
        if digits and (single or digits < len(made) or digits > 3):
            raise refusal(
                f"its merge of {first!r} and {second!r} reaches across digits, which llama.cpp leaves together"
            )


def _isolates(step: Mapping[str, Any], *, alone: bool) -> bool:
    """True for a step whose matches become pieces, and so does what is between them.

    Expressions that match everything, as those that stand alone do, may as well throw away what is between.
    """
    if step.get("type") != "Split":
        return False
    behavior, invert = step.get("behavior"), bool(step.get("invert"))
    return (behavior == "Isolated" and not invert) or (alone and behavior == "Removed" and invert)


def _whole_words_matter(described: Mapping[str, Any]) -> bool:
    """True if merges do not make some token of the vocabulary, which is then one only where whole words are."""
    plain: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
    }
    plain |= {"pre_tokenizer": None, "post_processor": None, "decoder": None}
    merging = Tokenizer.from_str(json.dumps(plain | {"model": {**described["model"], "ignore_merges": False}}))
    added = {token["content"] for token in described.get("added_tokens", ())}
    words = [word for word in described["model"]["vocab"] if word not in added]
    return any(len(encoded.ids) != 1 for encoded in merging.encode_batch(words, add_special_tokens=False))


def _check_rewriting(described: Mapping[str, Any]) -> None:
    """Refuses rules that change a text, or its pieces, before merges."""
    for step in steps_of(described.get("normalizer"), "normalizers"):
        if step["type"] != "NFC":
            raise refusal(f"it normalizes text ({step['type']}), which llama.cpp does not")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if described["model"].get(name):
            raise refusal(f"it has {name} = {described['model'][name]!r}, which llama.cpp does not know")
