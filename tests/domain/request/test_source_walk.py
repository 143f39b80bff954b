"""The sources of a request are found by its types: no list of them is kept by hand."""

import pytest
from pydantic import BaseModel

from app.domain.attempt_lines import FetchedLine
from app.domain.request.job_request import JobRequest
from app.domain.request.source_walk import named_sources, read_sources, read_uploads, with_source
from app.domain.request.sources import BuiltinText, DatasetSource, HubDataset, HubModel, LocalText, UploadedText
from bitwright.events import TEXT_ROLES
from tests.domain.request.request_fields import IN_LISTS, UPLOAD, body_with, place_of, source_fields
from workers.disk.orders import AttemptOrder, FetchOrder
from workers.supervise.attempt.sources import tokens_read

FIELDS = source_fields()
ALWAYS = set(FIELDS) - set(IN_LISTS)
"""Fields that every request has; parts of lists are there where they are given."""


def test_the_types_name_these_fields() -> None:
    """The reader of types sees what is there today; a new field joins the tests below by itself."""
    assert set(FIELDS) >= {"model", "calibration.dataset", "evaluation.dataset", "finetune.dataset"}


@pytest.mark.parametrize("field", FIELDS)
def test_a_source_in_any_field_is_found(field: str) -> None:
    request = JobRequest.parse(body_with(field, UPLOAD))
    found = {named.field: named.source for named in named_sources(request)}
    assert set(found) == ALWAYS | {place_of(field)}
    assert getattr(found[place_of(field)], "id") == UPLOAD  # noqa: B009 (of the kinds of source, only some have one)
    assert read_uploads(request) == {f"{place_of(field)}.id": UPLOAD}


@pytest.mark.parametrize("field", FIELDS)
def test_a_source_in_any_field_can_be_replaced(field: str) -> None:
    request = JobRequest.parse(body_with(field, UPLOAD))
    other = HubModel(id="org/other") if HubModel in FIELDS[field] else LocalText(path="/other.jsonl")
    place = place_of(field)
    changed = with_source(request, place, other)
    found = {named.field: named.source for named in named_sources(changed)}
    assert found[place] == other
    assert with_source(changed, place, next(n.source for n in named_sources(request) if n.field == place)) == request


def test_a_part_that_is_left_out_names_nothing() -> None:
    request = JobRequest.parse({"model": "org/model", "method": "rtn", "evaluation": None})
    assert [named.field for named in named_sources(request)] == ["model", "calibration.dataset"]


@pytest.mark.parametrize("field", ["calibration.dataset", "calibration.mixture.dataset"])
def test_calibration_text_is_not_read_where_a_base_job_gives_the_blocks(field: str) -> None:
    request = JobRequest.parse(body_with(field, UPLOAD, base_job="job_0123456789abcdefghjkmnpqrs"))
    assert {named.field for named in read_sources(request)} == ALWAYS - {"calibration.dataset"}
    assert read_uploads(request) == {}


@pytest.mark.parametrize("field", [field for field, kinds in FIELDS.items() if HubDataset in kinds])
def test_every_text_has_a_place_in_the_orders_and_a_size(field: str) -> None:
    role = TEXT_ROLES.get(field)
    assert ("others" if role is None else role) in FetchOrder.model_fields
    for message in (AttemptOrder, FetchedLine):
        assert ("other_texts" if role is None else f"{role}_path") in message.model_fields
    request = JobRequest.parse(body_with(field, "org/wanted"))
    found = [tokens_read(request, named) for named in named_sources(request) if named.field == place_of(field)]
    assert found
    assert all(size > 0 for size in found)


class Inner(BaseModel):
    dataset: DatasetSource = BuiltinText()


class Held(BaseModel):
    several: tuple[DatasetSource, ...] = ()
    named: dict[str, DatasetSource] = {}
    inner: list[Inner] = []


def test_sources_in_lists_and_mappings_are_found_and_replaced() -> None:
    assert set(source_fields(Held)) == {"several", "named", "inner.dataset"}
    upload = UploadedText(id=UPLOAD)
    part = Held(several=(BuiltinText(), upload), named={"a": upload}, inner=[Inner(dataset=upload)])
    found = {named.field for named in named_sources(part) if isinstance(named.source, UploadedText)}
    assert found == {"several.1", "named.a", "inner.0.dataset"}
    for field in found:
        part = with_source(part, field, BuiltinText())
    assert {named.source for named in named_sources(part)} == {BuiltinText()}


def test_a_part_that_does_not_say_its_size_is_refused() -> None:
    request = JobRequest.parse(body_with("model", UPLOAD))
    named = next(named_sources(request))
    with pytest.raises(TypeError, match="how much"):
        tokens_read(request, named)
