"""The tokenizer of a checkpoint as GGUF metadata: byte-level BPE, and BPE over characters with bytes to fall back on.

The file gets the tokenizer that transformers loads from the folder, which also reads the job's texts: some of its
classes replace the rules of tokenizer.json by their own. Normalization to NFC, which Qwen's tokenizers have, is not
known to llama.cpp: text that is not in that form is split into other tokens there.
"""

from pathlib import Path

from gguf import GGUFWriter, TokenType

from workers.formats.gguf.tokenizers.byte_fallback import BYTE, byte_fallback, is_byte_fallback
from workers.formats.gguf.tokenizers.byte_level import byte_level, is_byte_level
from workers.formats.gguf.tokenizers.source import SourceTokenizer, Vocabulary, refusal
from workers.formats.gguf.tokenizers.special import add_special, frame, stop_tokens

NEVER_MERGED = -1e9
"""Score of pieces that no merge makes."""


def add_tokenizer(writer: GGUFWriter, folder: Path, vocabulary: int) -> tuple[str, ...]:
    """Adds tokens, merges or scores, special tokens and chat template; texts of which llama.cpp makes other tokens.

    vocabulary   rows in the embedding matrix
    """
    tokenizer = SourceTokenizer.read(folder)
    rules = vocabulary_of(tokenizer)
    tokens, kinds = _tokens(tokenizer, rules, vocabulary)
    writer.add_tokenizer_model(rules.model)
    writer.add_tokenizer_pre(rules.pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if rules.merges is not None:
        writer.add_token_merges(list(rules.merges))
    if rules.scores is not None:
        writer.add_token_scores([rules.scores.get(token, NEVER_MERGED) for token in tokens])
    writer.add_add_space_prefix(rules.space_prefix)
    add_special(writer, folder, tokenizer, vocabulary)
    return rules.warnings


def check_tokenizer(folder: Path, vocabulary: int) -> None:
    """Checks the tokenizer without writing it.

    Raises:
        FormatCannotHold: it is of a kind that is not written, splits text in a way that has no name, has more tokens
            than rows, or does something that llama.cpp does not.
    """
    tokenizer = SourceTokenizer.read(folder)
    rules = vocabulary_of(tokenizer)
    added = tokenizer.added(vocabulary)
    largest = max([*tokenizer.described["model"]["vocab"].values(), *(token["id"] for token in added)], default=0)
    if largest >= vocabulary:
        raise refusal(f"it has the token id {largest}, and the model has {vocabulary} embeddings")
    for token in added:
        greedy = [name for name in ("single_word", "lstrip", "rstrip") if token[name]]
        if greedy:
            raise refusal(f"its token {token['content']!r} has {greedy[0]}, which llama.cpp does not know")
    tokens, _ = _tokens(tokenizer, rules, vocabulary)
    if len(set(tokens)) < len(tokens) or not all(tokens):
        raise refusal("two of its tokens are the same text, or one is empty")
    frame(tokenizer)
    stop_tokens(folder, tokenizer, vocabulary)


def vocabulary_of(tokenizer: SourceTokenizer) -> Vocabulary:
    """The rules of a tokenizer of any kind that is written.

    Raises:
        FormatCannotHold: it is of none of them, or does something that llama.cpp does not.
    """
    if is_byte_fallback(tokenizer.described):
        return byte_fallback(tokenizer.described)
    if is_byte_level(tokenizer.described):
        return byte_level(tokenizer.described)
    kind = tokenizer.described["model"].get("type")
    raise refusal(f"it is of the kind {kind}, and written are byte-level BPE and BPE with bytes to fall back on")


def _tokens(tokenizer: SourceTokenizer, rules: Vocabulary, vocabulary: int) -> tuple[list[str], list[TokenType]]:
    """Text and kind of each row of the embedding matrix; rows without a token are unused."""
    texts: dict[int, str] = {index: text for text, index in tokenizer.described["model"]["vocab"].items()}
    kinds = [TokenType.NORMAL if index in texts else TokenType.UNUSED for index in range(vocabulary)]
    if rules.bytes_by_name:
        for index, text in texts.items():
            if index < vocabulary and BYTE.fullmatch(text):
                kinds[index] = TokenType.BYTE
    for token in tokenizer.added(vocabulary):
        if token["id"] < vocabulary:
            texts[token["id"]] = token["content"]
            kinds[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    unknown = tokenizer.id_of("unk")
    if rules.bytes_by_name and unknown is not None and unknown < vocabulary:
        kinds[unknown] = TokenType.UNKNOWN
    taken = set(texts.values())
    return [texts[index] if index in texts else _unused(index, taken) for index in range(vocabulary)], kinds


def _unused(index: int, taken: set[str]) -> str:
    """A name that no token has: llama.cpp ends the process if two have the same name."""
    name = f"[PAD{index}]"
    while name in taken:
        name = f"[{name}]"
    return name
