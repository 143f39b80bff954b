"""H against X^T X in fp64, its factor against the inverse, and the order in which a block's linears are found."""

import pytest
import torch
from torch import Tensor, nn

from tests.methods.toy_block import GatedBlock
from workers.numerics.hessian import DAMPING_STEPS, Hessian, input_groups, inverse_factor, inverse_factors, see_inputs

CPU = torch.device("cpu")


def correlated(tokens: int, columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(5)
    return (torch.randn(tokens, columns, dtype=torch.float64) @ torch.randn(columns, columns, dtype=torch.float64)).to(
        dtype
    )


@pytest.mark.parametrize("width", [24, 8, 1])
def test_sums_in_micro_batches_are_the_product_of_all_tokens(width: int) -> None:
    x = correlated(100, 24)
    hessian = Hessian(24, width, x.dtype, CPU)
    for part in torch.split(x, 7):
        hessian.add(part)
    expected = 2 * x.T @ x
    found = hessian.matrix()
    assert found.shape == (24 // width, width, width)
    for number, block in enumerate(found):
        columns = slice(number * width, (number + 1) * width)
        torch.testing.assert_close(block, expected[columns, columns], rtol=1e-13, atol=1e-10)
        assert torch.equal(block, block.T)


def test_half_precision_inputs_are_summed_in_fp32() -> None:
    x = correlated(4096, 16, torch.bfloat16)
    hessian = Hessian(16, 16, x.dtype, CPU)
    for part in torch.split(x, 512):
        hessian.add(part)
    assert hessian.sum.dtype == torch.float32
    torch.testing.assert_close(hessian.matrix()[0].double(), 2 * x.double().T @ x.double(), rtol=1e-4, atol=1e-2)


def test_a_linear_is_seen_and_the_rest_of_the_pass_is_saved() -> None:
    block = GatedBlock()
    seen: list[Tensor] = []
    later: list[int] = []
    block.down.register_forward_pre_hook(lambda *_: later.append(1))
    hidden = torch.randn(6, 5, 32)
    passes = [lambda part=part: block(part) for part in torch.split(hidden, 2)]
    see_inputs(block.up, passes, seen.append)
    torch.testing.assert_close(torch.cat(seen), block.norm(hidden).flatten(0, 1))
    assert not later
    assert not block.up._forward_pre_hooks


def test_linears_are_grouped_by_the_tensor_that_they_are_given_in_the_order_of_calls() -> None:
    block = GatedBlock()
    by_name = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    shuffled = {name: by_name[name] for name in ("down", "up", "gate")}
    assert input_groups(shuffled, lambda: block(torch.randn(1, 3, 32))) == [("gate", "up"), ("down",)]


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    x = correlated(60, 20)
    hessian = 2 * x.T @ x
    factor, retries = inverse_factor(hessian, 0.01)
    assert factor is not None
    assert retries == 0
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(20, dtype=x.dtype)
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped), rtol=1e-9, atol=1e-12)
    assert torch.equal(factor, factor.triu())


def test_columns_that_no_token_lit_stay_alone() -> None:
    x = correlated(60, 20)
    x[:, [3, 11]] = 0
    factor, _ = inverse_factor(2 * x.T @ x, 0.01)
    assert factor is not None
    assert factor.isfinite().all()
    for column in (3, 11):
        alone = torch.zeros(20, dtype=x.dtype)
        alone[column] = factor[column, column]
        assert torch.equal(factor[column], alone)
        assert torch.equal(factor[:, column], alone)
    nothing, _ = inverse_factor(torch.zeros(4, 4, dtype=x.dtype), 0.01)
    assert nothing is not None
    torch.testing.assert_close(nothing, torch.eye(4, dtype=x.dtype) * 1.01**-0.5)


def test_damping_rises_where_it_is_too_little_and_then_gives_up() -> None:
    hessian = torch.eye(6, dtype=torch.float64)
    hessian[0, 1] = hessian[1, 0] = 1.05
    assert inverse_factor(hessian, 0.01)[1] == 1
    assert inverse_factor(hessian, 0.2)[1] == 0
    hessian[0, 1] = hessian[1, 0] = 9
    assert inverse_factor(hessian, 0.01) == (None, len(DAMPING_STEPS))
    hessian[0, 1] = hessian[1, 0] = torch.nan
    assert inverse_factor(hessian, 0.01)[0] is None


@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_damping_is_a_share_of_the_mean_over_lit_columns(damping: float) -> None:
    """Dead columns are no part of that mean, and get it as their diagonal."""
    x = correlated(60, 20)
    x[:, 5:15] = 0
    hessian = 2 * x.T @ x
    lit = [j for j in range(20) if not 5 <= j < 15]
    mean = hessian.diagonal()[lit].mean()
    factor, _ = inverse_factor(hessian, damping)
    assert factor is not None
    damped = hessian + damping * mean * torch.eye(20, dtype=x.dtype)
    damped.diagonal()[5:15] = (1 + damping) * mean
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped), rtol=1e-9, atol=1e-12)


def test_factors_of_several_are_those_of_each() -> None:
    """One of them after its damping rose, one not at all: each as if alone."""
    sound, bad = (2 * x.T @ x for x in (correlated(60, 6), correlated(60, 6)))
    shifted = bad - 1.05 * torch.linalg.eigvalsh(bad)[0] * torch.eye(6, dtype=bad.dtype)
    hopeless = torch.full_like(bad, torch.nan)
    together = inverse_factors([sound, shifted, hopeless, sound], 1e-6)
    alone = [inverse_factor(hessian, 1e-6) for hessian in (sound, shifted, hopeless, sound)]
    assert [retries for _, retries in together] == [retries for _, retries in alone]
    assert together[2] == (None, len(DAMPING_STEPS))
    for (ours, _), (theirs, _) in zip(together, alone, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)  # type: ignore[arg-type]
    assert inverse_factors([], 0.01) == []


def test_damping_rises_tenfold_and_then_a_hundredfold() -> None:
    for above, retries in ((1.005, 0), (1.05, 1), (1.5, 2)):
        hessian = torch.eye(6, dtype=torch.float64)
        hessian[0, 1] = hessian[1, 0] = above
        factor, found = inverse_factor(hessian, 0.01)
        assert found == retries
        assert factor is not None
        damped = hessian + 0.01 * (1, 10, 100)[retries] * torch.eye(6, dtype=torch.float64)
        torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped), rtol=1e-9, atol=1e-9)
    hessian[0, 1] = hessian[1, 0] = 2.1
    assert inverse_factor(hessian, 0.01) == (None, 3)
    hessian[0, 1] = hessian[1, 0] = torch.inf
    assert inverse_factor(hessian, 0.01) == (None, 3)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_diagonal_that_overflowed_has_no_factor(value: float) -> None:
    """One column of huge inputs: its products with the others may be finite, and the factor would be 0."""
    hessian = torch.eye(6)
    hessian[2, 2] = value
    assert inverse_factor(hessian, 0.01) == (None, 3)


def test_a_single_column_that_overflowed_has_no_factor() -> None:
    """Its square root is infinite, and no factorization fails."""
    assert inverse_factor(torch.tensor([[torch.inf]]), 0.01) == (None, 3)
