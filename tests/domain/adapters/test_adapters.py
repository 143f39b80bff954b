"""Adapters, finetuning and merges in requests, in shorthand and in full."""

import json
from typing import Any

import pytest

from app.domain.adapters import ADAPTERS, BayesianLoRASpec, LoRASpec, QAHiRASpec, QBaRASpec
from app.domain.formats import ExportFormat
from app.domain.methods import RTNSpec
from app.domain.methods.schemes import Spec
from app.domain.request.adapter_recipes import ADAPTER_RECIPES
from app.domain.request.combination_rules import shape_errors, trained_parameters
from app.domain.request.finetuning import Finetune
from app.domain.request.job_request import JobRequest
from tests.domain.request.test_request import problems

TEXT = {"finetune": {"dataset": "upl_0abc"}}
MODEL = {"model": "org/name"}


@pytest.mark.parametrize("name", ADAPTER_RECIPES)
def test_a_recipe_is_a_request_with_its_parts(name: str) -> None:
    recipe = ADAPTER_RECIPES[name]
    short = JobRequest.parse({**MODEL, **TEXT, "method": name, "bits": 3, "rank": 8, "alpha": 4})
    full = {"quantization": {**recipe.quantization, "bits": 3}, "adapter": {"kind": recipe.kind, "rank": 8, "alpha": 4}}
    assert short == JobRequest.parse({**MODEL, **TEXT, **full})
    assert short == JobRequest.parse(
        {**MODEL, **TEXT, "quantization": {"method": name, "bits": 3}, "rank": 8, "alpha": 4}
    )
    dumped = short.model_dump(mode="json")
    assert JobRequest.parse(dumped) == short
    assert JobRequest.parse(json.loads(json.dumps(dumped))).model_dump(mode="json") == dumped


def test_the_recipes_of_the_papers() -> None:
    def parts(method: str, **fields: object) -> tuple[str, str, bool, tuple[str, ...]]:
        request = JobRequest.parse({**MODEL, **TEXT, "method": method, **fields})
        assert request.adapter is not None
        quantization = request.quantization
        formats = tuple(name.value for name in request.formats)
        return quantization.method, request.adapter.kind, quantization.symmetric, formats

    assert parts("qlora") == ("nf", "lora", True, ("merged", "peft"))
    assert parts("q-bara") == parts("q-blora") == ("nf", "q-bara", True, ("merged",))
    assert parts("qa-lora") == ("rtn", "qa-lora", False, ("compressed-tensors",))
    assert parts("qa-hira", merge="quantized") == ("rtn", "qa-hira", False, ("native",))
    assert parts("qa-blora", merge="16bit") == ("rtn", "qa-blora", False, ("merged",))
    assert parts("qa-hira", merge="quantized", round_offset=True)[3] == ("compressed-tensors",)
    assert parts("qa-lora", symmetric=True)[2]
    assert parts("bayesian-lora") == ("nf", "bayesian-lora", True, ("merged", "peft"))


def test_any_quantizer_may_be_the_base() -> None:
    request = JobRequest.parse(
        {**MODEL, **TEXT, "method": "signround", "adapter": {"kind": "qa-hira"}, "merge": "quantized"}
    )
    assert (request.quantization.method, request.adapter) == ("signround", QAHiRASpec())


def test_finetuning_alone_trains_a_lora() -> None:
    assert JobRequest.parse({**MODEL, **TEXT, "method": "rtn"}).adapter == LoRASpec()
    assert JobRequest.parse({**MODEL, "method": "rtn"}).adapter is None


def test_a_dataset_may_be_a_text_that_stands_for_one() -> None:
    request = JobRequest.parse({**MODEL, "method": "qlora", "finetune": {"dataset": "/texts/a.jsonl"}})
    assert request.finetune is not None
    assert request.finetune.dataset.source == "local"


HIRA = {**MODEL, **TEXT, "method": "qa-hira"}
MISTAKES: list[tuple[str, dict[str, Any], str, str, str]] = [
    ("no text", {**MODEL, "method": "qlora"}, "finetune", "missing_field", "dataset"),
    ("no dataset", {**MODEL, "method": "qlora", "finetune": {}}, "finetune.dataset", "missing_field", ""),
    ("rank", {**HIRA, "rank": 0}, "rank", "out_of_range", "1 to 1024"),
    ("alpha", {**HIRA, "alpha": "x"}, "alpha", "wrong_type", "number"),
    ("rank inside", {**HIRA, "adapter": {"rank": 0}}, "adapter.rank", "out_of_range", "1 to 1024"),
    ("twice", {**HIRA, "adapter": {"rank": 2}, "rank": 2}, "rank", "conflicting_fields", "move rank into adapter"),
    ("against", {**HIRA, "adapter": {"kind": "lora"}}, "adapter.kind", "conflicting_fields", "stands for 'qa-hira'"),
    ("kind", {**MODEL, **TEXT, "method": "rtn", "adapter": {"kind": "x"}}, "adapter.kind", "invalid_value", "q-bara"),
    ("field", {**HIRA, "adapter": {"ranks": 2}}, "adapter.ranks", "unknown_field", "did you mean rank?"),
    (
        "field of another kind",
        {**MODEL, **TEXT, "method": "qlora", "adapter": {"pool_in": 2}},
        "adapter.pool_in",
        "unknown_field",
        "q-bara, qa-blora and qa-hira have it",
    ),
    ("merge", {**HIRA, "merge": "8bit"}, "merge", "invalid_value", "quantized or 16bit"),
    ("stray merge", {**MODEL, "method": "rtn", "merge": "16bit"}, "merge", "conflicting_fields", "no adapter"),
    ("no fold", {**MODEL, **TEXT, "method": "qlora", "merge": "quantized"}, "merge", "conflicting_fields", "qa-lora"),
    (
        "codebook",
        {**HIRA, "method": "nf", "adapter": {"kind": "qa-hira"}, "merge": "quantized"},
        "merge",
        "offset_not_representable",
        "codebook",
    ),
    (
        "integer zero points",
        {**HIRA, "merge": "quantized", "formats": ["native", "compressed-tensors"]},
        "formats.1",
        "offset_not_representable",
        "round_offset",
    ),
    (
        "gguf",
        {**HIRA, "merge": "quantized", "formats": ["gguf"], "bits": 6, "symmetric": True},
        "bits",
        "format_cannot_hold",
        "asymmetric",
    ),
    ("stray rounding", {**HIRA, "round_offset": True}, "round_offset", "conflicting_fields", "merge"),
    ("peft", {**HIRA, "formats": ["compressed-tensors", "peft"]}, "formats.1", "format_cannot_hold", "qa-hira"),
    (
        "16 bits packed",
        {**HIRA, "merge": "16bit", "formats": ["compressed-tensors"]},
        "formats.0",
        "format_cannot_hold",
        "ask for",
    ),
]


@pytest.mark.parametrize(("body", "field", "code", "says"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_named_with_its_way_out(body: dict[str, Any], field: str, code: str, says: str) -> None:
    found = problems(body)
    assert field in found, found
    assert found[field][0] == code
    assert says in found[field][1]
    assert len(found) == 1 or field == "formats.0", found


def test_all_problems_come_at_once() -> None:
    found = problems({**MODEL, "method": "qa-hira", "bits": 9, "rank": 0, "merge": "x", "seed": -1})
    assert found.keys() == {"finetune", "bits", "rank", "merge", "seed"}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_silent_request_learns_at_the_rate_of_its_adapter(kind: str) -> None:
    """In the request as it is stored and shown; a rate that is given stays."""
    body = {**MODEL, "method": "rtn", "symmetric": False, "adapter": {"kind": kind}}
    silent = JobRequest.parse({**body, **TEXT}).finetune
    given = JobRequest.parse({**body, "finetune": {**TEXT["finetune"], "learning_rate": 0.5}}).finetune
    assert silent is not None
    assert given is not None
    assert silent.learning_rate == ADAPTERS[kind].learning_rate
    assert given.learning_rate == 0.5


def test_pooled_inputs_learn_at_a_multiple_of_a_loras_rate_unless_they_are_sums() -> None:
    rates = {kind: info.learning_rate for kind, info in ADAPTERS.items()}
    assert rates["lora"] < rates["q-bara"] < rates["qa-lora"] < rates["qa-hira"]
    summed = JobRequest.parse({**MODEL, **TEXT, "method": "qa-lora", "adapter": {"pooling": "sum"}}).finetune
    assert summed is not None
    assert summed.learning_rate == rates["lora"]


@pytest.mark.parametrize(("steps", "rate"), [(100, 0.27), (1000, 0.027), (10, 1.0)])
def test_gates_can_close_within_the_steps(steps: int, rate: float) -> None:
    body = {**MODEL, "method": "bayesian-lora", "finetune": {**TEXT["finetune"], "steps": steps}}
    for given, expected in (({}, rate), ({"gate_learning_rate": 0.01}, 0.01)):
        adapter = JobRequest.parse({**body, "adapter": given}).adapter
        assert isinstance(adapter, BayesianLoRASpec)
        assert adapter.gate_learning_rate == pytest.approx(expected)


def test_schemas_give_no_default_where_a_silent_request_gets_something_else() -> None:
    """Else a form that fills defaults in would send them."""
    for field, model in (("learning_rate", Finetune), ("gate_learning_rate", BayesianLoRASpec)):
        shown = model.model_json_schema()["properties"][field]
        assert "default" not in shown
        assert "silent" in shown["description"]


def test_every_kind_is_described() -> None:
    for kind, info in ADAPTERS.items():
        assert issubclass(info.spec, Spec)
        assert info.spec.model_fields["kind"].default == kind


LINEARS = {"model.layers.0.self_attn.k_proj": (192, 576), "model.layers.0.mlp.down_proj": (576, 1536)}


def test_shapes_that_do_not_fit_are_named_once_each() -> None:
    spec = RTNSpec(group_size=64)
    assert shape_errors(spec, QAHiRASpec(), LINEARS) == []
    found = shape_errors(spec, QAHiRASpec(pool_in=96, repeat_out=5), LINEARS)
    assert [error.field for error in found] == ["adapter.pool_in"]
    found = shape_errors(spec, QBaRASpec(pool_in=2, repeat_out=5), LINEARS)
    assert [(error.field, "k_proj" in error.detail) for error in found] == [("adapter.repeat_out", True)]


def test_parameters_of_all_linears() -> None:
    by_hand = 16 * (192 + 576) + 16 * (576 + 1536)
    assert trained_parameters(RTNSpec(), LoRASpec(rank=16), LINEARS) == by_hand
    assert trained_parameters(RTNSpec(), QBaRASpec(rank=16), LINEARS) == by_hand


def test_formats_of_the_default_request_hold_what_is_made() -> None:
    for name in ADAPTER_RECIPES:
        for merge in (None, "16bit", "quantized"):
            if merge == "quantized" and not ADAPTERS[ADAPTER_RECIPES[name].kind].merges_quantized:
                continue
            request = JobRequest.parse({**MODEL, **TEXT, "method": name, "merge": merge})
            assert set(request.formats) <= set(ExportFormat)
