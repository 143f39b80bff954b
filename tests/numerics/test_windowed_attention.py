"""Attention within a window: any dtype and device gives what a mask gives."""

import pytest
import torch

from workers.numerics.causal_attention import Band
from workers.numerics.windowed_attention import attend_within

LENGTH, HEADS, KEYS, WIDTH = 150, 4, 2, 32


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, scaling: float) -> torch.Tensor:
    """softmax(scaling q k^T) v over the window, head by head."""
    place = torch.arange(query.shape[1], device=query.device)
    seen = (place[None] <= place[:, None]) & (place[None] > place[:, None] - window)
    heads = []
    for head in range(query.shape[2]):
        keys, values = (x[:, :, head * x.shape[2] // query.shape[2]] for x in (key, value))
        scores = (scaling * query[:, :, head] @ keys.mT).masked_fill(~seen, -torch.inf)
        heads.append(scores.softmax(-1) @ values)
    return torch.stack(heads, 2).flatten(2)


def held(dtype: torch.dtype, device: str, window: int, tolerance: float) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(2, LENGTH, heads, WIDTH) for heads in (HEADS, KEYS, KEYS)]
    given = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    results = []
    for exact in (True, False):
        q, k, v = ((x.double() if exact else x.clone()).requires_grad_() for x in given)
        y = plain(q, k, v, window, 0.3) if exact else attend_within(q, k, v, Band(window), 0.3)
        (y * torch.linspace(-1, 1, y.numel(), device=device, dtype=y.dtype).view_as(y)).sum().backward()
        results.append([y.detach(), q.grad, k.grad, v.grad])
    for expected, found in zip(*results, strict=True):
        assert expected is not None
        assert found is not None
        assert (found.double() - expected).norm() < tolerance * expected.norm() + 1e-4
    return [tensor for tensor in results[1] if tensor is not None]


@pytest.mark.parametrize("window", [1, 17, LENGTH - 1, LENGTH, 4 * LENGTH])
def test_a_window_is_the_formula(window: int) -> None:
    held(torch.float32, "cpu", window, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [1, 17, 64, LENGTH])
def test_a_window_is_the_formula_on_a_gpu(dtype: torch.dtype, window: int) -> None:
    first, again = (held(dtype, "cuda", window, 2e-2) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
