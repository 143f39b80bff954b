"""Requirements of a request, checked against the report."""

import math

import pytest

from app.domain.request.job_request import Requirements
from app.domain.runtimes import Runtime
from bitwright.report import LoadReport, Report
from tests.reports import QUALITY, report
from workers.supervise.requirements import missed_requirement


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
