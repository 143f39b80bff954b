"""Orders from the supervisor to its children: `fetch.json` and `order.json` in the workspace."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.domain.request.job_request import JobRequest
from app.domain.request.sources import HubDataset, HubModel, UploadedModel
from bitwright.events import TEXT_ROLES, Message

BUILTIN_TEXT = "BITWRIGHT_BUILTIN_TEXT"
"""Variable that names the file with the builtin text, for children of a worker."""


class TextOrder(BaseModel):
    """One Hub dataset to write as JSONL to `path`: rows from the start, until `characters` of text are there.

    asks    whether rows are those of a task, with answers
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: HubDataset
    path: str
    characters: Annotated[int, Field(gt=0)]
    asks: bool = False


class FetchOrder(BaseModel):
    """Models and texts to bring from the Hub; models go into folders of their own under `models_folder`, shared by all
    jobs.

    request     of the job, which the model must fit before its weights are fetched
    capacity    bytes that the worker has, by name; what it does not know is left out
    tenant_id   whose own token fetches: its models go into folders that no other tenant's jobs read, which may have no
                access to them. None: the service's, and folders for all
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: HubModel | None
    models_folder: str
    request: JobRequest | None = None
    capacity: dict[str, int] = Field(default_factory=dict)
    tenant_id: str | None = None
    calibration: TextOrder | None = None
    evaluation: TextOrder | None = None
    finetuning: TextOrder | None = None
    others: dict[str, TextOrder] = Field(default_factory=dict, description="Texts without a role, by their fields.")

    @property
    def empty(self) -> bool:
        """True if the job needs nothing from the Hub."""
        return not any((self.model, self.texts))

    @property
    def texts(self) -> dict[str, TextOrder]:
        """All texts, by the request's fields that name them."""
        known = {field: getattr(self, role) for field, role in TEXT_ROLES.items()}
        return {field: text for field, text in known.items() if text is not None} | self.others


class PublishOrder(BaseModel):
    """Files under `folder` to commit, by their paths in it, to a repository of the Hub."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    job_id: str
    repository: str
    private: bool
    force: bool
    folder: str


class RuntimePlace(Message):
    """A runtime of a worker.

    place   where it is, if it is not among this Python's packages: llama.cpp's libraries, the Python of vLLM
    """

    version: str
    place: str | None = None


class WarmChild(Message):
    """A limited child that waits for orders (`app.limited.process.Handle`)."""

    orders: int
    answers: int
    pid: int


class AttemptOrder(Message):
    """The supervisor's order to an attempt: `order.json` in the workspace. All paths are absolute and local."""

    job_id: str
    attempt: int
    request: JobRequest
    model_path: str
    model_revision: str | None = None
    calibration_path: str | None = Field(default=None, description="JSONL file; None for builtin or generated text.")
    evaluation_path: str | None = Field(default=None, description="JSONL file; None for builtin text.")
    finetuning_path: str | None = Field(default=None, description="JSONL file; None for builtin text.")
    other_texts: dict[str, str] = Field(
        default_factory=dict,
        description="JSONL files of further texts, by the request's fields that name them: parts of a mixture, tasks.",
    )
    base_job_path: str | None = Field(
        default=None, description="Folder with the checkpoints of the job that this one starts from, by format."
    )
    device: Literal["cpu", "cuda"]
    device_index: int = Field(default=0, description="Of the first rank; the others follow.")
    world_size: int = Field(default=1, ge=1, description="Processes that compute the job together, each a rank.")
    rendezvous: str = Field(default="", description="Path of a new file by which several ranks find each other.")
    runtimes: dict[str, RuntimePlace] = Field(
        default_factory=dict, description="What the worker has to read results in, by name."
    )
    warm: WarmChild | None = Field(
        default=None,
        description="A child that has imported what reading takes; None: the attempt starts one for results.",
    )
    limits_input: bool = Field(
        default=False,
        description="Whether that child reads the job's input, too, within limits; else the attempt does.",
    )
    input_memory_bytes: int = Field(default=4 << 30, description="The most that reading the job's input may take.")
    input_seconds: float = Field(default=120.0, description="The same in seconds, and more for large texts.")
    micro_batch_divisor: int = Field(default=1, description="2 or more after an out-of-memory attempt.")
    told: int | None = Field(
        default=None,
        description="Milestones that earlier attempts have told: what is adopted beyond them is told now. None: all.",
    )
    traceparent: str | None = Field(default=None, description="The attempt's place in its job's trace, if any.")
    memory: Literal["plan", "off"] | int = Field(
        default="off", description="The most memory of the attempt: by what its job needs, any, or so many bytes."
    )
    tells_needs: bool = Field(
        default=False, description="Whether the attempt reports what it will need: the worker has memory to give back."
    )

    def is_told(self, milestone: int) -> bool:
        """True if an earlier attempt has told of a block or checkpoint, which died before it could else."""
        return self.told is None or milestone < self.told

    def with_told(self, milestones: int) -> "AttemptOrder":
        """The same order once this attempt has told of so many itself."""
        return self if self.told is None else self.model_copy(update={"told": max(self.told, milestones)})

    @property
    def text_files(self) -> list[Path]:
        """Files of all texts that are read from one."""
        paths = (self.calibration_path, self.evaluation_path, self.finetuning_path, *self.other_texts.values())
        return [Path(path) for path in paths if path is not None]

    @property
    def model_pin(self) -> str | None:
        """Name of the model's bytes, alike on any machine: its commit on the Hub, its upload; None: it has none."""
        model = self.request.model
        return self.model_revision or (model.id if isinstance(model, UploadedModel) else None)

    def renumbered(self, given: Mapping[int, int]) -> "AttemptOrder":
        """The order with the numbers that descriptors have in another process: `given`, from number to number."""
        if self.warm is None or not given:
            return self
        ends = {"orders": given[self.warm.orders], "answers": given[self.warm.answers]}
        return self.model_copy(update={"warm": self.warm.model_copy(update=ends)})


class SpareOrder(Message):
    """The one order that a spare takes: a JSON line, with descriptors beside it (`workers.child.birth`).

    log     the file that takes what the process prints from then on
    given   numbers that the descriptors have in the supervisor, in the order in which they come
    """

    workspace: str
    log: str
    job_id: str
    attempt: int
    given: tuple[int, ...] = ()
