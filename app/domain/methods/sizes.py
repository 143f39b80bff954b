"""Sizes in a request: a whole number of bytes, or a text with a unit, decimal or binary as it is written."""

import re
from types import MappingProxyType
from typing import Annotated

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

UNITS: MappingProxyType[str, int] = MappingProxyType(
    {
        "B": 1,
        **{f"{letter}B": 1000**power for power, letter in enumerate("kMGT", start=1)},
        **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)},
    }
)
LARGEST = 1 << 50
EXAMPLE = "90MB"
PATTERN = r"^[0-9]{1,15}(\.[0-9]{1,6})? ?(B|kB|MB|GB|TB|KiB|MiB|GiB|TiB)$"


def parse_size(value: object) -> int:
    """Bytes of a size as a request has it; a fraction of a byte is dropped.

    Raises:
        PydanticCustomError: it is neither a whole number nor a number with a unit, or out of range.
    """
    size = value if isinstance(value, int) and not isinstance(value, bool) else None
    if isinstance(value, str) and re.fullmatch(PATTERN, value):
        number, unit = re.fullmatch(r"([0-9.]+) ?([a-zA-Z]+)", value).groups()  # type: ignore[union-attr]
        whole, _, part = number.partition(".")
        size = (int(whole + part) * UNITS[unit]) // 10 ** len(part)
    if size is None or not 1 <= size <= LARGEST:
        detail = (
            f'must be bytes: a whole number up to {LARGEST}, or a text like "{EXAMPLE}" with one of {", ".join(UNITS)}'
        )
        raise PydanticCustomError("value_refused", "{error}", {"error": detail})
    return size


def in_words(size: float) -> str:
    """The size in the largest decimal unit that it fills, e.g. 89.6 MB."""
    for unit in ("TB", "GB", "MB", "kB"):
        if size >= UNITS[unit]:
            return f"{size / UNITS[unit]:.4g} {unit}"
    return f"{size:.0f} B"


Size = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": LARGEST},
                {"type": "string", "pattern": PATTERN, "examples": [EXAMPLE]},
            ]
        }
    ),
    Field(description="Bytes: a whole number, or a number with one of B, kB, MB, GB, TB, KiB, MiB, GiB, TiB."),
]
