"""Every method that takes llama.cpp's block types, on a small block: what engine, formats and resumed jobs count on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from app.domain.methods import METHODS as NAMED
from app.domain.methods import Form, Scheme, SchemeName, WeightSpec
from tests.conformance.test_methods import assert_same, output_error, quantized, with_statistics
from tests.methods.toy_block import GATED_FOLDS, GatedBlock, _task
from workers.contracts.blocks import BlockTask
from workers.contracts.results import BlockResult
from workers.engine.finished_blocks import FinishedBlocks
from workers.engine.tune.tuner import Tuner
from workers.numerics.quantized import BlockWeight

TAKING = sorted(name for name, info in NAMED.items() if Form.BLOCKS in info.produces)
NAMES = ["q2_k", "q3_k", "iq3_s", "iq4_xs", "q4_1", "q6_k"]
QUICK = {"steps": 5, "batch_size": 4, "search_samples": 2}
WIDTH = 256
every_method = pytest.mark.parametrize(
    "method", [pytest.param(method, marks=pytest.mark.slow) if method == "awq" else method for method in TAKING]
)
"""AWQ searches a grid for every candidate, which takes long."""
every_pair = pytest.mark.parametrize(
    ("method", "name"),
    [
        *[(method, name) for method in TAKING if method != "awq" for name in NAMES],
        pytest.param("awq", "q2_k", marks=pytest.mark.slow),
    ],
)


def quick(method: str, **fields: Any) -> WeightSpec:
    kind = NAMED[method].spec
    return kind.model_validate({key: value for key, value in (QUICK | fields).items() if key in kind.model_fields})


def task_for(name: str, **changed: Any) -> BlockTask:
    """A gated MLP of whole super-blocks, whose channels have few common causes and one of which is never lit."""
    generator = torch.Generator().manual_seed(8)
    torch.manual_seed(8)
    block = GatedBlock(WIDTH, WIDTH)
    hidden = torch.randn(12, 10, 16, generator=generator) @ torch.randn(16, WIDTH, generator=generator)
    hidden = hidden + torch.randn(12, 10, WIDTH, generator=generator)
    hidden[..., 9] = 0
    schemes = dict.fromkeys(("gate", "up", "down"), Scheme.named(SchemeName(name)))
    return with_statistics(_task(block, hidden, **({"schemes": schemes, "folds": GATED_FOLDS} | changed)))


def block_weights(result: BlockResult) -> dict[str, BlockWeight]:
    found = {name: linear.weight for name, linear in result.linears.items()}
    assert all(isinstance(weight, BlockWeight) for weight in found.values())
    return {name: weight for name, weight in found.items() if isinstance(weight, BlockWeight)}


def test_these_methods_take_them() -> None:
    assert TAKING == ["awq", "gptq", "rtn", "signround"]


@every_pair
def test_results_are_of_the_scheme_and_close_and_the_block_is_left_as_it_was(method: str, name: str) -> None:
    task = task_for(name)
    state = {key: tensor.clone() for key, tensor in task.block.state_dict().items()}
    result = quantized(method, task, quick(method))
    for linear, weight in block_weights(result).items():
        assert weight.scheme == task.schemes[linear]
        assert weight.shape == task.linear(linear).weight.shape
        assert weight.scale.dtype == torch.float16
        assert int(weight.codes.max()) < len(weight.kind.levels)
    assert output_error(task, result) < (0.5 if name == "q2_k" else 0.25)
    assert all(torch.equal(state[key], tensor) for key, tensor in task.block.state_dict().items())


@every_method
def test_the_same_block_is_the_same_again_and_after_another_one(method: str) -> None:
    spec, tuner, task = quick(method), Tuner(), task_for("q3_k", index=1)
    before = replace(task_for("q3_k"), seed=9, tune=tuner.tune)
    with torch.no_grad():
        before.linear("gate").weight.mul_(1.5)
    quantized(method, with_statistics(before), spec)
    assert_same(quantized(method, replace(task, tune=tuner.tune), spec), quantized(method, task_for("q3_k"), spec))


@every_pair
def test_a_finished_block_comes_back_to_the_bit(method: str, name: str, tmp_path: Path) -> None:
    result = quantized(method, task_for(name), quick(method, steps=0))
    first, resumed = FinishedBlocks(tmp_path), FinishedBlocks(tmp_path)
    first.adopt("print")
    first.save(0, result.linears, None)
    resumed.adopt("print")
    assert_same(BlockResult(resumed.load(0)), result)


@every_method
def test_weights_of_every_kind_stay_finite(method: str) -> None:
    task = task_for("q2_k")
    with torch.no_grad():
        task.linear("gate").weight[:, :32] = 0
        task.linear("gate").weight[3] = 0
        task.linear("up").weight.abs_()
        task.linear("up").weight[5, 7] = 100
        task.linear("down").weight.mul_(1e-3)
        task.linear("down").bias.zero_()
    result = quantized(method, with_statistics(task), quick(method))
    assert all(bool(linear.dequantize().isfinite().all()) for linear in result.linears.values())


@every_method
def test_half_precision_is_kept(method: str) -> None:
    task = task_for("q2_k")
    task.block.to(torch.bfloat16)
    task = replace(task, inputs=task.inputs.bfloat16(), inputs_fp=task.inputs_fp.bfloat16())
    task = with_statistics(task)
    task = replace(task, second_moments={key: value.float() for key, value in task.second_moments.items()})
    result = quantized(method, task, quick(method))
    assert {linear.dequantize().dtype for linear in result.linears.values()} == {torch.bfloat16}
    assert output_error(task, result) < 0.5


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "iq3_s"])
def test_each_way_that_knows_more_of_the_outputs_is_closer(name: str) -> None:
    """Round to nearest by the search, GPTQ, its sweeps, and learned rounding, which starts with those."""
    task = task_for(name)
    ways: list[tuple[str, dict[str, Any]]] = [
        ("rtn", {"scheme": name}),
        ("gptq", {"act_order": False}),
        ("gptq", {"act_order": False, "sweeps": 2}),
        ("signround", {}),
    ]
    errors = [output_error(task, quantized(method, task, quick(method, **fields))) for method, fields in ways]
    assert errors[1] < 0.75 * errors[0]
    assert errors[2] < errors[1]
    assert errors[3] <= errors[2] * 1.01
    untuned = quantized("signround", task, quick("signround", steps=0))
    assert output_error(task, untuned) == pytest.approx(errors[0], rel=1e-6)


def test_other_schemes_do_not_see_the_sweeps() -> None:
    task = task_for("q4_0")
    task = replace(task, schemes=dict.fromkeys(task.schemes, Scheme(bits=3, group_size=32, symmetric=False)))
    assert_same(*(quantized("gptq", task, quick("gptq", sweeps=sweeps)) for sweeps in (0, 3)))
