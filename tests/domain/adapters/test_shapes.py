"""The shape of an adapter at a linear, against the formulas of the module's docstring, written out in numbers."""

from typing import Any

import pytest

from app.domain.adapters import (
    AdapterShape,
    LoRASpec,
    QABLoRASpec,
    QAHiRASpec,
    QALoRASpec,
    QBaRASpec,
)
from app.domain.adapters.shapes import divisors, equal_rank, shape_for
from app.domain.methods import Scheme
from app.domain.methods.budgets import Candidate
from app.domain.methods.schemes import AbsmaxScheme, FloatName
from bitwright.errors import MisalignedAdapter


def test_what_follows_from_a_shape() -> None:
    pair = AdapterShape(12, 20, 3, 4, "pair", 7, alpha=8.0, nominal_rank=2)
    assert (pair.pooled, pair.distinct) == (4, 5)
    assert pair.parameters == 7 * (4 + 5)
    assert pair.update_rank == 4
    assert pair.flops_per_token == 2 * 63 + 12
    assert pair.scale == 4.0
    summed = AdapterShape(12, 20, 3, 4, "single", 3, alpha=8.0, nominal_rank=2, pooling="sum")
    assert summed.parameters == 4 * 5
    assert summed.update_rank == 3
    assert summed.scale == 12.0
    assert AdapterShape(12, 20, 1, 4, "pair", 7, alpha=8.0, nominal_rank=2).flops_per_token == 2 * 7 * (12 + 5)


@pytest.mark.parametrize(
    ("rank", "inputs", "outputs", "pool", "repeat", "expected"),
    [
        (4, 64, 64, 2, 2, 8),
        (4, 64, 64, 1, 1, 4),
        (4, 64, 32, 2, 1, 6),  # 4 * 96 / 64
        (1, 10, 10, 2, 5, 2),  # 2.86, of which two outputs have use
        (1, 8, 8, 1, 1, 1),
        (100, 16, 16, 1, 1, 16),
        (1, 10, 13, 1, 2, 1),  # 1.4
    ],
)
def test_as_many_parameters_as_the_lora_has(
    rank: int, inputs: int, outputs: int, pool: int, repeat: int, expected: int
) -> None:
    assert equal_rank(rank, inputs, outputs, pool, repeat) == expected


def test_the_shape_of_each_kind() -> None:
    def found(spec: Any, group: int = 8) -> tuple[int, int, str, int]:
        shape = shape_for(spec, 64, 32, group)
        assert (shape.in_features, shape.out_features, shape.nominal_rank, shape.alpha) == (64, 32, 4, 16.0)
        return shape.pool_in, shape.repeat_out, shape.form, shape.rank

    assert found(LoRASpec(rank=4)) == (1, 1, "pair", 4)
    assert found(QALoRASpec(rank=4)) == (8, 1, "pair", 4)
    assert found(QALoRASpec(rank=4), -1) == (64, 1, "pair", 4)
    assert found(QBaRASpec(rank=4)) == (2, 2, "pair", 8)
    assert found(QBaRASpec(rank=4, pool_in=4, repeat_out=1)) == (4, 1, "pair", 8)
    assert found(QABLoRASpec(rank=4)) == (8, 2, "pair", 8)  # 4 * 96 / (8 + 16) = 16, of which 8 pools have use
    assert found(QABLoRASpec(rank=4, pool_in=16)) == (16, 2, "pair", 4)
    # Of tiles of about 64 * 32 / (4 * 96) = 5.33 numbers that begin with groups of 8: the smallest.
    assert found(QAHiRASpec(rank=4)) == (8, 1, "single", 8)
    assert found(QAHiRASpec(rank=4), 1)[0] * found(QAHiRASpec(rank=4), 1)[1] in {4, 8}
    assert found(QAHiRASpec(rank=4, pool_in=16, repeat_out=4)) == (16, 4, "single", 4)


@pytest.mark.parametrize(
    ("spec", "field", "choices"),
    [
        (QBaRASpec(pool_in=3), "adapter.pool_in", "1, 2, 4, 8, 16, 32, 64"),
        (QBaRASpec(repeat_out=3), "adapter.repeat_out", "1, 2, 4, 8, 16, 32"),
        (QABLoRASpec(pool_in=4), "adapter.pool_in", "8, 16, 32, 64"),
        (QABLoRASpec(pool_in=24), "adapter.pool_in", "8, 16, 32, 64"),
        (QAHiRASpec(pool_in=12), "adapter.pool_in", "8, 16, 32, 64"),
        (QAHiRASpec(repeat_out=64), "adapter.repeat_out", "1, 2, 4, 8, 16, 32"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(spec: Any, field: str, choices: str) -> None:
    with pytest.raises(MisalignedAdapter) as refused:
        shape_for(spec, 64, 32, 8)
    assert (refused.value.field, refused.value.hint) == (field, f"use one of {choices}")


def test_divisors_are_all_and_rise() -> None:
    for number in range(1, 200):
        assert list(divisors(number)) == [d for d in range(1, number + 1) if number % d == 0]


def test_the_bits_of_a_linear() -> None:
    """Codes, a scale for each group of 4, and where weights are asymmetric a zero point as wide as a code."""
    symmetric = Scheme(bits=3, group_size=4, symmetric=True)
    asymmetric = Scheme(bits=3, group_size=4, symmetric=False)
    rows = Scheme(bits=3, group_size=-1, symmetric=False)
    assert [scheme.bits_per_weight(8) for scheme in (symmetric, asymmetric, rows)] == [3 + 4, 3 + 19 / 4, 3 + 19 / 8]
    assert symmetric.bits_per_weight(8, scale_bits=32) == 3 + 8
    shape = (5, 8)
    assert Candidate(symmetric).stored_bits(shape) == 40 * 3 + 10 * 16
    assert Candidate(asymmetric).stored_bits(shape, 32) == 40 * 3 + 10 * (32 + 3)
    assert Candidate(rows).stored_bits(shape) == 40 * 3 + 5 * 19
    dtypes: tuple[tuple[FloatName, int], ...] = (("float32", 32), ("float16", 16), ("bfloat16", 16))
    for dtype, bits in dtypes:
        absmax = AbsmaxScheme(bits=8, dtype=dtype, superblock=4)
        assert Candidate(symmetric, absmax).stored_bits(shape) == 40 * 3 + 10 * 8 + 3 * bits
