"""Names of other tools in a request: the problem says where ours is, and what it says can be asked for."""

import inspect
import json
import re
from typing import Any

import pytest

from app.domain.request.foreign_names import FIELDS, FORMATS, NOT_ASKED, SCHEMES
from app.domain.request.job_request import JobRequest
from app.domain.request.shorthand import ALL_SHORTHAND
from bitwright.errors import FieldProblem, InvalidRequest

BASE = {"model": "org/name", "method": "rtn"}


def problem_of(**fields: Any) -> FieldProblem:
    with pytest.raises(InvalidRequest) as caught:
        JobRequest.parse({**BASE, **fields})
    (name,) = fields
    return next(problem for problem in caught.value.errors if problem.field.split(".")[0] == name)


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, names in FIELDS.items() for name in names])
def test_a_name_of_another_tool_is_told_the_field_that_says_it(path: str, name: str) -> None:
    problem = problem_of(**{name: 1})
    assert problem.code == "unknown_field"
    assert problem.detail.endswith(f"did you mean {path}?")


@pytest.mark.parametrize("path", FIELDS)
def test_each_field_that_is_named_is_one_of_a_request(path: str) -> None:
    """A request that gives the field a value of no type complains of the value, and never that there is no field."""
    first, *rest = path.split(".")
    value: Any = ["no such value", {}]
    for key in reversed(rest):
        value = {key: value}
    if path == "model.revision":
        value |= {"source": "hub", "id": "org/name"}
    body = {**BASE, first: value}
    if first == "quantization":
        body = {"model": "org/name", "quantization": {"method": "rtn", **value}}
    if path not in ALL_SHORTHAND or path in {"bits", "group_size", "symmetric", "scheme", "method"}:
        with pytest.raises(InvalidRequest) as caught:
            JobRequest.parse(body)
        assert all(problem.code != "unknown_field" for problem in caught.value.errors)
        assert any(problem.field.startswith(path) for problem in caught.value.errors)


@pytest.mark.parametrize("name", NOT_ASKED)
def test_a_name_that_needs_no_field_is_told_why(name: str) -> None:
    assert problem_of(**{name: True}).detail.endswith(NOT_ASKED[name])


def test_a_name_below_another_field_is_told_it_too() -> None:
    with pytest.raises(InvalidRequest) as caught:
        JobRequest.parse({**BASE, "calibration": {"nsamples": 128}})
    (problem,) = caught.value.errors
    assert problem.field == "calibration.nsamples"
    assert problem.detail.endswith("did you mean calibration.num_samples?")


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("head", "quantization.modules.head"),
        ("embeddings", "quantization.modules.embeddings"),
        ("evaluation.further_samples", "calibration.further_samples"),
        *((field.rpartition(".")[2], field) for field in ("evaluation.seeds", "finetune.validation_share")),
        *((field.rpartition(".")[2], field) for field in ("require.max_kl_divergence", "require.loads")),
    ],
)
def test_a_field_in_another_place_is_told_its_own(path: str, field: str) -> None:
    *above, name = path.split(".")
    body: dict[str, Any] = {name: 1}
    for key in above:
        body = {key: body}
    with pytest.raises(InvalidRequest) as caught:
        JobRequest.parse({**BASE, **body})
    (problem,) = caught.value.errors
    assert (problem.field, problem.code) == (path, "unknown_field")
    assert problem.detail == f"there is no such field here; did you mean {field}?"


def test_a_field_of_no_other_place_is_told_what_there_is() -> None:
    """Names of sources and kinds stand in many objects, of which none is meant more than another."""
    for name in ("path", "kind", "id"):
        assert "there are: model" in problem_of(**{name: 1}).detail


def test_a_field_of_other_methods_is_told_theirs() -> None:
    problem = problem_of(preset="best")
    assert problem.detail == "rtn has no preset; apiq, omniquant and signround have it"
    for method in ("apiq", "omniquant", "signround"):
        assert JobRequest.parse({**BASE, "method": method, "preset": "best"}).quantization.method == method


def test_values_of_other_tools_are_told_ours() -> None:
    for name, here in SCHEMES.items():
        assert problem_of(scheme=name.upper()).detail.endswith(f"did you mean {here}?")
        assert JobRequest.parse({**BASE, "scheme": here, "formats": ["native"]}).quantization.method == "rtn"
    for here, names in FORMATS.items():
        for name in names:
            assert problem_of(formats=[name]).detail.endswith(f"did you mean {here}?")
    told = problem_of(formats=["GGUF:Q4_K_M"]).detail.rpartition("; give ")[2]
    formats, scheme = re.fullmatch(r"formats: (\[.*\]) and scheme: (\S+)", told).groups()  # type: ignore[union-attr]
    assert JobRequest.parse({**BASE, "scheme": scheme, "formats": json.loads(formats)}).formats == ("gguf",)


@pytest.mark.parametrize("size", [0, -3, 65537])
def test_a_size_of_groups_out_of_range_is_told_the_range_and_the_exception(size: int) -> None:
    assert "1 to 65536, or -1" in problem_of(group_size=size).detail


def test_a_revision_follows_a_repository() -> None:
    for text, revision in (("org/name@v1.0", "v1.0"), ("org/name@refs/pr/1", "refs/pr/1"), ("org/name", "main")):
        model = JobRequest.parse({**BASE, "model": text}).model
        assert (model.source, model.id, model.revision) == ("hub", "org/name", revision)  # type: ignore[union-attr]
    assert problem_of(model="org/name@").code == "out_of_range"


def test_a_mean_of_widths_is_told_as_one() -> None:
    told = problem_of(bits=2.75).detail.rpartition(" give ")[2]
    budget = JobRequest.parse({**BASE, "bits": json.loads(told)}).quantization.budget()
    assert budget is not None
    assert budget.average == 2.75


@pytest.mark.parametrize(
    ("method", "meant"), [("GPTQ", "gptq"), ("AutoRound", "auto-round"), ("lora", "qlora"), ("sign_round", "signround")]
)
def test_a_method_of_nearly_that_name_is_named(method: str, meant: str) -> None:
    assert f"did you mean {meant}?" in problem_of(method=method).detail


@pytest.mark.parametrize("text", ["https://huggingface.co/org/name", "hf:org/name", "a/b/c", ""])
def test_a_model_that_is_none_is_told_the_forms_of_one(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        JobRequest.parse({"model": text, "method": "rtn"})
    (problem,) = caught.value.errors
    assert problem.field == "model"
    assert all(form in problem.detail for form in ("id@revision", "upl_", "path"))


def test_an_object_that_is_none_is_told_its_fields() -> None:
    assert "with any of dataset, num_samples" in problem_of(evaluation="none").detail
    assert problem_of(evaluation="none").detail.endswith(", or null")
    assert "with any of name, kind, dataset" in problem_of(evaluation={"tasks": ["mmlu"]}).detail


@pytest.mark.slow
def test_arguments_of_transformers_are_known() -> None:
    """Every argument of its GPTQ and AWQ configurations that says something about the numbers of a result."""
    from transformers import AwqConfig, GPTQConfig

    about_numbers = {"bits", "group_size", "damp_percent", "desc_act", "sym", "dataset", "zero_point"}
    arguments = {*inspect.signature(GPTQConfig).parameters, *inspect.signature(AwqConfig).parameters}
    assert about_numbers <= arguments
    for name in about_numbers - set(ALL_SHORTHAND):
        assert "did you mean" in problem_of(**{name: 1}).detail


@pytest.mark.slow
def test_presets_of_compressed_tensors_of_integers_are_told_in_bits() -> None:
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    checked = 0
    for name, scheme in PRESET_SCHEMES.items():
        weights = scheme.get("weights")
        if weights is None or weights.type != "int" or scheme.get("input_activations"):
            continue
        told = problem_of(scheme=name).detail.rpartition("; give ")[2].removesuffix(" in place of scheme")
        fields = {key: json.loads(value) for key, value in (field.split(": ") for field in told.split(", "))}
        quantization = JobRequest.parse({**BASE, **fields}).quantization
        assert (quantization.bits, quantization.group_size) == (weights.num_bits, weights.group_size)
        assert quantization.symmetric == weights.symmetric
        checked += 1
    assert checked >= 8
