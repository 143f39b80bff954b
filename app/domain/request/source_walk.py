"""Every source that a request names, found by walking its parts: a field that is added is found, too."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel

from app.domain.request.job_request import JobRequest
from app.domain.request.sources import Source, UploadedModel, UploadedText

Part = TypeVar("Part", bound=BaseModel)


@dataclass(frozen=True)
class NamedSource:
    """A source, the field that names it, dotted, and the part of the request that this is a field of."""

    field: str
    source: Source
    section: BaseModel


def named_sources(section: BaseModel, path: str = "") -> Iterator[NamedSource]:
    """All sources in a request or a part of one, in the order of its fields."""
    for name in type(section).model_fields:
        yield from _in_value(section, f"{path}{name}", getattr(section, name))


def _in_value(section: BaseModel, field: str, value: object) -> Iterator[NamedSource]:
    if isinstance(value, Source):
        yield NamedSource(field, value, section)
    elif isinstance(value, BaseModel):
        yield from named_sources(value, f"{field}.")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _in_value(section, f"{field}.{key}", item)
    elif isinstance(value, list | tuple | set | frozenset):
        for index, item in enumerate(value):
            yield from _in_value(section, f"{field}.{index}", item)


def read_sources(request: JobRequest) -> list[NamedSource]:
    """The sources that the job reads: all, but for calibration text where blocks are taken from a base job.

    An export reads the base job's native checkpoint alone.
    """
    if request.exports:
        return []
    unread = "calibration." if request.base_job is not None else None
    return [named for named in named_sources(request) if unread is None or not named.field.startswith(unread)]


def read_uploads(request: JobRequest) -> dict[str, str]:
    """Ids of the uploads that the job reads, by the field that holds them."""
    sources = [(named.field, named.source) for named in read_sources(request)]
    return {f"{field}.id": source.id for field, source in sources if isinstance(source, UploadedModel | UploadedText)}


def with_source(section: Part, field: str, source: Source) -> Part:
    """The same with another source in the dotted `field`, one that `named_sources` gave."""
    name, _, rest = field.partition(".")
    changed = _replaced(getattr(section, name), rest, source)
    return section.model_copy(update={name: changed})


def _replaced(value: Any, rest: str, source: Source) -> Any:
    if not rest:
        return source
    if isinstance(value, BaseModel):
        return with_source(value, rest, source)
    name, _, after = rest.partition(".")
    if isinstance(value, Mapping):
        return {**value, name: _replaced(value[name], after, source)}
    items = list(value)
    items[int(name)] = _replaced(items[int(name)], after, source)
    return type(value)(items)
