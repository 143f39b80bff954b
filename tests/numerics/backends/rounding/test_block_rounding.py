"""Tuned rounding on block types: against autograd in fp64, rounding straight through; kernels; what is kept."""

import pytest
import torch
from torch import Tensor

from app.domain.methods import BLOCK_SCHEMES, Scheme, SchemeName
from workers.numerics.backends.rounding import block_rounding_operators as operators
from workers.numerics.blocks.search import search_blocks
from workers.numerics.blocks.tuned_blocks import tuned_blocks
from workers.numerics.quantized import BlockWeight
from workers.numerics.tuned_codes import TunedCodes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def start(name: SchemeName, seed: int = 0) -> tuple[Tensor, BlockWeight]:
    weight = torch.randn(6, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return weight, search_blocks(weight, Scheme.named(name))


def tuned(weight: Tensor, made: BlockWeight) -> TunedCodes[operators.BlockGroups]:
    return tuned_blocks({"only": weight}, {"only": made})


def differentiable(place: Tensor, made: BlockWeight) -> Tensor:
    """w_hat of places (out, in), rounding straight through; the slope is the distance to the next level."""
    table = torch.tensor(made.kind.levels, dtype=torch.float64)
    q = place.detach().round()
    inside = (q >= 0) & (q < len(table))
    q = q.clamp(0, len(table) - 1).long()
    slope = table.diff()[q.clamp(max=len(table) - 2)] * inside
    width = made.kind.columns
    factor = made.factor().double().repeat_interleave(width, 1)
    own = made.offset()
    offset = torch.zeros_like(factor) if own is None else own.double().repeat_interleave(width, 1)
    return factor * (table[q] + slope * (place - place.detach())) + offset


@pytest.mark.parametrize("name", sorted(BLOCK_SCHEMES - {SchemeName.IQ3_S}))
def test_steps_equal_signed_descent_by_autograd_in_fp64(name: SchemeName) -> None:
    weight, made = start(name)
    generator = torch.Generator().manual_seed(1)
    inputs, target = (torch.randn(20, n, dtype=torch.float64, generator=generator) for n in (512, 6))
    ours, w_hat = tuned(weight, made), torch.empty_like(weight)
    ours.write(w_hat)
    torch.testing.assert_close(w_hat, made.dequantize(), rtol=1e-6, atol=1e-7)
    place = ours.state.place.view_as(weight).clone().requires_grad_()
    for step in range(5):
        expected = differentiable(place, made)
        torch.testing.assert_close(w_hat, expected.detach(), rtol=1e-9, atol=1e-12)
        loss = ((inputs @ expected.T - target) ** 2).mean()
        by_weight, by_place = torch.autograd.grad(loss, (expected, place))
        rate = 0.3 * (1 - step / 5)
        ours.step(by_weight, torch.tensor(rate, dtype=torch.float64), w_hat)
        with torch.no_grad():
            place.sub_(rate * by_place.sign())
        torch.testing.assert_close(ours.state.place.view_as(place), place.detach(), rtol=1e-12, atol=1e-12)
    ours.keep(torch.tensor(True))
    result = ours.results()["only"]
    torch.testing.assert_close(result.dequantize(), w_hat, rtol=1e-6, atol=1e-7)
    assert not torch.equal(result.weight.codes, made.codes)


def test_points_of_a_lattice_follow_their_places() -> None:
    """The loss of a linear by itself falls, and every result is a point."""
    weight, made = start(SchemeName.IQ3_S)
    weight = weight.float()
    ours, w_hat = tuned(weight, made), torch.empty_like(weight)
    ours.write(w_hat)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    before = float((direction * w_hat).sum())
    for _ in range(8):
        ours.step(direction, torch.tensor(0.1), w_hat)
    assert float((direction * w_hat).sum()) < before - 50
    ours.keep(torch.tensor(True))
    result = ours.results()["only"].weight
    assert torch.equal(result.dequantize().float(), w_hat)


def test_nan_moves_nothing_and_is_counted_and_a_restart_forgets_it() -> None:
    weight, made = start(SchemeName.Q2_K)
    ours = tuned(weight, made)
    gradient = torch.zeros_like(weight)
    gradient[1, 3] = float("nan")
    ours.step(gradient, torch.tensor(0.25), torch.empty_like(weight))
    assert ours.faults() == 1
    assert torch.equal(ours.state.place, ours.state.start)
    ours.step(torch.randn_like(weight), torch.tensor(0.25), torch.empty_like(weight))
    assert not torch.equal(ours.state.place, ours.state.start)
    ours.restart()
    assert ours.faults() == 0
    assert torch.equal(ours.state.place, ours.state.start)


def test_sub_blocks_without_a_factor_do_not_move() -> None:
    weight, _ = start(SchemeName.Q2_K)
    weight[2] = 0
    made = search_blocks(weight, Scheme.named(SchemeName.Q2_K))
    ours, w_hat = tuned(weight, made), torch.empty_like(weight)
    ours.step(torch.randn_like(weight), torch.tensor(0.5), w_hat)
    assert not w_hat[2].any()


@pytest.mark.parametrize("backend", ["kernels", "loops"])
@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_0", "q5_1", "iq4_nl", "iq3_s"])
def test_kernels_give_the_bits_of_the_plain_steps(name: str, backend: str) -> None:
    kernels = pytest.importorskip(f"workers.numerics.backends.rounding.block_rounding_{backend}")
    device = DEVICE if backend == "kernels" else "cpu"
    weight = start(SchemeName(name))[0].bfloat16().to(device)
    made, yes = search_blocks(weight, Scheme.named(SchemeName(name))), torch.tensor(True, device=device)
    runs = []
    for module in (operators, kernels):
        of, seen, w_hat = tuned(weight, made), list[Tensor](), torch.empty_like(weight)
        of._kernels = module
        generator = torch.Generator().manual_seed(5)
        of.write(w_hat)
        for _ in range(3):
            seen.append(w_hat.clone())
            gradient = torch.randn(weight.shape, generator=generator).bfloat16().to(device)
            gradient[0, 1], gradient[2], gradient[3, 5] = float("nan"), 0, float("inf")
            of.step(gradient, torch.tensor(0.4, device=device), w_hat)
        of.keep(~yes)
        assert not of.state.codes.any()
        of.keep(yes)
        assert int(of.faults()) == 3
        runs.append([*seen, w_hat, of.state.codes, of.state.place])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)
    for call in kernels.warm_ups(made.kind, torch.bfloat16, torch.device(device)):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_dtype_take_steps_on_a_processor(dtype: torch.dtype) -> None:
    """Compiled loops know two of them; the others are torch's."""
    weight = start(SchemeName.Q3_K)[0].to(dtype)
    ours, w_hat = tuned(weight, search_blocks(weight, Scheme.named(SchemeName.Q3_K))), torch.empty_like(weight)
    ours.step(torch.randn_like(weight), torch.tensor(0.4), w_hat)
    ours.keep(torch.tensor(True))
    assert torch.equal(ours.results()["only"].dequantize(), w_hat)
