"""Tasks of an evaluation: rows whose answers are known, and the figures that each kind of task gives.

Figures are those of lm-eval (EleutherAI's lm-evaluation-harness) of the same names, on the same rows.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from app.domain.request.sources import TaskSource

TOKENS_PER_ROW = 1024
"""Of a row in a dataset on the Hub, by which it is known how much of that is fetched."""


class TaskKind(StrEnum):
    """Question that a row asks a model."""

    MULTIPLE_CHOICE = "multiple_choice"
    EXACT_MATCH = "exact_match"
    PERPLEXITY = "perplexity"
    CHAT = "chat"


HIGHER_IS_BETTER: Mapping[TaskKind, Mapping[str, bool]] = MappingProxyType(
    {
        TaskKind.MULTIPLE_CHOICE: {"acc": True, "acc_norm": True, "acc_bytes": True},
        TaskKind.EXACT_MATCH: {"exact_match": True, "same_tokens": True},
        TaskKind.PERPLEXITY: {"word_perplexity": False, "byte_perplexity": False, "bits_per_byte": False},
        TaskKind.CHAT: {
            "well_formed": True,
            "ended": True,
            "calls_valid": True,
            "calls_match": True,
            "same_tokens": True,
        },
    }
)
"""Figures by kind, and whether more is better. `calls_valid` is of rows with tools, `calls_match` of those whose last
turn is known; `same_tokens` counts tokens until the quantized model's greedy text leaves the original's."""


class TaskPart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EvaluationTask(TaskPart):
    """Rows that both models are asked, the original and what ships."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$", description="Of your choice, for the report.")
    kind: TaskKind = Field(
        description="multiple_choice: rows with `question`, `choices` and `answer`, by log-likelihood. exact_match: "
        "`prompt` and `answer`, by greedy text. perplexity: any text. chat: `messages`, and `tools` if there are any: "
        "whether greedy turns and their calls are well formed."
    )
    dataset: TaskSource = Field(description="JSONL rows: an upload, a file, or a dataset on the Hub.")
    limit: int = Field(default=1000, strict=True, ge=1, le=20_000, description="Rows, the first ones, at the most.")
    max_new_tokens: int = Field(default=64, strict=True, ge=1, le=4096, description="Of a greedy text.")
    stop: tuple[str, ...] = Field(
        default=("\n",), max_length=8, description="Texts at which an answer of exact_match ends, besides its own end."
    )

    @property
    def tokens_read(self) -> int:
        """Tokens of the dataset that are read at the most, about."""
        return self.limit * TOKENS_PER_ROW

    @property
    def metrics(self) -> Mapping[str, bool]:
        """Its figures, and whether more is better."""
        return HIGHER_IS_BETTER[self.kind]


class TaskRequirement(TaskPart):
    """A limit on a figure of a task."""

    task: str = Field(description="Name of a task of `evaluation.tasks`.")
    metric: str = Field(description="One of its figures, e.g. acc.")
    at_least: float | None = Field(default=None, strict=True, allow_inf_nan=False)
    at_most: float | None = Field(default=None, strict=True, allow_inf_nan=False)
    worse_by_at_most: float | Literal["noise"] | None = Field(
        default=None,
        description="Than the original's. noise: two standard errors of the difference over rows.",
    )
