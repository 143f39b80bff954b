"""What can be done to a model: frozen specs of the quantization methods, their presets, and the recipes.

A spec is a method's parameters and nothing else. `METHODS` lists every method with its paper; `RECIPES` are
shorthand names that stand for parts of a request.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from itertools import product
from types import MappingProxyType
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)

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


SCALE_BITS = 16
"""Of a stored scale, where its dtype is not known yet."""


class Scheme(Spec):
    """How one linear's weight is stored."""

    bits: Bits
    group_size: GroupSize
    symmetric: Symmetric

    def bits_per_weight(self, in_features: int, scale_bits: int = SCALE_BITS) -> float:
        """Bits of a weight with its share of scale and zero point."""
        group = _columns(self, in_features)
        return self.bits + (scale_bits + (0 if self.symmetric else self.bits)) / group


def _each_once(choices: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(choices)) < len(choices):
        raise ValueError("must name each width once")
    return tuple(sorted(choices))


class BitBudget(Spec):
    """Widths that are chosen for each linear, by how much each of them would cost its output."""

    average: float = Field(
        strict=True,
        ge=MIN_BITS,
        le=16,
        allow_inf_nan=False,
        description="At most this many bits a weight over all linears of the blocks, scales and zero points included, "
        "low-rank factors and the output head not.",
    )
    choices: Annotated[tuple[Bits, ...], AfterValidator(_each_once)] = Field(
        default=(2, 3, 4, 8), min_length=1, max_length=MAX_BITS - MIN_BITS + 1, description="Widths to choose from."
    )

    @model_validator(mode="after")
    def _is_in_reach(self) -> Self:
        if self.average < self.choices[0]:
            raise ValueError(f"average must be at least {self.choices[0]}, the least of choices")
        return self


def _json_type(value: object) -> str:
    return "object" if isinstance(value, Mapping | BitBudget) else "integer"


Width = Annotated[
    Annotated[Bits, Tag("integer")] | Annotated[BitBudget, Tag("object")],
    Discriminator(_json_type),
    Field(description='Width of a code in bits, or a budget: {"average": 2.75, "choices": [2, 3, 4]}.'),
]


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


@dataclass(frozen=True)
class Candidate:
    """One way to store a linear, of those that a budget chooses from.

    absmax   None: one floating-point number a group
    """

    scheme: Scheme
    absmax: AbsmaxScheme | None = None

    def stored_bits(self, shape: tuple[int, int], scale_bits: int = SCALE_BITS) -> int:
        """Bits of a linear (out, in): codes, and scales with zero points or the maxima with both their levels.

        What a linear has but once (a codebook, the least of its maxima) is left out, as in LQ-LoRA's count.
        """
        weights = shape[0] * shape[1]
        groups = weights // _columns(self.scheme, shape[1])
        if self.absmax is not None:
            superblocks = -(-groups // self.absmax.superblock)
            return self.scheme.bits * weights + self.absmax.bits * groups + self.absmax.dtype_bits * superblocks
        return self.scheme.bits * weights + (scale_bits + (0 if self.scheme.symmetric else self.scheme.bits)) * groups


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

    bits: Width = 4
    group_size: GroupSize = 64
    symmetric: Symmetric = True
    modules: ModuleRules = ModuleRules()

    def scheme(self, name: str) -> Scheme | None:
        """The scheme of the linear with this full module name, of a budget the widest; None if it is ignored."""
        if any(fnmatchcase(name, pattern) for pattern in self.modules.ignore):
            return None
        return self._schemes(o for p, o in self.modules.overrides.items() if fnmatchcase(name, p))[-1]

    def candidates(self, name: str, in_features: int) -> tuple[Candidate, ...]:  # noqa: ARG002 - for grids
        """What the budget chooses from for the linear of that name: one where its width is given; none if ignored."""
        if self.scheme(name) is None:
            return ()
        overrides = (o for p, o in self.modules.overrides.items() if fnmatchcase(name, p))
        return tuple(Candidate(scheme) for scheme in self._schemes(overrides))

    def schemes(self) -> tuple[tuple[str, Scheme], ...]:
        """The default's schemes with the pattern "", and each override's, alone, with its own: of a budget, several."""
        given = {"": (), **{pattern: (override,) for pattern, override in self.modules.overrides.items()}}
        return tuple((pattern, scheme) for pattern, overrides in given.items() for scheme in self._schemes(overrides))

    def _schemes(self, overrides: Iterable[SchemeOverride]) -> list[Scheme]:
        """All that these overrides leave, by rising width."""
        values: dict[str, object] = {"group_size": self.group_size, "symmetric": self.symmetric}
        for override in overrides:
            values |= override.model_dump(exclude_none=True)
        if "bits" in values:
            return [Scheme.model_validate(values)]
        widths = self.bits.choices if isinstance(self.bits, BitBudget) else (self.bits,)
        return [Scheme.model_validate({"bits": width} | values) for width in widths]

    def budget(self) -> BitBudget | None:
        """The budget, where widths are chosen by it."""
        return self.bits if isinstance(self.bits, BitBudget) else None

    def least_bits(self, name: str, in_features: int) -> float:
        """Bits a weight, scales included, of the cheapest way to store a linear that is not ignored."""
        return min(c.scheme.bits_per_weight(in_features) for c in self.candidates(name, in_features))

    def forms(self) -> frozenset[Form]:
        """What these parameters make of the linears of the blocks."""
        return frozenset({Form.AFFINE})

    def adapter_rank(self) -> int:
        """Rank of the factors beside each linear; 0: there are none."""
        return 0

    def needs_fisher(self) -> bool:
        """Whether the engine measures the loss's squared gradients by the weights before the first block."""
        return False

    def tuned_sequences(self, num_samples: int) -> int:  # noqa: ARG002 - for methods that tune
        """Sequences that go through a block with gradients when `num_samples` calibrate: what the work is priced by."""
        return 0

    def end_to_end_steps(self) -> int:
        """Steps that tune the scales of the whole model after the last block; 0 leaves that stage out."""
        return 0


class RTNSpec(WeightSpec):
    """Round to nearest. Looks at the weights alone."""

    method: Literal["rtn"] = "rtn"


SCALE_BATCH_SIZE = 4
"""Sequences of a step that tunes scales end to end."""


class SignRoundSpec(WeightSpec):
    """SignRound (AutoRound): rounding offsets and clipping ranges tuned by signed gradient descent, block by block."""

    method: Literal["signround"] = "signround"
    preset: Literal["light", "default", "best"] = Field(
        default="default",
        description="Fills both numbers of steps and the calibration's size where they are not given.",
    )
    steps: int = Field(default=200, strict=True, ge=0, le=20_000, description="Tuning steps a block; 0 equals RTN.")
    batch_size: int = Field(default=8, strict=True, ge=1, le=1024, description="Sequences a step.")
    learning_rate: float | None = Field(
        default=None,
        strict=True,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="First step of the linear decay to 0; null means 1/steps.",
    )
    scale_search: bool = Field(
        default=True,
        description="Start from the ranges with the least rounding error, weighted by the inputs' second moments, "
        "instead of the groups' full ranges; of no effect with 0 steps.",
    )
    quantized_inputs: bool = Field(
        default=True,
        strict=True,
        description="Feed a block the output of the quantized blocks before it, not of the original ones.",
    )
    scale_steps: int = Field(
        default=0,
        strict=True,
        ge=0,
        le=20_000,
        description="Steps that tune all scales together against the original model's next-token distribution once "
        "every block is done, codes fixed; 0 leaves that out. Skipped with a warning where the model does not fit.",
    )

    def tuned_sequences(self, num_samples: int) -> int:
        """A batch a step."""
        return self.steps * min(self.batch_size, num_samples)

    def end_to_end_steps(self) -> int:
        """The spec's `scale_steps`."""
        return self.scale_steps


PRESET_ABSMAX = AbsmaxScheme(bits=8, dtype="float32", superblock=256)
"""Double quantization where no budget chooses: that of LQ-LoRA's "nf4" and "nf3"."""


class LQLoRASpec(WeightSpec):
    """LQ-LoRA: NormalFloat with double quantization and low-rank factors, found together, under a budget of bits."""

    method: Literal["lq-lora"] = "lq-lora"
    bits: Width = BitBudget(average=2.75)
    group_size: GroupSize = Field(default=64, description="Where bits is one width; a budget chooses of group_sizes.")
    symmetric: Literal[True] = Field(default=True, description="NormalFloat has no zero point.")
    rank: int = Field(default=64, strict=True, ge=1, le=1024, description="Of the low-rank factors beside each linear.")
    alpha: float = Field(
        default=16.0,
        strict=True,
        gt=0,
        le=65536,
        allow_inf_nan=False,
        description="lora_alpha of the adapter. The calibrated product does not depend on it.",
    )
    iterations: int = Field(
        default=100, strict=True, ge=1, le=1000, description="At most; a linear stops once its error no longer falls."
    )
    fisher: bool = Field(
        default=True,
        strict=True,
        description="Weight errors by the empirical Fisher information on the calibration text, by rows and columns.",
    )
    group_sizes: tuple[Annotated[int, Field(strict=True, ge=8, le=65536)], ...] = Field(
        default=(16, 32, 64),
        min_length=1,
        max_length=8,
        description="B0 of a budget's grid, where it divides the inputs.",
    )
    absmax_bits: tuple[Annotated[int, Field(strict=True, ge=MIN_BITS, le=MAX_BITS)], ...] = Field(
        default=(2, 3, 4, 8), min_length=1, max_length=7, description="b1 of the grid: width of the groups' maxima."
    )
    absmax_dtypes: tuple[FloatName, ...] = Field(
        default=("bfloat16", "float16", "float32"),
        min_length=1,
        max_length=3,
        description="b2 of the grid: dtype of the maxima's scales.",
    )
    superblocks: tuple[Annotated[int, Field(strict=True, ge=1, le=65536)], ...] = Field(
        default=(16, 64, 256), min_length=1, max_length=8, description="B1 of the grid: groups that share such a scale."
    )

    def candidates(self, name: str, in_features: int) -> tuple[Candidate, ...]:
        """The grid (b0, b1, b2, B0, B1), less what overrides fix and group sizes that do not divide."""
        schemes = [candidate.scheme for candidate in super().candidates(name, in_features)]
        if self.budget() is None:
            return tuple(Candidate(scheme, PRESET_ABSMAX) for scheme in schemes)
        given = [o.group_size for p, o in self.modules.overrides.items() if fnmatchcase(name, p) and o.group_size]
        sizes = given[-1:] or [size for size in self.group_sizes if in_features % size == 0] or self.group_sizes[:1]
        grid = product(sizes, self.absmax_bits, self.absmax_dtypes, self.superblocks)
        return tuple(
            Candidate(scheme.model_copy(update={"group_size": size}), AbsmaxScheme(bits, dtype, superblock))
            for size, bits, dtype, superblock in grid
            for scheme in schemes
        )

    def scheme(self, name: str) -> Scheme | None:
        """As in every method; under a budget with the smallest group size, which divides if any does."""
        found = super().scheme(name)
        fixed = any(o.group_size for p, o in self.modules.overrides.items() if fnmatchcase(name, p))
        if found is None or fixed or self.budget() is None:
            return found
        return found.model_copy(update={"group_size": min(self.group_sizes)})

    def least_bits(self, name: str, in_features: int) -> float:
        """Of the grid's cheapest configuration."""
        return min(
            c.scheme.bits
            + (c.absmax.bits + c.absmax.dtype_bits / c.absmax.superblock) / _columns(c.scheme, in_features)
            for c in self.candidates(name, in_features)
            if c.absmax is not None
        )

    def forms(self) -> frozenset[Form]:
        """NormalFloat codes and factors, whatever the parameters."""
        return frozenset({Form.CODEBOOK, Form.LOW_RANK})

    def adapter_rank(self) -> int:
        """The spec's `rank`."""
        return self.rank

    def needs_fisher(self) -> bool:
        """The spec's `fisher`."""
        return self.fisher


def _columns(scheme: Scheme, in_features: int) -> int:
    return in_features if scheme.group_size == PER_CHANNEL else scheme.group_size


QuantizationSpec = Annotated[RTNSpec | SignRoundSpec | LQLoRASpec, Field(discriminator="method")]


@dataclass(frozen=True)
class Preset:
    """What a preset fills in where the request is silent: fields of the method's spec, and the calibration's size."""

    spec: Mapping[str, int]
    num_samples: int
    sequence_length: int


SIGNROUND_PRESETS: MappingProxyType[str, Preset] = MappingProxyType(
    {
        "light": Preset({"steps": 50, "scale_steps": 0}, num_samples=128, sequence_length=512),
        "default": Preset({"steps": 200, "scale_steps": 0}, num_samples=128, sequence_length=2048),
        "best": Preset({"steps": 200, "scale_steps": 100}, num_samples=128, sequence_length=2048),
    }
)


@dataclass(frozen=True)
class MethodInfo:
    """A method: what /v1/methods tells of it, and what requests, estimates and tables follow from."""

    spec: type[WeightSpec]
    title: str
    summary: str
    paper: str | None
    """arXiv number, None where there is no paper."""
    produces: frozenset[Form]
    """All that its spec's `forms` may say."""
    needs_calibration: bool
    presets: Mapping[str, Preset] = field(default_factory=lambda: MappingProxyType({}))
    """By the values of the spec's field `preset`; none if it has no such field."""


METHODS: MappingProxyType[str, MethodInfo] = MappingProxyType(
    {
        "rtn": MethodInfo(
            spec=RTNSpec,
            title="Round to nearest",
            summary="The baseline: each weight goes to the nearest code of its group's range.",
            paper=None,
            produces=frozenset({Form.AFFINE}),
            needs_calibration=False,
        ),
        "signround": MethodInfo(
            spec=SignRoundSpec,
            title="SignRound",
            summary="Tunes rounding and clipping ranges of a block's linears against the original block's output.",
            paper="2309.05516",
            produces=frozenset({Form.AFFINE}),
            needs_calibration=True,
            presets=SIGNROUND_PRESETS,
        ),
        "lq-lora": MethodInfo(
            spec=LQLoRASpec,
            title="LQ-LoRA",
            summary="NormalFloat codes plus low-rank factors by alternating decomposition, each linear with its share "
            "of a budget of bits, weighted by Fisher information.",
            paper="2311.12023",
            produces=frozenset({Form.CODEBOOK, Form.LOW_RANK}),
            needs_calibration=True,
        ),
    }
)

RECIPES: MappingProxyType[str, dict[str, object]] = MappingProxyType(
    {
        "auto-round": {"method": "signround"},
        "auto-round-light": {"method": "signround", "preset": "light"},
        "auto-round-best": {"method": "signround", "preset": "best"},
        "lq-lora-unweighted": {"method": "lq-lora", "fisher": False},
    }
)
"""Shorthand `method` names that are not methods, with the shorthand fields that they stand for."""
