"""Linears of passes in fp32 products: the numbers, roundings and hooks of the linears themselves."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from workers.engine.device import quick_products as module
from workers.engine.device.quick_products import quick_products


@pytest.fixture(autouse=True)
def _fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit products are the slower ones, whatever processor runs the tests."""
    monkeypatch.setattr(module, "product_dtype", lambda _, dtype: torch.float32 if dtype.itemsize == 2 else dtype)


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32])
def pair(request: pytest.FixtureRequest) -> Iterator["Pair"]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield Pair().to(request.param)


class Pair(nn.Module):
    """Two linears, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(40, 24), nn.Linear(24, 56, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).tanh())
        return y

    @property
    def dtype(self) -> torch.dtype:
        return self.first.weight.dtype


def correct(linear: nn.Linear, x: Tensor) -> Tensor:
    """In fp64, rounded once."""
    bias = None if linear.bias is None else linear.bias.double()
    return nn.functional.linear(x.double(), linear.weight.double(), bias)


@pytest.mark.parametrize("at_once", [1, 24 * 5, 1 << 20])
def test_outputs_are_those_of_the_product_rounded_once(
    pair: Pair, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WIDENED_ELEMENTS", at_once)
    dtype = pair.dtype
    x = torch.randn(3, 7, 40).to(dtype)
    with quick_products(pair):
        found = [pair.first(x), pair.second(x[..., :24].contiguous())]
    for linear, y, given in zip((pair.first, pair.second), found, (x, x[..., :24]), strict=True):
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), correct(linear, given), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_inputs_that_change_in_place_are_read_again(pair: Pair) -> None:
    x = torch.randn(2, 40).to(pair.dtype)
    with quick_products(pair):
        pair.first(x)
        x.zero_()
        torch.testing.assert_close(pair.first(x), pair.first.bias.expand(2, -1))


def test_a_weight_that_is_replaced_meanwhile_counts(pair: Pair) -> None:
    x = torch.randn(2, 40).to(pair.dtype)
    with quick_products(pair):
        pair.first(x)
        pair.first.weight = nn.Parameter(torch.zeros_like(pair.first.weight), requires_grad=False)
        torch.testing.assert_close(pair.first(x), pair.first.bias.expand(2, -1))


def test_hooks_see_the_linears_own_inputs_and_nothing_stays(pair: Pair) -> None:
    seen: list[Tensor] = []
    pair.second.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x, dtype = torch.randn(2, 40), pair.dtype
    failing = nn.Sequential(pair, nn.Unflatten(1, (57,)))
    with pytest.raises(RuntimeError, match="unflatten"), quick_products(failing):
        failing(x.to(dtype))
    assert [(inputs.dtype, inputs.shape) for inputs in seen] == [(dtype, (2, 24))]
    assert all("forward" not in vars(linear) for linear in (pair.first, pair.second))


def test_gradients_are_those_of_the_linears() -> None:
    linear, x = nn.Linear(8, 4).bfloat16(), torch.randn(3, 8, dtype=torch.bfloat16)
    with quick_products(linear):
        linear(x).float().square().sum().backward()
    assert linear.weight.grad is not None
    own = linear.weight.grad.clone()
    linear.zero_grad()
    linear(x).float().square().sum().backward()
    torch.testing.assert_close(own, linear.weight.grad)
