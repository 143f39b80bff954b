"""Forms of quantized weights, and the checkpoints that a user of any version of the service meets by name."""

from collections.abc import Iterable
from enum import StrEnum


class Form(StrEnum):
    """The form of a quantized linear: a method makes it, a format may hold it."""

    AFFINE = "affine"
    """Integer codes with a scale per group, and a zero point or an offset."""
    CODEBOOK = "codebook"
    """Indices into a table of values (NormalFloat) with a largest magnitude per group."""
    FLOAT = "float"
    """Codes of a small floating-point type (FP8, FP4) with a scale per group."""
    BLOCKS = "blocks"
    """Codes in llama.cpp's blocks (Q4_K and the like): scales of parts of a block are codes themselves."""
    LOW_RANK = "low-rank"
    """Two factors beside one of the other forms, whose product is added to it, as in LoRA."""


NATIVE = "native"
"""The checkpoint that every job keeps, requested or not."""
PEFT = "peft"
"""The checkpoint that is an adapter for stock peft: no model without its base."""
ADAPTER_FOLDER = "adapter"
"""Folder of the adapter file of a job that trains, beside its checkpoints; not a format."""
ADAPTERS_ALONE = frozenset({PEFT, ADAPTER_FOLDER})
"""Folders that are no model without their base."""


def first_choice(kept: Iterable[str]) -> str:
    """The folder, among those that a job keeps, for a caller that names none.

    A checkpoint that was requested; else `native`, which is always kept; the adapter, which is no model, comes last.
    """
    return min(kept, key=lambda name: (name == ADAPTER_FOLDER, name == NATIVE))
