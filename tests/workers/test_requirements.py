"""What a request demands is held against the report."""

import math

import pytest

from app.domain.jobs import Requirements
from app.domain.report import Quality, Report, TextReport
from tests.workers.scripted_attempt import bare_report
from workers.requirements import missed_requirement


def report(**quality: float) -> Report:
    text = TextReport(source="builtin", sha256="0" * 64, num_samples=1, sequence_length=16, tokens=16)
    values = {"perplexity_original": 10.0, "perplexity": 12.0, "kl_divergence": 0.1, "top1_agreement": 0.9} | quality
    return bare_report(Quality(text=text, **values))


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
    error = missed_requirement(Requirements(**require), report(**quality))
    assert ("" if error is None else error.value) == missed


def test_nothing_is_missed_where_nothing_is_asked_for() -> None:
    assert missed_requirement(None, bare_report(None)) is None
    assert missed_requirement(Requirements(), bare_report(None)) is None


def test_a_demand_without_an_evaluation_is_missed() -> None:
    error = missed_requirement(Requirements(max_kl_divergence=1.0), bare_report(None))
    assert error is not None
    assert error.field == "evaluation"
