"""Group sizes and patterns against a model's linears: the same words from the API and from the engine."""

from typing import Any

import pytest

from app.domain.methods import RTNSpec
from app.domain.methods.module_rules import divides, dividing_sizes, rule_errors

INPUTS = {"model.layers.0.mlp.up_proj": 96, "model.layers.0.mlp.down_proj": 100, "lm_head": 96}


def fields(modules: dict[str, Any], *, tied: bool = True, **spec: Any) -> dict[str | None, str]:
    """Field -> code of everything that does not fit."""
    found = rule_errors(RTNSpec(modules=modules, **spec), INPUTS, head="lm_head", tied=tied)
    assert all(error.hint and error.value is not None for error in found)
    return {error.field: error.code for error in found}


def test_what_fits_has_no_errors() -> None:
    assert fields({}, group_size=4) == {}
    assert fields({}, group_size=-1) == {}
    assert fields({"ignore": []}, tied=False, group_size=4) == {}
    assert fields({"ignore": ["*"], "overrides": {}}) != {}


@pytest.mark.parametrize(
    ("modules", "group_size", "expected"),
    [
        ({}, 32, {"quantization.group_size": "group_size_does_not_divide"}),
        ({"ignore": ["lm_head", "*.down_proj"]}, 32, {}),
        ({"overrides": {"*.down_proj": {"group_size": 50}}}, 32, {}),
        (
            {"overrides": {"*.down_proj": {"group_size": 50}, "*.0.mlp.down_proj": {"group_size": 7}}},
            32,
            {"quantization.modules.overrides.*.0.mlp.down_proj.group_size": "group_size_does_not_divide"},
        ),
        (
            {"overrides": {"*.up_proj": {"group_size": 7}, "*.down_proj": {"group_size": 7}}},
            4,
            {
                "quantization.modules.overrides.*.up_proj.group_size": "group_size_does_not_divide",
                "quantization.modules.overrides.*.down_proj.group_size": "group_size_does_not_divide",
            },
        ),
        (
            {"ignore": ["lm_head", "*.typo"], "overrides": {"*.tpyo": {"bits": 8}}},
            4,
            {
                "quantization.modules.ignore.1": "unknown_module",
                "quantization.modules.overrides.*.tpyo": "unknown_module",
            },
        ),
        ({"ignore": []}, 4, {"quantization.modules.ignore": "invalid_request"}),
        ({"ignore": ["*"]}, 32, {"quantization.modules.ignore": "invalid_request"}),
    ],
)
def test_what_does_not_fit_is_named_by_its_field(
    modules: dict[str, Any], group_size: int, expected: dict[str, str]
) -> None:
    assert fields(modules, group_size=group_size) == expected


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4a16", "mxfp4", "mxfp8a16"])
def test_columns_that_are_no_whole_groups_of_a_scheme_are_named_by_their_linear(name: str) -> None:
    spec = RTNSpec.model_validate({"scheme": name})
    (error,) = rule_errors(spec, INPUTS, head="lm_head", tied=True)
    assert (error.code, error.field, error.value) == ("group_size_does_not_divide", "quantization.scheme", name)
    assert "the 100 inputs of model.layers.0.mlp.down_proj" in error.detail
    fits = {"scheme": name, "modules": {"overrides": {"*.down_proj": {"scheme": "fp8-block"}}}}
    assert rule_errors(RTNSpec.model_validate(fits), INPUTS, head="lm_head", tied=True) == []


def test_an_untied_head_is_a_linear_like_others() -> None:
    assert fields({"ignore": ["*.down_proj"]}, tied=False, group_size=64) == {
        "quantization.group_size": "group_size_does_not_divide"
    }


@pytest.mark.parametrize("width", [96, 100, 101, 7, 576, 1 << 20])
def test_the_sizes_that_are_named_divide(width: int) -> None:
    sizes = dividing_sizes(width)
    assert all(divides(size, width) for size in sizes)
    assert len(sizes) == len(set(sizes))
    assert bool(sizes) == (width >= 8)
    assert divides(-1, width)
    assert not divides(0, width)


@pytest.mark.parametrize(
    ("name", "kept"),
    [("lm_head", True), ("language_model.lm_head", True), ("model.my_lm_head", False), ("lm_head.weight", False)],
)
def test_the_default_keeps_the_head_of_a_part_of_a_larger_model(name: str, kept: bool) -> None:
    spec = RTNSpec()
    assert (spec.scheme_of(name) is None) is kept
    inputs = {"language_model.model.layers.0.mlp.up_proj": 64, name: 64}
    told = [error.value for error in rule_errors(spec, inputs, head=name, tied=False)]
    assert told == ([] if kept else ["lm_head"])


def test_an_override_of_the_head_reaches_that_of_a_part_of_a_larger_model() -> None:
    spec = RTNSpec(bits=4, modules={"ignore": [], "overrides": {"lm_head": {"bits": 8}}})
    widths = {
        name: scheme.bits for name in ("language_model.lm_head", "my_lm_head") if (scheme := spec.scheme_of(name))
    }
    assert widths == {"language_model.lm_head": 8, "my_lm_head": 4}
    assert [choice.scheme.bits for choice in spec.candidates("language_model.lm_head", 64)] == [8]
