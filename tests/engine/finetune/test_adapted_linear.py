"""The linear beside which an adapter is trained, against autograd through the dense weight in fp64."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from app.domain.methods import Scheme
from tests.engine.finetune.small_lora import SmallLoRA
from workers.engine.finetune.adapted_linear import AdaptedLinear, rebuilt
from workers.numerics.quantized import AffineWeight, CodebookWeight, QuantizedWeight

OUT, IN, GROUP = 12, 32, 16


def affine(*, offset: bool) -> AffineWeight:
    generator = torch.Generator().manual_seed(0)
    scheme = Scheme(bits=3, group_size=GROUP, symmetric=False)
    codes = torch.randint(0, 8, (OUT, IN), generator=generator).to(torch.uint8)
    scale = torch.rand(OUT, IN // GROUP, generator=generator) + 0.1
    if offset:
        return AffineWeight(codes, scale, None, scheme, torch.float64, -4 * scale + 0.01)
    zero = torch.randint(0, 8, scale.shape, generator=generator).to(torch.uint8)
    return AffineWeight(codes, scale, zero, scheme, torch.float64)


def codebook() -> CodebookWeight:
    codes = affine(offset=False).codes
    scheme = Scheme(bits=3, group_size=GROUP, symmetric=True)
    absmax = torch.rand(OUT, IN // GROUP, generator=torch.Generator().manual_seed(1)) + 0.1
    return CodebookWeight(codes, torch.linspace(-1, 1, 8), absmax, scheme, torch.float64)


WEIGHTS: list[QuantizedWeight] = [affine(offset=False), affine(offset=True), codebook()]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("weight", WEIGHTS, ids=["zero point", "offset", "codebook"])
def test_output_and_gradients_are_those_of_the_dense_weight(weight: QuantizedWeight, kept: bool) -> None:
    torch.manual_seed(0)
    dense = weight.dequantize()
    bias = nn.Parameter(torch.randn(OUT, dtype=torch.float64), requires_grad=False)
    adapter = SmallLoRA(IN, OUT, rank=4, dtype=torch.float64, zero=False)
    linear = AdaptedLinear(dense if kept else rebuilt(weight, torch.float64), bias, adapter)
    x = torch.randn(3, 5, IN, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(3, 5, OUT, dtype=torch.float64)

    def gradients(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((y * direction).sum(), [x, adapter.a, adapter.b])

    y = linear(x)
    expected = x @ (dense + adapter.b @ adapter.a).T + bias
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(gradients(y), gradients(expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_no_gradient_of_the_weight_is_made_and_no_weight_is_kept() -> None:
    made = []
    weight = WEIGHTS[0]

    def make() -> Tensor:
        made.append(weight.dequantize())
        return made[-1]

    saved: list[Tensor] = []
    linear = AdaptedLinear(make, None, None)
    x = torch.randn(2, IN, dtype=torch.float64, requires_grad=True)

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        y = linear(x)
    assert saved == []
    y.sum().backward()
    assert len(made) == 2
    assert all(not w.requires_grad and w.grad is None for w in made)
    assert not list(linear.parameters())


@pytest.mark.parametrize(("saves", "times"), [(False, 3), (True, 2)])
def test_where_a_block_is_computed_again_its_weights_are_made_twice_and_nothing_else_changes(
    saves: bool, times: int
) -> None:
    made, alive = list[int](), list[int]()
    weight = WEIGHTS[0].dequantize()

    def make() -> Tensor:
        made.append(1)
        fresh = weight.clone()
        weakref.finalize(fresh, alive.append, 1)
        return fresh

    x = torch.randn(2, IN, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(1))
    linear = AdaptedLinear(make, None, None, saves=saves)
    block = nn.Sequential(linear, nn.Tanh())
    y = checkpoint(block, x, use_reentrant=False)
    assert len(alive) == 1, "what the first pass saved is dropped"
    y.square().sum().backward()
    assert len(made) == times
    assert len(alive) == times, "nothing is held after the backward pass"
    (expected,) = torch.autograd.grad((x @ weight.T).tanh().square().sum(), x)
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=0)


def test_a_linear_without_anything_trained_before_it_makes_its_weight_once() -> None:
    made = []

    def make() -> Tensor:
        made.append(1)
        return WEIGHTS[0].dequantize().float()

    linear = AdaptedLinear(make, None, SmallLoRA(IN, OUT, rank=2, zero=False))
    linear(torch.randn(2, IN)).sum().backward()
    assert len(made) == 1


def test_the_compute_dtype_is_that_of_the_inputs_and_adapters_stay_fp32() -> None:
    weight = replace(affine(offset=False), dtype=torch.bfloat16)
    adapter = SmallLoRA(IN, OUT, rank=4, zero=False)
    x = torch.randn(2, IN, dtype=torch.bfloat16, requires_grad=True)
    y = AdaptedLinear(rebuilt(weight, torch.bfloat16), None, adapter)(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert adapter.a.grad is not None
    assert adapter.a.grad.dtype == torch.float32
