"""Points of the trade between size and distance that a goal is chosen from."""

from pydantic import BaseModel, ConfigDict, Field


class FrontierPoint(BaseModel):
    """The closest result of a size, as far as it is known."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    bytes: int = Field(description="Of the weight files of a checkpoint, at the most.")
    bits_per_weight: float = Field(description="Of the linears whose schemes are chosen, scales included.")
    error: float | None = Field(
        default=None, description="KL by the loss's squared gradients, nats a token, before anything is measured."
    )
    kl_predicted: float | None = Field(
        default=None, description="Nats a token, rounded to nearest: between the points that were measured."
    )
    kl_rounded: float | None = Field(default=None, description="The same, measured on held-out calibration text.")
    kl: float | None = Field(default=None, description="Of the method's result, measured on the same text.")
