"""The fields of a request whose type can be a source, read off the types themselves, and requests that use each."""

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from app.domain.request.job_request import JobRequest
from app.domain.request.sources import Source

UPLOAD = "upl_0123456789abcdefghjkmnpqrs"


def types_in(annotation: object) -> Iterator[type]:
    """Every class that an annotation is made of: through unions, containers and `Annotated`."""
    if isinstance(annotation, type) and not get_args(annotation):
        yield annotation
    for inner in get_args(annotation):
        yield from types_in(inner)


def source_fields(model: type[BaseModel] = JobRequest, path: str = "") -> dict[str, tuple[type[Source], ...]]:
    """Each dotted field that can be a source, with the kinds of source that it takes."""
    found: dict[str, tuple[type[Source], ...]] = {}
    for name, field in model.model_fields.items():
        classes = list(types_in(_whole(field)))
        sources = tuple(dict.fromkeys(kind for kind in classes if issubclass(kind, Source)))
        if sources:
            found[f"{path}{name}"] = sources
        for part in classes:
            if issubclass(part, BaseModel) and not issubclass(part, Source):
                found |= source_fields(part, f"{path}{name}.")
    return found


def _whole(field: FieldInfo) -> object:
    return field.annotation


IN_LISTS: Mapping[str, Mapping[str, Any]] = {
    "calibration.mixture.dataset": {"share": 1.0},
    "evaluation.tasks.dataset": {"name": "asked", "kind": "perplexity"},
}
"""Fields of parts in lists, with what such a part needs besides."""


def body_with(field: str, source: object, **fields: Any) -> dict[str, Any]:
    """A request that names this source in this field; of a list, in its first part."""
    body: dict[str, Any] = {"model": "org/model", "method": "qlora", "finetune": {"dataset": "org/text"}, **fields}
    *parts, last = field.split(".")
    part = body
    for name in parts:
        part[name] = dict(part.get(name) or {})
        part = part[name]
    part[last] = source
    if field in IN_LISTS:
        outer, inner = parts
        body[outer][inner] = [{**IN_LISTS[field], last: source}]
    return body


def place_of(field: str) -> str:
    """A field's path in a request: of a list in its first part."""
    return field if field not in IN_LISTS else ".0.".join(field.rsplit(".", 1))
