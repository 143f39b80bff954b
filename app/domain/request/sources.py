"""Sources of models and texts. Shorthand strings expand to these.

"org/name", "org/name@revision"     -> hub
"/folder", "./folder", "~/folder"   -> local (must lie under a configured root)
"upl_..."                           -> upload
"builtin"                           -> builtin (datasets only)
"generated"                         -> generated (calibration only)
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

HUB_ID = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95})?$"
UPLOAD_ID = r"^upl_[0-9a-z]+$"
SHORT_MODEL = (
    "the id of a repository like HuggingFaceTB/SmolLM2-135M, or id@revision; the path of a folder, which begins with "
    "/, ./ or ~; or the id of an upload, upl_..."
)
"""Short texts that stand for a model, in words."""


class Source(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HubModel(Source):
    """A model repository on the Hugging Face Hub, or on the mirror that the service is set to."""

    source: Literal["hub"] = "hub"
    id: str = Field(pattern=HUB_ID, description="Repository id.", examples=["HuggingFaceTB/SmolLM2-135M"])
    revision: str = Field(
        default="main", min_length=1, max_length=200, description="Branch, tag or commit; pinned to a commit at start."
    )


class LocalModel(Source):
    """A checkpoint folder on the worker's machine, under one of the configured roots."""

    source: Literal["local"] = "local"
    path: str = Field(min_length=1, max_length=4096, description="Folder that holds config.json and safetensors.")


class UploadedModel(Source):
    """A checkpoint sent through /v1/uploads."""

    source: Literal["upload"] = "upload"
    id: str = Field(
        pattern=UPLOAD_ID, description="Id of a completed upload.", examples=["upl_0123456789abcdefghjkmnpqrs"]
    )


ModelSource = Annotated[HubModel | LocalModel | UploadedModel, Field(discriminator="source")]


class BuiltinText(Source):
    """The running Python's own reference text (`pydoc_data.topics` and standard-library docstrings).

    Split by hash into a calibration and an evaluation half. Needs no network and no licence.
    """

    source: Literal["builtin"] = "builtin"


class GeneratedText(Source):
    """Text that the model itself writes, token by token at temperature 1: for calibration alone.

    The worker holds the whole model meanwhile, and time grows with `num_samples` times `sequence_length`. What a small
    model writes is worse text to calibrate on than the builtin one, where that is in its language.
    """

    source: Literal["generated"] = "generated"


class HubDataset(Source):
    """A dataset repository on the Hub; rows need `text`, `prompt` and `completion`, or `messages`."""

    source: Literal["hub"] = "hub"
    id: str = Field(pattern=HUB_ID, description="Repository id.", examples=["NeelNanda/pile-10k"])
    revision: str = Field(default="main", min_length=1, max_length=200, description="Branch, tag or commit.")
    config: str | None = Field(default=None, max_length=200, description="Configuration name, if it has several.")
    split: str = Field(default="train", max_length=200, description="Split to read.")


class LocalText(Source):
    """A JSONL file on the worker's machine, under one of the configured roots."""

    source: Literal["local"] = "local"
    path: str = Field(min_length=1, max_length=4096, description="JSONL file; a line is a JSON object.")


class UploadedText(Source):
    """A JSONL file sent through /v1/uploads."""

    source: Literal["upload"] = "upload"
    id: str = Field(
        pattern=UPLOAD_ID,
        description="Id of a completed upload of one JSONL file.",
        examples=["upl_0123456789abcdefghjkmnpqrs"],
    )


DatasetSource = Annotated[BuiltinText | HubDataset | LocalText | UploadedText, Field(discriminator="source")]
CalibrationSource = Annotated[
    BuiltinText | GeneratedText | HubDataset | LocalText | UploadedText, Field(discriminator="source")
]
TaskSource = Annotated[HubDataset | LocalText | UploadedText, Field(discriminator="source")]


def expand_source(value: object) -> object:
    """A shorthand string as a source object; anything else unchanged, for validation to judge."""
    if not isinstance(value, str):
        return value
    if value in ("builtin", "generated"):
        return {"source": value}
    if value.startswith("upl_"):
        return {"source": "upload", "id": value}
    if value.startswith(("/", "./", "../", "~", ".")):
        return {"source": "local", "path": value}
    name, at, revision = value.partition("@")
    return {"source": "hub", "id": name, "revision": revision} if at else {"source": "hub", "id": value}
