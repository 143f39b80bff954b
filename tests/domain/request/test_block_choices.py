"""Requests for GGUF files where they are silent: mixes, and what budgets and goals choose from."""

from typing import Any

import pytest

from app.domain.request.job_request import JobRequest
from bitwright.errors import InvalidRequest

LADDER = ["q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0"]


def parsed(**body: Any) -> dict[str, Any]:
    """The full form, which is a request of the same meaning."""
    request = JobRequest.parse({"model": "org/name", "method": "rtn", **body})
    full = request.model_dump(mode="json")
    assert JobRequest.parse(full) == request == JobRequest.model_validate(full)
    return full


def outer(full: dict[str, Any]) -> dict[str, Any]:
    modules = full["quantization"]["modules"]
    return {name: modules[name] and modules[name]["scheme"] for name in ("embeddings", "head")}


def test_a_mix_is_of_embeddings_and_head_too_and_goes_into_a_gguf_file() -> None:
    full = parsed(scheme="Q4_K_M")
    assert full["formats"] == ["gguf"]
    assert full["quantization"]["scheme"] == "q4_k_m"
    assert outer(full) == {"embeddings": "q4_k_m", "head": "q4_k_m"}
    assert full["quantization"]["modules"]["ignore"] == []


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ({"embeddings": "q8_0"}, {"embeddings": "q8_0", "head": "q4_k_m"}),
        ({"head": "q8_0"}, {"embeddings": "q4_k_m", "head": "q8_0"}),
        ({"embeddings": None}, {"embeddings": None, "head": None}),
        ({"ignore": ["lm_head"]}, {"embeddings": "q4_k_m", "head": None}),
        ({"ignore": ["*.v_proj"]}, {"embeddings": "q4_k_m", "head": "q4_k_m"}),
    ],
)
def test_what_is_said_of_embeddings_and_head_stays(modules: dict[str, Any], expected: dict[str, Any]) -> None:
    asked = {"method": "rtn", "scheme": "q4_k_m", "modules": modules}
    full = JobRequest.parse({"model": "org/name", "quantization": asked}).model_dump(mode="json")
    assert outer(full) == expected


@pytest.mark.parametrize(
    "goal", [{"bits": {"average": 3.5, "over": "model"}}, {"at_most": {"bytes": "90MB"}}, {"at_most": {"kl": 0.1}}]
)
def test_choices_for_a_gguf_file_are_its_types_for_embeddings_and_head_too(goal: dict[str, Any]) -> None:
    quantization = parsed(**goal, formats=["gguf", "merged"])["quantization"]
    (name,) = goal
    assert quantization[name]["choices"] == LADDER
    assert quantization[name]["outer"] is True
    assert quantization["modules"]["ignore"] == []


def test_choices_stay_integers_where_the_request_speaks_of_them_or_another_format_packs() -> None:
    budget = {"average": 3.5, "over": "model"}
    for other in ({"formats": ["gguf"], "group_size": 32}, {"formats": ["gguf", "compressed-tensors"]}):
        bits = parsed(bits=budget, **other)["quantization"]["bits"]
        assert all(isinstance(choice, int) for choice in bits["choices"])
        assert not bits["outer"]
    other = parsed(method="omniquant", bits=budget, formats=["gguf"])["quantization"]["bits"]
    assert all(isinstance(choice, int) for choice in other["choices"])


def test_a_budget_over_linears_leaves_embeddings_and_head_and_so_does_one_that_says_so() -> None:
    of_linears = parsed(bits={"average": 3.5}, formats=["gguf"])["quantization"]
    assert of_linears["bits"]["choices"] == LADDER
    assert (of_linears["bits"]["outer"], of_linears["modules"]["ignore"]) == (False, ["lm_head"])
    kept = parsed(bits={"average": 3.5, "over": "model", "outer": False}, formats=["gguf"])["quantization"]
    assert (kept["bits"]["outer"], kept["modules"]["ignore"]) == (False, ["lm_head"])
    named = parsed(bits={"average": 3.5, "over": "model", "choices": ["Q2_K", "q6_k"]})
    assert named["formats"] == ["gguf"]
    assert named["quantization"]["bits"]["choices"] == ["q2_k", "q6_k"]
    assert named["quantization"]["bits"]["outer"] is True


@pytest.mark.parametrize(
    "bits",
    [
        {"average": 3.5, "outer": True, "choices": ["q2_k", "q6_k"]},
        {"average": 3.5, "outer": True, "over": "model", "choices": [2, 8]},
    ],
)
def test_what_embeddings_and_head_cannot_be_chosen_by_is_refused(bits: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        JobRequest.parse({"model": "org/name", "method": "rtn", "bits": bits})
    assert "outer" in str(refused.value.errors[0].detail)
