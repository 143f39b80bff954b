"""What can be done to a model: frozen specs of the quantization methods, their presets, and the recipes.

A spec is a method's parameters and nothing else. `METHODS` lists every method with its paper; `RECIPES` are
shorthand names that stand for parts of a request.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

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


class RTNSpec(WeightSpec):
    """Round to nearest. Looks at the weights alone."""

    method: Literal["rtn"] = "rtn"


class NormalFloatSpec(WeightSpec):
    """NormalFloat, round to nearest: the base of QLoRA. Looks at the weights alone."""

    method: Literal["nf"] = "nf"
    bits: int = Field(default=4, strict=True, ge=2, le=4, description="Width of a code in bits: NF2, NF3 or NF4.")
    double_quantization: bool = Field(
        default=True,
        strict=True,
        description="Store the groups' largest magnitudes in 8 bits, with one fp32 number for 256 of them: 4.127 bits "
        "a weight in place of 4.25 with groups of 64.",
    )

    @model_validator(mode="after")
    def _is_symmetric(self) -> Self:
        if not all(scheme.symmetric for scheme in self.schemes().values()):
            raise ValueError("NormalFloat is symmetric: leave symmetric true")
        return self

    def forms(self) -> frozenset[Form]:
        """Codes of a codebook."""
        return frozenset({Form.CODEBOOK})


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

    def needs_original_inputs(self) -> bool:
        """Only in place of the quantized blocks' outputs."""
        return not self.quantized_inputs

    def shared_batch(self) -> int:
        """A step's batch, if there are steps."""
        return self.batch_size if self.steps else 0


QuantizationSpec = Annotated[RTNSpec | NormalFloatSpec | SignRoundSpec, Field(discriminator="method")]


@dataclass(frozen=True)
class Preset:
    """What a preset fills in where the request is silent: fields of the method's spec, and the calibration's size."""

    spec: Mapping[str, int]
    num_samples: int
    sequence_length: int


SIGNROUND_PRESETS: MappingProxyType[str, Preset] = MappingProxyType(
    {
        "light": Preset({"steps": 50, "scale_steps": 0}, num_samples=128, sequence_length=2048),
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
        "nf": MethodInfo(
            spec=NormalFloatSpec,
            title="NormalFloat",
            summary="Each weight goes to the nearest quantile of a normal distribution: QLoRA's base, 2 to 4 bits.",
            paper="2305.14314",
            produces=frozenset({Form.CODEBOOK}),
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
    }
)

RECIPES: MappingProxyType[str, dict[str, object]] = MappingProxyType(
    {
        "auto-round": {"method": "signround"},
        "auto-round-light": {"method": "signround", "preset": "light"},
        "auto-round-best": {"method": "signround", "preset": "best"},
    }
)
"""Shorthand `method` names that are not methods, with the shorthand fields that they stand for."""
