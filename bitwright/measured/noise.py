"""Noise of figures: how far a figure lies from what it would be on other text of the same kind.

Sequences, or rows of a task, are draws; tokens of one sequence are not, since they have the same words before them. The
standard error of a mean over n draws is their standard deviation over sqrt(n).
"""

from pydantic import Field

from bitwright.measured.report_part import ReportPart

STANDARD_ERRORS = 2.0
"""Within so many of them, two figures are not said to differ."""


class Noise(ReportPart):
    """Standard errors over the sequences of a text; null where there is one sequence only."""

    sequences: int
    perplexity: float | None
    perplexity_ratio: float | None = Field(description="Of perplexity after over before, sequence by sequence.")
    kl_divergence: float | None
    top1_agreement: float | None


def within_noise(difference: float, stderr: float | None) -> bool:
    """True if a difference with this standard error may be none."""
    return stderr is not None and abs(difference) <= STANDARD_ERRORS * stderr
