"""Schemes of embeddings and head in a request: short and full forms, contradictions, and the formats that hold them."""

from typing import Any

import pytest

from app.domain.methods import Scheme, SchemeName
from app.domain.request.job_request import JobRequest
from bitwright.errors import FieldProblem, InvalidRequest


def parsed(modules: dict[str, Any], formats: tuple[str, ...] = ("native",), **quantization: Any) -> JobRequest:
    fields = {"method": "rtn", "bits": 2, "group_size": 32, **quantization}
    return JobRequest.parse({"model": "o/m", "quantization": {**fields, "modules": modules}, "formats": list(formats)})


def problems(
    modules: dict[str, Any], formats: tuple[str, ...] = ("native",), **quantization: Any
) -> list[FieldProblem]:
    with pytest.raises(InvalidRequest) as caught:
        parsed(modules, formats, **quantization)
    return list(caught.value.errors)


def test_a_width_alone_stands_for_the_linears_groups_and_symmetry() -> None:
    request = parsed({"embeddings": 4, "head": 8}, symmetric=False)
    modules = request.model_dump(mode="json")["quantization"]["modules"]
    assert modules["embeddings"] == {"bits": 4, "group_size": 32, "symmetric": False, "scheme": None}
    assert modules["head"] == {"bits": 8, "group_size": 32, "symmetric": False, "scheme": None}
    spec = request.quantization
    assert spec.embeddings_scheme() == Scheme(bits=4, group_size=32, symmetric=False)
    assert (
        spec.head_scheme() == spec.scheme_of("language_model.lm_head") == Scheme(bits=8, group_size=32, symmetric=False)
    )
    assert spec.scheme_of("model.layers.0.mlp.up_proj") == Scheme(bits=2, group_size=32, symmetric=False)


def test_a_name_alone_stands_for_a_scheme() -> None:
    request = parsed({"embeddings": "nvfp4a16"})
    assert request.quantization.embeddings_scheme() == Scheme.named(SchemeName.NVFP4A16)
    assert request.quantization.head_scheme() is None


@pytest.mark.parametrize("method", [{"method": "nf", "bits": 4}, {"method": "loftq", "bits": 2}])
def test_embeddings_are_integers_beside_codebooks(method: dict[str, Any]) -> None:
    """Widths that a codebook does not have are no matter of the embeddings."""
    assert parsed({"embeddings": 8}, **method).quantization.embeddings_scheme() == Scheme(
        bits=8, group_size=32, symmetric=True
    )


def test_the_expanded_form_means_itself() -> None:
    request = parsed({"embeddings": 4, "head": "fp8"})
    assert request.quantization.modules.ignore == ()
    full = request.model_dump(mode="json")
    assert JobRequest.parse(full) == request


def test_silence_leaves_both_in_16_bits() -> None:
    modules = parsed({}).quantization.modules
    assert (modules.embeddings, modules.head, modules.ignore) == (None, None, ("lm_head",))


@pytest.mark.parametrize(
    ("modules", "field", "code"),
    [
        ({"head": 4, "ignore": ["lm_head"]}, "quantization.modules.ignore.0", "conflicting_fields"),
        (
            {"head": 4, "overrides": {"lm_head": {"bits": 8}}},
            "quantization.modules.overrides.lm_head",
            "conflicting_fields",
        ),
        ({"embeddings": {"group_size": 32}}, "quantization.modules.embeddings", "invalid_value"),
        ({"embeddings": {"bits": 4, "scheme": "fp8"}}, "quantization.modules.embeddings", "out_of_range"),
        ({"embeddings": 9}, "quantization.modules.embeddings", "out_of_range"),
        ({"embeddings": "fp5"}, "quantization.modules.embeddings", "invalid_value"),
        ({"embeddings": True}, "quantization.modules.embeddings", "wrong_type"),
        ({"head": [4]}, "quantization.modules.head", "wrong_type"),
    ],
)
def test_what_is_wrong_is_named(modules: dict[str, Any], field: str, code: str) -> None:
    assert [(problem.field, problem.code) for problem in problems(modules)] == [(field, code)]


def test_a_request_that_names_no_format_gets_one_that_holds_it() -> None:
    def formats(modules: dict[str, Any], **quantization: Any) -> tuple[str, ...]:
        fields = {"method": "rtn", "bits": 4, "group_size": 32, **quantization, "modules": modules}
        return JobRequest.parse({"model": "o/m", "quantization": fields}).formats

    assert formats({"embeddings": 4}) == ("compressed-tensors",)
    assert formats({"head": 8}) == ("compressed-tensors",)
    assert formats({"embeddings": 8}) == ("native",)
    assert formats({"embeddings": 8}, method="loftq", base="affine", rank=4) == ("merged", "peft")
    assert formats({"embeddings": 8}, method="nf") == ("merged",)


UNIFORM = {"bits": 4, "group_size": 32}


def test_compressed_tensors_holds_one_scheme_for_everything() -> None:
    parsed({"embeddings": 4}, ("compressed-tensors",), **UNIFORM)
    parsed({"embeddings": 4, "head": 4}, ("compressed-tensors",), **UNIFORM)
    parsed({"head": 8}, ("compressed-tensors",), **UNIFORM)


@pytest.mark.parametrize(
    ("modules", "quantization"),
    [
        ({"embeddings": 8}, UNIFORM),
        ({"embeddings": {"bits": 4, "group_size": 64}}, UNIFORM),
        ({"embeddings": 4, "head": 8}, UNIFORM),
        ({"embeddings": 4, "overrides": {"*.o_proj": {"bits": 8}}}, UNIFORM),
        ({"embeddings": 4}, {"bits": {"average": 4.5}, "group_size": 32}),
        ({"embeddings": "nvfp4a16"}, UNIFORM),
    ],
)
def test_other_combinations_are_refused_with_the_formats_that_can(
    modules: dict[str, Any], quantization: dict[str, Any]
) -> None:
    found = [p for p in problems(modules, ("compressed-tensors",), **quantization) if p.field == "formats.0"]
    assert [problem.code for problem in found] == ["format_cannot_hold"]
    assert '["native"] or ["merged"] or ["gguf"]' in found[0].detail
    parsed(modules, ("merged",), **quantization)


@pytest.mark.parametrize(
    ("modules", "field"),
    [
        ({"embeddings": {"bits": 4, "group_size": 16}}, "quantization.modules.embeddings.group_size"),
        ({"head": {"bits": 8, "symmetric": False}}, "quantization.modules.head.bits"),
        ({"embeddings": "nvfp4a16"}, "quantization.modules.embeddings"),
    ],
)
def test_a_format_holds_embeddings_and_head_as_it_holds_linears(modules: dict[str, Any], field: str) -> None:
    assert [(p.field, p.code) for p in problems(modules, ("gguf",))] == [(field, "format_cannot_hold")]
