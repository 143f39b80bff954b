"""LoftQ: its half-steps against what they minimize, peft's own initialization, and the strength of the correction."""

import itertools
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from app.domain.methods import Form, LoftQSpec, Scheme
from tests.methods.toy_block import toy_task
from workers.methods.loftq import Iterate, LoftQ, Quantize, iterates, quantizer
from workers.methods.rtn import quantize_weight
from workers.numerics.normal_float import quantize
from workers.numerics.quantized import AffineWeight, CodebookWeight, QuantizedAbsmax

GOLDEN = Path(__file__).parents[1] / "golden" / "loftq_peft.safetensors"
F32 = torch.float32


def scheme(bits: int, group_size: int = 16, *, symmetric: bool = True) -> Scheme:
    return Scheme(bits=bits, group_size=group_size, symmetric=symmetric)


def weight() -> Tensor:
    scales = torch.linspace(0.3, 3, 24).unsqueeze(1)
    return torch.randn(24, 64, generator=torch.Generator().manual_seed(2)) * scales


def alone(w: Tensor, quantize_: Quantize, rank: int, count: int) -> list[Iterate]:
    """Iterates of a batch of one."""
    return [only for (only,) in iterates(w[None], quantize_, rank, count, seed=0)]


CASES = [
    (LoftQSpec(bits=bits, base=base, double_quantization=double), symmetric)
    for bits, (base, double, symmetric) in itertools.product(
        (2, 3, 4),
        (
            ("normal-float", False, True),
            ("normal-float", True, True),
            ("affine", False, True),
            ("affine", False, False),
        ),
    )
]


@pytest.mark.parametrize(("spec", "symmetric"), CASES, ids=lambda c: c if isinstance(c, bool) else f"{c.base}{c.bits}")
def test_the_second_half_step_never_raises_the_error_of_its_quantized_weight(
    spec: LoftQSpec, *, symmetric: bool
) -> None:
    assert isinstance(spec.bits, int)
    w, to = weight().double(), scheme(spec.bits, symmetric=symmetric)
    found = alone(w, quantizer(spec, [to], F32, torch.float64), 4, 6)
    for now in found:
        assert now.error <= now.before
        q = now.quantized.dequantize()
        assert now.error == pytest.approx(float((w - q - now.left @ now.right).norm()), rel=1e-12)
        s = torch.linalg.svdvals(w - q)
        assert now.error == pytest.approx(float(s[4:].norm()), rel=1e-9), "the optimum of rank 4"
    for last, now in itertools.pairwise(found):
        q = now.quantized.dequantize()
        assert now.before == pytest.approx(float((w - last.left @ last.right - q).norm()), rel=1e-12)


def test_the_result_is_the_best_iterate() -> None:
    """Of this weight with two bits a later iterate is worse than one before it, so that the last would not do."""
    task = toy_task({"up": scheme(2), "down": scheme(2)})
    spec = LoftQSpec(bits=2, rank=4, iterations=12)
    result = LoftQ().quantize_block(task, spec)
    worse = 0
    for name, linear in result.linears.items():
        w = task.linear(name).weight.detach()
        found = alone(w, quantizer(spec, [scheme(2)], F32, F32), 4, 12)
        assert linear.low_rank is not None
        error = float((w - linear.weight.dequantize() - linear.low_rank.product()).norm())
        assert error == pytest.approx(min(iterate.error for iterate in found), rel=1e-5)
        worse += found[-1].error > 1.0001 * error
    assert worse


@pytest.mark.parametrize("spec", [LoftQSpec(), LoftQSpec(base="affine")], ids=lambda spec: spec.base)
@pytest.mark.parametrize("widths", [(2, 3, 4), (3, 3, 3)])
def test_linears_of_one_shape_in_a_batch_end_as_each_alone(spec: LoftQSpec, widths: tuple[int, ...]) -> None:
    """With a scheme each, or all of one, whose affine grids are rounded to at once.

    Sides are longer than those whose decomposition is exact, so that directions are followed.
    """
    w = (
        torch.randn(3, 300, 384, generator=torch.Generator().manual_seed(6))
        * torch.tensor([1.0, 30, 0.1])[:, None, None]
    )
    schemes = [scheme(bits, 64, symmetric=spec.base != "affine") for bits in widths]
    together = list(iterates(w, quantizer(spec, schemes, F32, F32), 16, 3, seed=5))
    for place, own in enumerate(schemes):
        singles = iterates(w[place, None], quantizer(spec, [own], F32, F32), 16, 3, seed=5)
        for batch, (single,) in zip(together, singles, strict=True):
            assert batch[place].error == pytest.approx(single.error, rel=1e-4)
            product = batch[place].quantized.dequantize() + batch[place].left @ batch[place].right
            assert float((w[place] - product).norm()) == pytest.approx(batch[place].error, rel=1e-4)


@pytest.mark.parametrize("bits", [2, 4])
def test_factors_that_are_followed_are_nearly_the_best_of_every_iterate(bits: int) -> None:
    """Against the singular values in fp64 of what each iterate's own quantized weight leaves."""
    w = torch.randn(288, 320, generator=torch.Generator().manual_seed(4)) @ torch.diag(torch.linspace(0.2, 2, 320))
    for iterate in alone(w, quantizer(LoftQSpec(), [scheme(bits, 64)], F32, F32), 24, 5):
        left = torch.linalg.svdvals((w - iterate.quantized.dequantize()).double())[24:].norm()
        assert iterate.error <= float(left) * (1 + 1e-4)


@pytest.mark.parametrize("iterations", [1, 3])
def test_it_equals_the_initialization_of_peft(iterations: int) -> None:
    """Their block is 64 consecutive numbers, here a row; both are fp32, so that singular vectors differ in last bits.

    Q must be equal but for the products' own rounding, B A to what an SVD in fp32 leaves: some 1e-6 of its norm.
    """
    golden = load_file(GOLDEN)
    w, q, product = golden["weight"], golden[f"q{iterations}"], golden[f"b{iterations}"] @ golden[f"a{iterations}"]
    last = alone(w, quantizer(LoftQSpec(), [scheme(4, 64)], F32, F32), 4, iterations)[-1]
    assert (last.quantized.dequantize() - q).abs().max() < 1e-6 * q.abs().max()
    assert (last.left @ last.right - product).norm() < 1e-5 * product.norm()
    for ours, theirs in ((last.right, golden[f"a{iterations}"]), (last.left.T, golden[f"b{iterations}"].T)):
        signs = (ours * theirs).sum(1, keepdim=True).sign()
        assert torch.allclose(ours * signs, theirs, atol=1e-4)


@pytest.mark.parametrize("alpha", [1.0, 16.0, 64.0])
def test_the_correction_acts_at_full_strength_whatever_alpha(alpha: float) -> None:
    task = toy_task({"up": scheme(3)})
    full, other = (LoftQ().quantize_block(task, LoftQSpec(bits=3, rank=4, alpha=a)) for a in (4.0, alpha))
    a, b = full.linears["up"].low_rank, other.linears["up"].low_rank
    assert a is not None
    assert b is not None
    assert b.alpha == alpha
    assert torch.allclose(a.product(), b.product(), atol=1e-6)
    assert torch.allclose(a.b @ a.a, a.product()), "alpha = rank: what is stored is what acts"


@pytest.mark.parametrize("base", ["normal-float", "affine"])
def test_its_weights_are_nearer_than_those_of_its_base_alone(base: str) -> None:
    task = toy_task({"up": scheme(3), "down": scheme(3)})
    result = LoftQ().quantize_block(task, LoftQSpec.model_validate({"bits": 3, "rank": 4, "base": base}))
    for name, linear in result.linears.items():
        w = task.linear(name).weight.detach()
        alone = quantize(w, scheme(3), F32, F32) if base == "normal-float" else quantize_weight(w, scheme(3), F32)
        assert (linear.dequantize() - w).norm() < 0.85 * (alone.dequantize() - w).norm()
        assert isinstance(linear.weight, CodebookWeight if base == "normal-float" else AffineWeight)


def test_double_quantization_is_in_the_result() -> None:
    spec = LoftQSpec(bits=3, rank=4, double_quantization=True)
    linear = LoftQ().quantize_block(toy_task({"up": scheme(3)}), spec).linears["up"]
    assert isinstance(linear.weight, CodebookWeight)
    assert isinstance(linear.weight.absmax, QuantizedAbsmax)


def test_the_same_seed_gives_the_same_result_and_the_block_is_left_alone() -> None:
    task = toy_task({"up": scheme(3), "down": scheme(2)})
    before = {name: t.clone() for name, t in task.block.state_dict().items()}
    first, second = (LoftQ().quantize_block(task, LoftQSpec(bits=3, rank=4)) for _ in range(2))
    for name, linear in first.linears.items():
        assert torch.equal(linear.dequantize(), second.linears[name].dequantize())
    assert all(torch.equal(t, before[name]) for name, t in task.block.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"symmetric": False}, "has no zero point"),
        ({"modules": {"overrides": {"*.down_proj": {"symmetric": False}}}}, "has no zero point"),
        ({"base": "affine", "double_quantization": True}, "double_quantization is for base"),
        ({"rank": 0}, "greater than or equal to 1"),
        ({"iterations": 0}, "greater than or equal to 1"),
        ({"alpha": 0}, "greater than 0"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        LoftQSpec.model_validate(fields)


def test_forms_follow_from_the_base() -> None:
    assert LoftQSpec().forms() == {Form.CODEBOOK, Form.LOW_RANK}
    assert LoftQSpec(base="affine", symmetric=False).forms() == {Form.AFFINE, Form.LOW_RANK}
    assert LoftQSpec(rank=8).factors_rank() == 8
