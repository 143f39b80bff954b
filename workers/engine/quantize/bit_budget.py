"""A budget of bits: what each linear's choices would cost in error, and the choices that cost least together.

For the methods that do not say themselves what they weigh, the error of a choice is that of the linear's output when
its weight is rounded to nearest,

    e = sum over tokens, outputs of (sum_j (w_hat_ij - w_ij)^2 x_j^2)  /  sum over tokens, outputs of (W x)_i^2

the diagonal of the second moments only, relative to the output so that linears of different scale can be added. It
comes from one pass of the calibration text through the original blocks. Linears that read the same input (q, k, v;
gate, up) get one width, since runtimes join them: their choices are one item.

The budget counts code bits, scales and zero points of the blocks' quantized linears, those with an override too. It
does not count low-rank factors, or what a linear has but once. Over the model it counts besides what the checkpoint
stores of everything else: embeddings, head and norms.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from app.domain.methods import BitBudget, Candidate, Form, WeightSpec
from app.domain.methods.module_rules import over_budget
from bitwright.errors import NumericalFailure
from bitwright.report import AllocatedLinear, AllocationReport
from workers.contracts.blocks import Fisher, ScoreTask, ScoringMethod
from workers.engine.device.process_group import SINGLE_PROCESS, ProcessGroup
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.quantize.activations import Activations, second_moments, sum_moments
from workers.engine.quantize.registry import method_of
from workers.engine.quantize.stored_sizes import kept_bytes, parameters
from workers.engine.seeds import derived_seed
from workers.methods.rtn import round_to_scheme
from workers.numerics import normal_float
from workers.numerics.allocation import Allocation, allocate


@dataclass(frozen=True)
class Scoring:
    """Scores of the choices of a budget.

    activations   of the calibration text before block 0, used up; None where a method scores weights alone
    processes     have other sequences of the text; all of them find the same errors
    """

    model: StreamedModel
    spec: WeightSpec
    scale_dtype: torch.dtype
    seed: int
    activations: Activations | None
    fisher: Mapping[str, Fisher]
    tick: Callable[[float], None]
    processes: ProcessGroup = SINGLE_PROCESS

    def candidates(self) -> dict[str, tuple[Candidate, ...]]:
        """Of every quantized linear of the blocks, by full name."""
        all_choices = {n: self.spec.candidates(n, m.in_features) for n, m in self.model.linears().items()}
        return {name: choices for name, choices in all_choices.items() if choices and name != self.model.layout.head}

    def errors(self, candidates: Mapping[str, tuple[Candidate, ...]]) -> dict[str, list[float]]:
        """Of every choice of every linear.

        Raises:
            NumericalFailure: one of them is not finite.
        """
        by_linear: dict[str, list[float]] = {}
        for index in range(len(self.model.blocks)):
            prefix = self.model.layout.block(index)
            with self.model.loaded(prefix):
                names = [n for n in self.model.block_linears(index) if f"{prefix}.{n}" in candidates]
                of_block = self._block_errors(index, {n: candidates[f"{prefix}.{n}"] for n in names})
            by_linear |= {f"{prefix}.{name}": errors for name, errors in of_block.items()}
            self.tick((index + 1) / len(self.model.blocks))
        for name, errors in by_linear.items():
            if not all(map(_is_finite, errors)):
                hint = "leave the widths out of choices that overflow the model's dtype, or give bits as a number"
                field = f"quantization.{self.spec.field_of_choices()}"
                raise NumericalFailure(f"{name}: a choice's error is not finite", field=field, hint=hint)
        return by_linear

    def _block_errors(self, index: int, candidates: Mapping[str, tuple[Candidate, ...]]) -> dict[str, list[float]]:
        linears = self.model.block_linears(index)
        method = method_of(self.spec)
        if isinstance(method, ScoringMethod):
            prefix, seed = self.model.layout.block(index), derived_seed(self.seed, index)
            return {
                name: method.candidate_errors(
                    ScoreTask(
                        linears[name].weight, choices, self.fisher.get(f"{prefix}.{name}"), self.scale_dtype, seed
                    ),
                    self.spec,
                )
                for name, choices in candidates.items()
            }
        assert self.activations is not None  # noqa: S101 - for the type checker; a budget makes the job read its text
        watched = {name: linears[name] for name in candidates}
        with second_moments(watched) as moments, output_energies(watched) as energies:
            self.activations.advance_original(index, self.model.blocks[index])
            sum_moments(self.processes, moments, watched)
            nothing = torch.zeros((), dtype=torch.float64, device=self.model.device)
            self.processes.sum_(*(energies.setdefault(name, nothing.clone()) for name in watched))
        codebook = Form.CODEBOOK in self.spec.forms()
        return {
            name: [
                float(output_error(linears[name].weight, choice, moments[name], self.scale_dtype, codebook=codebook))
                / max(float(energies[name]), torch.finfo(torch.float64).tiny)
                for choice in choices
            ]
            for name, choices in candidates.items()
        }


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")


@torch.no_grad()
def output_error(
    weight: Tensor, choice: Candidate, moments: Tensor, scale_dtype: torch.dtype, *, codebook: bool
) -> Tensor:
    """sum_ij (w_hat_ij - w_ij)^2 m_j, fp64 (), for second moments m (in,)."""
    working = weight.float()
    if codebook:
        rounded = normal_float.quantize(working, choice.scheme, scale_dtype, torch.float32).dequantize()
    else:
        rounded = round_to_scheme(working, choice.scheme, scale_dtype).dequantize()
    return (rounded - working).square().sum(0, dtype=torch.float64) @ moments.double()


@contextmanager
def output_energies(linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """Sum over tokens and outputs of each linear's squared output, fp64 (), while the context lasts."""
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def add(module: nn.Module, arguments: object, output: Tensor) -> None:  # noqa: ARG001 - a hook's signature
            energy = output.detach().float().square().sum(dtype=torch.float64)
            sums[name] = sums[name] + energy if name in sums else energy

        return add

    handles = [linear.register_forward_hook(watch(name)) for name, linear in linears.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def spend(scoring: Scoring, budget: BitBudget) -> tuple[dict[str, Candidate], AllocationReport]:
    """The choice of every quantized linear of the blocks, by full name.

    Raises:
        InvalidRequest: even the cheapest choices take more than the budget.
        NumericalFailure: an error is not finite.
    """
    started = time.perf_counter()
    candidates = scoring.candidates()
    errors = scoring.errors(candidates)
    linears = scoring.model.linears()
    shapes = {name: (linears[name].out_features, linears[name].in_features) for name in candidates}
    scale_bits = scoring.scale_dtype.itemsize * 8
    costs = {n: [c.stored_bits(shapes[n], scale_bits) for c in choices] for n, choices in candidates.items()}
    weights = sum(out * width for out, width in shapes.values())
    scored = time.perf_counter()
    kept, counted = 0, weights
    if budget.over == "model":
        kept, counted = 8 * kept_bytes(scoring.model, scoring.spec, scale_bits), parameters(scoring.model)
    limit = int(budget.average * counted) - kept
    solved = solve(candidates, costs, errors, limit, scoring.model.input_groups())
    if solved is None:
        raise over_budget(budget.average, (kept + sum(map(min, costs.values()))) / counted, budget.over)
    allocation, chosen = solved
    ended = time.perf_counter()
    report = AllocationReport(
        average=budget.average,
        over=budget.over,
        reached=(kept + allocation.cost) / max(1, counted),
        error=allocation.error,
        gap=allocation.gap,
        seconds=ended - started,
        solver_seconds=ended - scored,
        linears=tuple(
            described(name, candidates[name][x], costs[name][x] / (shapes[name][0] * shapes[name][1]))
            for name, x in chosen.items()
        ),
    )
    return {name: candidates[name][x] for name, x in chosen.items()}, report


def solve(
    candidates: Mapping[str, tuple[Candidate, ...]],
    costs: Mapping[str, Sequence[int]],
    errors: Mapping[str, Sequence[float]],
    limit: int,
    groups: Sequence[Sequence[str]] = (),
) -> tuple[Allocation, dict[str, int]] | None:
    """The allocation within `limit` bits, and each linear's choice by its full name; None if nothing is so small."""
    items = list(tied(candidates, groups))
    item_costs = [[sum(each) for each in zip(*(costs[name] for name in item), strict=True)] for item in items]
    item_errors = [[sum(each) for each in zip(*(errors[name] for name in item), strict=True)] for item in items]
    if sum(map(min, item_costs)) > limit:
        return None
    allocation = allocate(item_costs, item_errors, limit)
    return allocation, {name: x for item, x in zip(items, allocation.choices, strict=True) for name in item}


def tied(candidates: Mapping[str, tuple[Candidate, ...]], groups: Sequence[Sequence[str]]) -> Iterator[tuple[str, ...]]:
    """The linears whose choices are one item: those of a group that choose among the same widths.

    groups   full names of linears that read the same input

    A configuration of more than a width (with a second level for the maxima) is each linear's own.
    """
    others = {name: [other for other in group if other != name] for group in groups for name in group}
    done: set[str] = set()
    for name, choices in candidates.items():
        if name in done:
            continue
        together = [name]
        if all(choice.absmax is None for choice in choices):
            alike = (other for other in others.get(name, ()) if other not in done)
            together += [other for other in alike if _widths(candidates.get(other, ())) == _widths(choices)]
        done.update(together)
        yield tuple(together)


def _widths(choices: Sequence[Candidate]) -> list[tuple[int, str | None]]:
    return [(choice.scheme.bits, choice.scheme.name) for choice in choices]


def described(name: str, choice: Candidate, bits: float) -> AllocatedLinear:
    """A linear's choice as the report has it."""
    second = choice.absmax
    return AllocatedLinear(
        name=name,
        bits=choice.scheme.bits,
        group_size=choice.scheme.group_size,
        scheme=choice.scheme.name,
        bits_per_weight=bits,
        absmax=None if second is None else f"{second.bits} bits, {second.dtype}, {second.superblock}",
    )
