"""Figures of an evaluation's tasks: of the original and of what ships, with the noise of their difference."""

from pydantic import Field

from bitwright.measured.noise import within_noise
from bitwright.measured.report_part import ReportPart


class TaskFigure(ReportPart):
    """A figure of a task. Standard errors are over rows; null where there is one row only."""

    name: str
    higher_is_better: bool
    original: float | None = Field(description="null for a figure that compares with the original.")
    original_stderr: float | None = None
    value: float = Field(description="Of what ships.")
    stderr: float | None = None
    difference_stderr: float | None = Field(
        default=None, description="Of `value` less `original`, row by row: both models are asked the same rows."
    )
    rows: int = Field(description="That the figure is over.")

    @property
    def is_noise(self) -> bool:
        """True if it differs from the original's by no more than the noise."""
        return self.original is not None and within_noise(self.value - self.original, self.difference_stderr)

    @property
    def worse_by(self) -> float | None:
        """Difference from the original's, positive where it is worse."""
        if self.original is None:
            return None
        return self.original - self.value if self.higher_is_better else self.value - self.original


class TaskReport(ReportPart):
    """One task: the rows that both models were asked, and what came of it."""

    name: str
    kind: str
    source: str = Field(description="Shorthand of the dataset source.")
    sha256: str = Field(description="Of the rows as they were asked: tokens and answers.")
    rows: int
    figures: tuple[TaskFigure, ...]
    tokens_written: int = Field(default=0, description="Of greedy texts of what ships, all rows together.")
    seconds: float

    def figure(self, name: str) -> TaskFigure | None:
        """The figure of a name; None if the rows gave none."""
        return next((figure for figure in self.figures if figure.name == name), None)
