"""What the supervisor tells the fetch: `fetch.json` in the workspace."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from app.domain.events import TEXT_ROLES
from app.domain.sources import HubDataset, HubModel


class TextOrder(BaseModel):
    """One Hub dataset to write as JSONL to `path`: rows from the start, until `characters` of text are there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: HubDataset
    path: str
    characters: Annotated[int, Field(gt=0)]


class FetchOrder(BaseModel):
    """What to bring from the Hub; models go into folders of their own under `models_folder`, shared by all jobs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: HubModel | None
    models_folder: str
    calibration: TextOrder | None = None
    evaluation: TextOrder | None = None
    finetuning: TextOrder | None = None

    @property
    def empty(self) -> bool:
        """Whether the job needs nothing from the Hub."""
        return not any((self.model, *(getattr(self, role) for role in TEXT_ROLES.values())))
