"""Files beside a checkpoint's weights: their sizes, and JSON that is read no deeper than anybody writes it."""

import json
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from app.domain.inputs.mistaken_files import mistaken
from bitwright.errors import CorruptCheckpoint

MIB = 1 << 20
MOST_FILES = 10_000
MOST_LEVELS = 64
"""Of JSON within JSON."""
LARGEST: tuple[tuple[str, int], ...] = (
    ("chat_template*", MIB),
    ("tokenizer_config.json", 16 * MIB),
    ("generation_config.json", MIB),
    ("special_tokens_map.json", 4 * MIB),
    ("added_tokens.json", 16 * MIB),
    ("*processor_config.json", 4 * MIB),
    ("tokenizer*", 128 * MIB),
    ("vocab*", 64 * MIB),
    ("merges.txt", 64 * MIB),
    ("tekken.json", 128 * MIB),
    ("*.model", 64 * MIB),
    ("*.tiktoken", 64 * MIB),
)
"""Name -> bytes, several times the largest that is published; the first that fits counts."""


def check_side_files(names: Iterable[str], size_of: Callable[[str], int]) -> None:
    """Check that no file that a library reads whole is larger than one of its kind can be.

    Raises:
        CorruptCheckpoint: one is, or the folder holds more files than a checkpoint has.
    """
    files = list(names)
    if len(files) > MOST_FILES:
        detail = f"the checkpoint has {len(files)} files; at most {MOST_FILES} are looked at"
        raise CorruptCheckpoint(detail, field="model", value=len(files), hint="name the folder of one checkpoint")
    for name in files:
        limit = next((limit for pattern, limit in LARGEST if fnmatchcase(name, pattern)), None)
        if limit is not None and (size := size_of(name)) > limit:
            detail = f"{name} has {size} bytes; at most {limit} are read"
            raise CorruptCheckpoint(detail, field=name, value=size, hint="take the file that came with the weights")


def read_object(data: bytes, name: str, field: str) -> dict[str, Any]:
    """The JSON object that a file holds; `field` is for messages.

    Raises:
        CorruptCheckpoint: it holds none, or one that is nested too deeply.
    """
    try:
        decoded = json.loads(data)
    except (ValueError, RecursionError) as error:
        if kind := mistaken(data):
            raise CorruptCheckpoint(f"{name} is {kind.what}", field=field, value=name, hint=kind.hint) from error
        raise CorruptCheckpoint(f"{name} is not JSON: {error}", field=field, value=name) from error
    if not isinstance(decoded, dict):
        raise CorruptCheckpoint(f"{name} is no JSON object", field=field, value=name)
    if is_deep(decoded):
        detail = f"{name} is nested more than {MOST_LEVELS} levels deep"
        raise CorruptCheckpoint(detail, field=field, value=name)
    return decoded


def is_deep(value: object, most: int = MOST_LEVELS) -> bool:
    """True if decoded JSON is nested more than `most` levels deep: whatever walks it may stop at Python's own limit."""
    level = [value]
    for _ in range(most + 1):
        level = [
            entry
            for each in level
            for entry in (each.values() if isinstance(each, dict) else each if isinstance(each, list) else ())
            if isinstance(entry, dict | list)
        ]
        if not level:
            return False
    return True
