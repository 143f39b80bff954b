"""Frozen specs of the methods that make quantized weights alone."""

from typing import Literal

from pydantic import Field

from app.domain.schemes import WeightSpec

ANY_SHARE = 840
"""A batch that any number of devices up to 8 divides: of methods that sum over all sequences at once."""
SCALE_BATCH_SIZE = 4
"""Sequences of a step that tunes scales end to end."""


class RTNSpec(WeightSpec):
    """Round to nearest. Looks at the weights alone."""

    method: Literal["rtn"] = "rtn"


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
