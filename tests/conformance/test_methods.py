"""Every method of the registry on one small block: what the engine, the formats and a resumed job count on.

A new method is tested by its line in the registry. `QUICK` shortens whatever its spec has of these fields.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from app.domain.methods import METHODS as NAMED
from app.domain.methods import Form, Scheme, WeightSpec
from bitwright.errors import NumericalFailure
from tests.methods.toy_block import gated_task
from workers.contracts.blocks import BlockTask, Fisher
from workers.contracts.results import BlockResult
from workers.engine.finished_blocks import FinishedBlocks
from workers.engine.quantize.registry import METHODS
from workers.engine.tune.tuner import Tuner
from workers.numerics import low_rank
from workers.numerics.quantized import AffineWeight

QUICK = {"bits": 4, "group_size": 16, "steps": 6, "epochs": 2, "batch_size": 4, "iterations": 3, "rank": 4}
LINEARS = ("gate", "up", "down")
every_method = pytest.mark.parametrize("name", METHODS)


def quick(name: str, **fields: Any) -> WeightSpec:
    """A spec of little work; a scheme's name or a goal stands in place of bits, and a name in place of groups too."""
    kind = NAMED[name].spec
    instead = {"bits": {"scheme", "at_most", "fits"}, "group_size": {"scheme"}}
    given = {key for key, value in fields.items() if value is not None}
    quickly = {key: value for key, value in QUICK.items() if not instead.get(key, set()) & given}
    return kind.model_validate({key: value for key, value in (quickly | fields).items() if key in kind.model_fields})


def task_for(spec: WeightSpec, names: tuple[str, ...] = LINEARS, **changed: Any) -> BlockTask:
    """A gated MLP, one of whose input columns is always 0, as the engine gives it to the spec's method."""
    schemes: dict[str, Scheme] = {name: scheme for name in names if (scheme := spec.scheme_of(name)) is not None}
    return with_statistics(gated_task(schemes, **({"samples": 16, "length": 12} | changed)))


def with_statistics(task: BlockTask) -> BlockTask:
    """Second moments of the linears' inputs, Fisher information, and targets, as the block computes them now."""
    moments: dict[str, Tensor] = {}
    hooks = [
        task.linear(name).register_forward_pre_hook(
            lambda _, inputs, name=name: moments.update({name: inputs[0].square().sum((0, 1))})
        )
        for name in task.schemes
    ]
    with torch.no_grad():
        targets = task.block(task.inputs_fp)
    for hook in hooks:
        hook.remove()
    fisher = {
        name: Fisher(rows=torch.rand(task.linear(name).out_features) + 0.1, columns=moments[name] + 1e-3)
        for name in task.schemes
    }
    return replace(task, targets=targets, second_moments=moments, fisher=fisher)


def quantized(name: str, task: BlockTask, spec: WeightSpec) -> BlockResult:
    return METHODS[name].quantize_block(task, spec)


def output_error(task: BlockTask, result: BlockResult) -> float:
    """Of the block with everything that the method made of it, relative to what the block adds to its inputs."""
    changed = {f"{name}.weight": linear.dequantize() for name, linear in result.linears.items()} | result.parameters
    with torch.no_grad():
        outputs = torch.func.functional_call(task.block, changed, (task.inputs,))
    return float((outputs - task.targets).norm() / (task.targets - task.inputs).norm())


def assert_same(one: BlockResult, other: BlockResult) -> None:
    assert one.linears.keys() == other.linears.keys()
    for name, linear in one.linears.items():
        assert torch.equal(linear.weight.codes, other.linears[name].weight.codes)
        assert torch.equal(linear.dequantize(), other.linears[name].dequantize())


@every_method
def test_the_block_is_left_as_it_was(name: str) -> None:
    spec = quick(name)
    task = task_for(spec)
    state = {key: tensor.clone() for key, tensor in task.block.state_dict().items()}
    modules = {key: id(module) for key, module in task.block.named_modules()}
    parameters = {key: (id(p), p.requires_grad, p.grad) for key, p in task.block.named_parameters()}
    given = {field: getattr(task, field).clone() for field in ("inputs", "inputs_fp", "targets")}
    quantized(name, task, spec)
    assert all(torch.equal(state[key], tensor) for key, tensor in task.block.state_dict().items())
    assert {key: id(module) for key, module in task.block.named_modules()} == modules
    assert {key: (id(p), p.requires_grad, p.grad) for key, p in task.block.named_parameters()} == parameters
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in task.block.modules())
    assert all(torch.equal(tensor, getattr(task, field)) for field, tensor in given.items())


@every_method
def test_the_same_seed_gives_the_same_bits_whatever_was_drawn_before(name: str) -> None:
    spec = quick(name)
    results: list[BlockResult] = []
    for _ in range(2):
        task = task_for(spec)
        torch.manual_seed(len(results))
        results.append(quantized(name, task, spec))
    assert_same(*results)


@every_method
def test_a_block_is_the_same_after_another_one_and_in_a_job_that_begins_with_it(name: str) -> None:
    """A resumed job begins at a later block: no state may pass from block to block."""
    spec, tuner = quick(name), Tuner()
    before, task = task_for(spec), replace(task_for(spec), index=1, seed=8)
    with torch.no_grad():
        for linear in LINEARS:
            before.linear(linear).weight.mul_(1.5)
    quantized(name, replace(with_statistics(before), tune=tuner.tune), spec)
    assert_same(quantized(name, replace(task, tune=tuner.tune), spec), quantized(name, task, spec))


@every_method
def test_every_linear_with_a_scheme_has_a_result_of_it_and_no_other_has(name: str) -> None:
    spec = quick(name)
    task = task_for(spec, ("gate", "down"))
    result = quantized(name, task, spec)
    assert list(result.linears) == ["gate", "down"]
    for linear, of in result.linears.items():
        weight = task.linear(linear).weight
        assert of.weight.shape == weight.shape
        assert of.weight.scheme == task.schemes[linear]
        assert of.weight.dtype == weight.dtype
        assert (Form.AFFINE if isinstance(of.weight, AffineWeight) else Form.CODEBOOK) in spec.forms()
        assert int(of.weight.codes.max()) < 2**of.weight.scheme.bits
        rank = 0 if of.low_rank is None else of.low_rank.rank
        assert rank == min(spec.factors_rank(), *weight.shape)


@every_method
def test_losses_counters_and_parameters_can_be_reported(name: str) -> None:
    spec = quick(name)
    shares: list[float] = []
    task = task_for(spec, tick=shares.append)
    result = quantized(name, task, spec)
    assert (result.loss is None) == (result.loss_initial is None)
    if result.loss is not None and result.loss_initial is not None:
        assert 0 <= float(result.loss) <= float(result.loss_initial)
    assert all(math.isfinite(float(counter)) and key.isidentifier() for key, counter in result.counters.items())
    others = {key: p for key, p in task.block.named_parameters() if key.removesuffix(".weight") not in task.schemes}
    assert result.parameters.keys() <= others.keys()
    assert all(value.shape == others[key].shape for key, value in result.parameters.items())
    assert all(0 <= share <= 1 for share in shares)
    assert shares == sorted(shares)


@every_method
def test_the_outputs_are_close(name: str) -> None:
    spec = quick(name)
    task = task_for(spec)
    assert output_error(task, quantized(name, task, spec)) < 0.2


def zero_groups(weight: Tensor) -> None:
    weight[:, :16] = 0
    weight[3] = 0


def one_sign(weight: Tensor) -> None:
    weight.abs_()
    weight[: len(weight) // 2].neg_()


def one_outlier(weight: Tensor) -> None:
    weight[5, 7] = 1000


def all_zero(weight: Tensor) -> None:
    weight.zero_()


def all_negative(weight: Tensor) -> None:
    weight.abs_().neg_()


def all_positive(weight: Tensor) -> None:
    weight.abs_()


def tiny(weight: Tensor) -> None:
    """Below what fp16 tells from 0 as a scale."""
    weight.mul_(1e-7)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("change", [zero_groups, one_sign, one_outlier])
@every_method
def test_weights_of_every_shape_stay_finite_and_near(name: str, change: Any, symmetric: bool) -> None:
    """The block's inputs have a dead column besides: a Hessian has a 0 on its diagonal, a second moment is 0."""
    if symmetric not in quick(name).symmetries():
        pytest.skip("the method refuses such schemes")
    spec = quick(name, symmetric=symmetric)
    task = task_for(spec)
    with torch.no_grad():
        for linear in LINEARS:
            change(task.linear(linear).weight)
    task = with_statistics(task)
    result = quantized(name, task, spec)
    for of in result.linears.values():
        if isinstance(of.weight, AffineWeight):
            assert bool(of.weight.scale.isfinite().all())
            assert bool((of.weight.scale != 0).all())
        assert bool(of.dequantize().isfinite().all())
    assert output_error(task, result) < 0.5


@every_method
def test_a_group_may_be_one_column(name: str) -> None:
    """A deviation that is divided by one less than the group's width is NaN there."""
    for symmetric in quick(name).symmetries():
        spec = quick(name, group_size=1, symmetric=symmetric)
        task = task_for(spec)
        for of in quantized(name, task, spec).linears.values():
            assert bool(of.dequantize().isfinite().all())


@every_method
def test_a_method_that_looks_at_no_inputs_gets_none(name: str) -> None:
    spec, nothing = quick(name), torch.empty(0)
    task = task_for(spec)
    if not spec.observes_inputs():
        task = replace(task, inputs=nothing, inputs_fp=nothing, targets=nothing, second_moments={})
    elif not spec.needs_original_inputs():
        task = replace(task, inputs_fp=nothing)
    assert_same(quantized(name, task, spec), quantized(name, task_for(spec), spec))


@every_method
def test_a_finished_block_comes_back_to_the_bit(name: str, tmp_path: Path) -> None:
    spec = quick(name)
    result = quantized(name, task_for(spec), spec)
    first, resumed = FinishedBlocks(tmp_path), FinishedBlocks(tmp_path)
    first.adopt("print")
    first.save(0, result.linears, None)
    resumed.adopt("print")
    assert resumed.resumed == 1
    assert_same(BlockResult(resumed.load(0)), result)


@every_method
def test_half_precision_is_kept(name: str) -> None:
    spec = quick(name)
    task = task_for(spec)
    task.block.to(torch.bfloat16)
    half = {field: getattr(task, field).to(torch.bfloat16) for field in ("inputs", "inputs_fp")}
    task = with_statistics(replace(task, scale_dtype=torch.bfloat16, **half))
    task = replace(task, second_moments={key: value.float() for key, value in task.second_moments.items()})
    result = quantized(name, task, spec)
    assert {linear.dequantize().dtype for linear in result.linears.values()} == {torch.bfloat16}
    assert all(isinstance(task.linear(linear), nn.Linear) for linear in LINEARS)


HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)


def in_dtype(task: BlockTask, dtype: torch.dtype) -> BlockTask:
    """The task of a model in that dtype, whose formats store scales in it."""
    task.block.to(dtype)
    halves = {field: getattr(task, field).to(dtype) for field in ("inputs", "inputs_fp")}
    task = with_statistics(replace(task, scale_dtype=dtype, **halves))
    return replace(task, second_moments={key: value.float() for key, value in task.second_moments.items()})


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("change", [all_zero, all_negative, all_positive, tiny])
@every_method
def test_edge_groups_in_every_dtype_of_scales(name: str, change: Any, dtype: torch.dtype) -> None:
    """Zeros, one sign and next to nothing, with the most bits that the method has and every grid that it has."""
    for bits, symmetric in ((8, False), (8, True), (2, False), (2, True)):
        try:
            spec = quick(name, bits=bits, symmetric=symmetric)
        except ValidationError:
            continue
        task = task_for(spec, length=6)
        task = replace(task, inputs=task.inputs / 16, inputs_fp=task.inputs / 16)
        with torch.no_grad():
            for linear in LINEARS:
                change(task.linear(linear).weight)
        task = in_dtype(task, dtype)
        result = quantized(name, task, spec)
        for linear, of in result.linears.items():
            assert bool(of.dequantize().isfinite().all())
            assert int(of.weight.codes.max()) < 2**bits
            if isinstance(of.weight, AffineWeight):
                assert bool(of.weight.scale.isfinite().all())
                assert bool((of.weight.scale != 0).all())
                assert of.weight.zero_point is None or int(of.weight.zero_point.max()) < 2**bits
            if bits == 8:
                # 1e-5 is the least scale of fp16; factors are trained away from what the weight needs.
                weight, slack = task.linear(linear).weight.detach().float(), 2e-5 if of.low_rank is None else 2e-3
                off = (of.scaling.undo(of.dequantize().float()) - weight).norm()
                assert float(off) <= 0.1 * float(weight.norm()) + slack * weight.numel() ** 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf])
@every_method
def test_inputs_that_are_partly_not_finite_are_refused_or_left_out(name: str, value: float) -> None:
    """What comes of it may be worse, but never a code or a scale that is made of them."""
    spec = quick(name)
    task = task_for(spec)
    inputs = task.inputs.clone()
    inputs[3, 2, 5] = value
    task = with_statistics(replace(task, inputs=inputs, inputs_fp=inputs))
    try:
        result = quantized(name, replace(task, fisher=task_for(spec).fisher), spec)
    except NumericalFailure:
        return
    nearest = METHODS["rtn"].quantize_block(task, quick("rtn")).linears
    for linear, of in result.linears.items():
        assert bool(of.dequantize().isfinite().all())
        weight = task.linear(linear).weight
        if isinstance(of.weight, AffineWeight) and of.low_rank is None:
            off = (of.scaling.undo(of.dequantize()) - weight).norm()
            assert off <= 1.5 * (nearest[linear].dequantize() - weight).norm()


@pytest.mark.parametrize("name", ["loftq", "lq-lora"])
def test_factors_of_large_linears_are_drawn_by_the_block_s_seed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "EXACT_UP_TO", 8)
    monkeypatch.setattr(low_rank, "BESIDES", 2)
    monkeypatch.setattr(low_rank, "FOLLOWED_BESIDES", 2)
    spec = quick(name, iterations=1)
    first, again, other = (quantized(name, replace(task_for(spec), seed=seed), spec) for seed in (7, 7, 8))
    assert_same(first, again)
    with pytest.raises(AssertionError):
        assert_same(first, other)
