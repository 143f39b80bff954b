"""SignRound against its formula: the hand-written step equals autograd in fp64, and 0 steps equal round to nearest."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from app.domain.methods import RTNSpec, Scheme, SignRoundSpec
from tests.methods.toy_block import toy_task
from workers.methods.rtn import RTN, quantize_weight
from workers.methods.sign_round import RoundedWeights, SignRound, gradients, rounded_weights, signed_step

SCHEMES = [
    Scheme(bits=bits, group_size=group, symmetric=symmetric)
    for bits, group, symmetric in itertools.product((2, 3, 4, 8), (16, -1), (True, False))
]


class RoundSTE(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(_ctx: object, *gradients: Tensor) -> Tensor:
        return gradients[0]


def by_autograd(weight: Tensor, scheme: Scheme, v: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """w_hat by the paper's formula, differentiable; an independent writing of it."""
    group = weight.shape[1] if scheme.group_size == -1 else scheme.group_size
    w = weight.view(-1, group)
    low, high = w.min(-1).values.clamp(max=0), w.max(-1).values.clamp(min=0)
    rounded = RoundSTE.apply
    if scheme.symmetric:
        q_max = 2 ** (scheme.bits - 1)
        a, c = -alpha * low, beta * high
        s = (torch.where(a > c, a, -c) / q_max)[..., None]
        symmetric: Tensor = s * torch.clamp(rounded(w / s + v), -q_max, q_max - 1)
        return symmetric.view_as(weight)
    top = 2**scheme.bits - 1
    s = (beta * high - alpha * low) / top
    z = rounded(-alpha * low / s)[..., None]
    s = s[..., None]
    asymmetric: Tensor = s * (torch.clamp(rounded(w / s + v) + z, 0, top) - z)
    return asymmetric.view_as(weight)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_step_equals_autograd_in_fp64(scheme: Scheme) -> None:
    torch.manual_seed(2)
    weight = torch.randn(12, 48, dtype=torch.float64)
    inputs, target = torch.randn(20, 48, dtype=torch.float64), torch.randn(20, 12, dtype=torch.float64)
    width = 48 if scheme.group_size == -1 else scheme.group_size
    ours = RoundedWeights({"only": weight}, scheme, width, torch.float64)
    v, alpha, beta = (t.clone().requires_grad_() for t in (ours.state.offset, ours.state.alpha, ours.state.beta))
    w_hat = torch.empty_like(weight)
    ours.write(w_hat)
    for step in range(6):
        expected = by_autograd(weight, scheme, v, alpha, beta)
        assert torch.equal(w_hat, expected.detach())
        loss = ((inputs @ expected.T - target) ** 2).mean()
        grads = torch.autograd.grad(loss, (expected, v, alpha, beta), allow_unused=True)
        by_formula = gradients(ours.state, grads[0].view(-1, width), scheme)
        for hand, auto in zip(by_formula, grads[1:], strict=True):
            wanted = torch.zeros_like(hand) if auto is None else auto.view_as(hand)
            torch.testing.assert_close(hand, wanted, rtol=1e-10, atol=1e-13)
        rate = 0.05 * (1 - step / 6)
        stepped = signed_step(ours.state, grads[0].view(-1, width), rate, scheme, (0.0, 1.0))
        ours.step(grads[0], torch.tensor(rate, dtype=torch.float64), w_hat)
        with torch.no_grad():
            for parameter, gradient in zip((v, alpha, beta), grads[1:], strict=True):
                parameter.sub_(rate * torch.sign(gradient))
            alpha.clamp_(0, 1)
            beta.clamp_(0, 1)
        for plain, parameter in zip(stepped, (v, alpha, beta), strict=True):
            torch.testing.assert_close(plain, parameter.detach().view_as(plain), rtol=1e-12, atol=1e-12)
    assert not torch.equal(w_hat, quantize_weight(weight, scheme, torch.float64).dequantize())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_steps_equal_round_to_nearest(scheme: Scheme) -> None:
    task = toy_task(schemes={"up": scheme, "down": scheme})
    nearest = RTN().quantize_block(task, RTNSpec()).linears
    untuned = SignRound().quantize_block(task, SignRoundSpec(steps=0)).linears
    for name, result in nearest.items():
        assert torch.equal(result.affine.codes, untuned[name].affine.codes)
        assert torch.equal(result.affine.scale, untuned[name].affine.scale)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tuning_lowers_the_block_error_and_leaves_the_block_as_it_was(bits: int) -> None:
    scheme = Scheme(bits=bits, group_size=16, symmetric=bits != 3)
    task = toy_task(schemes={"up": scheme, "down": scheme})
    before = {name: tensor.clone() for name, tensor in task.block.state_dict().items()}
    result = SignRound().quantize_block(task, SignRoundSpec(steps=60))
    assert result.loss is not None
    assert result.loss_initial is not None
    assert result.loss < 0.8 * result.loss_initial
    assert all(torch.equal(before[name], tensor) for name, tensor in task.block.state_dict().items())
    assert all(isinstance(task.linear(name), nn.Linear) for name in ("up", "down"))


def test_the_same_seed_gives_the_same_codes_and_another_seed_others() -> None:
    scheme = Scheme(bits=3, group_size=16, symmetric=True)
    task = toy_task(schemes={"up": scheme, "down": scheme})
    spec = SignRoundSpec(steps=20)
    first, second = (SignRound().quantize_block(task, spec).linears["up"].weight for _ in range(2))
    other = SignRound().quantize_block(replace(task, seed=99), spec).linears["up"].weight
    assert torch.equal(first.codes, second.codes)
    assert not torch.equal(first.codes, other.codes)


def test_original_inputs_are_used_when_asked_for() -> None:
    """With `quantized_inputs` off, what the quantized activations are does not matter."""
    scheme = Scheme(bits=3, group_size=16, symmetric=True)
    task = toy_task(schemes={"up": scheme, "down": scheme})
    spec = SignRoundSpec(steps=10, quantized_inputs=False)
    codes = [
        SignRound().quantize_block(replace(task, inputs=inputs), spec).linears["up"].weight.codes
        for inputs in (task.inputs, torch.randn_like(task.inputs))
    ]
    assert torch.equal(*codes)


def test_a_loss_reported_is_the_loss_of_the_result() -> None:
    """The held-out loss recomputed with the dequantized result equals the one reported."""
    from workers.engine.tune.sequence_order import split

    scheme = Scheme(bits=3, group_size=16, symmetric=False)
    task = toy_task(schemes={"up": scheme, "down": scheme})
    result = SignRound().quantize_block(task, SignRoundSpec(steps=30))
    with torch.no_grad():
        for name, linear in result.linears.items():
            task.linear(name).weight.copy_(linear.weight.dequantize())
        _, held_out = split(len(task.inputs), task.seed)
        error = task.forward(task.block, task.inputs[held_out]) - task.targets[held_out]
    assert float(error.square().mean()) == pytest.approx(result.loss, rel=1e-5)


def test_half_precision_keeps_gradients_of_small_errors() -> None:
    """The gradient of a mean over many numbers is below fp16's smallest; unscaled, nothing would move."""
    task = toy_task({name: Scheme(bits=3, group_size=16, symmetric=True) for name in ("up", "down")}, length=512)
    task.block.half()
    inputs = 0.02 * task.inputs
    with torch.no_grad():
        targets = task.block(inputs.half())
    task = replace(task, inputs=inputs.half(), inputs_fp=inputs.half(), targets=targets, scale_dtype=torch.float16)
    result = SignRound().quantize_block(task, SignRoundSpec(steps=40, batch_size=8, scale_search=False))
    assert result.loss is not None
    assert result.loss_initial is not None
    assert result.loss < 0.8 * result.loss_initial


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.group_size == 16], ids=str)
def test_no_steps_equal_round_to_nearest_where_the_inputs_moments_are_known(scheme: Scheme) -> None:
    """A search of the start's ranges is for those who go on from there."""
    task = toy_task(schemes={"up": scheme, "down": scheme})
    moments = {name: torch.rand(task.linear(name).in_features) + 0.01 for name in task.schemes}
    task = replace(task, second_moments=moments)
    untuned = SignRound().quantize_block(task, SignRoundSpec(steps=0)).linears
    for name, result in RTN().quantize_block(task, RTNSpec()).linears.items():
        assert torch.equal(result.affine.codes, untuned[name].affine.codes)
        assert torch.equal(result.affine.scale, untuned[name].affine.scale)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_searched_start_has_the_lower_weighted_error(symmetric: bool) -> None:
    """Weighted by the inputs' second moments, over all groups; without the search the start is round to nearest."""
    scheme = Scheme(bits=2, group_size=16, symmetric=symmetric)
    task = toy_task(schemes={"up": scheme, "down": scheme})
    moments = {name: torch.rand(task.linear(name).in_features) + 0.01 for name in task.schemes}
    task, errors = replace(task, second_moments=moments), {}
    for search in (True, False):
        (weights,) = rounded_weights(task, search=search)
        weights.keep(torch.tensor(True))
        errors[search] = sum(
            float(((of.dequantize() - task.linear(name).weight.detach()).square() * moments[name]).sum())
            for name, of in weights.results().items()
        )
    assert errors[True] < 0.9 * errors[False]
