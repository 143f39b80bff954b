"""Packed codes give the very weights of the representation that they were packed from; so does the kernel."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from app.domain.methods import BLOCK_SCHEMES, PER_CHANNEL, Form, Scheme, SchemeName
from tests.formats.examples import Made, random_result
from workers.numerics.packed_weight import PackedWeight
from workers.numerics.quantized import AffineWeight, CodebookWeight, QuantizedAbsmax, QuantizedWeight

OUT, IN = 6, 48


def weight_of(form: str, bits: int, group_size: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (OUT, IN), generator=generator).to(torch.uint8)
    scheme = Scheme(bits=bits, group_size=group_size, symmetric=form in ("symmetric", "codebook", "double"))
    groups = 1 if group_size == PER_CHANNEL else IN // group_size
    scale = (torch.rand(OUT, groups, generator=generator) + 0.1).bfloat16()
    if form == "symmetric":
        return AffineWeight(codes, scale, None, scheme, torch.bfloat16)
    if form == "zero":
        zero = torch.randint(0, 2**bits, scale.shape, generator=generator).to(torch.uint8)
        return AffineWeight(codes, scale, zero, scheme, torch.bfloat16)
    if form == "offset":
        return AffineWeight(codes, scale, None, scheme, torch.bfloat16, torch.randn(scale.shape, generator=generator))
    table = torch.linspace(-1, 1, 2**bits) ** 3
    if form == "codebook":
        return CodebookWeight(codes, table, scale.float(), scheme, torch.bfloat16)
    second = torch.randint(0, 256, scale.shape, generator=generator).to(torch.uint8)
    absmax = QuantizedAbsmax(second, torch.rand(-(-second.numel() // 4)), torch.tensor(0.3), 8, 4)
    return CodebookWeight(codes, table, absmax, scheme, torch.bfloat16)


FORMS = ["symmetric", "zero", "offset", "codebook", "double"]


@pytest.mark.parametrize("group_size", [16, PER_CHANNEL])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("form", FORMS)
def test_packed_weights_are_the_weights(form: str, bits: int, group_size: int) -> None:
    weight = weight_of(form, bits, group_size)
    packed = PackedWeight.of(weight)
    assert packed.packed.numel() == OUT * IN * {2: 2, 3: 4, 4: 4}.get(bits, 8) // 8
    assert torch.equal(packed.dequantize(torch.bfloat16), weight.dequantize())


@pytest.mark.parametrize("name", sorted(BLOCK_SCHEMES))
def test_packed_blocks_are_the_weights(name: SchemeName) -> None:
    weight = random_result((5, 512), Made(Scheme.named(name), Form.BLOCKS), torch.float32).weight
    assert torch.equal(PackedWeight.of(weight).dequantize(torch.float32), weight.dequantize())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("form", FORMS)
def test_the_kernel_makes_the_same_weights(form: str, bits: int) -> None:
    pytest.importorskip("triton")
    from workers.numerics.backends import unpack_kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # The interpreter cuts bf16 off instead of rounding it.
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    weight = replace(weight_of(form, bits, 16), dtype=dtype).to(device)
    packed = PackedWeight.of(weight)
    scale = packed.scale if isinstance(packed.scale, torch.Tensor) else packed.scale.dequantize()
    out = torch.empty(OUT, IN, dtype=dtype, device=device)
    layout: dict[str, Any] = {"width": packed.width, "group_size": packed.group_size, "middle": packed.middle}
    unpack_kernels.unpack(packed.packed, scale, packed.other, out, kind=packed.kind, **layout)
    if form == "offset":  # product and sum may be rounded at once
        torch.testing.assert_close(out, weight.dequantize())
    else:
        assert torch.equal(out, weight.dequantize())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_last_byte_that_is_not_full_is_no_weight(bits: int) -> None:
    codes = (torch.arange(15).view(5, 3) % 2**bits).to(torch.uint8)
    scheme = Scheme(bits=bits, group_size=PER_CHANNEL, symmetric=True)
    weight = AffineWeight(codes, torch.full((5, 1), 0.5), None, scheme, torch.float32)
    packed = PackedWeight.of(weight)
    assert packed.packed.numel() == {2: 4, 4: 8, 8: 15}[bits]
    assert torch.equal(packed.dequantize(torch.float32), (codes.float() - 2 ** (bits - 1)) * 0.5)
