"""AWQ (Lin et al., arXiv:2306.00978): scales that spare the columns of large inputs, then clipped ranges.

Rounding errors of a column count as much as its inputs are large. Before rounding, column j is multiplied by s_j and
its input divided by it, for the linears of a block that share an input (q, k, v; gate, up) or have one alone (o, down):

    s = x^alpha / sqrt(max x^alpha * min x^alpha),   x = mean of abs(X) over tokens,   alpha in {0, 1/20, ..., 19/20}
    min over alpha of  || f(X; Q(W s) / s) - f(X; W) ||^2

f is the submodule of the block around those linears (attention for q, k, v; the MLP for gate, up; o and down
themselves), Q rounds to nearest (`workers.numerics.affine`), and alpha = 0 is s = 1. 1/s is folded into the source of
the input, a norm's weight or the rows of the previous linear, so that nothing is computed at run time and the
floating-point block does not change. Then each group's range is clipped to +-m, for linears whose output does more than
decide a softmax:

    m = c * max abs(W s),   c in {1, 19/20, ..., 11/20},   min over c of  (w_hat - w) H_g (w_hat - w)^T

with H_g the group's diagonal block of H = 2 X^T X (`workers.numerics.hessian`): the error of the group's own products.
On schemes of FP8 and FP4 (`floats.float_grids`) the stored scales near the usual one take the place of c; on
llama.cpp's block types (`blocks.search`) their search does, there and in Q, weighted by the diagonal of H alone.

| symbol | variable | shape |
|---|---|---|
| x | `magnitude` | (in,), fp32 |
| s | `scale` | (in,), fp32 |
| H_g of all groups | `hessian` | (groups, G, G), fp32 |

Cost: a forward pass of the block; over `search_samples` sequences four more, and twenty of each submodule; for
clipping, ten times out*in*G operations.

Different from the paper's code: s is taken back from the norm's weight as its dtype holds it, so that the norm's
rounding is no error; H_g is of all tokens, where the code takes 512 of them; an input column that is 0 for all tokens
counts as a mean one. Scales that would move through a linear that is not quantized stay 1, and so do those behind v if
it has fewer outputs than o has inputs (grouped queries); both are counted. Left out: scales from weights as well as
inputs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from app.domain.methods import AWQSpec, Form, Scheme
from app.domain.methods.named_schemes import ScaleType
from workers.contracts.blocks import BlockTask, Fold, Method
from workers.contracts.experts import all_called
from workers.contracts.results import BlockResult
from workers.contracts.whole_passes import fits_at_once
from workers.numerics.affine import Grid, GroupRange, affine_grid, affine_weight, grouped, round_to_grid
from workers.numerics.blocks.search import search_blocks
from workers.numerics.divergence import squared_distance
from workers.numerics.floats.float_grids import quantize, searched
from workers.numerics.floats.joined import shares_scale
from workers.numerics.hessian import Hessian, input_groups, watched
from workers.numerics.quantized import FloatWeight, LinearResult, Number, QuantizedWeight, Scaling

STEPS = 20
"""Number of steps in the interval of alpha, and in that of c."""
SMALLEST_CLIP = 0.5
"""Lower limit of c, exclusive."""
ELEMENTS_AT_ONCE = 1 << 28
"""Of weights that a GPU rounds together for several candidates, in fp32."""


class AWQ:
    @torch.no_grad()
    def quantize_block(self, task: BlockTask, spec: AWQSpec) -> BlockResult:
        inputs = task.inputs if spec.quantized_inputs else task.inputs_fp
        observed = observe(task, inputs)
        folds = [fold for fold in task.folds if _applies(task, fold)]
        scalings = dict.fromkeys(task.schemes, Scaling())
        parameters: dict[str, Tensor] = {}
        for done, fold in enumerate(folds, start=1):
            magnitude = observed[fold.linears[0]].magnitude()
            wanted = search_scale(task, fold, magnitude, inputs[: spec.search_samples])
            scale, changed = settle(task.block, fold, wanted)
            parameters |= changed
            scalings |= {name: replace(scalings[name], columns=scale) for name in fold.linears}
            if fold.source in scalings:
                scalings[fold.source] = replace(scalings[fold.source], rows=scale.unsqueeze(1))
            task.tick(0.9 * done / len(folds))
        scaled = {name: _scaled(task, name, scaling) for name, scaling in scalings.items()}
        amax = task.joined_amax(scaled) if any(map(shares_scale, task.schemes.values())) else {}
        del scaled
        unclipped = {name for fold in task.folds for name in fold.unclipped}
        results = {}
        for name, scaling in scalings.items():
            clips = spec.clip_search and name not in unclipped and _is_searched(task.schemes[name])
            hessian = observed[name].hessian(task.schemes[name]) if clips else None
            weight = quantize_weight(task, name, scaling, hessian, amax.get(name))
            results[name] = LinearResult(weight, scaling=scaling)
        moved, kept = float(len(folds)), float(len(task.folds) - len(folds))
        counters: dict[str, Number] = {"scales_moved": moved, "scales_kept": kept}
        return BlockResult(results, counters=counters, parameters=parameters)


@dataclass
class Observed:
    """Statistics of an input, for the linears that share it: sums of |x|, and H in blocks of each group width."""

    total: Tensor
    hessians: dict[int, Hessian]
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        """Adds inputs (tokens, in)."""
        self.total += x.abs().sum(0, dtype=self.total.dtype)
        self.tokens += len(x)
        for hessian in self.hessians.values():
            hessian.add(x)

    def magnitude(self) -> Tensor:
        """x (in,); columns that were always 0 get the mean of all columns."""
        mean = self.total / max(1, self.tokens)
        return torch.where(mean > 0, mean, mean.mean().clamp(min=torch.finfo(mean.dtype).tiny))

    def hessian(self, scheme: Scheme) -> Tensor:
        """The diagonal blocks of H for the groups of a scheme, (groups, G, G)."""
        return self.hessians[scheme.width(len(self.total))].matrix()


def observe(task: BlockTask, inputs: Tensor) -> dict[str, Observed]:
    """Statistics of the linears' inputs in forward passes of the block over `inputs`, by name."""
    linears = {name: task.linear(name) for name in task.schemes}
    observed: dict[str, Observed] = {}
    firsts = {}
    with all_called(task.block):
        groups = input_groups(linears, next(task.passes(inputs[:1])))
    for names in groups:
        first = linears[names[0]]
        columns, dtype = first.in_features, torch.promote_types(first.weight.dtype, torch.float32)
        widths = {task.schemes[name].width(columns) for name in names if _is_searched(task.schemes[name])}
        hessians = {width: Hessian(columns, width, dtype, task.device) for width in widths}
        shared = Observed(torch.zeros(columns, dtype=dtype, device=task.device), hessians)
        observed |= dict.fromkeys(names, shared)
        firsts[names[0]] = first
    with watched(firsts, lambda name, x: observed[name].add(x.flatten(0, -2))):
        for forward in task.passes(inputs):
            forward()
    for name in firsts:
        task.sum_(observed[name].total, *(hessian.sum for hessian in observed[name].hessians.values()))
        observed[name].tokens = task.total(observed[name].tokens)
    return observed


def search_scale(task: BlockTask, fold: Fold, magnitude: Tensor, inputs: Tensor) -> Tensor:
    """The s of the module docstring for one fold, (in,), by the error on the block's `inputs`."""
    candidates = torch.stack([_scale(magnitude, step / STEPS) for step in range(STEPS)])
    whole = replace(task, micro_batch=len(inputs)) if fits_at_once(task, inputs) else task
    try:
        errors = _errors(whole, fold, candidates, inputs)
    except torch.OutOfMemoryError:
        errors = None
    # Outside the except clause, which holds the tensors of the failed search.
    errors = _errors(task, fold, candidates, inputs) if errors is None else errors
    task.sum_(errors)
    # A choice of one row, which is made where the errors are: nobody waits for the device.
    return candidates.index_select(0, errors.nan_to_num(torch.inf).argmin().view(1))[0]


def _errors(task: BlockTask, fold: Fold, candidates: Tensor, inputs: Tensor) -> Tensor:
    """Squared errors of a fold's part on the block's `inputs` for each s of `candidates` (count, in), fp64 (count,)."""
    calls = _calls(task, inputs, task.block.get_submodule(fold.measured))
    targets = [call() for call in calls]
    errors = torch.zeros(len(candidates), dtype=torch.float64, device=candidates.device)
    with task.restored():
        for step, rounded in enumerate(_rounded(task, fold.linears, candidates)):
            for name, weight in rounded.items():
                task.linear(name).weight = nn.Parameter(weight, requires_grad=False)
            for call, target in zip(calls, targets, strict=True):
                errors[step] += squared_distance(call(), target)
    return errors


def _rounded(task: BlockTask, names: Sequence[str], candidates: Tensor) -> Iterator[dict[str, Tensor]]:
    """Q(W s) / s of some linears for one s after another, of which as many are rounded at once as `_together` says."""
    weights, schemes = {name: task.linear(name).weight for name in names}, task.schemes
    alike = all(schemes[name].form is Form.AFFINE for name in names)
    shared = any(shares_scale(schemes[name]) for name in names)
    for scales in torch.split(candidates, _together(weights.values()) if alike else 1):
        by_name = {name: scales.unsqueeze(1) * weight.to(scales.dtype) for name, weight in weights.items()}
        amax = task.joined_amax({name: moved[0] for name, moved in by_name.items()}) if shared else {}
        for name, moved in by_name.items():
            moments = _scaled_moments(task, name, scales[0])
            rounded = _round(moved.flatten(0, 1), schemes[name], task.scale_dtype, amax.get(name), moments)
            by_name[name] = (rounded.view_as(moved) / scales.unsqueeze(1)).to(weights[name].dtype)
        yield from ({name: made[number] for name, made in by_name.items()} for number in range(len(scales)))


def _together(weights: Iterable[Tensor]) -> int:
    """Candidates whose weights are computed at once: what fits a GPU; elsewhere one, which stays in a cache."""
    weights = list(weights)
    return max(1, ELEMENTS_AT_ONCE // sum(w.numel() for w in weights)) if weights[0].is_cuda else 1


def settle(block: nn.Module, fold: Fold, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Divides the output of a fold's source by `scale`; returns the parameters that change, and s as they can hold it.

    A norm's weight changes; of a linear, whose rows are still to be rounded, only the bias.
    """
    source, changed = block.get_submodule(fold.source), {}
    if not isinstance(source, nn.Linear):
        weight = source.get_parameter("weight")
        factor = weight.to(scale.dtype) + fold.offset
        stored = (factor / scale - fold.offset).to(weight.dtype)
        exact = factor / (stored.to(scale.dtype) + fold.offset)
        sound = exact.isfinite() & (exact > 0)
        scale = torch.where(sound, exact, 1)
        changed[f"{fold.source}.weight"] = torch.where(sound, stored, weight)
    bias = getattr(source, "bias", None)
    if bias is not None:
        changed[f"{fold.source}.bias"] = (bias.to(scale.dtype) / scale).to(bias.dtype)
    return scale, changed


def _is_searched(scheme: Scheme) -> bool:
    """True if its ranges can be clipped, or its scales chosen: not those of FP8, where that gains nothing."""
    return scheme.form is not Form.FLOAT or (scheme.row is not None and scheme.row.scale is not ScaleType.FLOAT)


def _scaled(task: BlockTask, name: str, scaling: Scaling) -> Tensor:
    """A linear's weight with the scales in it, fp32 or fp64 (out, in)."""
    weight = task.linear(name).weight
    return scaling.apply(weight.to(torch.promote_types(weight.dtype, torch.float32)))


def quantize_weight(
    task: BlockTask, name: str, scaling: Scaling, hessian: Tensor | None, joined_amax: Tensor | None = None
) -> QuantizedWeight:
    """Rounds a linear with the scales in it; `hessian` (groups, G, G) clips the groups' ranges, None leaves them.

    joined_amax   of weights with the scales in them, as in `workers.numerics.floats.joined`
    """
    weight, scheme, w = task.linear(name).weight, task.schemes[name], _scaled(task, name, scaling)
    if hessian is not None:
        # A scaled column is multiplied by an input divided by s.
        s = torch.ones(w.shape[1]).to(w) if isinstance(scaling.columns, float) else scaling.columns
        s = s.view(len(hessian), -1)
        hessian = hessian / (s.unsqueeze(1) * s.unsqueeze(2))
    if scheme.form is Form.BLOCKS:
        moments = (
            _scaled_moments(task, name, scaling.columns) if hessian is None else hessian.diagonal(0, 1, 2).flatten()
        )
        return replace(search_blocks(w, scheme, moments), dtype=weight.dtype)
    if scheme.form is Form.FLOAT:
        return _quantize_float(w, scheme, task.scale_dtype, hessian, joined_amax, weight.dtype)
    w = grouped(w, scheme.group_size)
    ranges = GroupRange.of(w) if hessian is None else clip_ranges(w, hessian, scheme, task.scale_dtype)
    grid = affine_grid(ranges, scheme, task.scale_dtype)
    return affine_weight(round_to_grid(w, grid)[0], grid, scheme, task.scale_dtype, weight.dtype)


def _quantize_float(
    w: Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    hessian: Tensor | None,
    joined_amax: Tensor | None,
    dtype: torch.dtype,
) -> FloatWeight:
    """The weight (out, in), scales in it, on a floating-point grid, with the best scales by the groups' products."""

    def cost(error: Tensor) -> Tensor:
        error = error.transpose(0, 1)
        return ((error @ hessian.to(error.dtype)) * error).sum(-1).T if hessian is not None else error

    quantized = searched(w, scheme, scale_dtype, joined_amax, cost=None if hessian is None else cost)
    return replace(quantized, dtype=dtype)


def clip_ranges(w: Tensor, hessian: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> GroupRange:
    """The range +-m within its own of each group of `w` (out, groups, G) with the least (w_hat - w) H_g (w_hat - w)^T.

    hessian   (groups, G, G), of the inputs that `w` is multiplied by
    """
    full, shares = GroupRange.of(w), [1 - step / STEPS for step in range(round(STEPS * (1 - SMALLEST_CLIP)))]
    widest = torch.maximum(-full.low, full.high)
    best, least = full, torch.full_like(widest, torch.inf)
    for some in torch.split(w.new_tensor(shares), _together([w])):
        m = widest * some.view(-1, 1, 1)
        tried = GroupRange(torch.maximum(full.low, -m), torch.minimum(full.high, m))
        grid = affine_grid(tried, scheme, scale_dtype)
        errors = (_dequantize(round_to_grid(w, grid)[0], grid) - w).flatten(0, 1).transpose(0, 1)
        costs = ((errors @ hessian) * errors).sum(-1).T.reshape(m.shape)
        for cost, low, high in zip(costs, tried.low, tried.high, strict=True):
            better = cost < least
            least = torch.where(better, cost, least)
            best = GroupRange(torch.where(better, low, best.low), torch.where(better, high, best.high))
    return best


def _applies(task: BlockTask, fold: Fold) -> bool:
    """True if all linears of a fold are quantized and the source has one number per column of them."""
    if not set(fold.linears) <= task.schemes.keys():
        return False
    source = task.block.get_submodule(fold.source)
    is_linear = isinstance(source, nn.Linear)
    if is_linear and fold.source not in task.schemes:
        return False
    columns = task.linear(fold.linears[0]).in_features
    return not is_linear or task.linear(fold.source).out_features == columns


def _scale(magnitude: Tensor, alpha: float) -> Tensor:
    scale = magnitude.pow(alpha).clamp(min=1e-4)
    return scale / (scale.max() * scale.min()).sqrt()


def _scaled_moments(task: BlockTask, name: str, scale: Tensor | float) -> Tensor | None:
    """Second moments of the inputs of a column, divided by s as they are, (in,), where they are known."""
    moments = task.second_moments.get(name)
    return None if moments is None else moments / (scale * scale)


def _round(
    weight: Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    joined_amax: Tensor | None,
    moments: Tensor | None,
) -> Tensor:
    """Q: rounded to nearest, (out, in), in the dtype given; moments weigh the search of llama.cpp's types."""
    if scheme.form is Form.BLOCKS:
        return search_blocks(weight, scheme, moments).dequantize()
    if scheme.form is Form.FLOAT:
        return quantize(weight, scheme, scale_dtype, joined_amax).dequantize()
    w = grouped(weight, scheme.group_size)
    grid = affine_grid(GroupRange.of(w), scheme, scale_dtype)
    return _dequantize(round_to_grid(w, grid)[0], grid).view_as(weight)


def _dequantize(codes: Tensor, grid: Grid) -> Tensor:
    steps = codes if grid.zero is None else codes - grid.zero.unsqueeze(-1)
    return steps * grid.scale.unsqueeze(-1)


def _calls(task: BlockTask, inputs: Tensor, submodule: nn.Module) -> list[Callable[[], Tensor]]:
    """The calls of one of the block's submodules in forward passes over `inputs`, to be repeated."""
    calls: list[Callable[[], Tensor]] = []

    def note(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        calls.append(partial(_call, module, *arguments, **keywords))

    handle = submodule.register_forward_pre_hook(note, with_kwargs=True)
    try:
        for forward in task.passes(inputs):
            forward()
    finally:
        handle.remove()
    return calls


def _call(submodule: nn.Module, *arguments: Any, **keywords: Any) -> Tensor:
    output = submodule(*arguments, **keywords)
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


METHOD = Method(AWQSpec, AWQ())
