"""A budget of bits in a request: what it may say, what formats answer, and which schemes it stands for."""

from typing import Any

import pytest

from app.domain.formats import ExportFormat
from app.domain.methods import BitBudget, LQLoRASpec, RTNSpec, Scheme
from app.domain.methods.module_rules import rule_errors
from app.domain.request.job_request import JobRequest
from bitwright.errors import InvalidRequest

BASE: dict[str, Any] = {"model": "org/name", "method": "rtn"}


def problems(body: dict[str, Any]) -> dict[str, tuple[str, str]]:
    with pytest.raises(InvalidRequest) as refused:
        JobRequest.parse(body)
    return {problem.field: (problem.code, problem.detail) for problem in refused.value.errors}


def test_a_budget_may_stand_in_shorthand_and_comes_back_as_it_is() -> None:
    request = JobRequest.parse({**BASE, "bits": {"average": 2.75, "choices": [4, 2, 3]}})
    assert request.quantization.bits == BitBudget(average=2.75, choices=(2, 3, 4))
    assert request.quantization.budget() == request.quantization.bits
    assert JobRequest.parse(request.model_dump(mode="json")) == request
    assert JobRequest.parse({**BASE, "bits": {"average": 4}}).quantization.bits == BitBudget(average=4.0)
    assert JobRequest.parse({**BASE, "bits": 3}).quantization.budget() is None


@pytest.mark.parametrize(
    ("bits", "field", "code", "words"),
    [
        ({"average": 1.9, "choices": [2, 3]}, "bits.average", "out_of_range", "2 to 16"),
        ({"average": 2.5, "choices": [3, 4]}, "bits", "out_of_range", "at least 3, the least of choices"),
        ({"average": 2.5, "choices": [2, 2]}, "bits.choices", "out_of_range", "each width once"),
        ({"average": 2.5, "choices": [2, 9]}, "bits.choices.1", "out_of_range", "a whole number, 2 to 8"),
        ({"average": 2.5, "choices": []}, "bits.choices", "out_of_range", "a list"),
        ({"average": "2"}, "bits.average", "wrong_type", "a number, 2 to 16"),
        ({"choices": [2, 3]}, "bits.average", "missing_field", "a number"),
        ({"average": 3, "mean": 3}, "bits.mean", "unknown_field", "there are: average, choices"),
        ([2, 3], "bits", "wrong_type", "a whole number, 2 to 8"),
    ],
)
def test_what_a_budget_may_not_say(bits: Any, field: str, code: str, words: str) -> None:
    found = problems({**BASE, "bits": bits})
    assert list(found) == [field]
    assert found[field][0] == code
    assert words in found[field][1]


def test_formats_must_hold_every_choice() -> None:
    wide = {**BASE, "bits": {"average": 4, "choices": [3, 4, 5, 6]}, "symmetric": False, "group_size": 64}
    found = problems({**wide, "formats": ["gguf"]})
    assert found["bits"][0] == "format_cannot_hold"
    assert JobRequest.parse(wide).formats == (ExportFormat.COMPRESSED_TENSORS,)


def test_overrides_win_over_the_budget() -> None:
    rules = {"overrides": {"*.a": {"bits": 8}, "*.b": {"group_size": 32}}}
    spec = RTNSpec.model_validate({"bits": {"average": 3.0, "choices": [2, 4]}, "modules": rules})
    schemes = {name: [c.scheme for c in spec.candidates(name, 64)] for name in ("x.a", "x.b", "x.c", "lm_head")}
    assert schemes["x.a"] == [Scheme(bits=8, group_size=64, symmetric=True)]
    assert [(s.bits, s.group_size) for s in schemes["x.b"]] == [(2, 32), (4, 32)]
    assert [(s.bits, s.group_size) for s in schemes["x.c"]] == [(2, 64), (4, 64)]
    assert schemes["lm_head"] == []
    assert spec.scheme_of("x.c") == Scheme(bits=4, group_size=64, symmetric=True)
    assert len(spec.schemes()) == 2 + 1 + 2


def test_an_average_that_scales_alone_exceed_is_refused_once_the_shapes_are_known() -> None:
    inputs = {"model.layers.0.mlp.up_proj": 64, "lm_head": 64}
    for spec, least in (
        (RTNSpec(bits=BitBudget(average=2.2), group_size=64), 2.25),
        (RTNSpec(bits=BitBudget(average=2.2), group_size=64, symmetric=False), 2.25 + 2 / 64),
        (LQLoRASpec(bits=BitBudget(average=2.03)), 2 + 2 / 64 + 16 / (64 * 256)),
    ):
        (error,) = rule_errors(spec, inputs, head="lm_head", tied=False)
        assert error.field == "quantization.bits.average"
        assert f"{least:.4g}" in error.detail
        enough = spec.model_copy(update={"bits": BitBudget(average=least + 1e-6)})
        assert rule_errors(enough, inputs, head="lm_head", tied=False) == []


def test_lq_lora_is_a_base_and_an_adapter_by_default() -> None:
    request = JobRequest.parse({"model": "org/name", "method": "lq-lora"})
    assert [name.value for name in request.formats] == ["merged", "peft"]
    assert request.quantization.budget() == BitBudget(average=2.75)
    unweighted = JobRequest.parse({"model": "org/name", "method": "lq-lora-unweighted", "bits": {"average": 3.5}})
    assert not unweighted.quantization.needs_fisher()
    found = problems({"model": "org/name", "method": "lq-lora", "formats": ["compressed-tensors", "peft"]})
    assert found["formats.0"][0] == "format_cannot_hold"
