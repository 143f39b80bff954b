"""Distance of a result on kinds of text: those that calibrated it, and rows of each part of a mixture."""

from pydantic import Field

from bitwright.measured.noise import Noise
from bitwright.measured.report_part import ReportPart


class KindQuality(ReportPart):
    """Distance from the original on sequences of one kind, as long as those of the evaluation text."""

    name: str = Field(description="calibration: of the whole calibration text; else the part of its mixture.")
    calibrates: bool = Field(description="Whether these very sequences calibrated. False: they were held out.")
    share: float | None = Field(default=None, description="Of the calibration's sequences, as asked for.")
    sequences: int = Field(default=0, description="Of this kind that calibrated.")
    tokens: int = Field(description="That were measured.")
    perplexity_original: float
    perplexity: float
    kl_divergence: float = Field(description="Nats a token.")
    top1_agreement: float
    noise: Noise
