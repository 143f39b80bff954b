"""Verdict of a check: the job's end, and its figures against those of an earlier result, each with a limit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from bitwright.cli.comparison import Compared
from bitwright.cli.render import format_bytes
from bitwright.errors import BitwrightError, RequirementMissed
from bitwright.job_states import JobStatus
from bitwright.report import Report
from bitwright.views import JobView


class Outcome(StrEnum):
    """The end of one check."""

    PASSED = "passed"
    MISSED = "missed"
    """It was judged, and the result is not good enough."""
    ERROR = "error"
    """It could not be judged."""


@dataclass(frozen=True)
class Check:
    """One check by its name, with figure and limit, or the reason, in a sentence."""

    name: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True)
class Gate:
    """A figure that may be so much larger than the baseline's, as a share of it.

    allowed   0.05: 5% more
    """

    name: str
    value: Callable[[Report], float | None]
    text: Callable[[float], str]
    allowed: float


def gates(kl: float, perplexity: float, size: float) -> tuple[Gate, ...]:
    """The gates with these shares."""
    return (
        Gate("KL to the original", _kl, "{:.5f}".format, kl),
        Gate("perplexity", _perplexity, "{:.3f}".format, perplexity),
        Gate("size", lambda report: report.size.bytes_quantized, format_bytes, size),
    )


def judge(job: JobView, baseline: Compared | None, limits: Sequence[Gate]) -> list[Check]:
    """All checks of a job that has ended."""
    checks = [_end_of(job)]
    if baseline is None:
        return checks
    if job.report is None:
        return [*checks, *(Check(f"{gate.name} against the baseline", Outcome.ERROR, "no report") for gate in limits)]
    return [*checks, *(against(gate, job.report, baseline) for gate in limits)]


def against(gate: Gate, report: Report, baseline: Compared) -> Check:
    """A figure of the report against the baseline's."""
    name = f"{gate.name} against the baseline"
    now, before = gate.value(report), gate.value(baseline.report)
    if now is None or before is None:
        which = "this result" if now is None else f"the baseline {baseline.name}"
        return Check(name, Outcome.ERROR, f"{which} was not evaluated; leave `evaluation` in the request")
    limit = before * (1 + gate.allowed)
    outcome = Outcome.PASSED if now <= limit else Outcome.MISSED
    figures = f"{gate.text(now)}, {change(now, before)} against {gate.text(before)}"
    return Check(name, outcome, f"{figures}; at most {gate.allowed:+.1%} is allowed")


def change(now: float, before: float) -> str:
    """The change as a share of what was before."""
    return f"{now / before - 1:+.1%}" if before else f"{now - before:+g}"


def failure(error: BitwrightError, name: str = "the service answers") -> Check:
    """The check that an error of the service or the request is."""
    return Check(name, Outcome.ERROR, sentence(error))


def sentence(error: BitwrightError) -> str:
    """An error with its code and its way out."""
    return f"{error.code}: {error.detail}" + (f" ({error.hint})" if error.hint else "")


def verdict(checks: Sequence[Check]) -> Outcome:
    """Of all checks: the worst."""
    outcomes = {check.outcome for check in checks}
    return next(outcome for outcome in (Outcome.ERROR, Outcome.MISSED, Outcome.PASSED) if outcome in outcomes)


def _end_of(job: JobView) -> Check:
    required = _asked(job)
    if job.status is JobStatus.SUCCEEDED:
        if required:
            return Check("the request's requirements", Outcome.PASSED, f"kept: {required}")
        return Check("the job succeeds", Outcome.PASSED, f"{job.id} succeeded")
    if job.error is None:
        return Check("the job succeeds", Outcome.ERROR, f"{job.id} was {job.status.value}")
    if job.error.code == RequirementMissed.code:
        return Check("the request's requirements", Outcome.MISSED, job.error.detail)
    return Check("the job succeeds", Outcome.ERROR, sentence(job.error.exception()))


def _asked(job: JobView) -> str:
    required: Mapping[str, object] = job.request.require or {}
    return ", ".join(f"{name} {value}" for name, value in required.items() if value is not None)


def _kl(report: Report) -> float | None:
    return None if report.quality is None else report.quality.kl_divergence


def _perplexity(report: Report) -> float | None:
    return None if report.quality is None else report.quality.perplexity
