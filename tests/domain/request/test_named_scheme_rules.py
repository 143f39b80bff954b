"""Requests for schemes by name and for scales of a cache: what they need, and what is refused with a way out."""

from typing import Any

import pytest

from app.domain.fit import can_do_without_model, without_model_problems
from app.domain.methods import METHODS
from app.domain.request.job_request import JobRequest
from bitwright.errors import InvalidRequest

MODEL = {"model": "org/model"}


def parsed(**quantization: Any) -> JobRequest:
    return JobRequest.parse({**MODEL, "quantization": quantization, "formats": ["native"]})


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "signround"])
def test_these_methods_take_every_scheme_and_others_none(method: str) -> None:
    in_blocks = method == "rtn"
    assert len(METHODS[method].spec.named_schemes) == (25 if in_blocks else 11)
    assert parsed(method=method, scheme="nvfp4a16").quantization.forms() == {"float"}
    assert METHODS[method].produces == {"affine", "float", *(("blocks",) if in_blocks else ())}
    with pytest.raises(InvalidRequest, match="not both"):
        parsed(method=method, scheme="nvfp4a16", bits=4)
    assert {name for name, info in METHODS.items() if info.spec.named_schemes} == {"rtn", "gptq", "awq", "signround"}


@pytest.mark.parametrize(
    ("quantization", "reads"),
    [
        ({"scheme": "nvfp4"}, True),
        ({"scheme": "fp8-tensor"}, True),
        ({"scheme": "nvfp4a16"}, False),
        ({"scheme": "fp8"}, False),
        ({"bits": 4}, False),
        ({"bits": 4, "kv_cache": "fp8"}, True),
        ({"bits": 4, "modules": {"overrides": {"*.down_proj": {"scheme": "nvfp4"}}}}, True),
    ],
)
def test_round_to_nearest_reads_text_where_numbers_of_activations_are_stored(
    quantization: dict[str, Any], reads: bool
) -> None:
    request = parsed(method="rtn", **quantization)
    assert request.quantization.reads_text() == reads
    assert not request.quantization.observes_inputs()
    assert can_do_without_model(request) == (not reads)


@pytest.mark.parametrize(
    ("quantization", "field", "way_out"),
    [
        ({"scheme": "nvfp4"}, "quantization.scheme", "nvfp4a16"),
        ({"scheme": "fp8-tensor"}, "quantization.scheme", '"fp8"'),
        (
            {"bits": 4, "modules": {"overrides": {"*.down_proj": {"scheme": "nvfp4"}}}},
            "quantization.modules.overrides.*.down_proj.scheme",
            "nvfp4a16",
        ),
        ({"bits": 4, "kv_cache": "fp8"}, "quantization.kv_cache", "leave it out"),
    ],
)
def test_without_a_model_what_calibration_would_measure_is_refused(
    quantization: dict[str, Any], field: str, way_out: str
) -> None:
    (problem,) = without_model_problems(parsed(method="rtn", weights_only=True, **quantization))
    assert problem.field == field
    assert way_out in problem.detail
    assert without_model_problems(parsed(method="rtn", weights_only=True, scheme="nvfp4a16")) == []


def test_formats_without_a_place_for_a_cache_s_scales_are_refused() -> None:
    body = {**MODEL, "method": "rtn", "bits": 4, "kv_cache": "fp8"}
    with pytest.raises(InvalidRequest) as refused:
        JobRequest.parse({**body, "formats": ["gguf"], "group_size": 32})
    (problem,) = refused.value.errors
    assert problem.field == "kv_cache"
    assert "native" in problem.detail
    assert JobRequest.parse({**body, "formats": ["gguf", "native"], "group_size": 32}).quantization.kv_cache == "fp8"
