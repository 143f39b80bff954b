"""Requests near another one: one step each, and all of them valid."""

import pytest

from app.domain.alternatives import alternatives
from app.domain.request.job_request import JobRequest


def steps(**fields: object) -> dict[str, dict[str, object]]:
    request = JobRequest.parse({"model": "org/model", **fields})
    return {one.why: dict(one.changes) for one in alternatives(request)}


def test_a_preset_and_a_width_go_one_step() -> None:
    assert steps(method="signround", bits=4) == {
        "smaller": {"bits": 3},
        "quicker": {"preset": "light"},
        "nearer": {"preset": "best"},
    }
    assert steps(method="signround", bits=4, preset="best")["nearer"] == {"bits": 5}


def test_what_cannot_be_smaller_or_quicker_is_left_out() -> None:
    assert steps(method="rtn", bits=2) == {"nearer": {"bits": 3}}
    assert "nearer" not in steps(method="rtn", bits=8)
    assert steps(method="gptq", bits=4)["quicker"] == {"method": "rtn"}


def test_a_step_that_a_format_refuses_is_passed_over() -> None:
    """AWQ's kernels have four bits alone."""
    assert "bits" not in steps(method="awq", bits=4, symmetric=False, formats=["awq"]).get("smaller", {})


@pytest.mark.parametrize(
    "fields", [{"method": "signround", "scheme": "nvfp4"}, {"method": "rtn", "at_most": {"kl": 0.1}}]
)
def test_schemes_by_name_and_goals_keep_their_width(fields: dict[str, object]) -> None:
    assert all("bits" not in changes for changes in steps(**fields).values())


def test_the_request_is_the_same_but_for_the_changes() -> None:
    request = JobRequest.parse({"model": "org/model", "method": "signround", "bits": 4, "metadata": {"a": "b"}})
    light = next(one.request for one in alternatives(request) if one.why == "quicker")
    assert light == JobRequest.parse(
        {"model": "org/model", "method": "signround", "bits": 4, "preset": "light", "metadata": {"a": "b"}}
    )
