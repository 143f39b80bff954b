"""Mixtures of calibration text: several datasets, or kinds of rows of one, each with its share of the sequences."""

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from app.domain.inputs.rows import RowKind
from app.domain.request.sources import BuiltinText, DatasetSource, HubDataset, LocalText, UploadedText

ROUNDED = 1e-6
"""By how much shares may differ from 1 in sum: 0.1 added up ten times is not 1."""


class MixedPart(BaseModel):
    """Rows that are a part of the calibration text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: DatasetSource
    share: float = Field(
        strict=True, gt=0, le=1, allow_inf_nan=False, description="Of the sequences; all shares add up to 1."
    )
    kind: RowKind | None = Field(
        default=None,
        description="Rows of this kind alone: text, completion (with prompt), messages, tools (messages with tools).",
    )

    @property
    def label(self) -> str:
        """Its name in a report."""
        match self.dataset:
            case HubDataset(id=named) | UploadedText(id=named):
                pass
            case LocalText(path=path):
                named = path.rpartition("/")[2]
            case BuiltinText():
                named = "builtin"
        return named if self.kind is None else f"{self.kind.value} of {named}"


def demand_whole(parts: Sequence[MixedPart]) -> None:
    """Refuses shares that do not add up to 1, and parts that are given twice.

    Raises:
        ValueError: says how they add up.
    """
    total = math.fsum(part.share for part in parts)
    if parts and abs(total - 1) > ROUNDED:
        raise ValueError(f"must have shares that add up to 1, not {total:g}")
    labels = [(part.dataset, part.kind) for part in parts]
    if len(set(labels)) < len(labels):
        raise ValueError("must name each dataset, or kind of its rows, once")


def sequences_of(parts: Sequence[MixedPart], count: int) -> list[int]:
    """Numbers of sequences that parts give of `count`: by largest remainders, one at least where there is room."""
    exact = [part.share * count for part in parts]
    given = [int(each) for each in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: (given[i] - exact[i], i))
    for index in by_remainder[: count - sum(given)]:
        given[index] += 1
    for index in [i for i, number in enumerate(given) if number == 0] if count >= len(parts) else []:
        given[given.index(max(given))] -= 1
        given[index] = 1
    return given
