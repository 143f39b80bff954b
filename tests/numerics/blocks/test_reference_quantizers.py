"""The search and the bytes against llama.cpp's C functions; `make test-llama-cpp` installs it and runs these."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from app.domain.methods import BLOCK_SCHEMES, Scheme, SchemeName
from tests.formats.gguf.test_block_bytes import EXTREMES, random_blocks, same_bits
from tests.numerics.blocks.ggml import decoded, quantized
from workers.formats.gguf.block_bytes import encode
from workers.numerics.blocks.search import search_blocks

FOLDER = Path(os.environ.get("BITWRIGHT_TEST_LLAMA_CPP", ""))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("BITWRIGHT_TEST_LLAMA_CPP"), reason="make test-llama-cpp installs llama.cpp"),
]
every_type = pytest.mark.parametrize("name", sorted(BLOCK_SCHEMES))

MEAN_SQUARES = {"q4_0": (0, 1.0), "q4_1": (0, 1.0), "q5_0": (0, 1.0), "q5_1": (0, 1.0), "q2_k": (256, 1.0)}
"""Weights of which the reference takes the mean square into its weighting (0: a row's), and by how much; else twice
that of 256, or of 32."""


@every_type
def test_the_decoder_in_c_gives_the_same_numbers(name: SchemeName) -> None:
    weight = random_blocks(name, 200)
    assert same_bits(decoded(FOLDER, name, encode(weight), weight.shape[1]), weight.dequantize())
    for case in EXTREMES.values():
        extreme = search_blocks(case, weight.scheme)
        assert same_bits(decoded(FOLDER, name, encode(extreme), 512), extreme.dequantize())


def weighting(name: SchemeName, weight: Tensor, importance: Tensor) -> Tensor:
    """What the reference weighs squared errors by, (out, in), with an importance of the columns."""
    importance = importance.expand(weight.shape)
    if name in ("q6_k", "q8_0", "q2_0"):
        return importance
    count, factor = MEAN_SQUARES.get(name, (32 if name == "iq4_nl" else 256, 2.0))
    parts = weight.view(len(weight), -1, count or weight.shape[1])
    mean = parts.square().mean(-1, keepdim=True).expand_as(parts).reshape(weight.shape)
    return importance * (factor * mean + weight.square()).sqrt()


@pytest.mark.parametrize("seed", [0, 1])
@every_type
def test_the_search_is_at_least_as_good_with_the_same_weighting(name: SchemeName, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(96, 1024, generator=generator) * torch.rand(96, 1, generator=generator)
    importance = torch.randn(1024, generator=generator).exp() if seed else torch.ones(1024)
    scheme = Scheme.named(name)
    kind = scheme.blocks
    assert kind is not None
    size = 1024 // kind.weights * kind.size
    theirs = decoded(FOLDER, name, quantized(FOLDER, kind.number, size, weight, importance), 1024)
    for weights in (weighting(name, weight, importance), importance.expand(weight.shape)):
        ours = search_blocks(weight, scheme, weights).dequantize()
        mine, reference = ((weights * (each - weight).square()).sum() for each in (ours, theirs))
        assert float(mine) <= float(reference)


@every_type
def test_without_importance_the_search_is_better(name: SchemeName) -> None:
    weight = torch.randn(96, 1024, generator=torch.Generator().manual_seed(2))
    kind = Scheme.named(name).blocks
    assert kind is not None
    size = 1024 // kind.weights * kind.size
    equal = torch.ones(1024) if name == "iq3_s" else None
    theirs = decoded(FOLDER, name, quantized(FOLDER, kind.number, size, weight, equal), 1024)
    ours = search_blocks(weight, Scheme.named(name)).dequantize()
    assert (ours - weight).square().sum() < 0.97 * (theirs - weight).square().sum()
