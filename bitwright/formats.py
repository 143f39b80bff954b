"""Forms of quantized weights, and the checkpoints that a user of any version of the service meets by name."""

from collections.abc import Iterable
from enum import StrEnum


class Form(StrEnum):
    """The form of a quantized linear: a method makes it, a format may hold it."""

    AFFINE = "affine"
    """Integer codes with a scale per group, and a zero point or an offset."""
    CODEBOOK = "codebook"
    """Indices into a table of values (NormalFloat) with a largest magnitude per group."""
    LOW_RANK = "low-rank"
    """Besides one of the others: two factors whose product is added to it, as in LoRA."""


NATIVE = "native"
"""The checkpoint that every job keeps, asked for or not."""
PEFT = "peft"
"""The checkpoint that is an adapter for stock peft: no model without its base."""
ADAPTER_FOLDER = "adapter"
"""Where the adapter file of a job that trains is kept, beside its checkpoints; no format of its own."""
ADAPTERS_ALONE = frozenset({PEFT, ADAPTER_FOLDER})
"""Folders that are no model without their base."""


def first_choice(kept: Iterable[str]) -> str:
    """Of what a job keeps, by name, what a caller gets who names none.

    A checkpoint that was asked for; else `native`, which is always kept; the adapter, which is no model, never before.
    """
    return min(kept, key=lambda name: (name == ADAPTER_FOLDER, name == NATIVE))
