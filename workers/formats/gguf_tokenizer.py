"""The tokenizer of a checkpoint as GGUF metadata: byte-level BPE, which Llama 3, Qwen and SmolLM2 have.

llama.cpp splits text by rules of its own that a file only names (`tokenizer.ggml.pre`). The name is found from the
checkpoint's own pre-tokenizer, part by part: a tokenizer that no known name describes is refused, because a near miss
would load and tokenize wrongly. SentencePiece tokenizers (Llama 2, Gemma) are not written.
"""

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from app.domain.errors import FormatCannotHold

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BY_PATTERN = {WORDS + r"\p{N}{1,3}" + REST: "llama-bpe", WORDS + r"\p{N}" + REST: "qwen2"}
"""Regular expressions by which tokenizers split text -> llama.cpp's name for the same rules."""


def add_tokenizer(writer: GGUFWriter, folder: Path, vocabulary: int) -> None:
    """Adds tokens, merges, special tokens and chat template; `vocabulary` rows are in the embedding matrix."""
    tokenizer = _read(folder)
    tokens, kinds = _tokens(tokenizer, vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_name(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    SpecialVocab(folder, load_merges=True, n_vocab=vocabulary).add_to_gguf(writer, quiet=True)


def check_tokenizer(folder: Path, vocabulary: int) -> None:
    """Looks at the tokenizer without writing it.

    Raises:
        FormatCannotHold: it is not byte-level BPE, splits text in a way that has no name, or has more tokens than rows.
    """
    tokenizer = _read(folder)
    pre_name(tokenizer)
    largest = max([*tokenizer["model"]["vocab"].values(), *(t["id"] for t in tokenizer.get("added_tokens", []))])
    if largest >= vocabulary:
        raise _refusal(f"it has the token id {largest}, and the model has {vocabulary} embeddings")


def pre_name(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for how the tokenizer (decoded tokenizer.json) splits text.

    Raises:
        FormatCannotHold: there is none.
    """
    if tokenizer["model"].get("type") != "BPE" or tokenizer["model"].get("byte_fallback"):
        raise _refusal("it is not byte-level BPE")
    splitter = tokenizer.get("pre_tokenizer") or {}
    parts = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    last = parts[-1]
    by_regex = last.get("use_regex", True)
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise _refusal("it is not byte-level BPE without a space in front")
    first = parts[:-1]
    if not first and by_regex:
        return "gpt-2"
    if len(first) == 1 and by_regex and first[0].get("type") == "Digits" and first[0].get("individual_digits"):
        return "smollm"
    if len(first) == 1 and not by_regex and first[0].get("type") == "Split":
        name = BY_PATTERN.get(first[0].get("pattern", {}).get("Regex", ""))
        if name is not None:
            return name
    raise _refusal("it splits text in a way that llama.cpp has no name for")


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise _refusal("there is no tokenizer.json")
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise _refusal(f"tokenizer.json is not JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict) or "vocab" not in found["model"]:
        raise _refusal("tokenizer.json describes no vocabulary")
    return found


def _tokens(tokenizer: dict[str, Any], vocabulary: int) -> tuple[list[str], list[TokenType]]:
    """Text and kind of each row of the embedding matrix; rows without a token are unused."""
    tokens = [f"[PAD{index}]" for index in range(vocabulary)]
    kinds = [TokenType.UNUSED] * vocabulary
    for text, index in tokenizer["model"]["vocab"].items():
        tokens[index], kinds[index] = text, TokenType.NORMAL
    for added in tokenizer.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    return tokens, kinds


def _refusal(reason: str) -> FormatCannotHold:
    return FormatCannotHold(
        f"gguf cannot hold the model's tokenizer: {reason}",
        field="formats",
        hint="leave gguf out; llama.cpp's own converter makes a GGUF of a `merged` checkpoint",
    )
