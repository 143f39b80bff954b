"""Requirements of a request, checked against the report."""

import math

import pytest

from app.domain.request.job_request import Requirements
from bitwright.report import Report
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
