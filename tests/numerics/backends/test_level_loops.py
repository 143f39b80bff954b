"""Coordinate descent and the fits of sub-blocks by compiled loops, against torch's operators and fp64."""

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from app.domain.methods import BLOCK_SCHEMES, Scheme, SchemeName
from app.domain.methods.block_types import ODD_LEVELS, BlockType
from tests.numerics.backends.test_descent_kernels import errors
from tests.numerics.blocks.test_descent import problem
from workers.numerics import backend
from workers.numerics.blocks.descent import descend
from workers.numerics.blocks.levels import codes_of, level_table
from workers.numerics.blocks.search import search_blocks
from workers.numerics.blocks.sub_blocks import Fit, fit_sub_blocks
from workers.numerics.quantized import BlockWeight

T = TypeVar("T")
TYPES = sorted(name for name in BLOCK_SCHEMES if (kind := Scheme.named(name).blocks) and kind.levels != ODD_LEVELS)
every_type = pytest.mark.parametrize("name", TYPES)


def kind_of(name: SchemeName) -> BlockType:
    kind = Scheme.named(name).blocks
    assert kind is not None
    return kind


def both(make: Callable[[], T], monkeypatch: pytest.MonkeyPatch) -> tuple[T, T]:
    """What loops make, and what operators make."""
    ours = make()
    monkeypatch.setattr(backend, "loops_know", lambda *_: False)
    return ours, make()


@every_type
def test_a_sweep_makes_the_moves_of_the_operators(name: SchemeName, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, in batches that are not whole, too; the last bits of a sum may decide one next to a middle."""
    weight, hessian = (tensor.float() for tensor in problem(max(192, kind_of(name).weights), 5, 3))
    weight[2], weight[4, 9] = 0, float("nan")
    start = search_blocks(weight, Scheme.named(name), hessian.diagonal())

    def swept() -> BlockWeight:
        return descend(weight, start, hessian, 1)

    ours, plain = both(swept, monkeypatch)
    known = [0, 1, 2, 3]
    assert float((ours.codes == plain.codes)[known].float().mean()) > 0.98
    before, after, expected = (errors(weight, made, hessian)[known] for made in (start, ours, plain))
    torch.testing.assert_close(after, expected, rtol=5e-3, atol=1e-9)
    assert bool((after <= before * (1 + 1e-6)).all())
    assert torch.equal(ours.codes[4], start.codes[4])


@every_type
def test_fits_leave_the_errors_of_the_operators(name: SchemeName, monkeypatch: pytest.MonkeyPatch) -> None:
    """And those that they say, by fp64; a sub-block of zeros, of one number and of no importance among them."""
    kind, generator = kind_of(name), torch.Generator().manual_seed(4)
    numbers = torch.randn(7, 40, kind.columns, generator=generator)
    weights = torch.rand(7, 40, kind.columns, generator=generator)
    numbers[0, 0], numbers[1, 1], weights[2, 2], weights[3, 3, ::2] = 0, 1.5, 0, 0
    ours, plain = both(lambda: fit_sub_blocks(numbers, weights, kind), monkeypatch)
    assert ours.factor.shape == ours.offset.shape == ours.error.shape == numbers.shape[:-1]
    scale = (weights * numbers.square()).sum(-1)
    torch.testing.assert_close(ours.error, plain.error, rtol=1e-3, atol=1e-5 * float(scale.max()))
    assert float(((ours.factor - plain.factor).abs() < 1e-4 * plain.factor.abs() + 1e-6).float().mean()) > 0.9
    left = least_errors(numbers, weights, ours, kind)
    assert bool((left <= ours.error * (1 + 1e-4) + 1e-5 * scale).all())


def least_errors(numbers: Tensor, weights: Tensor, fit: Fit, kind: BlockType) -> Tensor:
    """Of the best level of each number with these factors and offsets, by trying all of them."""
    levels = level_table(kind, numbers.device).double()
    made = fit.factor.double()[..., None, None] * levels + fit.offset.double()[..., None, None]
    nearest = (made - numbers.double().unsqueeze(-1)).square().amin(-1)
    return (nearest * weights.double()).sum(-1).float()


@pytest.mark.parametrize("name", sorted(BLOCK_SCHEMES))
def test_codes_of_levels_are_their_places(name: SchemeName) -> None:
    kind = kind_of(name)
    levels = level_table(kind, torch.device("cpu"))
    assert torch.equal(codes_of(levels, kind), torch.arange(len(levels), dtype=torch.uint8))
