"""Frozen spec of the method that tunes where ranges of groups are clipped."""

from typing import Literal

from pydantic import Field

from app.domain.methods.any_method import BatchSize, GoalSpec, LearningRate, PresetName


class OmniQuantSpec(GoalSpec):
    """OmniQuant's learnable weight clipping: each group's range tuned by AdamW, block by block."""

    method: Literal["omniquant"] = "omniquant"
    preset: PresetName = Field(
        default="default", description="Fills epochs, aug_loss and the calibration's size where they are not given."
    )
    epochs: int = Field(
        default=20,
        strict=True,
        ge=0,
        le=1000,
        description="Passes over the calibration sequences per block; with 0 every range is shrunk to 0.982 of itself.",
    )
    batch_size: BatchSize = 1
    learning_rate: LearningRate = Field(default=5e-3, description="Of every step.")
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
