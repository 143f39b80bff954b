"""Check of a result against the requirements of its request."""

from collections.abc import Collection

from app.domain.request.evaluation_tasks import TaskRequirement
from app.domain.request.job_request import Requirements
from bitwright.errors import RequirementMissed
from bitwright.measured.noise import STANDARD_ERRORS
from bitwright.measured.tasks import TaskFigure
from bitwright.report import GoalReport, Quality, Report, ShippedFigures


def missed_requirement(
    require: Requirements | None, report: Report, formats: Collection[str] | None = None
) -> RequirementMissed | None:
    """The error for the requirements that what ships misses, all in one; None if it keeps them.

    formats   whose checkpoints must keep them; None: all that were stored
    """
    if report.goal is not None and not report.goal.met:
        return _missed_goal(report.goal)
    if require is None or not require.model_dump(exclude_none=True):
        return None
    unloaded = _unloaded(require, report) or _missed_task(require, report)
    if unloaded is not None or not require.model_dump(exclude_none=True, exclude={"loads", "tasks"}):
        return unloaded
    if report.quality is None:
        detail = "the request has requirements, but the job evaluated nothing to hold them against"
        return RequirementMissed(detail, field="evaluation", hint="give an evaluation, or drop require")
    misses = _misses(require, report.quality)
    for way in report.shipped[1:]:
        if way.whole and (formats is None or {*way.checkpoints, way.adapter} & set(formats)):
            known = {name for name, _ in misses}
            unmet = _misses(require, report.quality.model_copy(update=way.figures.model_dump()))
            misses += [(name, f"{text} as {_loaded(way)}") for name, text in unmet if name not in known]
    if not misses:
        return None
    names = ", ".join(name for name, _ in misses)
    return RequirementMissed(
        "; ".join(text for _, text in misses),
        field=f"require.{misses[0][0]}",
        value=names,
        hint=_way_out(require, report),
    )


def _unloaded(require: Requirements, report: Report) -> RequirementMissed | None:
    """The error for the first required runtime that does not load the result, or was not seen to."""
    for runtime in require.loads or ():
        tries = [load for load in report.loads if load.runtime == runtime]
        files = [load for load in tries if load.read == "files"]
        failed = [load for load in files or tries if load.result in ("does_not_load", "differs")]
        if failed:
            detail = f"{runtime.value} {failed[0].version or ''} does not load {failed[0].format}: {failed[0].detail}"
        elif not any(load.result == "loads" for load in files or tries):
            reasons = [load.detail or "" for load in tries]
            detail = f"{runtime.value} was not seen to load the result: {next(iter(reasons), 'nothing was read')}"
        else:
            continue
        hint = "the artifacts are stored; report.loads has the runtime's own words"
        return RequirementMissed(detail, field="require.loads", value=runtime.value, hint=hint)
    return None


def _missed_task(require: Requirements, report: Report) -> RequirementMissed | None:
    """The error for the first figure of a task that is not as required."""
    reports = {task.name: task for task in report.tasks}
    for index, limit in enumerate(require.tasks or ()):
        task = reports.get(limit.task)
        figure = None if task is None else task.figure(limit.metric)
        found = _task_misses(limit, figure)
        if found is not None:
            field, words = found
            return RequirementMissed(
                f"{limit.metric} of {limit.task} {words}",
                field=f"require.tasks.{index}.{field}".rstrip("."),
                value=None if figure is None else figure.value,
                hint="the artifacts are stored; use more bits, a smaller group_size or a method that tunes",
            )
    return None


def _task_misses(limit: TaskRequirement, figure: TaskFigure | None) -> tuple[str, str] | None:
    """Field and words of the limit that a figure misses; None if it keeps all. A NaN keeps none."""
    if figure is None:
        return "metric", "was not measured: no row of the task tells it"
    value, worse = figure.value, figure.worse_by
    if limit.at_least is not None and not value >= limit.at_least:
        return "at_least", f"must be at least {limit.at_least:g}, the result has {value:.6g}"
    if limit.at_most is not None and not value <= limit.at_most:
        return "at_most", f"must be at most {limit.at_most:g}, the result has {value:.6g}"
    if limit.worse_by_at_most is None or worse is None:
        return None
    most = limit.worse_by_at_most
    allowed = STANDARD_ERRORS * (figure.difference_stderr or 0.0) if isinstance(most, str) else most
    if worse <= allowed:
        return None
    said = f"two standard errors ({allowed:.4g})" if isinstance(most, str) else f"{allowed:g}"
    return "worse_by_at_most", f"may be worse by {said}; it is {value:.6g}, and was {figure.original:.6g}"


def _missed_goal(goal: GoalReport) -> RequirementMissed:
    """The error for a goal that what was made does not keep."""
    if goal.goal == "kl":
        made = goal.frontier[goal.chosen].kl
        detail = (
            f"a KL of {goal.limit:g} was asked for, and after {goal.rounds} rounds the closest result has {made:.3g}"
        )
        hint = "the artifacts are stored; allow more rounds, or a larger KL"
        return RequirementMissed(detail, field="quantization.at_most.kl", value=made, hint=hint)
    largest = max(goal.bytes.values(), default=0)
    field = "quantization.fits" if goal.goal == "memory" else "quantization.at_most.bytes"
    detail = f"the weight files take {largest} bytes, and {goal.weight_limit} were asked for"
    return RequirementMissed(detail, field=field, value=largest, hint="the artifacts are stored; allow more")


def _way_out(require: Requirements, report: Report) -> str:
    """A hint: first of all a merge that loses nothing, where the merge is what lost it."""
    adapter = report.adapter
    usual = "the artifacts are stored; use more bits, a smaller group_size or a method that tunes"
    if adapter is None or adapter.before_merge is None or report.quality is None:
        return usual
    if _misses(require, report.quality.model_copy(update=adapter.before_merge.model_dump())):
        return usual
    merge = adapter.merge
    out = "leave round_offset out" if merge is not None and merge.rounded else "leave merge out"
    return f"before its adapter was merged it kept them: {out}, or {usual.partition('; ')[2]}"


def _loaded(way: ShippedFigures) -> str:
    return " or ".join(way.checkpoints) + (f" with {way.adapter}" if way.adapter else "")


def _misses(require: Requirements, quality: Quality) -> list[tuple[str, str]]:
    ratio = quality.perplexity / quality.perplexity_original
    measured: list[tuple[str, float | None, float, bool]] = [
        ("max_perplexity_ratio", require.max_perplexity_ratio, ratio, True),
        ("max_kl_divergence", require.max_kl_divergence, quality.kl_divergence, True),
        *[
            ("max_kl_of_kinds", require.max_kl_of_kinds, kind.kl_divergence, True)
            for kind in quality.kinds
            if not kind.calibrates
        ],
        ("min_top1_agreement", require.min_top1_agreement, quality.top1_agreement, False),
    ]
    # A NaN keeps no requirement: it compares false with everything.
    return [
        (name, f"{name} is {limit:g}, the result has {value:.6g}")
        for name, limit, value, upper in measured
        if limit is not None and not (value <= limit if upper else value >= limit)
    ]
