"""Storage schemes of a linear's weight, and the rules that tell linears apart."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from app.domain.methods.block_types import BlockType
from app.domain.methods.named_schemes import SCHEMES, WHOLE, Element, NamedScheme, SchemeName
from bitwright.formats import Form

MIN_BITS, MAX_BITS = 2, 8
PER_CHANNEL = -1

Bits = Annotated[int, Field(strict=True, ge=MIN_BITS, le=MAX_BITS, description="Width of a code in bits.")]


def without_default(schema: dict[str, Any]) -> None:
    """Of a field that a silent request gets another value for than this model would: clients shall not send it."""
    schema.pop("default", None)


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


class Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def group_width(group_size: int, in_features: int) -> int:
    """Columns of a group of a linear with so many inputs: all of them where groups are rows."""
    return in_features if group_size == PER_CHANNEL else group_size


SCALE_BITS = 16
"""Of a stored scale, where its dtype is not known yet."""


class Scheme(Spec):
    """Storage scheme of one linear's weight.

    name   None: integers, of which the other fields say all; else they are those of the name's row in `SCHEMES`
    """

    bits: Bits
    group_size: GroupSize
    symmetric: Symmetric
    name: SchemeName | None = None

    @classmethod
    def named(cls, name: SchemeName) -> "Scheme":
        """The scheme of that name."""
        row = SCHEMES[name]
        symmetric = row.blocks is None or not row.blocks.offset
        return cls(bits=row.bits, group_size=row.group_size, symmetric=symmetric, name=name)

    @property
    def row(self) -> NamedScheme | None:
        """The facts of its name; None for integers."""
        return None if self.name is None else SCHEMES[self.name]

    @property
    def form(self) -> Form:
        """The form of weights in it, where a method makes no codebook."""
        if self.blocks is not None:
            return Form.BLOCKS
        return Form.AFFINE if self.row is None or self.row.element is Element.INTEGER else Form.FLOAT

    @property
    def blocks(self) -> BlockType | None:
        """The type of llama.cpp's that it is; None: it is none."""
        return None if self.row is None else self.row.blocks

    @property
    def code_bits(self) -> int:
        """Bits that hold any of its codes by itself: those of `bits`, but where codes are stored several together."""
        return self.bits if self.blocks is None else self.blocks.code_bits

    def fitted(self, in_features: int) -> "Scheme":
        """The scheme that a linear with so many inputs gets: where they are not whole blocks of llama.cpp's, the type
        that its quantizer takes instead (`llama_tensor_get_type` of v0.5.0)."""
        kind = self.blocks
        if kind is None or kind.fallback is None or in_features % kind.weights == 0:
            return self
        return Scheme.named(SchemeName(kind.fallback))

    @property
    def group_rows(self) -> int:
        """Consecutive rows that share a scale; `WHOLE`: all."""
        return 1 if self.row is None else self.row.rows

    def width(self, in_features: int) -> int:
        """Columns of a group of a linear with so many inputs, of the last one perhaps fewer."""
        return group_width(self.group_size, in_features)

    def groups(self, in_features: int) -> int:
        """Groups of a row."""
        return -(-in_features // self.width(in_features))

    def divides(self, in_features: int) -> bool:
        """True if a linear with so many inputs can be stored: its columns are whole groups, where they must be.

        Of llama.cpp's types, in the one that it falls back to, too.
        """
        kind = self.fitted(in_features).blocks
        if kind is not None:
            return in_features % kind.weights == 0
        some = self.row is not None and not self.row.whole_groups
        return some or self.group_size == PER_CHANNEL or in_features % self.group_size == 0

    def bits_per_weight(self, in_features: int, scale_bits: int = SCALE_BITS) -> float:
        """Bits of a weight with its share of scale and zero point; what a whole linear has but once is left out."""
        kind = self.fitted(in_features).blocks
        if kind is not None:
            return kind.bits_per_weight
        if self.row is not None:
            rows, of_scale = self.row.rows, self.row.scale.stored_bits or scale_bits
            return self.bits + (0 if rows == WHOLE else of_scale / (self.width(in_features) * rows))
        return self.bits + (scale_bits + (0 if self.symmetric else self.bits)) / self.width(in_features)


FloatName = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True)
class AbsmaxScheme:
    """A second level of codes for the largest magnitudes of a codebook's groups: b1 = `bits`, b2 = `dtype`, B1."""

    bits: int
    dtype: FloatName
    superblock: int

    @property
    def dtype_bits(self) -> int:
        return 32 if self.dtype == "float32" else 16


PRESET_ABSMAX = AbsmaxScheme(bits=8, dtype="float32", superblock=256)
"""QLoRA's: 0.127 bits per weight at groups of 64. LQ-LoRA's "nf4" and "nf3" have it too."""


class SchemeOverride(Spec):
    """Changes by an override for the linears that its pattern matches: a scheme by name, or numbers of integers."""

    bits: Bits | None = None
    group_size: GroupSize | None = None
    symmetric: Symmetric | None = None
    scheme: SchemeName | None = Field(default=None, description="A scheme by name, in place of the other three.")

    @model_validator(mode="after")
    def _says_one_of_them(self) -> Self:
        given = [name for name in INTEGER_FIELDS if getattr(self, name) is not None]
        if self.scheme is not None and given:
            raise ValueError(f"give scheme, or {' and '.join(given)}, not both: a scheme's name says all three")
        return self


INTEGER_FIELDS = ("bits", "group_size", "symmetric")
"""Fields that describe integers, which a scheme's name takes the place of."""

Pattern = Annotated[str, StringConstraints(min_length=1, max_length=512)]
HEAD_PATTERN = "lm_head"
"""The plain name of the output head in patterns."""


def fits(name: str, pattern: str) -> bool:
    """True if a glob names a module; the plain `lm_head` names the head of a part of a larger model, too."""
    return fnmatchcase(name, pattern) or (pattern == HEAD_PATTERN and name.endswith(f".{HEAD_PATTERN}"))


class ModuleRules(Spec):
    """Rules for which linears are quantized, and which differ. Patterns are globs over full module names."""

    ignore: tuple[Pattern, ...] = Field(
        default=(HEAD_PATTERN,),
        max_length=256,
        description="Linears that keep their 16-bit weight. With `head`, none where this is silent.",
        json_schema_extra=without_default,
    )
    overrides: dict[Pattern, SchemeOverride] = Field(
        default_factory=dict,
        max_length=256,
        description="Pattern to changed bits, group_size or symmetric, or to a scheme by name; later matches win.",
        examples=[{"model.layers.*.mlp.down_proj": {"bits": 8}}],
    )
    embeddings: SchemeOverride | None = Field(
        default=None,
        description="Scheme of the matrix of embeddings, which is the head's too where the model ties them; `4` and a "
        "scheme's name are short for it. null: it stays in 16 bits.",
        examples=[{"bits": 4, "group_size": 32}],
    )
    head: SchemeOverride | None = Field(
        default=None,
        description="Scheme of the output head, in the same words. Alone in a model that ties it to the embeddings, it "
        "is stored apart from them. null: it stays in 16 bits, or is the quantized embeddings.",
        examples=[{"bits": 4, "group_size": 32}],
    )

    @model_validator(mode="before")
    @classmethod
    def _head_is_not_ignored(cls, given: object) -> object:
        """A request that gives a scheme to the head and does not speak of `ignore` ignores nothing."""
        if isinstance(given, Mapping) and given.get("head") is not None and "ignore" not in given:
            return {**given, "ignore": ()}
        return given

    @model_validator(mode="after")
    def _outer_matrices_have_one_scheme(self) -> Self:
        """Schemes of embeddings and head say a width, and nothing else says another of the head.

        Raises:
            ValidationError: with the location of each value that is refused.
        """
        refused = []
        for name in OUTER:
            given = getattr(self, name)
            if given is not None and given.bits is None and given.scheme is None:
                detail = f"say bits or a scheme by name for the {name}, e.g. 4"
                refused.append(refusal((name,), given.model_dump(exclude_none=True), detail))
        if self.head is not None:
            for index, pattern in enumerate(self.ignore):
                if pattern == HEAD_PATTERN:
                    detail = "modules.head gives the head a scheme; leave it out of ignore, or leave modules.head out"
                    refused.append(refusal(("ignore", index), pattern, detail, CONFLICTING))
            if HEAD_PATTERN in self.overrides:
                detail = "modules.head gives the head a scheme; leave this override out"
                value = self.overrides[HEAD_PATTERN].model_dump(exclude_none=True)
                refused.append(refusal(("overrides", HEAD_PATTERN), value, detail, CONFLICTING))
        if refused:
            raise ValidationError.from_exception_data(type(self).__name__, refused)
        return self


OUTER = ("embeddings", "head")
"""Fields of `ModuleRules` for the matrices outside the blocks."""
CONFLICTING: Literal["conflicting_fields"] = "conflicting_fields"


def refusal(
    location: tuple[int | str, ...],
    value: object,
    detail: str,
    kind: Literal["value_refused", "conflicting_fields"] = "value_refused",
) -> InitErrorDetails:
    """A refused value, for `ValidationError.from_exception_data`."""
    reason = PydanticCustomError(kind, "{error}", {"error": detail})
    return InitErrorDetails(type=reason, loc=location, input=value)
