"""Requests in shorthand and in full, and the error of each mistake."""

import json
from collections.abc import Mapping
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from app.domain.format_rules import default_for, format_problems
from app.domain.formats import FORMATS, Result
from app.domain.methods import METHODS, RECIPES, Form, LoftQSpec, SchemeOverride, WeightSpec
from app.domain.request.job_request import JobRequest
from app.domain.request.problems import MAX_PROBLEMS, as_written
from app.domain.request.shorthand import SHORTHAND, expand
from app.domain.request.sources import HubModel, LocalModel, UploadedModel
from bitwright.errors import InvalidRequest

BASE: dict[str, Any] = {"model": "org/name", "method": "signround"}
FULL: dict[str, Any] = {"model": "org/name", "quantization": {"method": "signround"}}


def problems(body: object) -> dict[str, tuple[str, str]]:
    """Field -> (code, detail) of everything that is wrong."""
    with pytest.raises(InvalidRequest) as refused:
        JobRequest.parse(body)
    assert refused.value.errors
    told = [(problem.field, problem.detail) for problem in refused.value.errors]
    assert len(set(told)) == len(told)
    json.dumps([problem.model_dump() for problem in refused.value.errors], allow_nan=False).encode()
    return {problem.field: (problem.code, problem.detail) for problem in refused.value.errors}


def test_shorthand_and_full_form_are_the_same_request() -> None:
    short = JobRequest.parse({"model": "org/name", "method": "signround", "bits": 3, "group_size": 128})
    full = JobRequest.parse(
        {
            "model": {"source": "hub", "id": "org/name", "revision": "main"},
            "quantization": {
                "method": "signround",
                "bits": 3,
                "group_size": 128,
                "symmetric": True,
                "preset": "default",
                "steps": 200,
                "batch_size": 8,
                "learning_rate": None,
                "quantized_inputs": True,
                "scale_steps": 0,
                "modules": {"ignore": ["lm_head"], "overrides": {}},
            },
            "calibration": {"dataset": {"source": "builtin"}, "num_samples": 128, "sequence_length": 2048},
            "evaluation": {"dataset": {"source": "builtin"}, "num_samples": 32, "sequence_length": 1024},
            "formats": ["compressed-tensors"],
            "seed": 0,
            "require": None,
            "device": "any",
            "priority": 0,
            "time_limit_seconds": None,
            "metadata": {},
        }
    )
    assert short == full


@pytest.mark.parametrize(
    ("given", "source"),
    [
        ("org/name", HubModel(id="org/name")),
        ("gpt2", HubModel(id="gpt2")),
        ("/models/x", LocalModel(path="/models/x")),
        ("./x", LocalModel(path="./x")),
        ("~/x", LocalModel(path="~/x")),
        ("upl_0abc", UploadedModel(id="upl_0abc")),
        ({"source": "hub", "id": "org/name", "revision": "v1"}, HubModel(id="org/name", revision="v1")),
    ],
)
def test_a_text_stands_for_a_source(given: object, source: object) -> None:
    assert JobRequest.parse({"model": given, "method": "rtn"}).model == source


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_a_request_with_its_fields(recipe: str) -> None:
    spelled_out = JobRequest.parse({"model": "org/name", "bits": 2, **RECIPES[recipe]})
    assert JobRequest.parse({"model": "org/name", "bits": 2, "method": recipe}) == spelled_out
    assert JobRequest.parse({"model": "org/name", "quantization": {"bits": 2, "method": recipe}}) == spelled_out


def test_a_recipe_is_not_contradicted_in_silence() -> None:
    found = problems({"model": "org/name", "method": "auto-round-light", "preset": "best"})
    assert found["preset"][0] == "conflicting_fields"
    assert JobRequest.parse({"model": "org/name", "method": "auto-round-light", "preset": "light"})


def test_every_field_of_a_spec_may_stand_at_the_top_but_modules() -> None:
    fields = {name for info in METHODS.values() for name in info.spec.model_fields}
    assert set(SHORTHAND) == fields - {"modules"}


def test_parsing_leaves_the_body_alone() -> None:
    body = {**BASE, "bits": 4, "calibration": {"dataset": "builtin"}}
    before = json.dumps(body)
    JobRequest.parse(body)
    assert json.dumps(body) == before


THERE_ARE = f"there are: {', '.join(METHODS)}"
TABLE: list[tuple[str, dict[str, Any], str, str, str]] = [
    ("unknown method", {**BASE, "method": "gptqq"}, "method", "unknown_method", THERE_ARE),
    ("method no text", {**BASE, "method": 4}, "method", "unknown_method", THERE_ARE),
    ("no method", {"model": "org/name"}, "method", "missing_field", THERE_ARE),
    ("null method", {**BASE, "method": None}, "method", "missing_field", "there are: rtn"),
    (
        "no method inside",
        {"model": "org/name", "quantization": {"bits": 4}},
        "quantization.method",
        "missing_field",
        "there are",
    ),
    ("no model", {"method": "rtn"}, "model", "missing_field", "an object with source (hub, local or upload)"),
    ("bits 0", {**BASE, "bits": 0}, "bits", "out_of_range", "a whole number, 2 to 8"),
    ("bits 9", {**BASE, "bits": 9}, "bits", "out_of_range", "a whole number, 2 to 8"),
    ("bits 1.5", {**BASE, "bits": 1.5}, "bits", "wrong_type", "a whole number, 2 to 8"),
    ("bits text", {**BASE, "bits": "4"}, "bits", "wrong_type", "a whole number, 2 to 8"),
    ("bits true", {**BASE, "bits": True}, "bits", "wrong_type", "a whole number, 2 to 8"),
    ("bits null", {**BASE, "bits": None}, "bits", "wrong_type", "a whole number, 2 to 8"),
    (
        "bits inside",
        {"model": "org/name", "quantization": {"method": "rtn", "bits": 9}},
        "quantization.bits",
        "out_of_range",
        "2 to 8",
    ),
    ("group size 0", {**BASE, "group_size": 0}, "group_size", "out_of_range", "1 to 65536, or -1"),
    ("group size -2", {**BASE, "group_size": -2}, "group_size", "out_of_range", "1 to 65536, or -1"),
    ("symmetric text", {**BASE, "symmetric": "yes"}, "symmetric", "wrong_type", "true or false"),
    ("preset", {**BASE, "preset": "fast"}, "preset", "invalid_value", "light, default, best or max"),
    ("scale steps", {**BASE, "scale_steps": -1}, "scale_steps", "out_of_range", "0"),
    ("whole scale steps", {**BASE, "scale_steps": 1.5}, "scale_steps", "wrong_type", "whole number"),
    (
        "scale steps of rtn",
        {"model": "org/name", "method": "rtn", "scale_steps": 1},
        "scale_steps",
        "unknown_field",
        "",
    ),
    ("steps", {**BASE, "steps": -1}, "steps", "out_of_range", "0 to 20000"),
    ("learning rate", {**BASE, "learning_rate": 0}, "learning_rate", "out_of_range", "above 0 and at most 1"),
    ("learning rate NaN", {**BASE, "learning_rate": float("nan")}, "learning_rate", "out_of_range", "above 0"),
    ("flag text", {**BASE, "quantized_inputs": "on"}, "quantized_inputs", "wrong_type", "true or false"),
    ("unknown field", {**BASE, "bit": 4}, "bit", "unknown_field", "there are: model, quantization"),
    ("near miss", {**BASE, "format": []}, "format", "unknown_field", "did you mean formats?"),
    (
        "field of another method",
        {"model": "org/name", "quantization": {"method": "rtn", "steps": 4}},
        "quantization.steps",
        "unknown_field",
        "apiq and signround have it",
    ),
    ("Hub id", {**BASE, "model": "a b"}, "model", "invalid_value", "like HuggingFaceTB/SmolLM2-135M"),
    ("Hub id inside", {**BASE, "model": {"source": "hub", "id": "../x"}}, "model.id", "invalid_value", "like Hugging"),
    ("upload id", {**BASE, "model": "upl_A"}, "model", "invalid_value", "like upl_"),
    ("source", {**BASE, "model": {"source": "s3"}}, "model.source", "invalid_value", "hub, local or upload"),
    ("no source", {**BASE, "model": {"id": "org/name"}}, "model.source", "missing_field", "hub, local or upload"),
    ("model no text", {**BASE, "model": 5}, "model", "wrong_type", "a short text that stands for one"),
    ("model null", {**BASE, "model": None}, "model", "wrong_type", "an object with source"),
    (
        "dataset",
        {**BASE, "calibration": {"dataset": "a b"}},
        "calibration.dataset",
        "invalid_value",
        "like NeelNanda/pile-10k",
    ),
    ("samples", {**BASE, "calibration": {"num_samples": 0}}, "calibration.num_samples", "out_of_range", "1 to 65536"),
    ("calibration null", {**BASE, "calibration": None}, "calibration", "wrong_type", "an object"),
    (
        "unknown field below",
        {**BASE, "evaluation": {"samples": 4}},
        "evaluation.samples",
        "unknown_field",
        "did you mean num_samples?",
    ),
    ("format", {**BASE, "formats": ["onnx"]}, "formats.0", "invalid_value", "native, compressed-tensors, merged"),
    ("no adapter", {**BASE, "formats": ["native", "peft"]}, "formats.1", "format_cannot_hold", "signround makes none"),
    ("formats text", {**BASE, "formats": "native"}, "formats", "wrong_type", "a list of at most 8"),
    ("seed", {**BASE, "seed": -1}, "seed", "out_of_range", "0 to 9223372036854775807"),
    ("huge seed", {**BASE, "seed": 10**400}, "seed", "out_of_range", "0 to 9223372036854775807"),
    ("device", {**BASE, "device": "tpu"}, "device", "invalid_value", "any, cpu or cuda"),
    ("time", {**BASE, "time_limit_seconds": 0}, "time_limit_seconds", "out_of_range", "1 to 2592000"),
    (
        "requirement",
        {**BASE, "require": {"max_perplexity_ratio": float("inf")}},
        "require.max_perplexity_ratio",
        "out_of_range",
        "a number above 0",
    ),
    (
        "requirement true",
        {**BASE, "require": {"min_top1_agreement": True}},
        "require.min_top1_agreement",
        "wrong_type",
        "a number, 0 to 1",
    ),
    ("label value", {**BASE, "metadata": {"a": 1}}, "metadata.a", "wrong_type", "a text of 0 to 512 characters"),
    ("label called hub", {**BASE, "metadata": {"hub": 1}}, "metadata.hub", "wrong_type", "a text of 0 to 512"),
    ("label name", {**BASE, "metadata": {"": "a"}}, "metadata.", "out_of_range", "1 to 64 characters"),
    (
        "labels",
        {**BASE, "metadata": {str(n): "" for n in range(17)}},
        "metadata",
        "out_of_range",
        "of at most 16 fields",
    ),
    ("NUL", {**BASE, "metadata": {"a": "b\0"}}, "metadata.a", "invalid_value", "U+0000"),
    ("surrogate", {**BASE, "metadata": {"a": "\ud800"}}, "metadata.a", "invalid_value", "surrogate"),
    (
        "override called local",
        {
            "model": "org/name",
            "quantization": {"method": "rtn", "modules": {"overrides": {"local": {"bits": 11}}}},
        },
        "quantization.modules.overrides.local.bits",
        "out_of_range",
        "2 to 8",
    ),
    (
        "override of nothing known",
        {**FULL, "quantization": {"method": "rtn", "modules": {"overrides": {"*.a": {"bit": 4}}}}},
        "quantization.modules.overrides.*.a.bit",
        "unknown_field",
        "did you mean bits?",
    ),
    (
        "ignore text",
        {**FULL, "quantization": {"method": "rtn", "modules": {"ignore": "lm_head"}}},
        "quantization.modules.ignore",
        "wrong_type",
        "a list of at most 256",
    ),
    ("both places", {**FULL, "bits": 4}, "bits", "conflicting_fields", "move bits into quantization"),
    ("quantization text", {"model": "org/name", "quantization": "rtn"}, "quantization", "wrong_type", "an object"),
    (
        "format width",
        {**BASE, "bits": 6, "symmetric": False, "formats": ["gguf"]},
        "bits",
        "format_cannot_hold",
        'ask for formats: ["compressed-tensors"]',
    ),
    (
        "format width of an override",
        {
            **FULL,
            "quantization": {"method": "rtn", "symmetric": False, "modules": {"overrides": {"*.a": {"bits": 6}}}},
            "formats": ["gguf"],
        },
        "quantization.modules.overrides.*.a.bits",
        "format_cannot_hold",
        "holds asymmetric weights of 2, 3, 4, 5 bits, not 6",
    ),
]


@pytest.mark.parametrize(("body", "field", "code", "says"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_a_mistake_is_named_with_its_way_out(body: dict[str, Any], field: str, code: str, says: str) -> None:
    found = problems(body)
    assert found.keys() == {field}, found
    assert found[field][0] == code
    assert says in found[field][1]


@pytest.mark.parametrize("body", [None, [], "text", 7, 1.5, True])
def test_a_body_is_an_object(body: object) -> None:
    assert problems(body)["body"][0] == "wrong_type"


def test_all_problems_come_at_once() -> None:
    found = problems(
        {"model": 7, "method": "gptqq", "bits": 5, "steps": -1, "seed": -1, "colour": "red", "formats": []}
    )
    assert {field: code for field, (code, _) in found.items()} == {
        "model": "wrong_type",
        "method": "unknown_method",
        "steps": "out_of_range",
        "seed": "out_of_range",
        "colour": "unknown_field",
    }
    found = problems({"method": "gptqq", "bits": 6, "symmetric": False, "formats": ["gguf"]})
    assert {field: code for field, (code, _) in found.items()} == {
        "model": "missing_field",
        "method": "unknown_method",
        "bits": "format_cannot_hold",
    }


def test_the_summary_names_the_first_and_counts_the_rest() -> None:
    with pytest.raises(InvalidRequest, match=r"^bits: must be a whole number, 2 to 8 \(and 1 more\)\n"):
        JobRequest.parse({**BASE, "bits": 9, "seed": -1})


def test_a_body_full_of_mistakes_gets_a_bounded_answer() -> None:
    body = {**BASE, **{f"field{number}": "x" * 1000 for number in range(5000)}}
    with pytest.raises(InvalidRequest) as refused:
        JobRequest.parse(body)
    assert len(refused.value.errors) == MAX_PROBLEMS
    assert all(len(str(problem.value)) <= 200 for problem in refused.value.errors)


def test_deep_nesting_is_a_problem_like_any_other() -> None:
    deep: Any = []
    for _ in range(10_000):
        deep = [deep]
    assert problems({**BASE, "deep": deep})["deep"][0] == "unknown_field"


def test_as_written() -> None:
    assert as_written({"bits": 4}, "quantization.bits") == "bits"
    assert as_written({"quantization": {"bits": 4}}, "quantization.bits") == "quantization.bits"
    assert as_written({}, "quantization") == "method"
    assert as_written({"model": "a/b"}, "model.id") == "model"
    assert as_written({"model": {"source": "hub"}}, "model.id") == "model.id"
    assert as_written({"evaluation": {"dataset": "x/y"}}, "evaluation.dataset.id") == "evaluation.dataset"


def test_expansion_knows_whether_the_method_is_real() -> None:
    assert expand(BASE).method_known
    unknown = expand({"model": "org/name", "method": "nothing", "steps": 3})
    assert not unknown.method_known
    assert unknown.body["quantization"] == {"method": "signround", "steps": 3, "scale_steps": 0}


@pytest.mark.parametrize("field", SchemeOverride.model_fields)
@pytest.mark.parametrize("method", METHODS)
def test_an_override_takes_what_the_method_takes(method: str, field: str) -> None:
    """No value is refused for all linears and let through for some of them, and each refusal names its field."""
    for value in (*range(2, 9), True, False):
        if isinstance(value, bool) != (field == "symmetric"):
            continue
        overrides = {"overrides": {"*": {field: value}}}
        of_all = {"model": "org/name", "quantization": {"method": method, field: value}}
        of_some = {"model": "org/name", "quantization": {"method": method, "modules": overrides}}
        try:
            JobRequest.parse(of_all)
        except InvalidRequest:
            (code, detail) = problems(of_some)[f"quantization.modules.overrides.*.{field}"]
            assert code == "invalid_value"
            assert len(detail) > 10
            assert f"quantization.{field}" in problems(of_all)
        else:
            assert JobRequest.parse(of_some)


def test_symmetry_is_refused_by_the_fact_of_the_spec() -> None:
    refused = {name for name, info in METHODS.items() if False not in info.spec().symmetries()}
    assert refused >= {name for name, info in METHODS.items() if Form.CODEBOOK in info.spec().forms()}
    assert False in LoftQSpec(base="affine").symmetries()
    for name in refused:
        _, detail = problems({"model": "org/name", "method": name, "symmetric": False})["symmetric"]
        assert detail.startswith("must be true: with these parameters")


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)
SCHEME_VALUES: dict[str, tuple[Any, ...]] = {
    "bits": (2, 3, 4, 8),
    "group_size": (-1, 1, 32, 64),
    "symmetric": (True, False),
}
DATASETS = st.sampled_from(["builtin", "org/data", "/texts/a.jsonl", "upl_0abc", {"source": "builtin"}])
TEXT_PARTS = st.fixed_dictionaries(
    {}, optional={"dataset": DATASETS, "num_samples": st.integers(1, 64), "sequence_length": st.integers(16, 512)}
)
RATIOS = st.floats(0.125, 8) | st.none()


def takes(spec: type[WeightSpec], fields: Mapping[str, Any]) -> bool:
    """Whether a spec may be made with these parameters."""
    try:
        spec.model_validate(fields)
    except ValidationError:
        return False
    return True


@st.composite
def quantizations(draw: st.DrawFn, spec: type[WeightSpec], given: Mapping[str, Any]) -> dict[str, Any]:
    """Valid parameters of a method; `given` are those that a recipe fills in already."""
    words = {name: get_args(field.annotation) for name, field in spec.model_fields.items() if name not in given}
    choices = {
        name: st.sampled_from(values)
        for name, values in words.items()
        if name not in ("method", "preset") and values and all(isinstance(value, str) for value in values)
    }
    chosen = draw(st.fixed_dictionaries({}, optional=choices))
    schemes = {
        name: st.sampled_from([value for value in values if takes(spec, {**given, **chosen, name: value})])
        for name, values in SCHEME_VALUES.items()
    }
    tuned = {"steps": st.integers(0, 500), "batch_size": st.integers(1, 64), "learning_rate": st.floats(0.001, 1)}
    known = {name: values for name, values in tuned.items() if name in spec.model_fields}
    overrides = st.dictionaries(TEXTS, st.fixed_dictionaries({}, optional=schemes), max_size=3)
    modules = st.fixed_dictionaries({}, optional={"ignore": st.lists(TEXTS, max_size=3), "overrides": overrides})
    fields = st.fixed_dictionaries({}, optional=schemes | known | {"modules": modules})
    return chosen | draw(fields)


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    """Valid requests in either form."""
    method = draw(st.sampled_from([*METHODS, *RECIPES]))
    recipe: Mapping[str, Any] = RECIPES.get(method, {"method": method})
    given = {name: value for name, value in recipe.items() if name != "method"}
    kind = METHODS[recipe["method"]].spec
    fields = draw(quantizations(kind, given))
    spec = kind.model_validate({**given, **fields})
    adapter = [default_for(Result.FACTORS)] if Form.LOW_RANK in spec.forms() else []
    models = [name for name in FORMATS if not name.info.is_adapter]
    able = [name for name in models if not format_problems(spec, (name, *adapter))]
    formats = st.lists(st.sampled_from(able), max_size=3).map(lambda names: (*names, *adapter))
    names = formats.filter(lambda names: not format_problems(spec, names))
    body: dict[str, Any] = draw(
        st.fixed_dictionaries(
            {"model": st.sampled_from(["org/name", "/models/x", "upl_0abc", {"source": "hub", "id": "gpt2"}])},
            optional={
                "calibration": TEXT_PARTS,
                "evaluation": TEXT_PARTS | st.none(),
                "formats": names.map(lambda names: [name.value for name in names]),
                "seed": st.integers(0, 2**63 - 1),
                "require": st.fixed_dictionaries({}, optional={"max_perplexity_ratio": RATIOS}) | st.none(),
                "device": st.sampled_from(["any", "cpu", "cuda"]),
                "priority": st.integers(-100, 100),
                "time_limit_seconds": st.integers(1, 1000) | st.none(),
                "metadata": st.dictionaries(TEXTS, TEXTS, max_size=4),
            },
        )
    )
    if draw(st.booleans()):
        return body | {"method": method} | {name: value for name, value in fields.items() if name != "modules"}
    return body | {"quantization": {"method": method, **fields}}


@given(bodies())
@settings(deadline=None)
def test_the_full_form_means_itself(body: dict[str, Any]) -> None:
    request = JobRequest.parse(body)
    dumped = request.model_dump(mode="json")
    assert JobRequest.parse(dumped) == request
    assert JobRequest.parse(json.loads(request.model_dump_json())) == request
    assert JobRequest.parse(dumped).model_dump(mode="json") == dumped


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(bodies(), st.sampled_from([*JobRequest.model_fields, *SHORTHAND]), JSON)
@settings(deadline=None, max_examples=300)
def test_any_json_is_parsed_or_refused_with_a_reason(body: dict[str, Any], field: str, value: Any) -> None:
    given = {**body, field: value}
    try:
        request = JobRequest.parse(given)
    except InvalidRequest:
        assert all(name and len(detail) > 10 for name, (_, detail) in problems(given).items())
    else:
        assert JobRequest.parse(request.model_dump(mode="json")) == request
