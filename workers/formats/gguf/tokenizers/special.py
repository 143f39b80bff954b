"""Tokens with a role, tokens around a text, and chat templates.

Nothing is left to llama.cpp's defaults: there, the name of the rules decides whether tokens are put around a text, and
without an end-of-sequence token in the file it is token 11.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from gguf import GGUFWriter

from workers.formats.gguf.tokenizers.source import ROLES, SourceTokenizer, refusal


def add_special(writer: GGUFWriter, folder: Path, tokenizer: SourceTokenizer, vocabulary: int) -> None:
    """Adds ids of special tokens, whether they are put around a text, and chat templates."""
    stops = stop_tokens(folder, tokenizer, vocabulary)
    starts = [tokenizer.id_of("bos"), *_configured(folder, "bos_token_id")]
    writer.add_bos_token_id(next((t for t in starts if t is not None and t < vocabulary), stops[0]))
    adding = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, token in zip(adding, stops, strict=False):
        add(token)
    for role in ROLES:
        special = tokenizer.id_of(role)
        if special is not None and special < vocabulary:
            getattr(writer, f"add_{role}_token_id")(special)
    before, after = frame(tokenizer)
    writer.add_add_bos_token(before)
    writer.add_add_eos_token(after)
    template = tokenizer.loaded.chat_template
    if isinstance(template, Mapping):
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
    elif template:
        writer.add_chat_template(template)


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
    raise refusal(
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
        raise refusal("it has no end-of-sequence token, and llama.cpp would take token 11 for one")
    return list(dict.fromkeys(stops))


def _configured(folder: Path, field: str) -> list[int]:
    """Token ids of a field of generation_config.json, or else of config.json."""
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        config = json.loads(file.read_bytes()) if file.is_file() else {}
        given = config.get(field)
        if given is None and isinstance(config.get("text_config"), Mapping):
            given = config["text_config"].get(field)
        if given is not None:
            return [token for token in (given if isinstance(given, list) else [given]) if isinstance(token, int)]
    return []
