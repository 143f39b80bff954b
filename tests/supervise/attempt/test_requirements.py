"""Requirements of a request, checked against the report."""

import math
from typing import Any

import pytest

from app.domain.request.job_request import Requirements
from app.domain.runtimes import Runtime
from bitwright.measured.tasks import TaskFigure, TaskReport
from bitwright.report import LoadReport, Report
from tests.reports import QUALITY, report
from workers.supervise.attempt.requirements import missed_requirement


def reported(**quality: float) -> Report:
    return report(quality=QUALITY.model_copy(update=quality))


@pytest.mark.parametrize(
    ("require", "quality", "missed"),
    [
        ({"max_perplexity_ratio": 1.2}, {}, ""),
        ({"max_perplexity_ratio": 1.19}, {}, "max_perplexity_ratio"),
        ({"max_kl_divergence": 0.1}, {}, ""),
        ({"max_kl_divergence": 0.09}, {}, "max_kl_divergence"),
        ({"min_top1_agreement": 0.9}, {}, ""),
        ({"min_top1_agreement": 0.91}, {}, "min_top1_agreement"),
        ({"max_kl_divergence": 0.01, "min_top1_agreement": 0.99}, {}, "max_kl_divergence, min_top1_agreement"),
        ({"max_kl_divergence": 5.0}, {"kl_divergence": math.nan}, "max_kl_divergence"),
        ({}, {"kl_divergence": math.nan}, ""),
    ],
)
def test_requirements(require: dict[str, float], quality: dict[str, float], missed: str) -> None:
    error = missed_requirement(Requirements(**require), reported(**quality))
    assert ("" if error is None else error.value) == missed


def test_nothing_is_missed_where_nothing_is_asked_for() -> None:
    assert missed_requirement(None, report()) is None
    assert missed_requirement(Requirements(), report()) is None


def test_a_demand_without_an_evaluation_is_missed() -> None:
    error = missed_requirement(Requirements(max_kl_divergence=1.0), report())
    assert error is not None
    assert error.field == "evaluation"


def load(read: str = "files", result: str = "loads", runtime: str = "vllm") -> LoadReport:
    return LoadReport.model_validate({"format": "merged", "runtime": runtime, "read": read, "result": result})


@pytest.mark.parametrize(
    ("loads", "missed"),
    [
        ([load()], ""),
        ([load("block")], ""),
        ([load("block"), load(result="does_not_load")], "vllm"),
        ([load("block"), load(result="differs")], "vllm"),
        ([load("block"), load(result="not_checked")], "vllm"),
        ([load("block", "not_checked"), load()], ""),
        ([load(), load(result="not_checked")], ""),
        ([load(runtime="transformers")], "vllm"),
        ([], "vllm"),
    ],
)
def test_a_required_runtime_must_have_loaded_the_result(loads: list[LoadReport], missed: str) -> None:
    """The last word counts: on the files, else on the block."""
    error = missed_requirement(Requirements(loads=(Runtime.VLLM,)), report(loads=tuple(loads)))
    assert ("" if error is None else error.value) == missed


def test_a_required_runtime_needs_no_evaluation_and_figures_count_besides() -> None:
    both = Requirements(loads=(Runtime.VLLM,), max_kl_divergence=0.01)
    error = missed_requirement(both, reported().model_copy(update={"loads": (load(),)}))
    assert error is not None
    assert error.field == "require.max_kl_divergence"


FIGURE = TaskFigure(
    name="acc", higher_is_better=True, original=0.6, value=0.5, stderr=0.04, difference_stderr=0.03, rows=150
)
TASK = TaskReport(
    **{"name": "arc", "kind": "multiple_choice", "source": "org/arc", "sha256": "0", "rows": 150, "seconds": 1.0},
    figures=(FIGURE,),
)


@pytest.mark.parametrize(
    ("limit", "missed"),
    [
        ({"at_least": 0.5}, None),
        ({"at_least": 0.51}, "at_least"),
        ({"at_most": 0.49}, "at_most"),
        ({"worse_by_at_most": 0.11}, None),
        ({"worse_by_at_most": 0.09}, "worse_by_at_most"),
        ({"worse_by_at_most": "noise"}, "worse_by_at_most"),
    ],
)
def test_limits_on_a_task(limit: dict[str, Any], missed: str | None) -> None:
    require = Requirements.model_validate({"tasks": [{"task": "arc", "metric": "acc", **limit}]})
    error = missed_requirement(require, report(tasks=(TASK,)))
    assert (None if error is None else error.field) == (None if missed is None else f"require.tasks.0.{missed}")


def test_a_difference_within_noise_is_no_miss_and_a_figure_that_is_not_there_is_one() -> None:
    require = Requirements.model_validate({"tasks": [{"task": "arc", "metric": "acc", "worse_by_at_most": "noise"}]})
    noisy = TASK.model_copy(update={"figures": (FIGURE.model_copy(update={"difference_stderr": 0.06}),)})
    assert missed_requirement(require, report(tasks=(noisy,))) is None
    error = missed_requirement(require, report())
    assert error is not None
    assert error.field == "require.tasks.0.metric"
