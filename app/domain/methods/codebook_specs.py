"""Frozen spec of the method that rounds to a codebook alone."""

from typing import Literal

from pydantic import Field

from app.domain.methods.any_method import WeightsOnly, WeightSpec
from app.domain.methods.schemes import PRESET_ABSMAX, AbsmaxScheme
from bitwright.formats import Form


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
    weights_only: WeightsOnly = False

    def needs_model(self) -> bool:
        """Weights alone."""
        return False

    def asks_for_weights_alone(self) -> bool:
        """As the request says."""
        return self.weights_only

    def observes_inputs(self) -> bool:
        """Weights alone."""
        return False

    def absmax(self) -> AbsmaxScheme | None:
        """QLoRA's, with double quantization."""
        return PRESET_ABSMAX if self.double_quantization else None

    def forms(self) -> frozenset[Form]:
        """Codes of a codebook."""
        return frozenset({Form.CODEBOOK})
