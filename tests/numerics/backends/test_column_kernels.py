"""Columns in turn by Triton's kernels: the codes of torch's operators, and those of explicit inverses in fp64."""

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from app.domain.methods import Scheme, SchemeName
from tests.methods.test_gptq import COLUMNS, by_explicit_inverses, correlated
from workers.methods.gptq import Elimination, quantize_floats, quantize_weight, quantize_weights
from workers.numerics import backend
from workers.numerics.backends import column_operators
from workers.numerics.blocks.elimination import columns_together, eliminate
from workers.numerics.quantized import QuantizedWeight

kernels = pytest.importorskip("workers.numerics.backends.column_kernels")

T = TypeVar("T")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTEGERS = [
    (Scheme(bits=4, group_size=16, symmetric=True), False),
    (Scheme(bits=3, group_size=48, symmetric=False), False),
    (Scheme(bits=4, group_size=36, symmetric=True), True),
    (Scheme(bits=2, group_size=-1, symmetric=False), False),
]


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for columns, and nothing else, on any device."""
    monkeypatch.setattr(backend, "triton_serves", lambda *_: False)
    for module in ("workers.methods.gptq", "workers.numerics.blocks.elimination"):
        monkeypatch.setattr(f"{module}.column_kernels", lambda *_: kernels)


def problem(columns: int, rows: int = 16) -> tuple[Tensor, Tensor]:
    """A weight and H of correlated inputs, fp64."""
    inputs = correlated(columns=columns)
    weight = torch.randn(rows, columns, dtype=torch.float64)
    return weight.to(DEVICE), (2 * inputs.T @ inputs).to(DEVICE)


def eliminated(hessian: Tensor, act_order: bool, together: int = 1) -> Elimination:
    made = Elimination.of(hessian.float(), 0.01, act_order=act_order, together=together)
    assert made is not None
    return made


def error(weight: Tensor, made: QuantizedWeight, hessian: Tensor) -> float:
    off = made.dequantize().double() - weight
    return float(((off @ hessian) * off).sum())


def alike(one: Tensor, other: Tensor) -> float:
    return float((one == other).float().mean())


@pytest.mark.parametrize(("scheme", "act_order"), INTEGERS, ids=str)
@pytest.mark.usefixtures("by_kernels")
def test_integers_are_those_of_explicit_inverses(scheme: Scheme, act_order: bool) -> None:
    """In fp32 against fp64: a number next to a middle may fall to the other side."""
    weight, hessian = problem(COLUMNS)
    found = quantize_weight(weight.float(), eliminated(hessian, act_order), scheme, torch.float32)
    codes, w_hat = by_explicit_inverses(weight, hessian, scheme, act_order=act_order)
    assert alike(found.codes, codes.to(torch.uint8)) > 0.995
    off = w_hat - weight
    assert error(weight, found, hessian) == pytest.approx(float(((off @ hessian) * off).sum()), rel=1e-2)


@pytest.mark.parametrize(
    ("scheme", "act_order"),
    [INTEGERS[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in INTEGERS[1:])],
    ids=str,
)
@pytest.mark.usefixtures("by_kernels")
def test_weights_side_by_side_get_the_codes_of_each_alone(scheme: Scheme, act_order: bool) -> None:
    """As experts of one shape are rounded: each behind a factor, and in an order, of its own."""
    columns = 32 if scheme.group_size == 16 else COLUMNS
    weights, made = [], []
    for number in range(2):
        torch.manual_seed(number)
        inputs = torch.randn(300, columns, device=DEVICE) * torch.rand(columns, device=DEVICE).exp()
        inputs += torch.randn(300, 1, device=DEVICE)
        weights.append(torch.randn(16, columns, device=DEVICE))
        made.append(eliminated((2 * inputs.T @ inputs).double(), act_order))
    assert kernels.lie_side_by_side(32)
    assert not kernels.lie_side_by_side(24)
    together = quantize_weights(weights, made, scheme, torch.bfloat16)
    for weight, elimination, found in zip(weights, made, together, strict=True):
        alone = quantize_weight(weight, elimination, scheme, torch.bfloat16)
        assert alike(found.codes, alone.codes) > 0.999
        assert alike(found.scale, alone.scale) > 0.999
    assert alike(together[0].codes, together[1].codes) < 0.9


@pytest.mark.parametrize(("scheme", "act_order"), INTEGERS, ids=str)
def test_integers_and_grids_are_those_of_the_operators(
    scheme: Scheme, act_order: bool, request: pytest.FixtureRequest
) -> None:
    weight, hessian = problem(COLUMNS)
    weight[2] = 0
    made = eliminated(hessian, act_order)
    plain = _plainly(lambda: quantize_weight(weight.float(), made, scheme, torch.bfloat16))
    request.getfixturevalue("by_kernels")
    ours = quantize_weight(weight.float(), made, scheme, torch.bfloat16)
    assert alike(ours.codes, plain.codes) > 0.998
    assert alike(ours.scale, plain.scale) > 0.99
    assert error(weight, ours, hessian) == pytest.approx(error(weight, plain, hessian), rel=1e-3)


@pytest.mark.parametrize(("name", "act_order"), [("nvfp4a16", False), ("mxfp8a16", True)])
def test_floats_are_those_of_the_operators(name: str, act_order: bool, request: pytest.FixtureRequest) -> None:
    weight, hessian = problem(160)
    made, scheme = eliminated(hessian, act_order), Scheme.named(SchemeName(name))
    given = ([weight.float()], made, scheme, torch.float32, hessian.diagonal().float(), [None])
    (plain,) = _plainly(lambda: quantize_floats(*given))
    request.getfixturevalue("by_kernels")
    (ours,) = quantize_floats(*given)
    assert alike(ours.dequantize(), plain.dequantize()) > 0.998
    assert error(weight, ours, hessian) == pytest.approx(error(weight, plain, hessian), rel=1e-3)


@pytest.mark.parametrize(("name", "act_order"), [("q3_k", False), ("q4_1", False), ("iq4_xs", True), ("iq3_s", True)])
def test_levels_are_those_of_the_operators(name: str, act_order: bool, request: pytest.FixtureRequest) -> None:
    weight, hessian = problem(256)
    weight[2] = 0
    scheme = Scheme.named(SchemeName(name))
    made = eliminated(hessian, act_order, columns_together(scheme))
    moments, order = hessian.diagonal().float(), made.order if act_order else None
    given = (weight.float(), scheme, made.factor, moments, order)
    plain = _plainly(lambda: eliminate(*given))
    request.getfixturevalue("by_kernels")
    ours = eliminate(*given)
    # A scale of fp16 that falls to the other side of a middle changes what follows in its row.
    assert alike(ours.codes, plain.codes) > 0.97
    near = 1e-3 if act_order else 3e-2
    assert error(weight, ours, hessian) == pytest.approx(error(weight, plain, hessian), rel=near)


@pytest.mark.usefixtures("by_kernels")
def test_what_is_not_a_number_stays_in_its_row() -> None:
    weight, hessian = problem(COLUMNS, rows=5)
    made, scheme = eliminated(hessian, act_order=False), Scheme(bits=4, group_size=48, symmetric=False)
    broken = weight.float().clone()
    broken[1, 7] = float("nan")
    whole, part = (quantize_weight(w, made, scheme, torch.float32) for w in (weight.float(), broken))
    rows = [0, 2, 3, 4]
    assert torch.equal(whole.dequantize()[rows], part.dequantize()[rows])
    assert bool(part.dequantize()[1, :48].isnan().all())


@pytest.mark.parametrize("scheme", ["integers", "q4_1", "mxfp4a16"])
def test_warm_ups_can_be_called(scheme: str) -> None:
    named = Scheme(bits=4, group_size=16, symmetric=False) if scheme == "integers" else Scheme.named(SchemeName(scheme))
    calls = kernels.warm_ups(64, named, torch.bfloat16, DEVICE)
    assert calls
    for call in calls:
        call()
    assert kernels.warm_ups(65, named, torch.bfloat16, DEVICE) == []


def _plainly(call: Callable[[], T]) -> T:
    """A result of torch's operators, on a GPU, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "triton_serves", lambda *_: False)
        assert backend.column_kernels(DEVICE, torch.float32) is column_operators
        return call()
