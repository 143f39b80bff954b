"""GPTQ's loop on block types: against a plain one in fp64 with the inverse anew for every column."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from app.domain.methods import Scheme, SchemeName
from tests.methods.test_gptq import correlated
from workers.methods.gptq import Elimination
from workers.numerics.blocks.elimination import columns_together, eliminate
from workers.numerics.blocks.levels import lattice, level_table
from workers.numerics.blocks.search import search_blocks
from workers.numerics.blocks.stored_parts import split_rows
from workers.numerics.quantized import BlockWeight

NAMES = ["q2_k", "q3_k", "q4_0", "q4_1", "iq4_xs"]


def scheme_of(name: str) -> Scheme:
    return Scheme.named(SchemeName(name))


def per_column(made: BlockWeight) -> tuple[Tensor, Tensor]:
    """Factor and offset of every weight, fp64 (rows, in)."""
    offset = made.offset()
    factor = made.factor().double().repeat_interleave(made.kind.columns, 1)
    return factor, torch.zeros_like(factor) if offset is None else offset.double().repeat_interleave(
        made.kind.columns, 1
    )


def plain(weight: Tensor, hessian: Tensor, grid: BlockWeight, order: list[int]) -> Tensor:
    """W_hat in fp64 on a grid: column after column, the inverse anew from those that are left."""
    w, table = weight.double().clone(), level_table(grid.kind, weight.device).double()
    h = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    factor, offset = per_column(grid)
    w_hat = torch.zeros_like(w)
    for step, j in enumerate(order):
        values = factor[:, j : j + 1] * table + offset[:, j : j + 1]
        w_hat[:, j] = values.gather(1, (w[:, j : j + 1] - values).abs().argmin(1, keepdim=True)).squeeze(1)
        left = order[step:]
        inverse = torch.linalg.inv(h[left][:, left])
        w[:, left] -= ((w[:, j] - w_hat[:, j]) / inverse[0, 0]).unsqueeze(1) * inverse[0]
    return w_hat


def error(weight: Tensor, w_hat: Tensor, hessian: Tensor) -> float:
    off = w_hat.double() - weight.double()
    return float(((off @ hessian) * off).sum())


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_codes_are_those_of_the_plain_loop_on_the_same_grid(name: str, act_order: bool) -> None:
    inputs, scheme = correlated(columns=256), scheme_of(name)
    hessian, weight = 2 * inputs.T @ inputs, torch.randn(5, 256, dtype=torch.float64)
    elimination = Elimination.of(hessian, 0.01, act_order=act_order)
    assert elimination is not None
    moments, order = hessian.diagonal(), elimination.order if act_order else None
    made = eliminate(weight, scheme, elimination.factor, moments, order)
    if act_order:
        expected = search_blocks(weight, scheme, moments)
        assert torch.equal(made.scale, expected.scale)
    w_hat = plain(weight, hessian, made, elimination.order.tolist())
    torch.testing.assert_close(made.dequantize(), w_hat, rtol=1e-6, atol=1e-7)
    nearest = search_blocks(weight, scheme, moments).dequantize()
    assert error(weight, made.dequantize(), hessian) < 0.75 * error(weight, nearest, hessian)


@pytest.mark.parametrize("act_order", [True, False])
def test_points_of_a_lattice_are_rounded_together_and_make_up_for_each_other(act_order: bool) -> None:
    inputs, scheme = correlated(columns=256), scheme_of("iq3_s")
    hessian, weight = (2 * inputs.T @ inputs).float(), torch.randn(6, 256)
    elimination = Elimination.of(hessian, 0.01, act_order=act_order, together=columns_together(scheme))
    assert elimination is not None
    fours = elimination.order.view(-1, 4)
    assert torch.equal(fours, fours[:, :1] + torch.arange(4))
    moments = hessian.diagonal()
    made = eliminate(weight, scheme, elimination.factor, moments, elimination.order if act_order else None)
    points = {tuple(point) for point in lattice(torch.device("cpu")).int().tolist()}
    assert {tuple(four) for four in (made.codes.int() * 2 - 15).abs().view(-1, 4).tolist()} <= points
    nearest = search_blocks(weight, scheme, moments).dequantize()
    assert error(weight, made.dequantize(), hessian.double()) < 0.75 * error(weight, nearest, hessian.double())


def test_without_a_factor_it_is_the_search_and_with_the_identity_too() -> None:
    weight, moments = torch.randn(7, 512), torch.ones(512)
    for name in ("q2_k", "iq3_s"):
        expected = search_blocks(weight, scheme_of(name), moments)
        for factor in (None, torch.eye(512)):
            found = eliminate(weight, scheme_of(name), factor, moments)
            assert (found.dequantize() == expected.dequantize()).float().mean() > 0.999


def test_rows_come_apart_again() -> None:
    made = search_blocks(torch.randn(9, 256), scheme_of("q2_k"))
    parts = split_rows(made, [4, 5])
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), made.dequantize())
    symmetric = split_rows(replace(search_blocks(torch.randn(3, 256), scheme_of("q4_0"))), [1, 2])
    assert all(part.minimum is None and part.scale_codes is None for part in symmetric)
