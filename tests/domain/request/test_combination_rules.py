"""Combinations of a method, an adapter, a merge and formats: which are taken, and the reasons for the others."""

from typing import Any, Literal

import pytest

from app.domain.adapters import ADAPTERS, BayesianLoRASpec, LoRASpec, QABLoRASpec, QAHiRASpec, QALoRASpec, QBaRASpec
from app.domain.formats import ExportFormat
from app.domain.methods import Form, LoftQSpec, NormalFloatSpec, RTNSpec, WeightSpec
from app.domain.request.combination_rules import (
    as_merged,
    default_result_formats,
    result_forms,
    result_problems,
    trained_parameters,
)

AFFINE, CODEBOOK, LOW_RANK = Form.AFFINE, Form.CODEBOOK, Form.LOW_RANK
CT, GGUF, MERGED, NATIVE, PEFT = (
    ExportFormat(name) for name in ("compressed-tensors", "gguf", "merged", "native", "peft")
)
RTN, NF = RTNSpec(symmetric=False), NormalFloatSpec()
LOFTQ = LoftQSpec(base="affine", rank=8, alpha=16.0)
SPECS = {
    "lora": LoRASpec(),
    "bayesian-lora": BayesianLoRASpec(),
    "qa-lora": QALoRASpec(),
    "q-bara": QBaRASpec(),
    "qa-hira": QAHiRASpec(),
    "qa-blora": QABLoRASpec(),
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("merge", [None, "16bit", "quantized"])
def test_factors_lie_beside_the_weights_where_stock_peft_has_them_or_they_are_added(
    kind: str, merge: str | None
) -> None:
    beside = merge == "16bit" or (merge is None and kind in {"lora", "bayesian-lora"})
    expected = {AFFINE} | ({LOW_RANK} if beside else set())
    assert result_forms(RTN, SPECS[kind], merge) == expected  # type: ignore[arg-type]
    assert result_forms(LOFTQ, SPECS[kind], merge) == expected  # type: ignore[arg-type]


def test_without_an_adapter_a_result_has_the_forms_of_the_method() -> None:
    assert result_forms(RTN, None, None) == {AFFINE}
    assert result_forms(NF, None, None) == {CODEBOOK}
    assert result_forms(LOFTQ, None, None) == {AFFINE, LOW_RANK}


def told(spec: WeightSpec, *formats: ExportFormat, adapter: Any, **merging: Any) -> list[tuple[str, str]]:
    options = {"merge": None, "round_offset": False, **merging}
    return [(problem.field, problem.code) for problem in result_problems(spec, formats, adapter, **options)]


@pytest.mark.parametrize(
    ("rank", "alpha", "fields"),
    [
        (8, 16.0, []),
        (8, 32.0, ["adapter.alpha"]),
        (8, 15.0, ["adapter.alpha"]),
        (16, 16.0, ["adapter.rank"]),
        (4, 16.0, ["adapter.rank"]),
        (16, 32.0, ["adapter.rank", "adapter.alpha"]),
    ],
)
def test_an_adapter_goes_on_from_factors_of_its_rank_and_strength_alone(
    rank: int, alpha: float, fields: list[str]
) -> None:
    found = told(LOFTQ, CT, PEFT, adapter=LoRASpec(rank=rank, alpha=alpha))
    assert found == [(field, "conflicting_fields") for field in fields]


@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind != "lora"])
def test_only_a_lora_goes_on_from_factors(kind: str) -> None:
    adapter = SPECS[kind].model_copy(update={"rank": 8, "alpha": 16.0})
    assert ("adapter.kind", "conflicting_fields") in told(LOFTQ, NATIVE, adapter=adapter)
    assert ("adapter.kind", "conflicting_fields") not in told(RTN, NATIVE, adapter=adapter)


@pytest.mark.parametrize(
    ("kind", "quantized", "stock"),
    [
        ("lora", False, True),
        ("qa-lora", True, False),
        ("q-bara", False, False),
        ("qa-hira", True, False),
        ("qa-blora", True, False),
        ("bayesian-lora", False, True),
    ],
)
def test_the_kinds_that_fold_and_those_that_peft_loads(kind: str, quantized: bool, stock: bool) -> None:
    adapter = SPECS[kind]
    assert told(RTN, NATIVE, adapter=adapter, merge="quantized") == (
        [] if quantized else [("merge", "conflicting_fields")]
    )
    assert (("formats.1", "format_cannot_hold") in told(RTN, CT, PEFT, adapter=adapter)) is not stock
    assert told(RTN, MERGED, adapter=adapter, merge="16bit") == []


def test_a_merge_in_16_bits_is_held_by_what_holds_sums() -> None:
    adapter = LoRASpec()
    for name in ExportFormat:
        found = [one for one in told(RTN, name, adapter=adapter, merge="16bit") if one[1] == "format_cannot_hold"]
        assert bool(found) is (name not in {NATIVE, MERGED}), name


def test_a_folded_offset_is_held_by_native_merged_and_gguf_and_rounded_by_all() -> None:
    adapter = QAHiRASpec()
    for name in (NATIVE, MERGED, GGUF, CT):
        found = told(RTN, name, adapter=adapter, merge="quantized")
        assert found == ([("formats.0", "offset_not_representable")] if name is CT else [])
        assert told(RTN, name, adapter=adapter, merge="quantized", round_offset=True) == []
    assert told(NF, NATIVE, adapter=adapter, merge="quantized") == [("merge", "offset_not_representable")]
    # Of a base job whose adapter lies in its offsets, with another one trained beside.
    assert told(RTN, CT, PEFT, adapter=LoRASpec(), folded="offsets") == [("formats.0", "offset_not_representable")]
    assert told(RTN, CT, PEFT, adapter=LoRASpec(), folded="zero_points") == []


def test_rounding_belongs_to_a_fold_and_a_merge_to_an_adapter() -> None:
    stray = ("round_offset", "conflicting_fields")
    assert told(RTN, NATIVE, adapter=None, round_offset=True) == [stray]
    assert told(RTN, NATIVE, adapter=None, merge="16bit", round_offset=True) == [("merge", "conflicting_fields"), stray]
    assert told(RTN, NATIVE, adapter=LoRASpec(), round_offset=True) == [stray]
    assert told(RTN, MERGED, adapter=LoRASpec(), merge="16bit", round_offset=True) == [stray]
    assert told(RTN, NATIVE, adapter=None) == []


FOLDED = Literal["offsets", "zero_points"] | None


@pytest.mark.parametrize(
    ("adapter", "merge", "rounded", "folded", "formats"),
    [
        (None, None, False, None, [CT]),
        (QAHiRASpec(), "quantized", False, None, [NATIVE]),
        (QAHiRASpec(), "quantized", True, None, [CT]),
        (QAHiRASpec(), "16bit", False, None, [MERGED]),
        (QAHiRASpec(), None, False, None, [CT]),
        (LoRASpec(), None, False, None, [CT, PEFT]),
        (LoRASpec(), None, False, "offsets", [NATIVE]),
        (LoRASpec(), None, False, "zero_points", [CT, PEFT]),
    ],
)
def test_the_formats_of_a_request_that_names_none(
    adapter: Any, merge: str | None, rounded: bool, folded: FOLDED, formats: list[ExportFormat]
) -> None:
    assert list(default_result_formats(RTN, adapter, merge, rounded, folded)) == formats


def test_a_fold_leaves_nothing_symmetric() -> None:
    spec = RTNSpec.model_validate(
        {"bits": 3, "symmetric": True, "modules": {"overrides": {"*.a": {"symmetric": True}, "*.b": {"bits": 8}}}}
    )
    merged = as_merged(spec)
    assert [scheme.symmetric for _, scheme in merged.schemes()] == [False, False, False]
    assert [scheme.bits for _, scheme in merged.schemes()] == [3, 3, 8]


def test_the_trained_numbers_of_an_adapter_are_counted() -> None:
    linears = {"a": (6, 4), "lm_head": (100, 4), "b": (2, 8)}
    spec = RTNSpec(group_size=2)
    assert trained_parameters(spec, LoRASpec(rank=3), linears) == 3 * (6 + 4) + 3 * (2 + 8)
    assert trained_parameters(spec, BayesianLoRASpec(rank=3), linears) == 3 * (6 + 4) + 3 * (2 + 8)
    assert trained_parameters(spec, QALoRASpec(rank=3), linears) == 3 * (6 + 2) + 3 * (2 + 4)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("merge", [None, "16bit"])
@pytest.mark.parametrize("name", ["gptq", "awq", "mlx", "peft", "bitsandbytes", "compressed-tensors"])
def test_a_format_that_does_not_fit_an_adapter_is_told_one_way_out_and_it_leads_there(
    kind: str, merge: Literal["16bit"] | None, name: str
) -> None:
    """Every problem of a format names formats that the same job may ask for, and no method that makes no adapter."""
    spec = RTNSpec(bits=5, group_size=32, symmetric=True)
    adapter: Any = SPECS[kind]
    problems = result_problems(spec, (ExportFormat(name),), adapter, merge, round_offset=False)
    details = [problem.detail for problem in problems if problem.code == "format_cannot_hold"]
    assert all("factors of rtn" not in detail and "rtn makes none" not in detail for detail in details)
    if merge == "16bit":
        assert details == [f"{name} holds no merged 16-bit weights; ask for merged"]
        assert not result_problems(spec, (MERGED,), adapter, merge, round_offset=False)
    elif name == "peft" and kind not in {"lora", "bayesian-lora"}:
        (detail,) = details
        assert detail.startswith(f"stock peft has no {kind}; leave peft out")
        assert not result_problems(spec, (), adapter, merge, round_offset=False)


@pytest.mark.parametrize("kind", ["lora", "bayesian-lora"])
def test_a_format_without_a_place_for_the_adapter_is_told_so(kind: str) -> None:
    adapter: Any = SPECS[kind]
    (problem,) = result_problems(RTN, (CT,), adapter, None, round_offset=False)
    assert problem.detail == (
        "compressed-tensors holds the quantized weights without the trained adapter; "
        'add "peft" to formats, or ask for "merged" alone, which adds it in'
    )
    for formats in ((CT, PEFT), (MERGED,)):
        assert not result_problems(RTN, formats, adapter, None, round_offset=False)
