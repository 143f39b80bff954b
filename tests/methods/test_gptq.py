"""GPTQ against its parent: column by column with explicit inverses, no factorization and no lazy batches."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from app.domain.methods import GPTQSpec, RTNSpec, Scheme, SchemeName
from tests.methods.toy_block import GatedBlock, gated_task
from workers.contracts.blocks import BlockTask, WarmUp
from workers.methods.gptq import GPTQ, Elimination, quantize_weight
from workers.methods.rtn import RTN
from workers.methods.rtn import quantize_weight as round_to_nearest
from workers.numerics.hessian import inverse_factors

COLUMNS = 144
SCHEMES = [
    Scheme(bits=bits, group_size=group, symmetric=symmetric)
    for (bits, group), symmetric in itertools.product([(2, 16), (3, 48), (4, 36), (3, 144), (8, -1)], (True, False))
]
W4 = Scheme(bits=4, group_size=16, symmetric=True)
W3 = Scheme(bits=3, group_size=16, symmetric=False)
GATED: dict[str, Scheme] = {"gate": W3, "up": W3, "down": W4}


def correlated(tokens: int = 400, columns: int = COLUMNS) -> Tensor:
    """Inputs (tokens, columns), fp64, of few causes and little noise."""
    torch.manual_seed(1)
    causes = torch.randn(tokens, 30, dtype=torch.float64) @ torch.randn(30, columns, dtype=torch.float64)
    return (causes + 0.3 * torch.randn(tokens, columns, dtype=torch.float64)) * torch.rand(columns).exp()


def error(weight: Tensor, w_hat: Tensor, inputs: Tensor) -> float:
    return float(((w_hat.double() - weight.double()) @ inputs.T).square().sum())


def by_explicit_inverses(
    weight: Tensor, hessian: Tensor, scheme: Scheme, *, act_order: bool, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Codes as they are stored and w_hat: optimal brain quantization in fp64, for `hessian` without dead columns.

    The inverse is computed anew from the columns that are left, whenever one is rounded.
    """
    w, n = weight.clone(), weight.shape[1]
    width = n if scheme.group_size == -1 else scheme.group_size
    h = hessian + damping * hessian.diagonal().mean() * torch.eye(n, dtype=hessian.dtype)
    order = sorted(range(n), key=lambda j: (-float(hessian[j, j]), j)) if act_order else list(range(n))
    grids = {g: min_max_grid(weight[:, g * width : (g + 1) * width], scheme) for g in range(n // width)}
    codes, w_hat = torch.zeros_like(w), torch.zeros_like(w)
    for step, j in enumerate(order):
        group = j // width
        if not act_order and j % width == 0:
            grids[group] = min_max_grid(w[:, j : j + width], scheme)
        scale, zero = grids[group]
        codes[:, j] = ((w[:, j] / scale).round() + zero).clamp(0, 2**scheme.bits - 1)
        w_hat[:, j] = scale * (codes[:, j] - zero)
        left = order[step:]
        inverse = torch.linalg.inv(h[left][:, left])
        w[:, left] -= ((w[:, j] - w_hat[:, j]) / inverse[0, 0]).unsqueeze(1) * inverse[0]
    return codes, w_hat


def min_max_grid(group: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row's range, which holds 0; fp32 scales."""
    low, high = group.min(1).values.clamp(max=0), group.max(1).values.clamp(min=0)
    if scheme.symmetric:
        half = 2 ** (scheme.bits - 1)
        return (torch.where(-low > high, -low, -high) / half).float().double(), torch.full_like(low, half)
    scale = ((high - low) / (2**scheme.bits - 1)).float().double()
    return scale, (-low / scale).round().clamp(0, 2**scheme.bits - 1)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_are_those_of_explicit_inverses(scheme: Scheme, act_order: bool) -> None:
    inputs = correlated()
    hessian = 2 * inputs.T @ inputs
    weight = torch.randn(10, COLUMNS, dtype=torch.float64)
    elimination = Elimination.of(hessian, 0.01, act_order=act_order)
    assert elimination is not None
    found = quantize_weight(weight, elimination, scheme, torch.float32)
    codes, w_hat = by_explicit_inverses(weight, hessian, scheme, act_order=act_order)
    assert torch.equal(found.codes, codes.to(torch.uint8))
    torch.testing.assert_close(found.dequantize(), w_hat, rtol=1e-6, atol=1e-7)
    assert not torch.equal(found.codes, round_to_nearest(weight, scheme, torch.float32).codes)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_with_the_identity_as_hessian_it_is_round_to_nearest(scheme: Scheme, act_order: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(10, COLUMNS)
    elimination = Elimination.of(torch.eye(COLUMNS), 0.01, act_order=act_order)
    assert elimination is not None
    found = quantize_weight(weight, elimination, scheme, torch.bfloat16)
    expected = round_to_nearest(weight, scheme, torch.bfloat16)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)
    assert (found.zero_point is None) == scheme.symmetric
    if found.zero_point is not None and expected.zero_point is not None:
        assert torch.equal(found.zero_point, expected.zero_point)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_errors_on_correlated_inputs_are_far_below_rounding(bits: int, act_order: bool) -> None:
    inputs = correlated()
    scheme = Scheme(bits=bits, group_size=48, symmetric=False)
    weight = torch.randn(20, COLUMNS)
    elimination = Elimination.of((2 * inputs.T @ inputs).float(), 0.01, act_order=act_order)
    assert elimination is not None
    ours, nearest = (
        w.dequantize()
        for w in (
            quantize_weight(weight, elimination, scheme, torch.float32),
            round_to_nearest(weight, scheme, torch.float32),
        )
    )
    assert error(weight, ours, inputs) < 0.5 * error(weight, nearest, inputs)


@pytest.mark.parametrize("bits", [2, 3])
def test_the_layers_error_in_fp32_is_that_of_explicit_inverses_in_fp64(bits: int) -> None:
    """Rounded sums move codes near a middle, for better or worse; the error of all rows says if they are too coarse.

    Divergence at 2 bits does not: it moves by percents with the last bit of an activation.
    """
    scheme, inputs = Scheme(bits=bits, group_size=48, symmetric=False), correlated().bfloat16().double()
    hessian, weight = 2 * inputs.T @ inputs, torch.randn(64, COLUMNS)
    elimination = Elimination.of(hessian.float(), 0.01, act_order=True)
    assert elimination is not None
    found = quantize_weight(weight, elimination, scheme, torch.float32).dequantize()
    _, expected = by_explicit_inverses(weight.double(), hessian, scheme, act_order=True)
    assert error(weight, found, inputs) == pytest.approx(error(weight, expected, inputs), rel=1e-3)


def output_error(task: BlockTask, result: Any) -> float:
    """Of the block's output, with the result in place for a moment."""
    with torch.no_grad(), task.restored():
        for name, linear in result.linears.items():
            task.linear(name).weight = torch.nn.Parameter(linear.weight.dequantize())
        return float((task.forward(task.block, task.inputs) - task.targets).square().mean())


@pytest.mark.parametrize("act_order", [False, True])
def test_a_block_comes_closer_than_with_rounding_and_stays_as_it_was(act_order: bool) -> None:
    task = gated_task(GATED)
    before = {name: tensor.clone() for name, tensor in task.block.state_dict().items()}
    spec = GPTQSpec(act_order=act_order)
    result = GPTQ().quantize_block(task, spec)
    assert output_error(task, result) < 0.8 * output_error(task, RTN().quantize_block(task, RTNSpec()))
    assert result.linears.keys() == GATED.keys()
    assert result.counters == {"damping_raised": 0, "rounded_to_nearest": 0}
    assert all(torch.equal(before[name], tensor) for name, tensor in task.block.state_dict().items())
    again = GPTQ().quantize_block(replace(task, seed=99), spec)
    for name, linear in result.linears.items():
        assert torch.equal(linear.weight.codes, again.linears[name].weight.codes)


@pytest.mark.parametrize("fails_at", [None, "down"])
def test_one_pass_of_all_sequences_gives_what_parts_of_passes_give(
    monkeypatch: pytest.MonkeyPatch, fails_at: str | None
) -> None:
    """Also where memory runs out on the way: what is left goes the other way."""
    events: list[float] = []
    task = gated_task(GATED, tick=events.append)
    expected = GPTQ().quantize_block(task, GPTQSpec()).linears
    raised: list[int] = []

    def factors(hessians: Sequence[Tensor], damping: float, real: Any = inverse_factors) -> Any:
        if fails_at is not None and len(events) == 3 and not raised:
            raised.append(1)
            raise torch.OutOfMemoryError
        return real(hessians, damping)

    monkeypatch.setattr("workers.methods.gptq.fits_at_once", lambda *_: True)
    monkeypatch.setattr("workers.methods.gptq.inverse_factors", factors)
    found = GPTQ().quantize_block(task, GPTQSpec()).linears
    for name, linear in expected.items():
        assert (found[name].weight.codes != linear.weight.codes).float().mean() < 0.01
    assert events == pytest.approx([2 / 3, 1, 2 / 3, 1])
    assert bool(raised) == (fails_at is not None)


def test_a_linear_sees_what_the_quantized_ones_before_it_make() -> None:
    """down's codes from a Hessian computed by hand behind the quantized gate and up."""
    task = gated_task(GATED)
    block = task.block
    assert isinstance(block, GatedBlock)
    result = GPTQ().quantize_block(task, GPTQSpec())
    with torch.no_grad():
        x = block.norm(task.inputs)
        gate, up = (
            torch.nn.functional.linear(x, result.linears[name].weight.dequantize(), task.linear(name).bias)
            for name in ("gate", "up")
        )
        rounded = (torch.nn.functional.silu(gate) * up).flatten(0, 1)
        original = (torch.nn.functional.silu(block.gate(x)) * block.up(x)).flatten(0, 1)
        found = []
        for inputs in (rounded, original):
            elimination = Elimination.of(2 * inputs.T @ inputs, 0.01, act_order=True)
            assert elimination is not None
            found.append(quantize_weight(block.down.weight, elimination, W4, torch.float32).codes)
    codes = result.linears["down"].weight.codes
    assert (codes != found[0]).float().mean() < 0.01, "sums in another order flip a code at the most"
    assert (codes != found[1]).float().mean() > 0.03


def test_linears_of_other_schemes_are_rounded_for_themselves() -> None:
    mixed = GATED | {"up": Scheme(bits=8, group_size=-1, symmetric=True)}
    alone = GPTQ().quantize_block(gated_task({"gate": W3}), GPTQSpec()).linears["gate"].weight
    together = GPTQ().quantize_block(gated_task(mixed), GPTQSpec()).linears
    assert torch.equal(together["gate"].weight.codes, alone.codes)
    assert (together["up"].weight.scheme.bits, together["up"].affine.scale.shape) == (8, (48, 1))


def test_columns_that_no_token_lit_are_rounded_to_nearest() -> None:
    task = gated_task({"up": W4})
    found = GPTQ().quantize_block(task, GPTQSpec()).linears["up"].weight
    nearest = round_to_nearest(task.linear("up").weight, W4, torch.float32)
    same = (found.codes == nearest.codes).all(0)
    assert bool(same[9]), "channel 9 is never lit"
    assert same.sum() < 8


@pytest.mark.parametrize(("scale", "event"), [(1e30, "hessian_not_positive_definite")])
def test_a_hessian_that_cannot_be_used_is_told_and_counted(scale: float, event: str) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    task = gated_task(GATED, log=lambda name, **fields: events.append((name, fields)))
    block = task.block
    assert isinstance(block, GatedBlock)
    block.norm.weight.data *= scale
    result = GPTQ().quantize_block(task, GPTQSpec())
    assert result.counters["rounded_to_nearest"] == 3
    assert events[0] == (event, {"block": 0, "linears": "gate, up"})
    for name, linear in RTN().quantize_block(task, RTNSpec()).linears.items():
        assert torch.equal(linear.weight.codes, result.linears[name].weight.codes)


def test_kernels_of_every_scheme_compile_ahead_on_a_gpu_and_none_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    schemes = [W4, *(Scheme.named(SchemeName(name)) for name in ("q2_k", "q4_1", "nvfp4a16", "iq3_s"))]
    cpu, linears = torch.device("cpu"), frozenset((512, scheme) for scheme in schemes)
    kinds = WarmUp(linears, torch.bfloat16, torch.bfloat16, cpu)
    assert GPTQ().warm_ups(kinds, GPTQSpec()) == []
    pytest.importorskip("triton")
    monkeypatch.setattr("workers.numerics.backend.triton_serves", lambda *_: True)
    plain, swept = (GPTQ().warm_ups(kinds, GPTQSpec(sweeps=sweeps)) for sweeps in (0, 2))
    # Columns of each, two more of groups that move; two searches of each block type, whose descent is one.
    assert (len(plain), len(swept)) == (5 + 1 + 3 * 2, 5 + 1 + 3 * 3)


def test_damping_that_had_to_rise_is_told_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    task = gated_task(GATED, log=lambda name, **_: events.append(name))
    twice = partial(lambda real, *given: [(factor, 1) for factor, _ in real(*given)], inverse_factors)
    monkeypatch.setattr("workers.methods.gptq.inverse_factors", twice)
    assert GPTQ().quantize_block(task, GPTQSpec()).counters["damping_raised"] == 3
    assert events == ["damping_raised", "damping_raised"]
