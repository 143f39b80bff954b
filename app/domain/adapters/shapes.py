"""The shape that an adapter takes at a linear: pools and tiles that divide it, as many parameters as the LoRA has.

`app.domain.adapters` has the letters.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import log
from typing import Literal

from app.domain.adapters import (
    AdapterShape,
    GroupedSpec,
    LoRASpec,
    Pooling,
    QABLoRASpec,
    QAHiRASpec,
    QALoRASpec,
    QBaRASpec,
)
from app.domain.methods.schemes import group_width
from bitwright.errors import MisalignedAdapter

NAMED_CHOICES = 8
"""Of the aligned choices, a message names so many."""


@lru_cache(maxsize=4096)
def shape_for(spec: GroupedSpec, in_features: int, out_features: int, group_size: int) -> AdapterShape:
    """The adapter of a linear (out_features, in_features) whose weight has groups of `group_size` inputs (-1: a row).

    Raises:
        MisalignedAdapter: the pool or the repetition does not divide the linear, or the pool is no multiple of the
            group though the kind promises to merge into the quantized weight. The hint names those that would do.
    """
    group = group_width(group_size, in_features)
    form: Literal["pair", "single"] = "pair"
    match spec:
        case LoRASpec():
            pool, repeat, rank = 1, 1, spec.rank
        case QALoRASpec():
            pool, repeat, rank = group, 1, spec.rank
        case QBaRASpec():
            _check_repeat(spec.repeat_out, out_features)
            _check_pool(spec.pool_in, in_features, 1)
            pool, repeat = spec.pool_in, spec.repeat_out
            rank = equal_rank(spec.rank, in_features, out_features, pool, repeat)
        case QABLoRASpec():
            pool, repeat = group if spec.pool_in is None else spec.pool_in, spec.repeat_out
            _check_repeat(repeat, out_features)
            _check_pool(pool, in_features, group)
            rank = equal_rank(spec.rank, in_features, out_features, pool, repeat)
        case QAHiRASpec():
            pool, repeat = _tile(spec, in_features, out_features, group)
            form, rank = "single", min(in_features // pool, out_features // repeat)
    pooling: Pooling = "mean" if isinstance(spec, LoRASpec) else spec.pooling
    return AdapterShape(in_features, out_features, pool, repeat, form, rank, spec.alpha, spec.rank, pooling)


def equal_rank(rank: int, in_features: int, out_features: int, pool_in: int, repeat_out: int) -> int:
    """r' with r'(I/p + O/q) = r(I + O) as nearly as a whole number can, but not beyond the rank of the whole update."""
    pooled, distinct = in_features // pool_in, out_features // repeat_out
    wanted = round(rank * (in_features + out_features) / (pooled + distinct))
    return max(1, min(wanted, pooled, distinct))


@lru_cache
def divisors(number: int) -> tuple[int, ...]:
    """All of them, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


def _tile(spec: QAHiRASpec, in_features: int, out_features: int, group: int) -> tuple[int, int]:
    """p and q with p*q next to O*I / (r(O + I)); of several the ones that leave the highest rank."""
    if spec.pool_in is not None:
        _check_pool(spec.pool_in, in_features, group)
    if spec.repeat_out is not None:
        _check_repeat(spec.repeat_out, out_features)
    aligned = [p for p in divisors(in_features) if p % group == 0]
    pools: Sequence[int] = aligned if spec.pool_in is None else [spec.pool_in]
    repeats: Sequence[int] = divisors(out_features) if spec.repeat_out is None else [spec.repeat_out]
    wanted = out_features * in_features / (spec.rank * (out_features + in_features))

    def preference(tile: tuple[int, int]) -> tuple[float, int, int]:
        pool, repeat = tile
        return abs(log(pool * repeat / wanted)), -min(in_features // pool, out_features // repeat), pool

    return min(((p, q) for p in pools for q in repeats), key=preference)


def _check_pool(pool: int, in_features: int, group: int) -> None:
    if in_features % pool == 0 and pool % group == 0:
        return
    choices = [p for p in divisors(in_features) if p % group == 0]
    aligned = f" and be a multiple of the group size {group}" if group > 1 else ""
    raise MisalignedAdapter(
        f"pool_in {pool} must divide the linear's {in_features} inputs{aligned}",
        field="adapter.pool_in",
        value=pool,
        hint=f"use one of {_named(choices)}",
    )


def _check_repeat(repeat: int, out_features: int) -> None:
    if out_features % repeat:
        raise MisalignedAdapter(
            f"repeat_out {repeat} must divide the linear's {out_features} outputs",
            field="adapter.repeat_out",
            value=repeat,
            hint=f"use one of {_named(divisors(out_features))}",
        )


def _named(choices: Sequence[int]) -> str:
    shown = ", ".join(map(str, choices[:NAMED_CHOICES]))
    return shown if len(choices) <= NAMED_CHOICES else f"{shown}, ... up to {choices[-1]}"
