"""Promises of every method that learns to the tuning loop: a start that comes back, and chunks that do not show."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from app.domain.methods import ApiQSpec, Scheme
from tests.methods.toy_block import toy_task
from workers.contracts.blocks import BlockTask
from workers.contracts.tuning import TrainableWeights
from workers.methods.apiq import corrected_weights
from workers.methods.omniquant import ClippedWeights
from workers.methods.sign_round import RoundedWeights
from workers.numerics import learned_ranges
from workers.numerics.backends.rounding import rounding_operators
from workers.numerics.quantized import LinearResult

W3 = Scheme(bits=3, group_size=16, symmetric=False)
RATE = 0.05


def task(seed: int, symmetric: bool) -> BlockTask:
    scheme = W3.model_copy(update={"symmetric": symmetric})
    made = toy_task({"up": scheme, "down": scheme})
    with torch.no_grad():
        for number, name in enumerate(made.schemes):
            weight = made.linear(name).weight
            weight.copy_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(10 * seed + number)))
    return replace(made, seed=seed)


def searched(of: BlockTask) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.rand(of.linear(name).in_features, generator=generator) for name in of.schemes}


def sign_round(of: BlockTask) -> TrainableWeights:
    ((scheme, width), weights) = next(iter(of.alike().items()))
    return RoundedWeights(weights, scheme, width, torch.float32, searched(of))


def omniquant(of: BlockTask) -> TrainableWeights:
    ((scheme, width), weights) = next(iter(of.alike().items()))
    return ClippedWeights(weights, scheme, width, torch.float32)


def apiq(**fields: Any) -> Callable[[BlockTask], TrainableWeights]:
    def made(of: BlockTask) -> TrainableWeights:
        symmetric = next(iter(of.schemes.values())).symmetric
        spec = ApiQSpec.model_validate({"bits": 3, "rank": 4, "symmetric": symmetric, "learning_rate": 0.01} | fields)
        starts = of.quantize(of, spec.base_spec().model_copy(update={"steps": 3})).linears if fields else {}
        (weights,) = corrected_weights(of, spec, starts)
        return weights

    return made


KINDS: dict[str, Callable[[BlockTask], TrainableWeights]] = {
    "sign_round": sign_round,
    "omniquant": omniquant,
    "apiq": apiq(),
    "apiq_from_sign_round": apiq(base="signround"),
    "apiq_frozen": apiq(freeze_base=True),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
both_grids = pytest.mark.parametrize("symmetric", [True, False])


def descended(weights: TrainableWeights, steps: int, seed: int = 0) -> tuple[Tensor, dict[str, LinearResult]]:
    """W_hat and the result after steps along random gradients."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.zeros(sum(math.prod(shape) for shape in weights.shapes.values()))
    for _ in range(steps):
        weights.step(torch.randn(len(out), generator=generator), torch.tensor(RATE), out)
    weights.keep(torch.tensor(True))
    return out, weights.results()


def with_nan(weights: TrainableWeights) -> None:
    out = torch.zeros(sum(math.prod(shape) for shape in weights.shapes.values()))
    weights.step(torch.full_like(out, math.nan), torch.tensor(RATE), out)


def assert_same(one: dict[str, LinearResult], other: dict[str, LinearResult]) -> None:
    assert list(one) == list(other)
    for name, linear in one.items():
        assert torch.equal(linear.weight.codes, other[name].weight.codes)
        assert torch.equal(linear.dequantize(), other[name].dequantize())
        if linear.low_rank is not None:
            theirs = other[name].low_rank
            assert theirs is not None
            assert torch.equal(linear.low_rank.a, theirs.a)
            assert torch.equal(linear.low_rank.b, theirs.b)


@both_grids
@every_kind
def test_after_a_restart_steps_are_those_of_new_weights(kind: str, *, symmetric: bool) -> None:
    """Out of memory begins a block again: what an optimizer remembers, and faults, are of the steps that count."""
    once, again = (KINDS[kind](task(1, symmetric)) for _ in range(2))
    start = torch.zeros(2 * 32 * 48)
    once.write(start)
    descended(again, 5, seed=9)
    with_nan(again)
    assert again.faults() > 0
    again.restart()
    assert (type(again.faults()), again.faults()) == (int, 0), "on a host it is a number, and waits for nothing"
    back = torch.zeros_like(start)
    again.write(back)
    assert torch.equal(back, start)
    (w_hat, expected), (ours, found) = descended(once, 4), descended(again, 4)
    assert torch.equal(ours, w_hat)
    assert_same(found, expected)
    assert not torch.equal(w_hat, start)


@both_grids
@every_kind
def test_another_block_s_weights_are_taken_over_with_their_start(kind: str, *, symmetric: bool) -> None:
    used, other = KINDS[kind](task(1, symmetric)), KINDS[kind](task(2, symmetric))
    before = descended(used, 5, seed=9)[0]
    with_nan(used)
    used.adopt(KINDS[kind](task(2, symmetric)))
    assert used.faults() == 0
    (w_hat, expected), (ours, found) = descended(other, 4), descended(used, 4)
    assert torch.equal(ours, w_hat)
    assert_same(found, expected)
    assert not torch.equal(w_hat, before)


@both_grids
@every_kind
def test_the_result_is_that_of_the_step_that_was_kept_and_shares_no_memory(kind: str, *, symmetric: bool) -> None:
    weights = KINDS[kind](task(1, symmetric))
    out, kept = descended(weights, 3)
    values = {name: linear.dequantize() for name, linear in kept.items()}
    for value, w_hat in zip(values.values(), out.split(32 * 48), strict=True):
        torch.testing.assert_close(value.flatten(), w_hat, rtol=1e-6, atol=1e-7)
    later = torch.zeros_like(out)
    weights.step(torch.randn(len(out)), torch.tensor(0.5), later)
    weights.keep(torch.tensor(False))
    assert_same(weights.results(), kept)
    weights.keep(torch.tensor(True))
    assert not torch.equal(weights.results()["up"].dequantize(), values["up"])
    assert all(torch.equal(linear.dequantize(), values[name]) for name, linear in kept.items())


@both_grids
@every_kind
def test_chunks_of_a_cache_do_not_show(kind: str, *, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = descended(KINDS[kind](task(1, symmetric)), 3)
    monkeypatch.setattr(learned_ranges, "CACHED_ELEMENTS", 50 * 16)
    monkeypatch.setattr(rounding_operators, "CACHED_ELEMENTS", 50 * 16)
    parts = descended(KINDS[kind](task(1, symmetric)), 3)
    # Sums and sigmoids of a chunk's ends differ in last bits.
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-4, atol=1e-5)
    for name, linear in whole[1].items():
        assert torch.equal(parts[1][name].weight.codes, linear.weight.codes)
        torch.testing.assert_close(parts[1][name].dequantize(), linear.dequantize(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("known", "least", "most"), [(True, 0.5, 1.5), (False, 0.0, 1.0)])
def test_a_searched_range_may_widen_again_and_a_full_one_may_not(known: bool, least: float, most: float) -> None:
    of = task(1, symmetric=False)
    ((scheme, width), weights) = next(iter(of.alike().items()))
    trained = RoundedWeights(weights, scheme, width, torch.float32, searched(of) if known else {})
    out, generator = torch.zeros(2 * 32 * 48), torch.Generator().manual_seed(0)
    gradient = torch.randn(len(out), generator=generator)
    trained.step(gradient, torch.tensor(1.0), out)
    for factor in (trained.state.alpha, trained.state.beta):
        assert (float(factor.min()), float(factor.max())) == (least, most)
