"""The tokenizer of a checkpoint as GGUF metadata: byte-level BPE, which Llama 3, Qwen and SmolLM2 have.

The file gets the tokenizer that transformers loads from the folder, which also reads the job's texts: some of its
classes replace the rules of tokenizer.json by their own. llama.cpp splits text by rules of its own that a file only
names (`tokenizer.ggml.pre`). The name is derived from the pre-tokenizer, step by step: a tokenizer that no known name
describes is refused, because a near miss would load and tokenize wrongly. SentencePiece tokenizers (Llama 2, Gemma) are
not written.

Nothing is left to llama.cpp's defaults: there, the name of the rules decides whether tokens are put around a text, and
without an end-of-sequence token in the file it is token 11. Normalization to NFC, which Qwen's tokenizers have, is not
known to llama.cpp: text that is not in that form is split into other tokens there.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bitwright.errors import FormatCannotHold

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BY_PATTERN = {
    (WORDS + r"\p{N}{1,3}" + REST, True): "llama-bpe",
    (WORDS + r"\p{N}{1,3}" + REST, False): "dbrx",
    (WORDS + r"\p{N}" + REST, False): "qwen2",
}
"""Regular expressions by which tokenizers split text, and whether words that are tokens are taken as they are
(`ignore_merges`) -> llama.cpp's name for the same rules."""
ROLES = ("unk", "sep", "pad", "mask")
"""Special tokens that a file may name, but need not."""


@dataclass(frozen=True)
class SourceTokenizer:
    """The tokenizer that transformers loads from a folder, and its description by the tokenizers library."""

    loaded: PreTrainedTokenizerBase
    described: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "SourceTokenizer":
        """The tokenizer of a checkpoint.

        Raises:
            FormatCannotHold: transformers cannot load it, or it is not one of the tokenizers library.
        """
        try:
            loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers passes on whatever its parsers raise
            if not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
                raise FormatCannotHold(
                    "the model has no tokenizer, and a GGUF file holds one",
                    field="formats",
                    hint="add the model's tokenizer.json, or leave gguf out of formats",
                ) from error
            raise _refusal(f"transformers cannot read it: {error}") from error
        backend = getattr(loaded, "backend_tokenizer", None)
        if backend is None:
            raise _refusal(f"transformers reads it as {type(loaded).__name__}, which is not byte-level BPE")
        return cls(loaded, json.loads(backend.to_str()))

    def id_of(self, role: str) -> int | None:
        """Id of a special token, by its name in transformers; None if there is none."""
        token_id = getattr(self.loaded, f"{role}_token_id", None)
        return token_id if isinstance(token_id, int) else None

    def added(self, vocabulary: int) -> list[Mapping[str, Any]]:
        """Tokens beside the model's own, without those for padding and the like that have no row in the embeddings."""
        optional = {self.id_of(role) for role in ROLES}
        return [t for t in self.described["added_tokens"] if t["id"] < vocabulary or t["id"] not in optional]


def add_tokenizer(writer: GGUFWriter, folder: Path, vocabulary: int) -> None:
    """Adds tokens, merges, special tokens and chat template; `vocabulary` rows are in the embedding matrix."""
    tokenizer = SourceTokenizer.read(folder)
    tokens, kinds = _tokens(tokenizer, vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_name(tokenizer.described))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(_pair(merge)) for merge in tokenizer.described["model"]["merges"]])
    starts_with = [tokenizer.id_of("bos"), *_configured(folder, "bos_token_id")]
    _add_special(writer, tokenizer, starts_with, stop_tokens(folder, tokenizer, vocabulary), vocabulary)
    starts, ends = frame(tokenizer)
    writer.add_add_bos_token(starts)
    writer.add_add_eos_token(ends)
    writer.add_add_space_prefix(False)
    template = tokenizer.loaded.chat_template
    if isinstance(template, Mapping):
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
    elif template:
        writer.add_chat_template(template)


def check_tokenizer(folder: Path, vocabulary: int) -> None:
    """Checks the tokenizer without writing it.

    Raises:
        FormatCannotHold: it is not byte-level BPE, splits text in a way that has no name, has more tokens than rows, or
            does something that llama.cpp does not.
    """
    tokenizer = SourceTokenizer.read(folder)
    pre_name(tokenizer.described)
    _check_rewriting(tokenizer.described)
    added = tokenizer.added(vocabulary)
    largest = max([*tokenizer.described["model"]["vocab"].values(), *(token["id"] for token in added)], default=0)
    if largest >= vocabulary:
        raise _refusal(f"it has the token id {largest}, and the model has {vocabulary} embeddings")
    for token in added:
        greedy = [name for name in ("single_word", "lstrip", "rstrip") if token[name]]
        if greedy:
            raise _refusal(f"its token {token['content']!r} has {greedy[0]}, which llama.cpp does not know")
    tokens, _ = _tokens(tokenizer, vocabulary)
    if len(set(tokens)) < len(tokens) or not all(tokens):
        raise _refusal("two of its tokens are the same text, or one is empty")
    frame(tokenizer)
    stop_tokens(folder, tokenizer, vocabulary)


def frame(tokenizer: SourceTokenizer) -> tuple[bool, bool]:
    """Two truth values: the beginning-of-sequence token comes before a text, the end-of-sequence token after it.

    Raises:
        FormatCannotHold: other tokens are put around a text.
    """
    plain = tokenizer.loaded("a", add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer.loaded("a", verbose=False)["input_ids"]
    start, end = tokenizer.id_of("bos"), tokenizer.id_of("eos")
    for starts in (False, True):
        for ends in (False, True):
            if whole == [start] * starts + plain + [end] * ends:
                return starts, ends
    raise _refusal(
        f"of the text 'a' it makes the tokens {whole}, and llama.cpp puts none around it but {start} and {end}"
    )


def stop_tokens(folder: Path, tokenizer: SourceTokenizer, vocabulary: int) -> list[int]:
    """Tokens that end a text: the tokenizer's own, then those of generation_config.json, or else of config.json.

    Raises:
        FormatCannotHold: there is none, and llama.cpp would take token 11.
    """
    candidates = [tokenizer.id_of("eos"), *_configured(folder, "eos_token_id")]
    stops = [token for token in candidates if token is not None and token < vocabulary]
    if not stops:
        raise _refusal("it has no end-of-sequence token, and llama.cpp would take token 11 for one")
    return list(dict.fromkeys(stops))


def pre_name(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for the rules by which the tokenizer (tokenizer.json, decoded) splits text.

    Raises:
        FormatCannotHold: there is none.
    """
    if tokenizer["model"].get("type") != "BPE" or tokenizer["model"].get("byte_fallback"):
        raise _refusal("it is not byte-level BPE")
    whole_words = bool(tokenizer["model"].get("ignore_merges"))
    splitter = tokenizer.get("pre_tokenizer") or {}
    parts = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    last = parts[-1]
    by_regex = last.get("use_regex", True)
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise _refusal("it is not byte-level BPE without a space in front")
    first = parts[:-1]
    if not first and by_regex and not whole_words:
        return "gpt-2"
    digits = [step.get("individual_digits") for step in first if step.get("type") == "Digits"]
    if len(first) == 1 and by_regex and digits == [True] and not whole_words:
        return "smollm"
    if len(first) == 1 and not by_regex and first[0].get("type") == "Split":
        isolated = first[0].get("behavior") == "Isolated" and not first[0].get("invert")
        name = BY_PATTERN.get((first[0].get("pattern", {}).get("Regex", ""), whole_words))
        if name is not None and isolated:
            return name
    raise _refusal("it splits text in a way that llama.cpp has no name for")


def _configured(folder: Path, field: str) -> list[int]:
    """Token ids of a field of generation_config.json, or else of config.json."""
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        given = json.loads(file.read_bytes()).get(field) if file.is_file() else None
        if given is not None:
            return [token for token in (given if isinstance(given, list) else [given]) if isinstance(token, int)]
    return []


def _check_rewriting(tokenizer: Mapping[str, Any]) -> None:
    """Refuses rules that change a text, or its pieces, before merges."""
    normalizer = tokenizer.get("normalizer") or {"type": "Sequence", "normalizers": []}
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    for step in steps:
        if step["type"] != "NFC":
            raise _refusal(f"it normalizes text ({step['type']}), which llama.cpp does not")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if tokenizer["model"].get(name):
            raise _refusal(f"it has {name} = {tokenizer['model'][name]!r}, which llama.cpp does not know")


def _add_special(
    writer: GGUFWriter, tokenizer: SourceTokenizer, starts: Sequence[int | None], stops: Sequence[int], vocabulary: int
) -> None:
    writer.add_bos_token_id(next((t for t in starts if t is not None and t < vocabulary), stops[0]))
    adding = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, token in zip(adding, stops, strict=False):
        add(token)
    for role in ROLES:
        special = tokenizer.id_of(role)
        if special is not None and special < vocabulary:
            getattr(writer, f"add_{role}_token_id")(special)


def _tokens(tokenizer: SourceTokenizer, vocabulary: int) -> tuple[list[str], list[TokenType]]:
    """Text and kind of each row of the embedding matrix; rows without a token are unused."""
    added = tokenizer.added(vocabulary)
    texts: dict[int, str] = {index: text for text, index in tokenizer.described["model"]["vocab"].items()}
    kinds = [TokenType.NORMAL if index in texts else TokenType.UNUSED for index in range(vocabulary)]
    for token in added:
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    taken = set(texts.values())
    return [texts[index] if index in texts else _unused(index, taken) for index in range(vocabulary)], kinds


def _unused(index: int, taken: set[str]) -> str:
    """A name that no token has: llama.cpp ends the process if two have the same name."""
    name = f"[PAD{index}]"
    while name in taken:
        name = f"[{name}]"
    return name


def _pair(merge: str | Sequence[str]) -> Sequence[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _refusal(reason: str) -> FormatCannotHold:
    return FormatCannotHold(
        f"gguf cannot hold the model's tokenizer: {reason}",
        field="formats",
        hint="leave gguf out; llama.cpp's own converter makes a GGUF of a `merged` checkpoint",
    )
