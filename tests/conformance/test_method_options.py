"""Every option of every method does something: switched alone, what a block becomes is not what it was.

A field that is added to a spec needs a line here. Fields that the block's task does not show, because the engine acts
on them before or after the blocks, stand in `ELSEWHERE` with the function by which it learns of them; those without
another value in `FIXED`, with the reason.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from app.domain.methods import METHODS as NAMED
from app.domain.methods import WeightSpec
from app.domain.request.job_request import JobRequest
from tests.conformance.test_methods import every_method, quantized, quick, task_for
from workers.contracts.blocks import BlockTask
from workers.contracts.results import BlockResult

OTHER: dict[str, dict[str, Any]] = {
    "": {"bits": 3, "group_size": 8, "symmetric": False, "modules": {"ignore": ["up"]}},
    "rtn": {"scale_search": False},
    "nf": {"double_quantization": False},
    "gptq": {"damping": 0.5, "act_order": False},
    "awq": {"search_samples": 1, "clip_search": False, "quantized_inputs": True},
    "omniquant": {"epochs": 3, "batch_size": 2, "learning_rate": 0.02, "aug_loss": True},
    "signround": {
        "steps": 9,
        "batch_size": 2,
        "learning_rate": 0.01,
        "scale_search": False,
        "quantized_inputs": False,
        "quick_steps": True,
    },
    "loftq": {"base": "affine", "double_quantization": True, "rank": 8, "alpha": 3.0, "iterations": 1},
    "apiq": {
        "symmetric": True,
        "granularity": "layer",
        "rank": 8,
        "alpha": 3.0,
        "steps": 6,
        "batch_size": 2,
        "learning_rate": 0.05,
        "range_learning_rate": 0.05,
        "weight_decay": 0.0,
        "aug_loss": True,
        "base": "signround",
        "freeze_base": True,
    },
    "lq-lora": {"rank": 8, "alpha": 3.0, "iterations": 1},
}
"""Another value of each field than `quick` gives, by method; "" has those of all methods."""

BUDGET = {"average": 3.0, "choices": [2, 3, 4]}


def choices(spec: WeightSpec) -> object:
    """Of a budget, for a linear with 1,024 inputs."""
    return spec.candidates("model.layers.0.mlp.up_proj", 1024)


GOAL: tuple[dict[str, Any], Any, Callable[[WeightSpec], object]] = ({}, {"kl": 0.1}, lambda spec: spec.goal())
FITS: tuple[dict[str, Any], Any, Callable[[WeightSpec], object]] = (
    {},
    {"memory": "1GB", "context": 64},
    lambda spec: spec.goal(),
)

ELSEWHERE: dict[tuple[str, str], tuple[dict[str, Any], Any, Callable[[WeightSpec], object]]] = {
    **{(name, "at_most"): GOAL for name in ("rtn", "gptq", "awq", "omniquant", "signround")},
    **{(name, "fits"): FITS for name in ("rtn", "gptq", "awq", "omniquant", "signround")},
    **{(name, "scheme"): ({}, "nvfp4", lambda spec: spec.schemes()) for name in ("rtn", "gptq", "awq", "signround")},
    **{(name, "kv_cache"): ({}, "fp8", lambda spec: spec.measures_inputs()) for name in NAMED},
    ("rtn", "weights_only"): ({}, True, lambda spec: spec.asks_for_weights_alone()),
    ("nf", "weights_only"): ({}, True, lambda spec: spec.asks_for_weights_alone()),
    ("gptq", "sweeps"): ({}, 2, lambda spec: spec.model_dump()["sweeps"]),
    ("signround", "scale_steps"): ({}, 7, lambda spec: spec.end_to_end_steps()),
    ("lq-lora", "fisher"): ({}, False, lambda spec: spec.needs_fisher()),
    ("lq-lora", "group_sizes"): ({"bits": BUDGET}, (32,), choices),
    ("lq-lora", "absmax_bits"): ({"bits": BUDGET}, (5,), choices),
    ("lq-lora", "absmax_dtypes"): ({"bits": BUDGET}, ("float16",), choices),
    ("lq-lora", "superblocks"): ({"bits": BUDGET}, (8,), choices),
}
"""Fields that the engine acts on outside the blocks: what else is given, another value, and what the engine asks."""

FIXED = {
    "method": "it names the method",
    "preset": "it fills in other fields, those that its method's presets name",
    ("nf", "symmetric"): "NormalFloat has no zero point",
    ("lq-lora", "symmetric"): "NormalFloat has no zero point",
}
"""Fields without effect of their own, with the reason."""

FIELDS = [(name, field) for name, info in NAMED.items() for field in info.spec.model_fields]
FREE = [(name, field) for name, field in FIELDS if field not in FIXED and (name, field) not in FIXED]
STARTS: dict[str, dict[str, Any]] = {
    "awq": {"bits": 2},
    "signround": {"bits": 2, "steps": 12},
    "apiq": {"bits": 2, "steps": 12, "learning_rate": 0.01},
}
"""What has to be so that a method gets anywhere in its few steps."""
WITH: dict[tuple[str, str], dict[str, Any]] = {
    ("loftq", "symmetric"): {"base": "affine"},
    ("rtn", "scale_search"): {"scheme": "nvfp4a16"},
}
"""Other fields without which an option is refused."""


def asked(name: str, **fields: Any) -> WeightSpec:
    """A quick spec with the method's `STARTS`."""
    starts, other = STARTS.get(name, {}), ("at_most", "fits", "scheme")
    if any(fields.get(field) for field in other):
        starts = {field: value for field, value in starts.items() if field != "bits"}
    return quick(name, **(starts | fields))


def seen_task(spec: WeightSpec) -> BlockTask:
    """As after some blocks: the quantized stream is not the original one."""
    task = task_for(spec)
    noise = torch.randn(task.inputs.shape, generator=torch.Generator().manual_seed(8))
    return replace(task, inputs=task.inputs + 0.05 * noise)


def differs(one: BlockResult, other: BlockResult) -> bool:
    """Whether a block that is made of them is another, or its adapters begin elsewhere."""
    if one.linears.keys() != other.linears.keys():
        return True
    for name, linear in one.linears.items():
        theirs = other.linears[name]
        if not torch.equal(linear.dequantize(), theirs.dequantize()):
            return True
        ours, others = linear.low_rank, theirs.low_rank
        if ours is not None and others is not None and (ours.alpha, ours.rank) != (others.alpha, others.rank):
            return True
    return False


@pytest.mark.parametrize(("name", "field"), FREE)
def test_an_option_makes_a_difference(name: str, field: str) -> None:
    if (name, field) in ELSEWHERE:
        given, value, asks = ELSEWHERE[name, field]
        assert asks(asked(name, **given, **{field: value})) != asks(asked(name, **given))
        return
    other = OTHER[""] | OTHER[name]
    assert field in other, f"name another value of {name}'s {field}, or why there is none"
    given = WITH.get((name, field), {})
    before, after = asked(name, **given), asked(name, **given, **{field: other[field]})
    assert getattr(before, field) != getattr(after, field)
    without, switched = (quantized(name, seen_task(spec), spec) for spec in (before, after))
    assert differs(without, switched), f"{field} has no effect"


@every_method
def test_without_another_option_nothing_differs(name: str) -> None:
    spec = asked(name)
    assert not differs(quantized(name, seen_task(spec), spec), quantized(name, seen_task(spec), spec))


@pytest.mark.parametrize("name", ["nf", "lq-lora"])
def test_a_zero_point_is_refused_where_there_is_none(name: str) -> None:
    with pytest.raises(ValidationError):
        asked(name, symmetric=False)


@pytest.mark.parametrize("name", [name for name, info in NAMED.items() if "preset" in info.spec.model_fields])
def test_a_preset_fills_in_the_fields_that_it_names(name: str) -> None:
    filled = [
        JobRequest.parse({"model": "org/name", "method": name, "preset": preset}).quantization
        for preset in ("light", "default", "best")
    ]
    assert len({spec.model_dump_json(exclude={"preset"}) for spec in filled}) == 3


def test_every_line_is_of_a_field_that_exists() -> None:
    fields = set(FIELDS)
    assert OTHER.keys() - {""} == NAMED.keys()
    assert {(name, field) for name, others in OTHER.items() if name for field in others} <= fields
    assert set(OTHER[""]) <= {field for _, field in fields}
    assert ELSEWHERE.keys() <= fields
    assert {key for key in FIXED if isinstance(key, tuple)} <= fields
    assert {key for key in FIXED if isinstance(key, str)} <= {field for _, field in fields}
