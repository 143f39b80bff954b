"""Requests that start from a base job: what they take over, and what they may not say otherwise."""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.adapters import LoRASpec, QALoRASpec
from app.domain.formats import ExportFormat
from app.domain.request.base_job import BaseJob, Folded, is_read, named_job
from app.domain.request.job_request import SHORTHAND, JobRequest
from app.domain.request.sources import HubModel
from bitwright.errors import FieldProblem, InvalidRequest
from tests.domain.request.test_request import JSON

ID = "job_01k6z3f8c2v9q4w7x5y1t0r8ab"
FINETUNE: dict[str, Any] = {"finetune": {"dataset": "builtin"}}
SIGNROUND: dict[str, Any] = {"model": "org/name", "method": "signround", "bits": 3, "preset": "light"}
QA_LORA: dict[str, Any] = {"model": "org/name", "method": "qa-lora", "bits": 4, "rank": 8, **FINETUNE}


def base_job(body: Mapping[str, Any], revision: str | None = None, folded: Folded | None = None) -> BaseJob:
    return BaseJob(ID, JobRequest.parse(body).model_dump(mode="json"), revision, folded)


def problems(body: Mapping[str, Any], start: BaseJob | None) -> dict[str, FieldProblem]:
    with pytest.raises(InvalidRequest) as refused:
        JobRequest.parse(body, start)
    return {problem.field: problem for problem in refused.value.errors}


def test_model_quantization_and_calibration_are_those_of_the_base_job() -> None:
    start = base_job({**SIGNROUND, "calibration": {"num_samples": 7}}, revision="abc123")
    request = JobRequest.parse({"base_job": ID, **FINETUNE}, start)
    before = JobRequest.model_validate(start.request)
    assert (request.quantization, request.calibration) == (before.quantization, before.calibration)
    assert request.model == HubModel(id="org/name", revision="abc123"), "the commit that was quantized, not the branch"
    assert (request.base_job, request.adapter) == (ID, LoRASpec())
    for named in ({"model": ID}, {"model": ID, "base_job": None}, {"model": ID, "base_job": ID}):
        assert JobRequest.parse({**named, **FINETUNE}, start) == request, "as a fine-tuned model's name elsewhere"
    assert JobRequest.parse(request.model_dump(mode="json"), start) == request, "the full form says the same"


@pytest.mark.parametrize(
    "named",
    [
        {"model": "org/name"},
        {"model": {"source": "hub", "id": "org/name", "revision": "abc123"}},
        {"method": "signround", "bits": 3},
        {"method": "auto-round-light"},
        {"quantization": {"method": "signround", "group_size": 64}},
        {"calibration": {"dataset": "builtin", "num_samples": 128}},
    ],
)
def test_the_same_may_be_said_again(named: dict[str, Any]) -> None:
    start = base_job(SIGNROUND, revision="abc123")
    assert JobRequest.parse({"base_job": ID, **FINETUNE, **named}, start) == JobRequest.parse(
        {"base_job": ID, **FINETUNE}, start
    )


@pytest.mark.parametrize(
    ("named", "field", "words"),
    [
        ({"model": "org/other"}, "model", "org/name"),
        ({"model": {"source": "hub", "id": "org/name", "revision": "v2"}}, "model", "abc123"),
        ({"bits": 4}, "bits", "whose bits is 3"),
        ({"method": "rtn"}, "method", "whose method is signround"),
        ({"method": "no-such"}, "method", "whose method is signround"),
        ({"method": "auto-round-best"}, "preset", "whose preset is light"),
        ({"method": "qa-lora"}, "method", '"adapter": {"kind": "qa-lora"}'),
        ({"quantization": {"modules": {"ignore": []}}}, "quantization.modules", "lm_head"),
        ({"calibration": {"num_samples": 3}}, "calibration.num_samples", "nothing is calibrated"),
        ({"calibration": {"dataset": "generated"}}, "calibration.dataset", "builtin"),
        ({"model": "job_other"}, "model", "names another job"),
    ],
)
def test_another_model_or_quantization_is_refused(named: dict[str, Any], field: str, words: str) -> None:
    found = problems({"base_job": ID, **FINETUNE, **named}, base_job(SIGNROUND, revision="abc123"))
    assert found.keys() == {field}
    assert found[field].code == "conflicting_fields"
    assert words in found[field].detail
    assert "leave" in found[field].detail


@pytest.mark.parametrize(
    ("body", "field", "code"),
    [
        ({}, "finetune", "missing_field"),
        ({**FINETUNE, "quantization": {"bitz": 3}}, "quantization.bitz", "unknown_field"),
        ({**FINETUNE, "rank": 3}, "rank", "unknown_field"),
        ({**FINETUNE, "model": 5}, "model", "wrong_type"),
        ({**FINETUNE, "calibration": {"samples": 5}}, "calibration.samples", "unknown_field"),
        ({**FINETUNE, "nonsense": 1}, "nonsense", "unknown_field"),
    ],
)
def test_what_is_wrong_anyway_is_still_said(body: dict[str, Any], field: str, code: str) -> None:
    found = problems({"base_job": ID, **body}, base_job(SIGNROUND))
    assert {name: problem.code for name, problem in found.items()} == {field: code}


def test_an_id_must_look_like_one_and_a_store_must_find_it() -> None:
    found = problems({"base_job": "17", "model": "org/name", "method": "rtn", **FINETUNE}, None)
    assert (found["base_job"].code, found["base_job"].value) == ("invalid_value", "17")
    assert set(problems({"model": ID, **FINETUNE}, None)) == {"model", "method"}
    assert named_job({"model": "org/name"}) is None
    assert named_job({"model": {"source": "hub", "id": ID}}) is None
    assert named_job({"base_job": 7, "model": ID}) == ID


def test_an_adapter_goes_on_with_its_kind_and_shape() -> None:
    start = base_job(QA_LORA)
    assert JobRequest.parse({"base_job": ID, **FINETUNE}, start).adapter == QALoRASpec(rank=8)
    for same in ({"adapter": {"kind": "qa-lora"}}, {"adapter": {"rank": 8}}, {"method": "qa-lora"}):
        assert JobRequest.parse({"base_job": ID, **FINETUNE, **same}, start).adapter == QALoRASpec(rank=8)
    loose = {"adapter": {"kind": "qa-lora", "dropout": 0.1}}
    assert JobRequest.parse({"base_job": ID, **FINETUNE, **loose}, start).adapter == QALoRASpec(rank=8, dropout=0.1)
    for changed, field in (({"rank": 4}, "rank"), ({"pooling": "sum"}, "pooling"), ({"alpha": 1.0}, "alpha")):
        found = problems({"base_job": ID, **FINETUNE, "adapter": changed}, start)
        assert found.keys() == {f"adapter.{field}"}
        assert "leave" in found[f"adapter.{field}"].detail


def test_an_adapter_of_another_kind_is_refused_with_ways_out() -> None:
    other = {"base_job": ID, **FINETUNE, "adapter": {"kind": "lora"}}
    found = problems(other, base_job(QA_LORA))["adapter.kind"]
    assert (found.code, found.value) == ("conflicting_fields", "lora")
    assert "leave adapter out" in found.detail
    assert "without base_job" in found.detail
    root = base_job(SIGNROUND | {"bits": 4})
    chained = JobRequest.parse({"base_job": ID, **FINETUNE, "adapter": {"kind": "qa-lora"}}, root)
    found = problems(other, BaseJob("job_2", chained.model_dump(mode="json")))["adapter.kind"]
    assert f"from base_job {ID}" in found.detail


def test_factors_of_a_method_go_on_as_a_lora_of_their_rank() -> None:
    start = base_job({"model": "org/name", "method": "loftq", "bits": 4, "rank": 8})
    assert JobRequest.parse({"base_job": ID, **FINETUNE}, start).adapter == LoRASpec(rank=8)
    found = problems({"base_job": ID, **FINETUNE, "adapter": {"kind": "qa-hira"}}, start)
    assert found["adapter.kind"].code == "conflicting_fields"


def test_a_folded_adapter_leaves_the_choice_of_the_next_but_not_of_every_format() -> None:
    start = base_job({**QA_LORA, "merge": "quantized"}, folded="offsets")
    request = JobRequest.parse({"base_job": ID, **FINETUNE}, start)
    assert (request.adapter, request.formats) == (LoRASpec(), (ExportFormat.NATIVE,))
    found = problems({"base_job": ID, **FINETUNE, "formats": ["compressed-tensors", "peft"]}, start)
    assert found["formats.0"].code == "offset_not_representable"
    rounded = {"adapter": {"kind": "qa-hira"}, "merge": "quantized", "round_offset": True}
    request = JobRequest.parse({"base_job": ID, **FINETUNE, **rounded}, start)
    assert request.formats == (ExportFormat.COMPRESSED_TENSORS,)
    symmetric = {"model": "org/name", "method": "rtn", "bits": 8, "merge": "quantized", "round_offset": True}
    start = base_job({**symmetric, **FINETUNE, "adapter": {"kind": "qa-lora"}}, folded="zero_points")
    found = problems({"base_job": ID, **FINETUNE, "formats": ["gguf", "peft"]}, start)
    assert "asymmetric" in found["quantization.bits" if "quantization.bits" in found else "bits"].detail


def test_the_files_that_are_read_of_a_base_job() -> None:
    plain, pooled = base_job(SIGNROUND).request, base_job(QA_LORA).request
    folded = base_job({**QA_LORA, "merge": "quantized"}).request
    lora = base_job({"model": "org/name", "method": "qlora", **FINETUNE}).request
    for request in (plain, pooled, folded, lora):
        assert is_read(request, "native", "bitwright.json")
        assert is_read(request, "native", "weights-00001-of-00002.safetensors")
        assert not is_read(request, "native", "load_bitwright.py")
        assert not is_read(request, "compressed-tensors", "model.safetensors")
    assert [is_read(r, "adapter", "adapter.safetensors") for r in (plain, pooled, folded, lora)] == [
        *(False, True),
        *(False, False),
    ]


@given(st.sampled_from([*JobRequest.model_fields, *SHORTHAND]), JSON, st.sampled_from([SIGNROUND, QA_LORA]))
@settings(deadline=None, max_examples=200)
def test_any_json_is_parsed_or_refused_with_a_reason(field: str, value: Any, before: dict[str, Any]) -> None:
    start, body = base_job(before), {"base_job": ID, **FINETUNE, field: value}
    try:
        request = JobRequest.parse(body, start)
    except InvalidRequest:
        assert all(name and len(problem.detail) > 10 for name, problem in problems(body, start).items())
    else:
        assert JobRequest.parse(request.model_dump(mode="json"), start) == request
