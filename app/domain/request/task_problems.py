"""Rules on tasks of an evaluation and on limits of their figures: each limit names a task and a figure that it has."""

from collections.abc import Sequence

from app.domain.request.evaluation_tasks import EvaluationTask, TaskRequirement
from bitwright.errors import FieldProblem

COMPARED_ALONE = "same_tokens"
"""The figure that the original has no value of, as it is the comparison with it."""


def task_problems(
    tasks: Sequence[EvaluationTask], required: Sequence[TaskRequirement] | None, computes: bool
) -> list[FieldProblem]:
    """Limits on what no task measures, and tasks of a job that asks no model.

    computes   False: the job writes other formats of an earlier result
    """
    problems = []
    if tasks and not computes:
        detail = "an export computes nothing: ask the job that it is of, or leave tasks out"
        problems.append(FieldProblem(field="evaluation.tasks", code="conflicting_fields", detail=detail))
    by_name = {task.name: task for task in tasks}
    for index, limit in enumerate(required or ()):
        problem = _problem(by_name, limit)
        if problem is not None:
            field, detail, value = problem
            field = f"require.tasks.{index}.{field}".rstrip(".")
            problems.append(FieldProblem(field=field, code="conflicting_fields", detail=detail, value=value))
    return problems


def _problem(tasks: dict[str, EvaluationTask], limit: TaskRequirement) -> tuple[str, str, str | None] | None:
    """Field, words and value of what is wrong with a limit."""
    task = tasks.get(limit.task)
    if task is None:
        return "task", f"evaluation.tasks has no such task; it has: {', '.join(tasks) or 'none'}", limit.task
    if limit.metric not in task.metrics:
        known = ", ".join(task.metrics)
        return "metric", f"a task of kind {task.kind.value} has no such figure; it has: {known}", limit.metric
    if limit.at_least is None and limit.at_most is None and limit.worse_by_at_most is None:
        return "", "say a limit: at_least, at_most or worse_by_at_most", None
    if limit.metric == COMPARED_ALONE and limit.worse_by_at_most is not None:
        return "worse_by_at_most", f"{COMPARED_ALONE} is no figure of the original; give at_least", None
    return None
