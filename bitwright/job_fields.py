"""Fields of a request as keyword arguments of `jobs.create`."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict

JsonObject = Mapping[str, Any]


class JobFields(TypedDict, total=False):
    """A request in shorthand or full form; GET /v1/methods has the schemas of methods and adapters.

    Parameters of one method or adapter are entries of `quantization` or `adapter`, or, in shorthand, of `extra_body`.
    A `Path` is a folder or file of the worker's machine; it is sent as an absolute path.
    """

    model: str | PathLike[str] | JsonObject
    method: str
    bits: int | JsonObject
    scheme: str
    at_most: JsonObject
    fits: JsonObject
    group_size: int
    symmetric: bool
    preset: str
    steps: int
    scale_steps: int
    rank: int
    alpha: float
    dropout: float
    quantization: JsonObject
    base_job: str
    adapter: JsonObject | None
    finetune: JsonObject | None
    merge: str | None
    round_offset: bool
    calibration: JsonObject
    evaluation: JsonObject | None
    formats: Sequence[str]
    seed: int
    verify: str | None
    require: JsonObject | None
    device: str
    priority: int
    time_limit_seconds: int | None
    metadata: Mapping[str, str]
    name: str | None
    publish: JsonObject | None


def request_body(fields: JobFields, extra_body: JsonObject | None) -> dict[str, Any]:
    """The body of POST /v1/jobs. `extra_body` holds fields that this version of the client does not name."""
    return {name: _plain(value) for name, value in {**fields, **(extra_body or {})}.items()}


def _plain(value: object) -> object:
    if isinstance(value, PathLike):
        return str(Path(value).expanduser().absolute())
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    return value
