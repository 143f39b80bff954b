"""Predicted distances against the formula with the whole matrix F, in fp64, and the text that they are made from."""

import pytest
import torch

from app.domain.methods import Scheme, SchemeName
from workers.contracts.blocks import Fisher
from workers.engine.quantize.scores import pieces, rounding_error
from workers.methods.rtn import quantize_weight
from workers.numerics.floats import float_grids


def rounded(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    if scheme.name is not None:
        return float_grids.quantize(weight, scheme, torch.float32).dequantize()
    return quantize_weight(weight, scheme, torch.float32).dequantize()


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(bits=3, group_size=32, symmetric=True),
        *map(Scheme.named, (SchemeName.FP8A16, SchemeName.NVFP4A16, SchemeName.MXFP4A16)),
    ],
)
def test_an_error_is_half_the_information_weighted_square(scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(48, 64, generator=generator)
    rows, columns = torch.rand(48, generator=generator) * 1e9, torch.rand(64, generator=generator)
    columns *= rows.sum() / columns.sum()
    information = torch.outer(rows.double(), columns.double()) / rows.double().sum()
    made = rounded(weight, scheme)
    change = (made - weight).double()
    expected = 0.5 * float((information * change.square()).sum())
    found = rounding_error(weight, made, Fisher(rows, columns))
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("length", "part"), [(64, 64), (512, 512), (2048, 512), (1000, 500), (1030, 515), (997, 512)])
def test_the_text_is_scored_in_pieces_of_one_length(length: int, part: int) -> None:
    ids = torch.arange(3 * length).view(3, length)
    cut = pieces(ids)
    expected = part if part <= 512 else 512
    assert cut.shape == (3 * (length // expected), expected)
    assert cut[0].tolist() == list(range(expected))


def test_no_more_text_is_scored_than_is_worth_it() -> None:
    assert pieces(torch.zeros(64, 2048, dtype=torch.int64)).numel() == 32_768
