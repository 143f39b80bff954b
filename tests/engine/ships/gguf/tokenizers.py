"""Tiny tokenizers of the kinds that llama.cpp knows, trained on Python's own documentation."""

import json
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from workers.formats.gguf.tokenizers.byte_level import LETTERS_WITH_CASE

VOCABULARY = 800
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXTS = list(pydoc_data.topics.topics.values())[:30] + ["été naïve Größe 東京 12345 ½", "1 22 333 4444 55555"] * 20
MIXED = [
    "a",
    "",
    "Hello world, 1234 it's été\n\n  def f(x):  return",
    "They'LL see 12345 things;  don't 99%\r\n\t\tx = [1, 2]\n \n",
    "東京で2026年。 emoji 🙂🙃 <|im_start|>user\nhi<|im_end|>\n</s>",
    "the statement object is the object that is the object/path and CamelCase words_with_underscores",
    "trailing   ",
    "x\n\n\n\ny\ttabs\t\tand…—dashes «quotes» 123,456.78 naïve Größe $5 + `code`",
]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN_3_5 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SEED = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+"
    "|\\s+(?!\\S)|\\s+"
)
DEEPSEEK = [
    "\\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
]


def byte_level(*patterns: str, digits: bool = False, whole_words: bool = False, around: str = "<s> $A") -> Tokenizer:
    """Byte-level BPE that splits by these expressions one after another; without any, as GPT-2 does."""
    made = Tokenizer(models.BPE(ignore_merges=whole_words))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps += [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not patterns))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    return _trained(made, around, pre_tokenizers.ByteLevel.alphabet(), ())


def stepwise(*steps: Any) -> Tokenizer:
    """Byte-level BPE by these steps."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    made.decoder = decoders.ByteLevel()
    return _trained(made, "<s> $A", pre_tokenizers.ByteLevel.alphabet(), ())


def isolating(*patterns: str) -> list[Any]:
    """Steps whose matches are pieces."""
    return [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]


DIGITS, BYTES = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False, use_regex=False)
HAN = "[一-龥ࠀ-一가-퟿]+"


def sentencepiece(prefix: str, *, complete: bool = True, around: str = "<s> $A") -> Tokenizer:
    """BPE over characters with bytes to fall back on.

    prefix    how a space comes before a text: "prepend" (Llama 2), "always", "first" (Metaspace) or "never" (Gemma)
    complete  whether every way to put a piece together is a merge, as in files that SentencePiece's became
    """
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", SPACE)
    if prefix == "prepend":
        made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
    elif prefix == "never":
        made.normalizer = replace
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=prefix, split=False)
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    split = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=True)
    lines = pre_tokenizers.Split(Regex("\n"), "isolated")
    own, made.pre_tokenizer = made.pre_tokenizer, pre_tokenizers.Sequence([split, lines])
    octets = [f"<0x{value:02X}>" for value in range(256)]
    trained = json.loads(_trained(made, around, [], octets).to_str())
    trained["pre_tokenizer"] = None if own is None else json.loads(own.__getstate__())
    trained["added_tokens"] = [token for token in trained["added_tokens"] if token["content"] in SPECIAL]
    if complete:
        trained["model"]["merges"] = _every_way(trained["model"])
    return Tokenizer.from_str(json.dumps(trained))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": byte_level,
    "smollm": lambda: byte_level(digits=True),
    "llama-bpe": lambda: byte_level(LLAMA_3, whole_words=True),
    "dbrx": lambda: byte_level(LLAMA_3),
    "qwen2": lambda: byte_level(QWEN),
    "qwen35": lambda: byte_level(QWEN_3_5),
    "tekken": lambda: byte_level(TEKKEN, whole_words=True),
    "gpt-4o": lambda: byte_level(GPT_4O),
    "seed-coder": lambda: byte_level(SEED),
    "deepseek-v3": lambda: byte_level(*DEEPSEEK),
    "bloom": lambda: byte_level(r" ?[^(\s|[.,!?…。，、।۔،])]+"),
    "deepseek-coder": lambda: stepwise(*isolating("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN), DIGITS, BYTES),
    "deepseek-llm": lambda: stepwise(
        *isolating("[\r\n]", r"\s?[" + LETTERS_WITH_CASE + "]+", "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$", HAN),
        DIGITS,
        BYTES,
    ),
    "falcon": lambda: stepwise(
        pre_tokenizers.Punctuation("contiguous"),
        pre_tokenizers.ByteLevel(False),
        pre_tokenizers.Digits(individual_digits=False),
        *isolating("[0-9][0-9][0-9]"),
    ),
    "llama, prepend": lambda: sentencepiece("prepend"),
    "llama, always": lambda: sentencepiece("always"),
    "llama, first": lambda: sentencepiece("first"),
    "llama, never": lambda: sentencepiece("never"),
    "gemma4": lambda: sentencepiece("never", complete=False),
}
"""By `tokenizer.ggml.pre`, or by `tokenizer.ggml.model` and the way a space comes before a text."""


def save(folder: Path, made: Tokenizer, **config: Any) -> Path:
    """tokenizer.json and tokenizer_config.json of a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def _trained(made: Tokenizer, around: str, alphabet: list[str], octets: Any) -> Tokenizer:
    special = [*SPECIAL, *octets]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 10, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    named = [(token, index) for index, token in enumerate(SPECIAL)]
    made.post_processor = processors.TemplateProcessing(single=around, special_tokens=named)
    return made


def _every_way(model: dict[str, Any]) -> list[list[str]]:
    """All pairs of tokens that are a merged piece together, piece by piece in the order of the merges."""
    vocabulary, merges = model["vocab"], []
    for first, second in (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]):
        made = first + second
        ways = [[made[:place], made[place:]] for place in range(1, len(made))]
        merges += [way for way in ways if way[0] in vocabulary and way[1] in vocabulary]
    return merges
