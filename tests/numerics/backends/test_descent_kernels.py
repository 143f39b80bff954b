"""Coordinate descent and the search of block types by Triton's kernels, against torch's operators."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from app.domain.methods import Scheme, SchemeName
from tests.numerics.blocks.test_descent import problem
from workers.numerics import backend
from workers.numerics.blocks.descent import descend
from workers.numerics.blocks.search import search_blocks
from workers.numerics.quantized import BlockWeight

descent_kernels = pytest.importorskip("workers.numerics.backends.descent_kernels")
search_kernels = pytest.importorskip("workers.numerics.backends.search_kernels")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators until a test says otherwise, and few programs, at which the interpreter is slow."""
    monkeypatch.setattr(backend, "triton_serves", lambda *_: False)
    monkeypatch.setattr(backend, "loops_know", lambda *_: False)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(search_kernels, "PROGRAM_ELEMENTS", 8192)


def errors(weight: Tensor, made: BlockWeight, hessian: Tensor) -> Tensor:
    off = replace(made, dtype=torch.float64).dequantize() - weight.double()
    return ((off @ hessian.double()) * off).sum(1)


@pytest.mark.parametrize(
    ("name", "columns"), [("q2_k", 256), ("q3_k", 512), ("q4_1", 320), ("iq4_nl", 160), ("iq3_s", 256)]
)
def test_a_sweep_makes_the_moves_of_the_operators(name: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, over panels that are not whole, too; the last bits of a sum may decide one next to a middle."""
    weight, hessian = (tensor.float().to(DEVICE) for tensor in problem(columns, 5, 3))
    weight[2] = 0
    weight[4, 9] = float("nan")
    start = search_blocks(weight, Scheme.named(SchemeName(name)), hessian.diagonal())
    plain = descend(weight, start, hessian, 1)
    monkeypatch.setattr("workers.numerics.blocks.descent.descent_kernels", lambda *_: descent_kernels)
    ours = descend(weight, start, hessian, 1)
    known = [0, 1, 2, 3]
    for part in ("codes", "scale", "scale_codes", "minimum", "minimum_codes"):
        one, other = getattr(ours, part), getattr(plain, part)
        if one is not None:
            assert one.dtype == other.dtype
            assert float((one[known] == other[known]).float().mean()) > 0.98
    before, after, expected = (errors(weight, made, hessian)[known] for made in (start, ours, plain))
    torch.testing.assert_close(after, expected, rtol=5e-3, atol=1e-9)
    assert bool((after <= before * (1 + 1e-6)).all())
    assert after.sum() < 0.6 * before.sum()
    assert torch.equal(ours.codes[4], start.codes[4])


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_0", "q5_1", "iq4_xs", "iq3_s", "q2_0"])
def test_the_search_finds_blocks_as_good_as_the_operators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, generator = Scheme.named(SchemeName(name)), torch.Generator().manual_seed(7)
    assert scheme.blocks is not None
    columns = 2 * scheme.blocks.weights
    weight = torch.randn(16, columns, generator=generator).mul_(torch.rand(columns, generator=generator).exp())
    weight[3], weight[4, : columns // 2 + 5], weight[5, 7] = 0, 2.0, float("nan")
    weight[6] *= 1e-6
    weight[7] *= 1e5
    importance = torch.rand(columns, generator=generator).square()
    importance[::7] = 0
    weight, importance = weight.to(DEVICE), importance.to(DEVICE)
    plain = search_blocks(weight, scheme, importance)
    monkeypatch.setattr("workers.numerics.blocks.search.search_kernels", lambda *_: search_kernels)
    ours = search_blocks(weight, scheme, importance)
    assert torch.equal(ours.scale.isnan(), plain.scale.isnan())
    usual = [row for row in range(16) if row not in (3, 5)]
    found, expected = (
        ((made.dequantize() - weight).square() * importance).sum(1)[usual].double() for made in (ours, plain)
    )
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)
    assert float(found.sum()) == pytest.approx(float(expected.sum()), rel=1e-3)
    assert not ours.dequantize()[3].any()
    assert float((ours.codes == plain.codes).float().mean()) > 0.93


def test_a_search_of_turned_columns_writes_their_grid_and_no_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.numerics.blocks.search.search_kernels", lambda *_: search_kernels)
    weight, scheme = torch.randn(4, 256, device=DEVICE), Scheme.named(SchemeName.Q2_K)
    expected, turned = search_blocks(weight, scheme), weight.T.contiguous().T
    made = replace(expected, codes=torch.full_like(expected.codes, 99))
    factor = torch.empty(16, 4, device=DEVICE)
    offset = torch.empty_like(factor)
    search_kernels.search(made, turned, torch.ones(256, device=DEVICE), factor, offset, codes=False)
    assert bool((made.codes == 99).all())
    own = expected.offset()
    assert own is not None
    assert torch.equal(factor.T, expected.factor())
    assert torch.equal(offset.T, own)


def test_warm_ups_can_be_called() -> None:
    scheme = Scheme.named(SchemeName.Q4_0)
    assert scheme.blocks is not None
    for call in [
        *descent_kernels.warm_ups(32, scheme.blocks, DEVICE),
        *search_kernels.warm_ups(32, scheme, torch.bfloat16, DEVICE),
    ]:
        call()
    assert descent_kernels.warm_ups(48, scheme.blocks, DEVICE) == []
    assert search_kernels.warm_ups(48, scheme, torch.bfloat16, DEVICE) == []
