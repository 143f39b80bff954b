"""A budget of bits: what each linear's choices would cost in error, and the choices that cost least together.

The error of a choice is what a method says of it that weighs its choices itself (`ScoringMethod`), or else the distance
that rounding to nearest is predicted to add to the whole model's (`workers.engine.quantize.scores`). Linears that read
the same input (q, k, v; gate, up) get one width, since runtimes join them: their choices are one item.

The budget counts code bits, scales and zero points of the blocks' quantized linears, those with an override too. It
does not count low-rank factors, or what a linear has but once. Over the model it counts besides what the checkpoint
stores of everything else: embeddings, head and norms. Where the request leaves embeddings and head to it, they are
chosen like the linears; in a file for llama.cpp every linear has a type of its own
(`workers.engine.quantize.candidates`).
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from app.domain.methods import BitBudget, Candidate, WeightSpec
from app.domain.methods.module_rules import over_budget
from bitwright.report import AllocatedLinear, AllocationReport
from workers.contracts.blocks import Fisher, ScoreTask, ScoringMethod
from workers.engine.job import Job
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.quantize.candidates import candidates_of, costs_of, joined_choices, shapes_of
from workers.engine.quantize.scores import demand_finite
from workers.engine.quantize.stored_sizes import kept_bytes, parameters
from workers.engine.seeds import derived_seed
from workers.numerics.allocation import Allocation, allocate

Errors = Callable[[Mapping[str, tuple[Candidate, ...]]], Mapping[str, Sequence[float]]]
"""The errors of every choice of every linear, from the choices; may raise NumericalFailure."""


@dataclass(frozen=True)
class Scoring:
    """The scores that a method gives its own choices, from the weights and Fisher information."""

    model: StreamedModel
    spec: WeightSpec
    method: ScoringMethod[Any]
    scale_dtype: torch.dtype
    seed: int
    fisher: Mapping[str, Fisher]
    tick: Callable[[float], None]

    def errors(self, candidates: Mapping[str, tuple[Candidate, ...]]) -> dict[str, list[float]]:
        """Of every choice of every linear.

        Raises:
            NumericalFailure: one of them is not finite.
        """
        by_linear: dict[str, list[float]] = {}
        for index in range(len(self.model.blocks)):
            prefix, seed = self.model.layout.block(index), derived_seed(self.seed, index)
            with self.model.loaded(prefix):
                linears = {f"{prefix}.{name}": linear for name, linear in self.model.block_linears(index).items()}
                tasks = {
                    full: ScoreTask(linear.weight, candidates[full], self.fisher.get(full), self.scale_dtype, seed)
                    for full, linear in linears.items()
                    if full in candidates
                }
                errors = self.method.candidate_errors(list(tasks.values()), self.spec)
                by_linear.update(zip(tasks, errors, strict=True))
            self.tick((index + 1) / len(self.model.blocks))
        demand_finite(by_linear, self.spec)
        return by_linear


def spend(job: Job, budget: BitBudget, errors_of: Errors) -> tuple[dict[str, Candidate], AllocationReport]:
    """The choice of everything that is chosen for, by full name.

    Raises:
        InvalidRequest: even the cheapest choices take more than the budget.
        NumericalFailure: an error is not finite.
    """
    started, model = time.perf_counter(), job.model
    candidates = candidates_of(model, job.spec)
    errors, shapes = errors_of(candidates), shapes_of(model, candidates)
    scale_bits = job.plan.scale_dtype.itemsize * 8
    costs = costs_of(model, candidates, None, scale_bits)
    weights = sum(out * width for out, width in shapes.values())
    scored = time.perf_counter()
    kept, counted = 0, weights
    if budget.over == "model":
        kept, counted = 8 * kept_bytes(model, job.schemes, candidates, scale_bits), parameters(model)
    limit = int(budget.average * counted) - kept
    solved = solve(candidates, costs, errors, limit, joined_choices(model, job.request.formats, candidates))
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
