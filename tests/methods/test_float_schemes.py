"""Methods on schemes of FP4 and FP8: GPTQ against a plain loop in fp64, limits in which they agree, joined scales."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from app.domain.methods import AWQSpec, GPTQSpec, RTNSpec, Scheme, SchemeName, SignRoundSpec, WeightSpec
from tests.methods.test_gptq import correlated, error, output_error
from tests.methods.toy_block import gated_task
from workers.contracts.blocks import BlockTask
from workers.engine.quantize.registry import METHODS
from workers.methods.gptq import Elimination, quantize_floats
from workers.numerics.floats.float_grids import searched
from workers.numerics.quantized import FloatWeight

COLUMNS = 128
NAMES = ["nvfp4a16", "mxfp4a16", "mxfp8", "fp8", "fp8-tensor", "fp8-block"]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().nan_to_num(0).unique()


def nearest(x: Tensor, bits: int) -> Tensor:
    """Of the element's values, the nearest; ties to an even place in the order of magnitudes."""
    table = torch.cat([-E2M1.flip(0)[:-1], E2M1]) if bits == 4 else E4M3
    above = torch.searchsorted(table, x).clamp(1, len(table) - 1)
    low, high = table[above - 1], table[above]
    even = (above - 1 - len(table) // 2) % 2 == 0
    down = (x - low < high - x) | ((x - low == high - x) & even)
    return torch.where(down, low, high)


def column_by_column(weight: Tensor, hessian: Tensor, factor: Tensor, bits: int, *, act_order: bool) -> Tensor:
    """W_hat in fp64 with these factors (rows, in): the inverse anew from the columns that are left."""
    w, n = weight.clone(), weight.shape[1]
    h = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(n, dtype=hessian.dtype)
    order = sorted(range(n), key=lambda j: (-float(hessian[j, j]), j)) if act_order else list(range(n))
    w_hat = torch.zeros_like(w)
    for step, j in enumerate(order):
        w_hat[:, j] = factor[:, j] * nearest(w[:, j] / factor[:, j], bits)
        left = order[step:]
        inverse = torch.linalg.inv(h[left][:, left])
        w[:, left] -= ((w[:, j] - w_hat[:, j]) / inverse[0, 0]).unsqueeze(1) * inverse[0]
    return w_hat


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gptq_is_the_plain_loop_with_scales_of_the_original_weights(name: str, act_order: bool) -> None:
    inputs, scheme = correlated(columns=COLUMNS), Scheme.named(SchemeName(name))
    hessian = 2 * inputs.T @ inputs
    weights = [torch.randn(rows, COLUMNS, dtype=torch.float64) for rows in (6, 4)]
    elimination = Elimination.of(hessian, 0.01, act_order=act_order)
    assert elimination is not None
    moments = hessian.diagonal()
    found = quantize_floats(weights, elimination, scheme, torch.float32, moments, [None, None])
    for weight, made in zip(weights, found, strict=True):
        expected = searched(weight, scheme, torch.float32, None, moments)
        assert torch.equal(made.scale.float(), expected.scale.float())
        factor = made.row_factor().double().repeat_interleave(made.group_size, 1)[:, :COLUMNS]
        w_hat = column_by_column(weight, hessian, factor, scheme.bits, act_order=act_order)
        torch.testing.assert_close(made.dequantize(), w_hat, rtol=1e-6, atol=1e-9)
        assert error(weight, made.dequantize(), inputs) < 0.7 * error(weight, expected.dequantize(), inputs)


def task_of(name: str, **changed: Any) -> BlockTask:
    scheme = Scheme.named(SchemeName(name))
    task = gated_task({"gate": scheme, "up": scheme}, joined=(("gate", "up"),), **changed)
    moments = {linear: torch.rand(32) + 0.1 for linear in task.schemes}
    amax = {linear: task.inputs.abs().max().reshape(1) for linear in task.schemes}
    with torch.no_grad():
        task.linear("up").weight.mul_(3)
        targets = task.block(task.inputs)
    return replace(task, second_moments=moments, targets=targets, input_amax=amax)


@pytest.mark.parametrize("name", [*NAMES, "int8"])
def test_with_the_identity_as_hessian_gptq_is_round_to_nearest(name: str) -> None:
    scheme, weight = Scheme.named(SchemeName(name)), torch.randn(10, COLUMNS)
    elimination = Elimination.of(torch.eye(COLUMNS), 0.01, act_order=True)
    assert elimination is not None
    if scheme.form != "float":
        return
    (made,) = quantize_floats([weight], elimination, scheme, torch.float32, torch.ones(COLUMNS), [None])
    expected = searched(weight, scheme, torch.float32)
    assert torch.equal(made.scale.float(), expected.scale.float())
    assert torch.equal(made.dequantize(), expected.dequantize())


@pytest.mark.parametrize("name", [*NAMES, "int8"])
def test_no_steps_of_sign_round_are_round_to_nearest(name: str) -> None:
    task = task_of(name)
    nearest_codes = METHODS["rtn"].quantize_block(task, RTNSpec()).linears
    for linear, untuned in METHODS["signround"].quantize_block(task, SignRoundSpec(steps=0)).linears.items():
        assert torch.equal(untuned.dequantize(), nearest_codes[linear].dequantize())


METHOD_SPECS: list[WeightSpec] = [
    RTNSpec(),
    GPTQSpec(),
    AWQSpec(search_samples=4),
    SignRoundSpec(steps=4),
]


@pytest.mark.parametrize("spec", METHOD_SPECS, ids=lambda spec: spec.method)
def test_linears_that_a_runtime_joins_have_one_global_scale(spec: WeightSpec) -> None:
    """That of the largest of their weights, as stored: AWQ's have its scales in them."""
    task = task_of("nvfp4")
    result = METHODS[spec.method].quantize_block(task, spec)
    weights = {name: linear.weight for name, linear in result.linears.items()}
    assert all(isinstance(weight, FloatWeight) for weight in weights.values())
    gate, up = (weight.global_scale for weight in weights.values() if isinstance(weight, FloatWeight))
    assert gate is not None
    assert up is not None
    assert torch.equal(gate, up)
    scaled = [linear.scaling.apply(task.linear(name).weight.detach()) for name, linear in result.linears.items()]
    largest = max(float(weight.abs().max()) for weight in scaled)
    assert float(gate) == pytest.approx(448 * 6 / largest, rel=1e-6)
    alone = METHODS[spec.method].quantize_block(replace(task, joined=()), spec).linears["gate"].weight
    assert isinstance(alone, FloatWeight)
    assert alone.global_scale is not None
    assert not torch.equal(alone.global_scale, gate)


@pytest.mark.parametrize("name", ["mxfp4a16", "fp8a16"])
def test_gptq_and_sign_round_come_closer_than_rounding_and_the_block_stays(name: str) -> None:
    task = task_of(name)
    before = {key: tensor.clone() for key, tensor in task.block.state_dict().items()}
    rounded = output_error(task, METHODS["rtn"].quantize_block(task, RTNSpec()))
    assert output_error(task, METHODS["gptq"].quantize_block(task, GPTQSpec())) < 0.7 * rounded
    tuned = METHODS["signround"].quantize_block(task, SignRoundSpec(steps=100))
    assert tuned.loss is not None
    assert tuned.loss_initial is not None
    assert tuned.loss < 0.98 * tuned.loss_initial
    assert all(torch.equal(before[key], tensor) for key, tensor in task.block.state_dict().items())


def test_a_block_is_tuned_with_the_inputs_that_a_server_rounds() -> None:
    """With W4A4 the loss is that of rounded inputs: larger than with weights alone, and what their sum comes to."""
    alone = METHODS["signround"].quantize_block(task_of("mxfp4a16"), SignRoundSpec(steps=0)).loss
    task = task_of("mxfp4")
    both = METHODS["signround"].quantize_block(task, SignRoundSpec(steps=0))
    assert both.loss is not None
    assert alone is not None
    assert both.loss > alone
    tuned = METHODS["signround"].quantize_block(task, SignRoundSpec(steps=60))
    assert tuned.loss is not None
    assert tuned.loss <= both.loss
