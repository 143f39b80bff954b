"""Report of the way to a goal: the points that were looked at, the one that was made, what is written of it."""

from collections.abc import Sequence
from typing import Literal

from app.domain.methods import AtMost, Fits, WeightSpec
from bitwright.frontier import FrontierPoint
from bitwright.report import AllocationReport, GoalReport, TextReport
from workers.engine.goal.frontier import Point, Scores
from workers.engine.goal.limits import Limits
from workers.engine.goal.progress import Progress
from workers.engine.goal.search import Curve
from workers.engine.job import Job
from workers.engine.quantize.bit_budget import described
from workers.engine.quantize.candidates import shapes_of


def allocation_report(scores: Scores, point: Point, job: Job, seconds: float) -> AllocationReport:
    """Schemes of all linears at a point."""
    shapes = shapes_of(job.model, point.choices)
    scale_bits = job.plan.scale_dtype.itemsize * 8
    chosen = {name: scores.candidates[name][x] for name, x in point.choices.items()}
    bits = {name: choice.stored_bits(shapes[name], scale_bits) for name, choice in chosen.items()}
    weights = {name: out * width for name, (out, width) in shapes.items()}
    return AllocationReport(
        average=None,
        reached=sum(bits.values()) / max(1, sum(weights.values())),
        error=point.error,
        gap=point.gap,
        seconds=seconds,
        solver_seconds=0.0,
        linears=tuple(described(name, choice, bits[name] / weights[name]) for name, choice in chosen.items()),
    )


def points_report(points: Sequence[Point], limits: Limits, curve: Curve) -> tuple[FrontierPoint, ...]:
    """The frontier as it is known."""
    weights = max(1, limits.weights_chosen)
    return tuple(
        FrontierPoint(
            bytes=limits.kept + -(-point.bits // 8),
            bits_per_weight=point.bits / weights,
            error=point.error,
            kl_predicted=curve.predicted(index),
            kl_rounded=curve.rounded.get(index),
            kl=curve.made.get(index),
        )
        for index, point in enumerate(points)
    )


def uniform_sizes(limits: Limits) -> tuple[FrontierPoint, ...]:
    """Sizes with the smallest choice everywhere, the second smallest, and so on: before anything is scored."""
    rising = [sorted(costs) for costs in limits.costs.values()]
    steps = max(map(len, rising), default=0)
    totals = sorted({sum(costs[min(step, len(costs) - 1)] for costs in rising) for step in range(steps)})
    weights = max(1, limits.weights_chosen)
    return tuple(FrontierPoint(bytes=limits.kept + -(-bits // 8), bits_per_weight=bits / weights) for bits in totals)


def goal_report(
    spec: WeightSpec,
    limits: Limits,
    points: tuple[FrontierPoint, ...],
    index: int,
    curve: Curve,
    text: TextReport | None,
    progress: Progress,
    *,
    exact: bool,
) -> GoalReport:
    """The way to the point that was made; sizes are told by the files, once they are written.

    exact   whether the method makes what was measured by rounding
    """
    goal = spec.goal()
    kind: Literal["kl", "bytes", "memory"] = "memory" if isinstance(goal, Fits) else "bytes"
    limit: float = goal.memory if isinstance(goal, Fits) else limits.weights
    met, misses = True, None
    if isinstance(goal, AtMost) and goal.kl is not None:
        known = curve.rounded if exact else curve.made
        kind, limit, met = "kl", goal.kl, known[index] <= limits.holds
        misses = None if index == 0 else known.get(index - 1, 0.0) > limits.holds
    return GoalReport(
        goal=kind,
        limit=limit,
        weight_limit=None if kind == "kl" else limits.weights,
        cache_bytes=limits.cache,
        text=text,
        margin=limits.margin if kind == "kl" else None,
        frontier=points,
        chosen=index,
        rounds=len(progress.made),
        met=met,
        next_smaller_misses=misses,
        seconds=progress.seconds,
    )


def with_files(report: GoalReport | None, sizes: dict[str, int]) -> GoalReport | None:
    """The report once the files are there.

    sizes   bytes of weight files, by packed checkpoint that was asked for
    """
    if report is None:
        return None
    met = report.met and (report.weight_limit is None or all(size <= report.weight_limit for size in sizes.values()))
    return report.model_copy(update={"bytes": sizes, "met": met})
