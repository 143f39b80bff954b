"""Frozen specs of the methods that make low-rank factors beside quantized weights."""

import math
from itertools import product
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from app.domain.methods.any_method import BatchSize, LearningRate, PresetName, Steps, WeightSpec
from app.domain.methods.budgets import BitBudget, Candidate, Width
from app.domain.methods.schemes import (
    MAX_BITS,
    MIN_BITS,
    PRESET_ABSMAX,
    AbsmaxScheme,
    FloatName,
    GroupSize,
    Scheme,
    Symmetric,
    fits,
)
from app.domain.methods.weight_specs import RTNSpec, SignRoundSpec
from bitwright.formats import Form

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
    def _only_codebooks_have_a_second_level(self) -> Self:
        if self.base == "affine" and self.double_quantization:
            raise ValueError('double_quantization is for base "normal-float"; leave it out with "affine"')
        return self

    def observes_inputs(self) -> bool:
        """Weights alone."""
        return False

    def absmax(self) -> AbsmaxScheme | None:
        """QLoRA's, with double quantization."""
        return PRESET_ABSMAX if self.double_quantization else None

    def forms(self) -> frozenset[Form]:
        """By the base."""
        return frozenset({Form.AFFINE if self.base == "affine" else Form.CODEBOOK, Form.LOW_RANK})

    def factors_rank(self) -> int:
        """The spec's `rank`."""
        return self.rank


class ApiQSpec(WeightSpec):
    """ApiQ: clipping and low-rank factors trained together against the original model's activations."""

    method: Literal["apiq"] = "apiq"
    preset: PresetName = Field(
        default="default", description="Fills steps and the calibration's size where they are not given."
    )
    symmetric: Symmetric = False
    granularity: Literal["block", "layer"] = Field(
        default="block",
        description="Whose output is preserved: a whole block's, all its linears at once, or each linear's in turn.",
    )
    rank: Rank = 64
    alpha: Alpha = 16.0
    steps: Steps = Field(
        default=512,
        description="Tuning steps of a block, or of the linears of one input with granularity layer.",
    )
    batch_size: BatchSize = 1
    learning_rate: LearningRate = Field(default=5e-4, description="Of the low-rank factors.")
    range_learning_rate: LearningRate = Field(default=5e-3, description="Of the clipping of ranges.")
    weight_decay: float = Field(
        default=0.1,
        strict=True,
        ge=0,
        le=10,
        allow_inf_nan=False,
        description="Of both; on the clipping it acts toward tighter ranges.",
    )
    aug_loss: bool = Field(
        default=False,
        strict=True,
        description="Also keep close to what the original weights make of the quantized inputs.",
    )
    base: Literal["rtn", "signround"] = Field(
        default="rtn",
        description="Where ranges and rounding start: the groups' full ranges, or SignRound's result.",
    )
    freeze_base: bool = Field(
        default=False, strict=True, description="Keep the base as it is and train the low-rank factors alone."
    )

    def base_spec(self) -> WeightSpec:
        """The spec of the base, for the same linears."""
        shared = {name: getattr(self, name) for name in WeightSpec.model_fields if name != "method"}
        return SignRoundSpec(**shared) if self.base == "signround" else RTNSpec(**shared)

    def forms(self) -> frozenset[Form]:
        """Affine weights and factors."""
        return frozenset({Form.AFFINE, Form.LOW_RANK})

    def factors_rank(self) -> int:
        """The spec's `rank`."""
        return self.rank

    def tuned_sequences(self, num_samples: int) -> int:
        """A batch a step, and what the base costs; steps of parts of a block count as one of the block."""
        return self.steps * min(self.batch_size, num_samples) + self.base_spec().tuned_sequences(num_samples)

    def tunes_linears_apart(self) -> bool:
        return self.granularity == "layer"

    def needs_original_inputs(self) -> bool:
        """Targets are enough, unless each linear has its own."""
        return self.tunes_linears_apart()

    def shared_batch(self) -> int:
        """A step's batch, if there are steps: what divides it and the base's too."""
        return math.gcd(self.batch_size, self.base_spec().shared_batch()) if self.steps else 0


class LQLoRASpec(WeightSpec):
    """LQ-LoRA: NormalFloat with double quantization and low-rank factors, found together, under a budget of bits."""

    method: Literal["lq-lora"] = "lq-lora"
    bits: Width = BitBudget(average=2.75)
    group_size: GroupSize = Field(default=64, description="Where bits is one width; a budget chooses of group_sizes.")
    rank: Rank = 64
    alpha: Alpha = 16.0
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
        given = [o.group_size for p, o in self.modules.overrides.items() if fits(name, p) and o.group_size]
        sizes = given[-1:] or [size for size in self.group_sizes if in_features % size == 0] or self.group_sizes[:1]
        grid = product(sizes, self.absmax_bits, self.absmax_dtypes, self.superblocks)
        return tuple(
            Candidate(scheme.model_copy(update={"group_size": size}), AbsmaxScheme(bits, dtype, superblock))
            for size, bits, dtype, superblock in grid
            for scheme in schemes
        )

    def scheme_of(self, name: str) -> Scheme | None:
        """As in every method; under a budget with the smallest group size, which divides if any does."""
        widest = super().scheme_of(name)
        fixed = any(o.group_size for p, o in self.modules.overrides.items() if fits(name, p))
        if widest is None or fixed or self.budget() is None:
            return widest
        return widest.model_copy(update={"group_size": min(self.group_sizes)})

    def least_bits(self, name: str, in_features: int) -> float:
        """Of the grid's cheapest configuration."""
        return min(
            c.scheme.bits + (c.absmax.bits + c.absmax.dtype_bits / c.absmax.superblock) / c.scheme.width(in_features)
            for c in self.candidates(name, in_features)
            if c.absmax is not None
        )

    def observes_inputs(self) -> bool:
        """Text is for the Fisher information alone."""
        return False

    def absmax(self) -> AbsmaxScheme | None:
        """QLoRA's, without a budget."""
        return None if self.budget() is not None else PRESET_ABSMAX

    def forms(self) -> frozenset[Form]:
        """NormalFloat codes and factors, whatever the parameters."""
        return frozenset({Form.CODEBOOK, Form.LOW_RANK})

    def factors_rank(self) -> int:
        """The spec's `rank`."""
        return self.rank

    def needs_fisher(self) -> bool:
        """The spec's `fisher`."""
        return self.fisher

    def needs_original_inputs(self) -> bool:
        """Gradients of the loss say what the text has to say."""
        return False
