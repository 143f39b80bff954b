"""The family of adapters against its definition, written out in fp64: dense updates, ranks, sizes, alignment."""

from itertools import product

import pytest
import torch
from torch import Tensor

from app.domain.adapters import (
    AdapterShape,
    BayesianLoRASpec,
    GroupedSpec,
    LoRASpec,
    QABLoRASpec,
    QAHiRASpec,
    QALoRASpec,
    QBaRASpec,
)
from app.domain.adapters.shapes import divisors, shape_for
from bitwright.errors import MisalignedAdapter
from workers.adapters.grouped import GroupedAdapter
from workers.numerics.quantized import LowRank

LLAMA_7B = [(4096, 4096, 4 * 32), (4096, 11008, 2 * 32), (11008, 4096, 32)]
"""in_features, out_features and number of the linears of the blocks."""

KINDS: list[GroupedSpec] = [
    LoRASpec(rank=4),
    QALoRASpec(rank=4, alpha=3),
    QALoRASpec(rank=4, pooling="sum"),
    QBaRASpec(rank=4),
    QBaRASpec(rank=3, pool_in=4, repeat_out=2, pooling="sum"),
    QAHiRASpec(rank=2),
    QAHiRASpec(rank=4, pool_in=32, repeat_out=4, alpha=7),
    QABLoRASpec(rank=2),
]


def trained(shape: AdapterShape, seed: int = 0) -> GroupedAdapter:
    """With random numbers everywhere, as after training."""
    adapter = GroupedAdapter(shape)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return adapter


def by_definition(adapter: GroupedAdapter) -> Tensor:
    """Delta W[o, i] one by one: s/p (or s for a sum) times the tile's number."""
    shape = adapter.shape
    matrix = adapter.m.double() if shape.form == "single" else adapter.b.double() @ adapter.a.double()
    s = shape.alpha / shape.nominal_rank
    factor = s if shape.pooling == "sum" else s / shape.pool_in
    delta = torch.zeros(shape.out_features, shape.in_features, dtype=torch.float64)
    for o, i in product(range(shape.out_features), range(shape.in_features)):
        delta[o, i] = factor * matrix[o // shape.repeat_out, i // shape.pool_in]
    return delta


@pytest.mark.parametrize("spec", KINDS, ids=str)
def test_the_forward_pass_is_a_product_with_the_dense_update(spec: GroupedSpec) -> None:
    adapter = trained(shape_for(spec, 64, 48, 16)).double()
    x = torch.randn(2, 5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = x @ by_definition(adapter).T
    assert torch.allclose(adapter.delta_weight(), by_definition(adapter), rtol=1e-15, atol=0)
    assert (adapter(x) - expected).norm() <= 1e-15 * expected.norm()
    assert (adapter(x[0, 0]) - expected[0, 0]).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("spec", KINDS, ids=str)
def test_as_low_rank_factors_the_update_is_the_same(spec: GroupedSpec) -> None:
    adapter = trained(shape_for(spec, 64, 48, 16))
    exact = adapter.delta_weight()
    assert (adapter.low_rank().product() - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_parameters_of_llama_7b() -> None:
    def total(spec: GroupedSpec, group: int) -> float:
        return sum(n * shape_for(spec, i, o, group).parameters for i, o, n in LLAMA_7B)

    assert total(LoRASpec(rank=64), 64) == pytest.approx(159.908e6, abs=500)
    assert total(QBaRASpec(rank=64), 64) == total(LoRASpec(rank=64), 64)
    assert total(QALoRASpec(rank=64), 32) == pytest.approx(89.309e6, abs=500)
    # The authors' tiles of 4 x 8 are aligned where a group is 4 columns.
    assert total(QAHiRASpec(rank=64, pool_in=4, repeat_out=8), 4) == pytest.approx(202.375e6, abs=500)
    assert shape_for(QBaRASpec(rank=64), 4096, 4096, 64).rank == 128
    # Left to itself QA-HiRA comes as near as divisors allow; 11008 = 2^8 * 43 has few.
    assert total(QAHiRASpec(rank=64), 32) == pytest.approx(total(LoRASpec(rank=64), 32), rel=0.16)


@pytest.mark.parametrize("spec", KINDS, ids=str)
def test_what_is_counted_is_what_is_there(spec: GroupedSpec) -> None:
    shape = shape_for(spec, 64, 48, 16)
    adapter = trained(shape)
    assert sum(p.numel() for p in adapter.parameters()) == shape.parameters
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    assert int(torch.linalg.matrix_rank(adapter.delta_weight())) == shape.update_rank


@pytest.mark.parametrize(
    ("spec", "rank"),
    [
        (QBaRASpec(rank=4), 8),  # the inner rank, lambda times the request's
        (QBaRASpec(rank=64), 48 // 2),  # outputs that differ
        (QBaRASpec(rank=64, pool_in=8), 64 // 8),  # inputs that differ
        (QAHiRASpec(rank=4, pool_in=16, repeat_out=8), 64 // 16),
        (QAHiRASpec(rank=4, pool_in=16, repeat_out=16), 48 // 16),
    ],
    ids=str,
)
def test_the_rank_of_an_update_is_what_its_tiles_and_inner_rank_leave(spec: GroupedSpec, rank: int) -> None:
    shape = shape_for(spec, 64, 48, 16)
    assert shape.update_rank == rank
    assert int(torch.linalg.matrix_rank(trained(shape).delta_weight())) == rank


@pytest.mark.parametrize(
    ("inputs", "outputs", "group", "rank"), [(4096, 4096, 32, 64), (576, 1536, 64, 16), (96, 80, 8, 3)]
)
def test_tiles_come_as_near_to_loras_parameters_as_any(inputs: int, outputs: int, group: int, rank: int) -> None:
    shape = shape_for(QAHiRASpec(rank=rank), inputs, outputs, group)
    wanted = rank * (inputs + outputs)

    def distance(count: int) -> float:
        return max(count / wanted, wanted / count)

    pools = [p for p in range(group, inputs + 1, group) if inputs % p == 0]
    repeats = [q for q in range(1, outputs + 1) if outputs % q == 0]
    best = min(distance(inputs // p * (outputs // q)) for p in pools for q in repeats)
    assert distance(shape.parameters) == pytest.approx(best)
    rivals = [(p, q) for p in pools for q in repeats if p * q == shape.pool_in * shape.repeat_out]
    assert shape.update_rank == max(min(inputs // p, outputs // q) for p, q in rivals)


def test_divisors() -> None:
    assert divisors(36) == (1, 2, 3, 4, 6, 9, 12, 18, 36)
    assert divisors(13) == (1, 13)


@pytest.mark.parametrize(
    ("spec", "field", "named"),
    [
        (QAHiRASpec(pool_in=96), "adapter.pool_in", "64, 192, 576"),
        (QAHiRASpec(pool_in=4, repeat_out=8), "adapter.pool_in", "64, 192, 576"),
        (QABLoRASpec(pool_in=2), "adapter.pool_in", "64, 192, 576"),
        (QBaRASpec(pool_in=5), "adapter.pool_in", "1, 2, 3, 4, 6, 8, 9, 12, ... up to 576"),
        (QBaRASpec(repeat_out=7), "adapter.repeat_out", "1, 2, 3, 4, 6, 8, 12, 16, ... up to 192"),
        (QAHiRASpec(repeat_out=7), "adapter.repeat_out", "up to 192"),
    ],
)
def test_misaligned_pools_are_refused_with_those_that_fit(spec: GroupedSpec, field: str, named: str) -> None:
    with pytest.raises(MisalignedAdapter) as refused:
        shape_for(spec, 576, 192, 64)
    assert refused.value.field == field
    assert refused.value.hint is not None
    assert refused.value.hint.endswith(named)


@pytest.mark.parametrize("spec", [QALoRASpec(rank=4), QAHiRASpec(rank=2), QABLoRASpec(rank=2)], ids=str)
@pytest.mark.parametrize("group", [16, -1])
def test_an_aligned_update_is_one_number_a_group(spec: GroupedSpec, group: int) -> None:
    adapter = trained(shape_for(spec, 64, 48, group))
    delta = adapter.group_delta(group)
    columns = 64 if group == -1 else group
    assert delta.shape == (48, 64 // columns)
    assert torch.equal(delta.repeat_interleave(columns, 1), adapter.delta_weight())


@pytest.mark.parametrize("spec", [LoRASpec(rank=4), QBaRASpec(rank=4)], ids=str)
def test_an_update_that_varies_in_a_group_has_no_group_delta(spec: GroupedSpec) -> None:
    with pytest.raises(MisalignedAdapter, match="constant over"):
        trained(shape_for(spec, 64, 48, 16)).group_delta(16)


@pytest.mark.parametrize("spec", KINDS, ids=str)
def test_training_starts_at_the_base_and_moves_at_once(spec: GroupedSpec) -> None:
    adapter = GroupedAdapter(shape_for(spec, 64, 48, 16), generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    assert not adapter(x).any()
    (adapter(x) - 1).square().mean().backward()
    gradients = {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}
    assert bool(gradients["m" if adapter.shape.form == "single" else "b"].any())
    if adapter.shape.form == "pair":
        bound = adapter.shape.pooled**-0.5
        assert float(adapter.a.detach().abs().max()) <= bound
        assert float(adapter.a.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.3)


def test_gradients_are_those_of_the_dense_update() -> None:
    adapter = trained(shape_for(QBaRASpec(rank=4), 64, 48, 16)).double()
    x = torch.randn(7, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    target = torch.randn(7, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((adapter(x) - target).square().sum(), [adapter.a, adapter.b])
    dense = torch.autograd.grad((x @ adapter.delta_weight().T - target).square().sum(), [adapter.a, adapter.b])
    for one, other in zip(found, dense, strict=True):
        assert torch.allclose(one, other, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rank", "alpha"), [(4, 16.0), (3, 7.0), (49, 1.0)])
def test_a_start_from_a_methods_factors_keeps_every_bit(dtype: torch.dtype, rank: int, alpha: float) -> None:
    generator = torch.Generator().manual_seed(rank)
    left, right = torch.randn(48, rank, generator=generator), torch.randn(rank, 64, generator=generator)
    given = LowRank.of_product(left, right, alpha, dtype)
    adapter = GroupedAdapter.continued(LoRASpec(), given, "only")
    back = adapter.low_rank(dtype)
    assert torch.equal(back.a, given.a)
    assert torch.equal(back.b, given.b)
    assert back.alpha == given.alpha
    assert torch.equal(adapter.low_rank().product(), given.product())
    x = torch.randn(5, 64, generator=generator)
    expected = x.double() @ (left @ right).double().T
    assert (adapter(x) - expected).abs().max() <= 0.03 * expected.abs().max()
    assert (adapter.delta_weight() - given.product()).abs().max() <= 1e-5 * given.product().abs().max()


def test_dropout_drops_whole_pools_while_training_alone() -> None:
    adapter = trained(shape_for(QALoRASpec(rank=4, dropout=0.5), 64, 48, 16))
    adapter.dropout.p = 0.5
    x = torch.ones(1, 64)
    torch.manual_seed(0)
    assert not torch.equal(adapter.train()(x), adapter(x))
    assert torch.equal(adapter.eval()(x), adapter(x))


def test_half_precision_computes_in_it_with_parameters_kept() -> None:
    adapter = trained(shape_for(QAHiRASpec(rank=4), 64, 48, 16))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    found = adapter(x.bfloat16())
    assert found.dtype == torch.bfloat16
    exact = x @ adapter.delta_weight(torch.float32).T
    assert (found.float() - exact).abs().max() <= 0.03 * exact.abs().max()


def test_bayesian_lora_is_no_shape_of_the_family() -> None:
    assert not isinstance(BayesianLoRASpec(), GroupedSpec)
