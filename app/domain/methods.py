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


class RTNSpec(WeightSpec):
    """Round to nearest. Looks at the weights alone."""

    method: Literal["rtn"] = "rtn"


ANY_SHARE = 840
"""A batch that any number of devices up to 8 divides: of methods that sum over all sequences at once."""
SCALE_BATCH_SIZE = 4
"""Sequences of a step that tunes scales end to end."""


class GPTQSpec(WeightSpec):
    """GPTQ: columns rounded in turn, each column's error made up for by those that are not rounded yet."""

    method: Literal["gptq"] = "gptq"
    damping: float = Field(
        default=0.01,
        strict=True,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="Added to the Hessian's diagonal, as a share of its mean (percdamp); raised if that is too little.",
    )
    act_order: bool = Field(
        default=True,
        strict=True,
        description="Take columns by falling Hessian diagonal instead of in their order. Groups stay consecutive "
        "columns, with scales from the original weights (static groups).",
    )

    def tuned_sequences(self, num_samples: int) -> int:
        """What Hessians and their factors cost, in sequences that are tuned on: about one for each that calibrates."""
        return num_samples

    def needs_original_inputs(self) -> bool:
        """Linears are observed in the quantized stream alone."""
        return False

    def shared_batch(self) -> int:
        """Hessians are sums over sequences."""
        return ANY_SHARE


class AWQSpec(WeightSpec):
    """AWQ: columns of large inputs scaled up before rounding, the inverse folded into what comes before them."""

    method: Literal["awq"] = "awq"
    search_samples: int = Field(
        default=32,
        strict=True,
        ge=1,
        le=65_536,
        description="Calibration sequences on which candidate scales are judged; all of them are observed.",
    )
    clip_search: bool = Field(
        default=True,
        strict=True,
        description="Clip the groups' ranges where that lowers the error of their products with the inputs.",
    )
    quantized_inputs: bool = Field(
        default=False,
        strict=True,
        description="Observe what the quantized blocks before a block put out, instead of the original ones.",
    )

    def tuned_sequences(self, num_samples: int) -> int:
        """What the search costs, in sequences that are tuned on: 20 candidates for each part of a block."""
        return num_samples + 8 * min(self.search_samples, num_samples)

    def needs_original_inputs(self) -> bool:
        """Only in place of the quantized blocks' outputs."""
        return not self.quantized_inputs

    def shared_batch(self) -> int:
        """All that is observed and judged is a sum over sequences."""
        return ANY_SHARE


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


class OmniQuantSpec(WeightSpec):
    """OmniQuant's learnable weight clipping: each group's range tuned by AdamW, block by block."""

    method: Literal["omniquant"] = "omniquant"
    preset: Literal["light", "default", "best"] = Field(
        default="default", description="Fills epochs, aug_loss and the calibration's size where they are not given."
    )
    epochs: int = Field(
        default=20,
        strict=True,
        ge=0,
        le=1000,
        description="Passes over the calibration sequences a block; with 0 every range is shrunk to 0.982 of itself.",
    )
    batch_size: int = Field(default=1, strict=True, ge=1, le=1024, description="Sequences a step.")
    learning_rate: float = Field(
        default=5e-3, strict=True, gt=0, le=1, allow_inf_nan=False, description="Of every step."
    )
    aug_loss: bool = Field(
        default=False,
        strict=True,
        description="Also keep close to what the original block makes of the quantized inputs.",
    )

    def tuned_sequences(self, num_samples: int) -> int:
        """Every sequence an epoch."""
        return self.epochs * num_samples

    def needs_original_inputs(self) -> bool:
        """Targets are enough."""
        return False

    def shared_batch(self) -> int:
        """A step's batch, if there are steps."""
        return self.batch_size if self.epochs else 0


Rank = Annotated[
    int,
    Field(
        strict=True, ge=1, le=4096, description="Of the low-rank factors; at most the smaller side of a linear counts."
    ),
]
Alpha = Annotated[
    float,
    Field(
        gt=0,
        le=65_536,
        allow_inf_nan=False,
        description="LoRA's alpha: in finetuning the factors' product is multiplied by alpha/rank.",
    ),
]


class LoftQSpec(WeightSpec):
    """LoftQ: quantization and a low-rank correction found in turn, each for what the other leaves of the weight."""

    method: Literal["loftq"] = "loftq"
    base: Literal["normal-float", "affine"] = Field(
        default="normal-float", description="What weights are rounded to: NormalFloat codebooks or evenly spaced codes."
    )
    double_quantization: bool = Field(
        default=False,
        strict=True,
        description="Store the codebooks' largest magnitudes in 8 bits, with one fp32 scale for 256 of them.",
    )
    rank: Rank = 64
    alpha: Alpha = 16.0
    iterations: int = Field(
        default=5, strict=True, ge=1, le=100, description="Of the alternation; the best one is the result."
    )

    @model_validator(mode="after")
    def _codebooks_have_no_zero_point(self) -> Self:
        if self.base == "normal-float" and not all(scheme.symmetric for scheme in self.schemes().values()):
            raise ValueError('NormalFloat is symmetric: leave symmetric true, or set base to "affine"')
        if self.base == "affine" and self.double_quantization:
            raise ValueError('double_quantization is for base "normal-float"; leave it out with "affine"')
        return self

    def forms(self) -> frozenset[Form]:
        """By the base."""
        return frozenset({Form.AFFINE if self.base == "affine" else Form.CODEBOOK, Form.LOW_RANK})

    def adapter_rank(self) -> int:
        """The spec's `rank`."""
        return self.rank


QuantizationSpec = Annotated[
    RTNSpec | GPTQSpec | AWQSpec | OmniQuantSpec | SignRoundSpec | LoftQSpec, Field(discriminator="method")
]


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

OMNIQUANT_PRESETS: MappingProxyType[str, Preset] = MappingProxyType(
    {
        "light": Preset({"epochs": 5, "aug_loss": False}, num_samples=128, sequence_length=512),
        "default": Preset({"epochs": 20, "aug_loss": False}, num_samples=128, sequence_length=2048),
        "best": Preset({"epochs": 40, "aug_loss": True}, num_samples=128, sequence_length=2048),
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
        "gptq": MethodInfo(
            spec=GPTQSpec,
            title="GPTQ",
            summary="Rounds a linear's columns in turn; those not rounded yet make up for each one's error.",
            paper="2210.17323",
            produces=frozenset({Form.AFFINE}),
            needs_calibration=True,
        ),
        "awq": MethodInfo(
            spec=AWQSpec,
            title="AWQ",
            summary="Scales up the columns of large inputs before rounding, folds the inverse into norms and linears "
            "before them, and clips ranges.",
            paper="2306.00978",
            produces=frozenset({Form.AFFINE}),
            needs_calibration=True,
        ),
        "omniquant": MethodInfo(
            spec=OmniQuantSpec,
            title="OmniQuant",
            summary="Tunes how far each group's range is clipped against the original block's output.",
            paper="2308.13137",
            produces=frozenset({Form.AFFINE}),
            needs_calibration=True,
            presets=OMNIQUANT_PRESETS,
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
        "loftq": MethodInfo(
            spec=LoftQSpec,
            title="LoftQ",
            summary="Rounds to NormalFloat or an affine grid and corrects what is lost by low-rank factors, in turn.",
            paper="2310.08659",
            produces=frozenset(Form),
            needs_calibration=False,
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
