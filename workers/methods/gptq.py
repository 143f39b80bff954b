"""GPTQ (Frantar et al., arXiv:2210.17323): columns are rounded in turn, and the rest of each row compensates the error.

For the rows W of a linear with inputs X (tokens, in), as they come out of the quantized blocks and linears before it:

    H = 2 X^T X,   lambda = damping * mean(diag H),   (H + lambda I)^-1 = U^T U,  U upper triangular
    for j = 0 .. in-1:   w_hat_j = s*(q - z),  q = round of W[:, j] on its group's grid (`workers.numerics.affine`)
                         e_j = (W[:, j] - w_hat_j) / U[j, j]
                         W[:, j+1:] <- W[:, j+1:] - e_j U[j, j+1:]

so that each column's error raises tr((W - W_hat) H (W - W_hat)^T) by the least that the remaining columns allow.
Updates reach the columns of the current lazy batch (128) at once and the others by one product at its end.

A group's scale is computed when its first column is reached, from weights that compensate the errors so far. With
`act_order`, columns are rounded in the order of falling diag H, and all scales are computed from the original weights
before the first of them (static groups): a stored group is still G consecutive columns.

On schemes of FP8 and FP4 (`floats.float_grids`) the scales are always those of the original weights, fixed
before the first column: the best that can be stored, with errors weighted by diag H. w_hat_j = s*E(W[:, j]/s) then.
In llama.cpp's block types a block's factors and offsets are searched as groups' scales are computed, when its first
column is reached or before all (`blocks.elimination`); `sweeps` of coordinate descent may follow (`blocks.descent`).

True sequential order: linears are taken in the order in which the block calls them; the inputs of each are quantized
activations behind the linears that are quantized so far. Linears that get the same tensor (q, k, v) share H and U; if
they share a scheme too, their rows are rounded together. Experts of one part do not depend on each other: H of all
their sides is summed in one pass, and of all that come after in another.

| symbol | variable | shape |
|---|---|---|
| W | `columns` | (in, rows), fp32, transposed: a column's weights lie together |
| H | `hessian` | (in, in), fp32 |
| U | `factor` | (in, in), fp32 |
| e of a lazy batch | `errors` | (128, rows), fp32 |

Cost: less than two forward passes of the block, or one where all sequences fit through it at once; for H, 2*in^2
operations per token, and out*in^2 for the updates.

Different from the paper's code: U from one factorization (`workers.numerics.hessian`); columns whose inputs are 0 for
all tokens are rounded to nearest, where the code sets them to 0; where H is not positive definite even with 100 times
the damping, a linear is rounded to nearest, which is logged and counted. A group that begins inside a lazy batch sees
that batch's updates. With H = I the result is round to nearest. Left out: searching for the range with the least
squared error.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from app.domain.methods import Form, GPTQSpec, Scheme
from workers.contracts.blocks import BlockTask, KernelMethod, Method, WarmUp
from workers.contracts.experts import all_called, seen_together
from workers.contracts.results import BlockResult
from workers.contracts.whole_passes import fits_at_once
from workers.numerics.affine import GroupRange, affine_grid, affine_weight, grouped
from workers.numerics.backend import column_kernels
from workers.numerics.backends.column_operators import COLUMNS, Columns, IntegerGrid
from workers.numerics.blocks.compensation import compensate
from workers.numerics.blocks.elimination import columns_together
from workers.numerics.blocks.stored_parts import split_rows
from workers.numerics.blocks.warm_up import block_warm_ups
from workers.numerics.floats.elements import element_of, encode
from workers.numerics.floats.float_grids import searched_grid
from workers.numerics.hessian import (
    Hessian,
    damped_hessian,
    input_groups,
    inverse_factors,
    see_inputs,
    watched,
)
from workers.numerics.quantized import AffineWeight, FloatWeight, LinearResult, QuantizedWeight

HESSIAN_BYTES = 2 << 30
"""Memory for the H of experts that are summed in one pass."""
TOGETHER_BYTES = 1 << 29
"""Memory for the factors and weights, fp32, of experts that are rounded together."""

Stage = Sequence[tuple[tuple[str, ...], Hessian]]
"""Names of linears that share their inputs, with H of these: of several groups that do not depend on each other."""


@dataclass(frozen=True)
class Elimination:
    """The order in which columns are rounded, (in,), and U of H in that order.

    static    whether the groups' scales are those of the original weights; else columns are in the stored order
    retries   number of times that the damping was raised
    identity  whether U is I, for want of a factor
    """

    order: Tensor
    factor: Tensor
    static: bool
    retries: int = 0
    identity: bool = False

    @classmethod
    def of(cls, hessian: Tensor, damping: float, *, act_order: bool, together: int = 1) -> "Elimination | None":
        """The elimination for H (in, in); None if it cannot be factorized.

        together   consecutive columns that stay so in any order
        """
        return cls.of_each([hessian], damping, act_order=act_order, together=together)[0]

    @classmethod
    def of_each(
        cls, hessians: Sequence[Tensor], damping: float, *, act_order: bool, together: int = 1
    ) -> list["Elimination | None"]:
        """The same for each H, with one wait for the device."""
        orders, ordered = [], []
        for hessian in hessians:
            falling = hessian.diagonal().view(-1, together).sum(1).argsort(descending=True, stable=True)
            falling = (falling.unsqueeze(1) * together + torch.arange(together, device=hessian.device)).flatten()
            orders.append(falling if act_order else torch.arange(len(hessian), device=hessian.device))
            ordered.append(hessian[orders[-1]][:, orders[-1]])
        factors = inverse_factors(ordered, damping)
        return [
            None if factor is None else cls(order, factor, act_order, retries)
            for order, (factor, retries) in zip(orders, factors, strict=True)
        ]

    @classmethod
    def none(cls, hessian: Tensor) -> "Elimination":
        """U = I: every column is rounded to nearest."""
        identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        order = torch.arange(len(hessian), device=hessian.device)
        return cls(order, identity, static=False, identity=True)


class GPTQ(KernelMethod[GPTQSpec]):
    def warm_ups(self, kinds: WarmUp, spec: GPTQSpec) -> list[Callable[[], object]]:
        calls, dtypes = list[Callable[[], object]](), (kinds.dtype, kinds.scale_dtype)
        kernels = column_kernels(kinds.device, torch.promote_types(kinds.dtype, torch.float32))
        for columns, scheme in kinds.linears:
            if scheme.blocks is not None:
                calls += block_warm_ups(columns, scheme, dtypes, kinds.device, eliminates=True, sweeps=spec.sweeps)
            else:
                calls += kernels.warm_ups(columns, scheme, kinds.scale_dtype, kinds.device)
        return calls

    @torch.no_grad()
    def quantize_block(self, task: BlockTask, spec: GPTQSpec) -> BlockResult:
        results: dict[str, LinearResult] = {}
        counters: Counter[str] = Counter(damping_raised=0, rounded_to_nearest=0)
        with task.restored():
            linears = {name: task.linear(name) for name in task.schemes}
            amax = task.joined_amax()
            with all_called(task.block):
                groups = input_groups(linears, next(task.passes(task.inputs[:1])))

            def quantize(stage: Stage) -> None:
                eliminations = self._eliminate(task, stage, spec, counters)
                done = _side_by_side(task, [names for names, _ in stage], eliminations)
                results.update((name, LinearResult(weight)) for name, weight in done.items())
                for (names, hessian), elimination in zip(stage, eliminations, strict=True):
                    for scheme, alike in {} if done else _by_scheme(task.schemes, names).items():
                        weights, shared = [linears[name].weight for name in alike], [amax.get(name) for name in alike]
                        moments = hessian.sum[0].diagonal()
                        sweeps = 0 if elimination.identity else spec.sweeps
                        retries = elimination.retries
                        damped = damped_hessian(hessian.matrix()[0], spec.damping, retries) if sweeps else None
                        made = (weights, elimination, scheme, task.scale_dtype, moments, shared)
                        parts = _quantized(*made, damped, sweeps)
                        results.update((name, LinearResult(weight)) for name, weight in zip(alike, parts, strict=True))
                    for name in names:
                        linears[name].weight = nn.Parameter(results[name].weight.dequantize(), requires_grad=False)
                    task.tick(len(results) / len(linears))

            done = _in_one_pass(task, groups, quantize) if fits_at_once(task, task.inputs) else 0
            for stage in _hessians(task, groups[done:]):
                quantize(stage)
        return BlockResult(results, counters={name: float(count) for name, count in counters.items()})

    def _eliminate(self, task: BlockTask, stage: Stage, spec: GPTQSpec, counters: Counter[str]) -> list[Elimination]:
        """The eliminations for the linears that share their inputs, of each group of a stage."""
        matrices = []
        for _, hessian in stage:
            task.sum_(hessian.sum)
            matrices.append(hessian.matrix()[0])
        together = max(columns_together(task.schemes[name]) for names, _ in stage for name in names)
        found = Elimination.of_each(matrices, spec.damping, act_order=spec.act_order, together=together)
        eliminations = []
        for (names, _), matrix, elimination in zip(stage, matrices, found, strict=True):
            facts = {"block": task.index, "linears": ", ".join(names)}
            if elimination is None:
                counters["rounded_to_nearest"] += len(names)
                task.log("hessian_not_positive_definite", **facts)
            elif elimination.retries:
                counters["damping_raised"] += len(names)
                task.log("damping_raised", retries=elimination.retries, **facts)
            eliminations.append(Elimination.none(matrix) if elimination is None else elimination)
        return eliminations


class _Done(Exception):
    """Ends a pass whose every linear is quantized."""


def _in_one_pass(task: BlockTask, groups: Sequence[tuple[str, ...]], quantize: Callable[[Stage], None]) -> int:
    """Quantizes the groups inside a single pass, each when it is called, so that the pass goes on behind it.

    The number of groups that are done: fewer than there are if memory ran out.
    """
    names_of, done = {names[0]: names for names in groups}, list[str]()

    def see(name: str, x: Tensor) -> None:
        hessian = Hessian(x.shape[-1], x.shape[-1], x.dtype, task.device)
        hessian.add(x.flatten(0, -2))
        quantize([(names_of[name], hessian)])
        done.append(name)
        if len(done) == len(groups):
            raise _Done

    with watched({name: task.linear(name) for name in names_of}, see), suppress(_Done, torch.OutOfMemoryError):
        next(replace(task, micro_batch=len(task.inputs)).passes(task.inputs))()
    return len(done)


def _hessians(task: BlockTask, groups: Sequence[tuple[str, ...]]) -> Iterator[Stage]:
    """H of each group's inputs as they are when it is asked for; those of a part's experts are summed in one pass, and
    come as many together as are rounded together.
    """
    for stage in seen_together(task.block, groups):
        width, rows = task.linear(stage[0][0]).in_features, sum(task.linear(n).out_features for n in stage[0])
        for together in batched(stage, max(1, HESSIAN_BYTES // (4 * width * width))):
            firsts = {names[0]: task.linear(names[0]) for names in together}
            sums = {
                name: Hessian(linear.in_features, linear.in_features, linear.weight.dtype, task.device)
                for name, linear in firsts.items()
            }
            if len(stage) == 1:
                ((name, linear),) = firsts.items()
                see_inputs(linear, task.passes(task.inputs), sums[name].add)
            else:
                with watched(firsts, partial(_add, sums)):
                    for forward in task.passes(task.inputs):
                        forward()
            for some in batched(together, max(1, TOGETHER_BYTES // (4 * width * (width + rows)))):
                yield [(names, sums.pop(names[0])) for names in some]


def _add(sums: Mapping[str, Hessian], name: str, x: Tensor) -> None:
    sums[name].add(x.flatten(0, -2))


def batched(stage: Sequence[tuple[str, ...]], size: int) -> Iterator[Sequence[tuple[str, ...]]]:
    """The groups of a stage, at most `size` at a time."""
    for first in range(0, len(stage), size):
        yield stage[first : first + size]


def _quantized(
    weights: Sequence[Tensor],
    elimination: Elimination,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    moments: Tensor,
    joined_amax: Sequence[Tensor | None],
    damped: Tensor | None,
    sweeps: int,
) -> Sequence[QuantizedWeight]:
    """Weights (rows, in) of the same inputs and one scheme, whose rows are rounded together.

    damped   H + lambda I, by which llama.cpp's types descend further, in so many sweeps; None: they do not
    """
    if scheme.form is Form.FLOAT:
        return quantize_floats(weights, elimination, scheme, scale_dtype, moments, joined_amax)
    if scheme.form is Form.BLOCKS:
        weight, order = torch.cat(list(weights)), elimination.order if elimination.static else None
        factor = None if elimination.identity else elimination.factor
        made = compensate(weight, scheme, factor, moments, order, damped, sweeps)
        return split_rows(made, [len(each) for each in weights])
    together = quantize_weight(torch.cat(list(weights)), elimination, scheme, scale_dtype)
    return together.split([len(weight) for weight in weights])


def _side_by_side(
    task: BlockTask, groups: Sequence[tuple[str, ...]], eliminations: Sequence[Elimination]
) -> dict[str, QuantizedWeight]:
    """Linears of experts of one shape and one scheme, rounded in one launch; nothing where that cannot be."""
    kernels = column_kernels(task.device, eliminations[0].factor.dtype)
    of_each = [_by_scheme(task.schemes, names) for names in groups]
    kinds = {
        tuple((scheme, *(task.linear(n).weight.shape for n in names)) for scheme, names in of.items()) for of in of_each
    }
    affine = all(scheme.form is Form.AFFINE for scheme in of_each[0])
    rows = [sum(task.linear(name).out_features for name in names) for names in of_each[0].values()]
    if len(groups) == 1 or len(kinds) > 1 or not affine or not all(map(kernels.lie_side_by_side, rows)):
        return {}
    if any(elimination.identity for elimination in eliminations):
        return {}
    made: dict[str, QuantizedWeight] = {}
    for scheme in of_each[0]:
        alike = [of[scheme] for of in of_each]
        weights = [torch.cat([task.linear(name).weight for name in names]) for names in alike]
        for names, whole in zip(alike, quantize_weights(weights, eliminations, scheme, task.scale_dtype), strict=True):
            made |= zip(names, whole.split([task.linear(name).out_features for name in names]), strict=True)
    return made


def quantize_weight(weight: Tensor, elimination: Elimination, scheme: Scheme, scale_dtype: torch.dtype) -> AffineWeight:
    """The formulas of the module docstring for a weight (rows, in) of any float dtype."""
    return quantize_weights([weight], [elimination], scheme, scale_dtype)[0]


def quantize_weights(
    weights: Sequence[Tensor], eliminations: Sequence[Elimination], scheme: Scheme, scale_dtype: torch.dtype
) -> Sequence[AffineWeight]:
    """The same for several weights of one shape, each behind an elimination of its own, all static or none."""
    dtype, static = eliminations[0].factor.dtype, eliminations[0].static
    whole = grouped(torch.cat(list(weights)).to(dtype), scheme.group_size)
    first, width = affine_grid(GroupRange.of(whole), scheme, scale_dtype), whole.shape[2]
    each = [Columns.of(weight, e.order, e.factor, width) for weight, e in zip(weights, eliminations, strict=True)]
    columns, kernels = each[0] if len(each) == 1 else Columns.side_by_side(each), column_kernels(whole.device, dtype)
    del each
    grid = IntegerGrid.of(first, scheme, scale_dtype, width if not static and width <= COLUMNS else None)
    for batch in _lazy_batches(len(columns.left), COLUMNS if static else width):
        if not static and width > COLUMNS and batch.start % width == 0:
            grid.put(batch.start // width, columns.left[batch.start : batch.start + width])
        kernels.round_integers(columns, batch, grid)
        columns.follow(batch)
    codes = grouped(columns.stored([e.order for e in eliminations]).T, scheme.group_size)
    made = affine_weight(codes, grid.of_rows(first), scheme, scale_dtype, weights[0].dtype)
    return made.split([len(weight) for weight in weights])


def quantize_floats(
    weights: Sequence[Tensor],
    elimination: Elimination,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    moments: Tensor,
    joined_amax: Sequence[Tensor | None],
) -> list[FloatWeight]:
    """The same on a floating-point grid for weights (rows, in) of the same inputs, each with scales of its own.

    moments       of the inputs, (in,), to choose the scales by
    joined_amax   of each, as in `workers.numerics.floats.joined`
    """
    order, factor, element = elimination.order, elimination.factor, element_of(scheme)
    grids = [
        searched_grid(weight.to(factor.dtype), scheme, scale_dtype, amax, moments)
        for weight, amax in zip(weights, joined_amax, strict=True)
    ]
    scale = torch.cat([grid.row_factor() for grid in grids]).to(factor.dtype).T.contiguous()
    columns = Columns.of(torch.cat(list(weights)), order, factor, grids[0].group_size)
    kernels = column_kernels(factor.device, factor.dtype)
    for batch in _lazy_batches(len(order), COLUMNS):
        kernels.round_floats(columns, batch, scale, element)
        columns.follow(batch)
    codes = torch.split(encode(columns.stored([order]).T, element), [len(weight) for weight in weights])
    return [
        replace(grid, codes=own.contiguous(), dtype=weight.dtype)
        for grid, own, weight in zip(grids, codes, weights, strict=True)
    ]


def _lazy_batches(columns: int, width: int) -> Iterator[slice]:
    """Batches of at most `COLUMNS` columns that start with a group, so that groups see all previous updates."""
    stride = max(width, COLUMNS // width * width)
    for first in range(0, columns, stride):
        last = min(first + stride, columns)
        yield from (slice(start, min(start + COLUMNS, last)) for start in range(first, last, COLUMNS))


def _by_scheme(schemes: Mapping[str, Scheme], names: tuple[str, ...]) -> dict[Scheme, list[str]]:
    alike: dict[Scheme, list[str]] = {}
    for name in names:
        alike.setdefault(schemes[name], []).append(name)
    return alike


METHOD = Method(GPTQSpec, GPTQ())
