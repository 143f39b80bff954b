"""The tokenizer of a checkpoint, as transformers loads it and as the tokenizers library describes it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from bitwright.errors import FormatCannotHold
from workers.formats.library_config import library_tokenizer

ROLES = ("unk", "sep", "pad", "mask")
"""Special tokens that a file may name, but need not."""


@dataclass(frozen=True)
class Vocabulary:
    """The rules by which llama.cpp makes tokens of a text.

    model         `tokenizer.ggml.model`: which of its algorithms
    pre           name of the rules that split a text first
    merges        pairs in order of their ranks; None: the scores decide
    scores        by text of a token; those left out have none
    space_prefix  whether a space is put before a text
    warnings      texts of which it makes other tokens, in words
    """

    model: str
    pre: str
    merges: Sequence[str] | None
    scores: Mapping[str, float] | None = None
    space_prefix: bool = False
    bytes_by_name: bool = False
    warnings: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class SourceTokenizer:
    """The tokenizer that transformers loads from a folder, and its description by the tokenizers library."""

    loaded: PreTrainedTokenizerBase
    described: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "SourceTokenizer":
        """The tokenizer of a checkpoint; the last one that was read is kept, for a job writes and compares it often.

        Raises:
            FormatCannotHold: transformers cannot load it, or it is not one of the tokenizers library.
        """
        try:
            loaded, described = _read(folder, _state(folder))
        except Exception as error:  # transformers passes on whatever its parsers raise
            if not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
                raise FormatCannotHold(
                    "the model has no tokenizer, and a GGUF file holds one",
                    field="formats",
                    hint="add the model's tokenizer.json, or leave gguf out of formats",
                ) from error
            raise refusal(f"transformers cannot read it: {error}") from error
        if described is None:
            raise refusal(f"transformers reads it as {type(loaded).__name__}, which is not of the tokenizers library")
        return cls(loaded, described)

    def id_of(self, role: str) -> int | None:
        """Id of a special token, by its name in transformers; None if there is none."""
        token_id = getattr(self.loaded, f"{role}_token_id", None)
        return token_id if isinstance(token_id, int) else None

    def added(self, vocabulary: int) -> list[Mapping[str, Any]]:
        """Tokens beside the model's own, without those for padding and the like that have no row in the embeddings."""
        optional = {self.id_of(role) for role in ROLES}
        return [t for t in self.described["added_tokens"] if t["id"] < vocabulary or t["id"] not in optional]


def _state(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Names, inodes, bytes and times of change of a folder's files."""
    files = sorted((file.name, file.stat()) for file in folder.iterdir() if file.is_file())
    return tuple((name, at.st_ino, at.st_size, at.st_mtime_ns) for name, at in files)


@lru_cache(maxsize=1)
def _read(folder: Path, _state: object) -> tuple[PreTrainedTokenizerBase, Mapping[str, Any] | None]:
    """A folder's tokenizer and its description, None where it is not of the tokenizers library; for reading only."""
    loaded = library_tokenizer(folder)
    backend = getattr(loaded, "backend_tokenizer", None)
    return loaded, None if backend is None else json.loads(backend.to_str())


def steps_of(part: Mapping[str, Any] | None, inside: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which `inside` a sequence stand in a list."""
    if part is None:
        return []
    return list(part[inside]) if part.get("type") == "Sequence" else [part]


def pairs_of(described: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges of a model, in order of their ranks."""
    merges = described["model"]["merges"]
    return [(first, second) for first, second in (m.split(" ", 1) if isinstance(m, str) else m for m in merges)]


def refusal(reason: str) -> FormatCannotHold:
    """The refusal of a tokenizer."""
    return FormatCannotHold(
        f"gguf cannot hold the model's tokenizer: {reason}",
        field="formats",
        hint="leave gguf out; llama.cpp's own converter makes a GGUF of a `merged` checkpoint",
    )
