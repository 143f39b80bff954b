"""How a linear's weight may be stored, and the parameters that every weight quantizer has."""

from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

MIN_BITS, MAX_BITS = 2, 8
PER_CHANNEL = -1

Bits = Annotated[int, Field(strict=True, ge=MIN_BITS, le=MAX_BITS, description="Width of a code in bits.")]


def _not_zero(group_size: int) -> int:
    if group_size == 0:
        raise ValueError("must be a whole number, 1 to 65536, or -1 for one group a row")
    return group_size


GroupSize = Annotated[
    int,
    Field(
        strict=True,
        ge=-1,
        le=65536,
        json_schema_extra={"not": {"const": 0}},
        description="Consecutive input columns that share a scale; must divide every linear's inputs. -1: per channel.",
    ),
    AfterValidator(_not_zero),
]
Symmetric = Annotated[
    bool,
    Field(
        strict=True, description="True: zero point at mid range, scale of either sign (full range). False: asymmetric."
    ),
]


class Form(StrEnum):
    """What a method makes of a linear; a format says which of them it holds."""

    AFFINE = "affine"
    """Integer codes with a scale a group, and a zero point or an offset."""
    CODEBOOK = "codebook"
    """Indices into a table of values (NormalFloat) with a largest magnitude a group."""
    LOW_RANK = "low-rank"
    """Besides one of the others: two factors whose product is added to it, as in LoRA."""


class Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Scheme(Spec):
    """How one linear's weight is stored."""

    bits: Bits
    group_size: GroupSize
    symmetric: Symmetric

    def width(self, in_features: int) -> int:
        """Columns of a group of a linear with so many inputs."""
        return in_features if self.group_size == PER_CHANNEL else self.group_size


class SchemeOverride(Spec):
    """What an override changes for the linears that its pattern matches."""

    bits: Bits | None = None
    group_size: GroupSize | None = None
    symmetric: Symmetric | None = None


Pattern = Annotated[str, StringConstraints(min_length=1, max_length=512)]


class ModuleRules(Spec):
    """Which linears are quantized, and which differ. Patterns are globs over full module names."""

    ignore: tuple[Pattern, ...] = Field(
        default=("lm_head",), max_length=256, description="Linears that keep their 16-bit weight."
    )
    overrides: dict[Pattern, SchemeOverride] = Field(
        default_factory=dict,
        max_length=256,
        description="Pattern to changed bits, group_size or symmetric; of several matches, later ones win.",
        examples=[{"model.layers.*.mlp.down_proj": {"bits": 8}}],
    )


class WeightSpec(Spec):
    """Parameters that every weight quantizer has."""

    bits: Bits = 4
    group_size: GroupSize = 64
    symmetric: Symmetric = True
    modules: ModuleRules = ModuleRules()

    def scheme(self, name: str) -> Scheme | None:
        """The scheme of the linear with this full module name; None if it is ignored."""
        if any(fnmatchcase(name, pattern) for pattern in self.modules.ignore):
            return None
        values = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        for pattern, override in self.modules.overrides.items():
            if fnmatchcase(name, pattern):
                values |= override.model_dump(exclude_none=True)
        return Scheme.model_validate(values)

    def schemes(self) -> dict[str, Scheme]:
        """The default scheme under the key "" and each override's, alone, under its pattern."""
        default = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        return {"": Scheme.model_validate(default)} | {
            pattern: Scheme.model_validate(default | override.model_dump(exclude_none=True))
            for pattern, override in self.modules.overrides.items()
        }

    def forms(self) -> frozenset[Form]:
        """What these parameters make of the linears of the blocks."""
        return frozenset({Form.AFFINE})

    def adapter_rank(self) -> int:
        """Rank of the factors beside each linear; 0: there are none."""
        return 0

    def tuned_sequences(self, num_samples: int) -> int:  # noqa: ARG002 - for methods that tune
        """Sequences that go through a block with gradients when `num_samples` calibrate: what the work is priced by."""
        return 0

    def end_to_end_steps(self) -> int:
        """Steps that tune the scales of the whole model after the last block; 0 leaves that stage out."""
        return 0

    def needs_original_inputs(self) -> bool:
        """Whether the method looks at what the original blocks before a block put out, which then is kept: half as
        much memory for activations again."""
        return True

    def shared_batch(self) -> int:
        """Sequences of a step that several GPUs may divide among themselves; 0 if they would gain nothing."""
        return 0
