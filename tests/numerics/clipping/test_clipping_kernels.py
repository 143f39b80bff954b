"""Kernels of clipped groups against torch's operators: on a GPU if there is one, else in Triton's interpreter."""

import math

import pytest
import torch
from torch import Tensor

from app.domain.methods import Scheme
from tests.methods.test_omniquant import by_autograd
from workers.numerics.affine import GroupRange
from workers.numerics.clipping.clipped_groups import ClippedGroups, GroupStart

kernels = pytest.importorskip("workers.numerics.clipping.kernels")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RATE = 0.05
OTHERS = [(3, 5, False), (4, 64, True), (8, 100, False)]
KINDS = [(2, 16, True), (4, 64, False), *(pytest.param(*kind, marks=pytest.mark.slow) for kind in OTHERS)]
every_kind = pytest.mark.parametrize(("bits", "width", "symmetric"), KINDS)


def pair(
    bits: int,
    width: int,
    symmetric: bool,
    *,
    dtype: torch.dtype = torch.float32,
    scale_dtype: torch.dtype = torch.bfloat16,
    offsets: bool = False,
) -> tuple[ClippedGroups, ClippedGroups]:
    """The same groups, by operators and by kernels; one group is 0."""
    torch.manual_seed(bits + width)
    weight = torch.randn(37, width).to(DEVICE, dtype)
    weight[3] = 0
    scheme, start = Scheme(bits=bits, group_size=width, symmetric=symmetric), GroupStart.full(weight)
    if offsets:
        start = GroupStart(start.ranges, torch.rand(37, width, device=DEVICE) - 0.5)
    plain, fused = (ClippedGroups(weight, start, scheme, scale_dtype) for _ in range(2))
    plain._kernels, fused._kernels = None, kernels
    return plain, fused


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("offsets", [False, True])
@every_kind
def test_what_is_written_and_kept_equals_the_operators(
    bits: int, width: int, dtype: torch.dtype, *, symmetric: bool, offsets: bool
) -> None:
    plain, fused = pair(bits, width, symmetric, dtype=dtype, offsets=offsets)
    torch.manual_seed(1)
    logits = torch.randn_like(plain.logits) + 2
    hats = [torch.full_like(plain.weight, math.nan) for _ in range(2)]
    for groups, out in zip((plain, fused), hats, strict=True):
        groups.logits.copy_(logits)
        groups.write(out)
        groups.keep(torch.tensor(True, device=DEVICE))
    assert torch.equal(plain.kept.codes, fused.kept.codes)
    assert torch.equal(plain.kept.scale, fused.kept.scale)
    assert torch.equal(plain.kept.zero_point, fused.kept.zero_point)
    assert torch.equal(*hats)
    codes = fused.kept.codes.clone()
    fused.logits.zero_()
    fused.keep(torch.tensor(False, device=DEVICE))
    assert torch.equal(fused.kept.codes, codes)


@every_kind
def test_steps_are_autograd_s_with_torch_s_adamw_in_fp64(bits: int, width: int, *, symmetric: bool) -> None:
    _, fused = pair(bits, width, symmetric, scale_dtype=torch.float32)
    scheme, weight = Scheme(bits=bits, group_size=-1, symmetric=symmetric), fused.weight.double()
    lower, upper = (row.double().requires_grad_() for row in fused.logits)
    optimizer = torch.optim.AdamW([lower, upper], lr=RATE, weight_decay=0.1, eps=1e-15)
    out = torch.empty_like(fused.weight)
    for _ in range(4):
        d = torch.randn_like(fused.weight)
        optimizer.zero_grad()
        by_autograd(weight, scheme, lower, upper).backward(d.double())
        for side in (lower, upper):
            assert side.grad is not None
            side.grad[3] = 0  # the group of zeros, whose scale is 0 in that formula
        optimizer.step()
        fused.step(d, torch.tensor(RATE, device=DEVICE), 0.1, out)
        expected = torch.stack([lower, upper]).detach()
        off = (fused.logits.double() - expected).abs().amax(0)
        # Next to a middle a weight may fall elsewhere in fp32.
        assert float((off > 1e-4).float().mean()) <= 0.06
    written = torch.empty_like(out)
    fused.write(written)
    assert torch.equal(out, written)
    assert float((fused.logits - 4).abs().max()) > 2 * RATE


@pytest.mark.slow
@every_kind
def test_steps_equal_the_operators(bits: int, width: int, *, symmetric: bool) -> None:
    plain, fused = pair(bits, width, symmetric)
    outs: list[Tensor] = []
    for groups in (plain, fused):
        torch.manual_seed(7)
        out = torch.empty_like(groups.weight)
        for _ in range(6):
            d = 1e-9 * torch.randn(groups.weight.shape).to(DEVICE)
            groups.step(d, torch.tensor(RATE, device=DEVICE), 0.1, out)
        outs.append(out)
    torch.testing.assert_close(fused.logits, plain.logits, rtol=1e-3, atol=1e-4)
    assert float((outs[0] != outs[1]).float().mean()) < 0.02


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's numpy on inf - inf
def test_gradients_that_are_not_finite_move_nothing_and_nan_is_counted() -> None:
    plain, fused = pair(3, 16, symmetric=False)
    d = torch.ones_like(plain.weight)
    d[0, 0], d[5, 1] = math.nan, math.inf
    for groups in (plain, fused):
        groups.step(d, torch.tensor(RATE, device=DEVICE), 0.0, torch.empty_like(d))
    assert int(fused.faults) == int(plain.faults) >= 1
    assert torch.equal(fused.logits[:, 0].cpu(), torch.full((2,), 4.0))
    assert bool(fused.logits.isfinite().all())


def test_warm_ups_compile_what_jobs_launch() -> None:
    from workers.numerics.backends.rounding.rounding_operators import GridSettings

    settings = GridSettings.of(Scheme(bits=4, group_size=16, symmetric=True), torch.bfloat16)
    for call in kernels.warm_ups(16, settings, torch.bfloat16, torch.bfloat16, torch.device(DEVICE)):
        call()


def test_a_range_of_zero_stays_finite() -> None:
    _, fused = pair(4, 16, symmetric=True)
    assert GroupRange.of(fused.weight[3:4]).high == 0
    out = torch.empty_like(fused.weight)
    fused.write(out)
    assert torch.equal(out[3].cpu(), torch.zeros(16))
