"""Whether a result keeps what its request demands."""

from app.domain.errors import RequirementMissed
from app.domain.jobs import Requirements
from app.domain.report import Report


def missed_requirement(require: Requirements | None, report: Report) -> RequirementMissed | None:
    """The error for the requirements that the report misses, all in one; None if it keeps them."""
    if require is None or not require.model_dump(exclude_none=True):
        return None
    if report.quality is None:
        detail = "the request has requirements, but the job evaluated nothing to hold them against"
        return RequirementMissed(detail, field="evaluation", hint="give an evaluation, or drop require")
    misses = _misses(require, report)
    if not misses:
        return None
    names = ", ".join(name for name, _ in misses)
    return RequirementMissed(
        "; ".join(text for _, text in misses),
        field=f"require.{misses[0][0]}",
        value=names,
        hint="the artifacts are stored; use more bits, a smaller group_size or a method that tunes",
    )


def _misses(require: Requirements, report: Report) -> list[tuple[str, str]]:
    quality = report.quality
    assert quality is not None  # noqa: S101 (the caller looked)
    ratio = quality.perplexity / quality.perplexity_original
    measured: list[tuple[str, float | None, float, bool]] = [
        ("max_perplexity_ratio", require.max_perplexity_ratio, ratio, True),
        ("max_kl_divergence", require.max_kl_divergence, quality.kl_divergence, True),
        ("min_top1_agreement", require.min_top1_agreement, quality.top1_agreement, False),
    ]
    # A NaN keeps no requirement: it compares false with everything.
    return [
        (name, f"{name} is {limit:g}, the result has {value:.6g}")
        for name, limit, value, upper in measured
        if limit is not None and not (value <= limit if upper else value >= limit)
    ]
