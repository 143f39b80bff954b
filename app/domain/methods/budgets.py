"""A budget of bits for all linears together, and what it chooses from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from app.domain.methods.goals import Choices, choice_order
from app.domain.methods.named_schemes import WHOLE
from app.domain.methods.schemes import MIN_BITS, SCALE_BITS, AbsmaxScheme, Bits, Scheme, Spec

BUDGET_WIDTHS = (2, 3, 4, 8)
"""Widths that a budget chooses from where the request names none, as far as its formats hold them."""


class BitBudget(Spec):
    """Widths or schemes that are chosen for each linear, by the distance that each of them is predicted to add."""

    average: float = Field(
        strict=True,
        ge=MIN_BITS,
        le=16,
        allow_inf_nan=False,
        description="At most this many bits per weight, scales and zero points included, low-rank factors not.",
    )
    choices: Choices = Field(default=BUDGET_WIDTHS, description="Widths, and schemes by name, to choose from.")
    over: Literal["linears", "model"] = Field(
        default="linears",
        description="What is counted: all linears of the blocks, without the output head; or all that the checkpoint "
        "stores, embeddings, head and norms too, which stay as they are unless the request says otherwise.",
    )

    @model_validator(mode="after")
    def _is_in_reach(self) -> Self:
        least = choice_order(self.choices[0])[0]
        if self.average < least:
            raise ValueError(f"average must be at least {least}, the least of choices")
        return self


def _json_type(value: object) -> str:
    return "object" if isinstance(value, Mapping | BitBudget) else "integer"


Width = Annotated[
    Annotated[Bits, Tag("integer")] | Annotated[BitBudget, Tag("object")],
    Discriminator(_json_type),
    Field(description='Width of a code in bits, or a budget: {"average": 2.75, "choices": [2, 3, 4]}.'),
]


@dataclass(frozen=True)
class Candidate:
    """One way to store a linear, of those that a budget chooses from.

    absmax   None: one floating-point number per group
    """

    scheme: Scheme
    absmax: AbsmaxScheme | None = None

    def stored_bits(self, shape: tuple[int, int], scale_bits: int = SCALE_BITS) -> int:
        """Bits of a linear (out, in): codes, and scales with zero points or the maxima with both their levels.

        What a linear has but once (a codebook, the least of its maxima) is left out, as in LQ-LoRA's count.
        """
        weights = shape[0] * shape[1]
        row = self.scheme.row
        if row is not None and row.blocks is not None:
            return round(self.scheme.bits_per_weight(shape[1]) * weights)
        if row is not None:
            bands = 1 if row.rows == WHOLE else -(-shape[0] // row.rows)
            return self.scheme.bits * weights + (row.scale.stored_bits or scale_bits) * bands * self.scheme.groups(
                shape[1]
            )
        groups = weights // self.scheme.width(shape[1])
        if self.absmax is not None:
            superblocks = -(-groups // self.absmax.superblock)
            return self.scheme.bits * weights + self.absmax.bits * groups + self.absmax.dtype_bits * superblocks
        return self.scheme.bits * weights + (scale_bits + (0 if self.scheme.symmetric else self.scheme.bits)) * groups
