"""The codes of sub-blocks against brute force over all of them, on whole super-blocks of llama.cpp's own types."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from app.domain.methods import BLOCK_SCHEMES, SCHEMES, Scheme, SchemeName
from workers.numerics.blocks.levels import lattice
from workers.numerics.blocks.search import search_blocks
from workers.numerics.quantized import BlockWeight

LEFT = {"q2_k": 0.04, "q3_k": 0.002, "q4_k": 0.02, "q5_k": 0.07, "q6_k": 0.05, "iq4_xs": 0.005, "iq3_s": 0.02}
"""The share of the squared error, at the most, that the best codes under the same d and dmin would not have."""


def nearest(numbers: Tensor, weights: Tensor, name: SchemeName) -> Tensor:
    """Of all levels, or points of a lattice for four weights, the nearest; numbers and weights are (..., columns)."""
    kind = SCHEMES[name].blocks
    assert kind is not None
    if name != SchemeName.IQ3_S:
        table = torch.tensor(kind.levels, dtype=numbers.dtype)
        return table[(numbers.unsqueeze(-1) - table).abs().argmin(-1)]
    points = lattice(numbers.device).to(numbers.dtype)
    quads, own = numbers.abs().view(-1, 1, 4), weights.reshape(-1, 1, 4)
    best = points[(own * (quads - points).square()).sum(-1).argmin(-1)].view(numbers.shape)
    return torch.where(numbers < 0, -best, best)


def errors(weight: Tensor, weights: Tensor, found: BlockWeight, name: SchemeName) -> Iterator[Tensor]:
    """Each choice's weighted squared errors of all sub-blocks, codes rounded to the nearest; (rows, sub-blocks)."""
    kind = found.kind
    assert kind.scales is not None
    repeats = kind.weights // kind.columns
    numbers = weight.double().view(len(weight), -1, kind.columns)
    own = weights.double().view(numbers.shape)
    scale = found.scale.double().repeat_interleave(repeats, 1).unsqueeze(-1)
    minimum = None if found.minimum is None else found.minimum.double().repeat_interleave(repeats, 1).unsqueeze(-1)
    for low in range(1 if kind.minimums is None else kind.minimums.largest + 1):
        offset = torch.zeros_like(scale) if minimum is None else minimum * low
        for code in range(kind.scales.largest + 1):
            factor = scale * (kind.scales.first + kind.scales.step * code)
            levels = nearest((numbers + offset) / torch.where(factor == 0, 1.0, factor), own, name)
            yield (own * (numbers - factor * levels + offset).square()).sum(-1)


QUICK = ("q3_k", "iq4_xs")
every = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(LEFT)]


@pytest.mark.parametrize("name", every)
def test_codes_are_nearly_the_best_of_all_under_the_same_scales(name: str) -> None:
    scheme = Scheme.named(SchemeName(name))
    generator = torch.Generator().manual_seed(0)
    rows = 1 if name == "iq3_s" else 2
    weight, weights = torch.randn(rows, 256, generator=generator), torch.rand(rows, 256, generator=generator) + 0.1
    found = search_blocks(weight, scheme, weights)
    best = torch.stack(list(errors(weight, weights, found, SchemeName(name)))).amin(0)
    mine = (weights * (weight - found.dequantize()).double().square()).view(rows, -1, found.kind.columns).sum(-1)
    assert bool((best <= mine * (1 + 1e-6)).all())
    assert float(mine.sum()) <= (1 + LEFT[name]) * float(best.sum())


def test_every_type_with_codes_of_sub_blocks_is_held_against_brute_force() -> None:
    assert {name for name in BLOCK_SCHEMES if SCHEMES[name].blocks.scales is not None} == LEFT.keys()  # type: ignore[union-attr]
