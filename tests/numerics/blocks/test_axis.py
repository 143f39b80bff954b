"""The axis of block types: codes and levels in their order, places between them, and where weights start."""

import pytest
import torch

from app.domain.methods import BLOCK_SCHEMES, SCHEMES, Scheme, SchemeName
from app.domain.methods.block_types import BlockType
from workers.numerics.blocks.axis import BlockAxis, start_of
from workers.numerics.blocks.levels import lattice
from workers.numerics.blocks.search import search_blocks

every_type = pytest.mark.parametrize("name", sorted(BLOCK_SCHEMES))
UNEVEN = [SchemeName.IQ4_NL, SchemeName.IQ4_XS]


def kind_of(name: SchemeName) -> BlockType:
    kind = SCHEMES[name].blocks
    assert kind is not None
    return kind


@every_type
def test_the_levels_are_at_whole_places_and_between_them_places_are_linear(name: SchemeName) -> None:
    kind = kind_of(name)
    axis, table = BlockAxis(kind), torch.tensor(kind.levels, dtype=torch.float64)
    codes = torch.arange(len(table), dtype=torch.float64)
    assert (axis.low, axis.high) == (0, len(table) - 1)
    assert torch.equal(axis.value(codes), table)
    assert torch.equal(axis.place(table), codes)
    for share in (0.25, 0.5, 0.75):
        between = table[:-1] + share * table.diff()
        torch.testing.assert_close(axis.place(between), codes[:-1] + share, rtol=0, atol=1e-12)
    assert torch.equal(axis.code(codes), codes.to(torch.uint8))
    assert torch.equal(axis.index(axis.code(codes)), codes.float())


@every_type
def test_places_go_on_beyond_both_ends_and_codes_do_not(name: SchemeName) -> None:
    axis = BlockAxis(kind_of(name))
    ends = torch.tensor(axis.kind.levels, dtype=torch.float32)[[0, -1]]
    beyond = axis.place(ends + torch.tensor([-40.0, 40.0]))
    assert beyond[0] < -0.9
    assert beyond[1] > axis.high + 0.9
    if name is SchemeName.IQ3_S:
        return  # its farthest magnitudes are no point together
    places = torch.tensor([[-7.0, axis.high + 7.0, -0.6, axis.high + 0.6]])
    assert torch.equal(axis.rounded(places), torch.tensor([[0.0, axis.high, 0.0, axis.high]]))


@pytest.mark.parametrize("name", UNEVEN)
def test_rounding_a_place_is_rounding_to_the_nearest_level(name: SchemeName) -> None:
    axis = BlockAxis(kind_of(name))
    numbers = torch.rand(4000, generator=torch.Generator().manual_seed(0)) * 300 - 150
    table = torch.tensor(axis.kind.levels, dtype=torch.float32)
    nearest = (numbers.unsqueeze(1) - table).abs().argmin(1)
    assert torch.equal(axis.rounded(axis.place(numbers)), nearest.float())


def test_four_places_of_a_lattice_become_one_of_its_points_and_points_stay() -> None:
    axis = BlockAxis(kind_of(SchemeName.IQ3_S))
    generator = torch.Generator().manual_seed(1)
    places = torch.rand(512, 32, generator=generator) * 17 - 1
    points = lattice(torch.device("cpu"))
    found = axis.value(axis.rounded(places)).view(-1, 4)
    known = {tuple(point) for point in points.int().tolist()}
    assert {tuple(four) for four in found.abs().int().tolist()} <= known
    signs = torch.randint(0, 2, points.shape, generator=generator) * 2.0 - 1
    codes = (points * signs + 15) / 2
    shaken = codes + torch.empty_like(codes).uniform_(-0.49, 0.49, generator=generator)
    assert torch.equal(axis.rounded(shaken), codes)


@every_type
def test_weights_start_within_their_codes_intervals_where_they_are(name: SchemeName) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(8, 512, generator=generator)
    weight[3, :256] = 0
    weight[4, 100] = 1000.0
    made = search_blocks(weight, Scheme.named(name))
    axis, width = BlockAxis(made.kind), made.kind.columns
    offset = made.offset()
    codes = made.codes.view(-1, width)
    place = start_of(
        axis, weight.view(-1, width), codes, made.factor().flatten(), None if offset is None else offset.flatten()
    )
    assert bool(place.isfinite().all())
    assert torch.equal(axis.code(axis.rounded(place)), codes)
    inside = (place - codes.float()).abs() < 0.4899
    value = axis.value(place.floor().clamp(0, axis.high))
    assert inside.float().mean() > 0.5, name
    assert value.shape == place.shape
