"""Names of checkpoint formats, and of the forms of quantized weights."""

from collections.abc import Iterable
from enum import StrEnum


class Form(StrEnum):
    """What a method makes of a linear; a format says which of them it holds."""

    AFFINE = "affine"
    """Integer codes with a scale a group, and a zero point or an offset."""
    CODEBOOK = "codebook"
    """Indices into a table of values (NormalFloat) with a largest magnitude a group."""
    LOW_RANK = "low-rank"
    """Besides one of the others: two factors whose product is added to it, as in LoRA."""


class ExportFormat(StrEnum):
    NATIVE = "native"
    COMPRESSED_TENSORS = "compressed-tensors"
    MERGED = "merged"
    PEFT = "peft"
    GGUF = "gguf"


ADAPTER_FOLDER = "adapter"
"""Where the adapter file of a job that trains is kept, beside its checkpoints; no format of its own."""


def first_choice(kept: Iterable[str]) -> str:
    """Of what a job keeps, by name, what a caller gets who names none.

    A checkpoint that was asked for; else `native`, which is always kept; the adapter, which is no model, never before.
    """
    return min(kept, key=lambda name: (name == ADAPTER_FOLDER, name == ExportFormat.NATIVE))
