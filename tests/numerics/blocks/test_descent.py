"""Coordinate descent: never worse, no single move left at its end, and the same by brute force on a small block."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from app.domain.methods import BLOCK_SCHEMES, Scheme, SchemeName
from workers.numerics.blocks.descent import descend
from workers.numerics.blocks.levels import point_numbers
from workers.numerics.blocks.search import search_blocks
from workers.numerics.quantized import BlockWeight

every_type = pytest.mark.parametrize("name", sorted(BLOCK_SCHEMES))


def problem(columns: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight, and H of inputs of few common causes, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    causes = torch.randn(400, 24, generator=generator) @ torch.randn(24, columns, generator=generator)
    inputs = (causes + 2 * torch.randn(400, columns, generator=generator)).double()
    return weight, inputs.T @ inputs + torch.eye(columns, dtype=torch.float64)


def errors(weight: Tensor, made: BlockWeight, hessian: Tensor) -> Tensor:
    """(w_hat - w) H (w_hat - w) of each row, with w_hat as it is decoded."""
    off = replace(made, dtype=torch.float64).dequantize() - weight.double()
    return ((off @ hessian) * off).sum(1)


@every_type
def test_no_row_is_worse_after_any_number_of_sweeps(name: SchemeName) -> None:
    weight, hessian = problem(256, 6, 1)
    start = search_blocks(weight, Scheme.named(name), hessian.diagonal())
    found = [errors(weight, descend(weight, start, hessian, sweeps), hessian) for sweeps in (0, 1, 2, 5)]
    assert torch.equal(found[0], errors(weight, start, hessian))
    for before, after in pairwise(found):
        # d and dmin are rounded to fp16 as part of their move.
        assert bool((after <= before * (1 + 1e-6)).all())
    assert found[-1].sum() < 0.85 * found[0].sum()


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "iq4_xs", "q4_1"])
def test_at_the_end_no_other_code_of_one_weight_or_sub_block_is_better(name: str) -> None:
    """By trying every one of them, decoded anew."""
    weight, hessian = problem(256, 2, 2)
    scheme = Scheme.named(SchemeName(name))
    end = descend(weight, search_blocks(weight, scheme, hessian.diagonal()), hessian, 60)
    least = errors(weight, end, hessian)
    tried = [("codes", len(end.kind.levels), column) for column in range(0, 256, 17)]
    if end.kind.scales is not None:
        tried += [("scale_codes", end.kind.scales.largest + 1, j) for j in range(256 // end.kind.columns)]
    if end.kind.minimums is not None:
        tried += [("minimum_codes", end.kind.minimums.largest + 1, j) for j in range(256 // end.kind.columns)]
    for part, count, column in tried:
        for code in range(0, count, 1 if count <= 16 else 7):
            codes = getattr(end, part).clone()
            codes[:, column] = code
            assert bool((errors(weight, replace(end, **{part: codes}), hessian) >= least * (1 - 1e-6)).all())


def test_scales_end_where_least_squares_puts_them() -> None:
    weight, hessian = problem(256, 3, 3)
    end = descend(weight, search_blocks(weight, Scheme.named(SchemeName.Q3_K)), hessian, 60)
    direction = replace(end, dtype=torch.float64).dequantize() / end.scale.double()
    best = ((direction @ hessian) * weight.double()).sum(1) / ((direction @ hessian) * direction).sum(1)
    torch.testing.assert_close(end.scale.double().flatten(), best, rtol=2**-11, atol=0)


@pytest.mark.parametrize("name", ["iq3_s", "q2_k"])
def test_what_is_found_can_be_stored(name: str) -> None:
    weight, hessian = problem(512, 4, 4)
    found = descend(weight, search_blocks(weight, Scheme.named(SchemeName(name))), hessian, 2)
    assert found.codes.dtype == torch.uint8
    assert found.scale.dtype == torch.float16
    assert found.scale_codes is not None
    assert int(found.scale_codes.max()) < 16
    if name == "iq3_s":
        magnitudes = (found.codes.int() * 2 - 15).abs().view(-1, 4)
        cells = ((magnitudes - 1) // 2 * torch.tensor([1, 8, 64, 512])).sum(1)
        assert int(point_numbers(torch.device("cpu"))[cells].min()) >= 0


def test_rows_of_what_is_not_finite_stay_and_others_do_not_see_them() -> None:
    weight, hessian = problem(256, 3, 5)
    broken = weight.clone()
    broken[1, 7] = float("nan")
    scheme = Scheme.named(SchemeName.Q2_K)
    whole, part = (descend(w, search_blocks(w, scheme), hessian, 2) for w in (weight, broken))
    for row in (0, 2):
        assert torch.equal(whole.dequantize()[row], part.dequantize()[row])
    assert bool(part.dequantize()[1].isnan().all())
