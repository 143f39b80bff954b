"""Frozen specs of the methods that make quantized weights alone."""

from typing import Literal

from pydantic import Field

from app.domain.methods.any_method import (
    ANY_SHARE,
    BatchSize,
    LearningRate,
    NamedSchemeSpec,
    Steps,
    WeightsOnly,
)
from bitwright.formats import Form


class RTNSpec(NamedSchemeSpec):
    """Round to nearest. Looks at the weights alone, but for llama.cpp's types, whose search weighs them by inputs."""

    method: Literal["rtn"] = "rtn"
    scale_search: bool = Field(
        default=True,
        strict=True,
        description="FP4 and MX: of the scales that can be stored near the usual one, take that with the least squared "
        "error of its group; of no effect on integers and FP8.",
    )
    weights_only: WeightsOnly = False

    def rounds_to_searched_scales(self) -> bool:
        """As the request says."""
        return self.scale_search

    def needs_model(self) -> bool:
        """A budget is spent, or a goal reached, by what the model computes, and activations are the model's."""
        return self.chooses() or self.measures_inputs()

    def asks_for_weights_alone(self) -> bool:
        """As the request says."""
        return self.weights_only

    def observes_inputs(self) -> bool:
        """Calibration text says how much each column of llama.cpp's types matters, unless weights alone are asked for:
        what an imatrix file is to its own quantizer."""
        return Form.BLOCKS in self.forms() and not self.weights_only

    def needs_original_inputs(self) -> bool:
        """Text is for a budget, or for sums of the inputs' squares."""
        return False


class GPTQSpec(NamedSchemeSpec):
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
    sweeps: int = Field(
        default=0,
        strict=True,
        ge=0,
        le=100,
        description="llama.cpp's types: passes of coordinate descent after the last column, over codes, sub-blocks' "
        "scales and minimums, and blocks' own, by the same error of the outputs. Of no effect on other schemes.",
    )

    def tuned_sequences(self, num_samples: int) -> int:
        """Cost of Hessians and their factors, in sequences that are tuned on: about one for each that calibrates."""
        return num_samples

    def needs_original_inputs(self) -> bool:
        """Linears are observed in the quantized activations alone."""
        return False

    def shared_batch(self) -> int:
        """Hessians are sums over sequences."""
        return ANY_SHARE


class AWQSpec(NamedSchemeSpec):
    """AWQ: columns of large inputs scaled up before rounding, the inverse folded into what comes before them."""

    method: Literal["awq"] = "awq"
    search_samples: int = Field(
        default=32,
        strict=True,
        ge=1,
        le=65_536,
        description="Calibration sequences on which candidate scales are scored; all of them are observed.",
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
        """Cost of the search, in sequences that are tuned on: 20 candidates for each part of a block."""
        return num_samples + 8 * min(self.search_samples, num_samples)

    def needs_original_inputs(self) -> bool:
        """Only in place of the quantized blocks' outputs."""
        return not self.quantized_inputs

    def shared_batch(self) -> int:
        """All that is observed and scored is a sum over sequences."""
        return ANY_SHARE


class SignRoundSpec(NamedSchemeSpec):
    """SignRound (AutoRound): rounding offsets and clipping ranges tuned by signed gradient descent, block by block."""

    method: Literal["signround"] = "signround"
    preset: Literal["light", "default", "best", "max"] = Field(
        default="default",
        description="Fills both numbers of steps and the calibration's size where they are not given. `max` takes "
        "minutes for what `best` takes tens of seconds for.",
    )
    steps: Steps = Field(default=200, description="Tuning steps per block; 0 equals RTN.")
    batch_size: BatchSize = 8
    learning_rate: LearningRate | None = Field(
        default=None, description="First step of the linear decay to 0; null means 1/steps."
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
    quick_steps: bool = Field(
        default=False,
        strict=True,
        description="Read half of each batch in the first three quarters of the steps, and make gradients of large "
        "bf16 models by FP8 products where a GPU has them: a block of an 8B model in about half the time.",
    )
    scale_steps: Steps = Field(
        default=0,
        description="Steps that tune all scales together against the original model's next-token distribution once "
        "every block is done, and on floating-point grids, in llama.cpp's types and of integers up to 3 bits the "
        "blocks' norms with them; of MXFP4, of llama.cpp's up to 6 bits and of integers up to 3 bits the codes, too. "
        "0 leaves that out. Skipped with a warning where the model does not fit. Of a model of 135M parameters a step "
        "takes 32 to 42 ms on an H200; for `max` the model writes text besides (`calibration.written_samples`).",
    )

    def tuned_sequences(self, num_samples: int) -> int:
        """A batch a step, or half of one."""
        batch = min(self.batch_size, num_samples)
        return (self.steps - self.half_batches()) * batch + self.half_batches() * max(1, batch // 2)

    def half_batches(self) -> int:
        """First steps that read half of their batch: while steps are large, more sequences do not make them better."""
        return self.steps * 3 // 4 if self.quick_steps else 0

    def end_to_end_steps(self) -> int:
        """The spec's `scale_steps`."""
        return self.scale_steps

    def needs_original_inputs(self) -> bool:
        """Only in place of the quantized blocks' outputs."""
        return not self.quantized_inputs

    def shared_batch(self) -> int:
        """A step's batch, if there are steps."""
        return self.batch_size if self.steps else 0
