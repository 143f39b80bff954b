"""Alternatives of a dry run: requests near by, with figures that say whether they were measured or estimated."""

from collections.abc import Mapping, Sequence
from typing import Any

from app.api.submission.preflight import Preflight
from app.domain.alternatives import Alternative, alternatives
from app.domain.request.job_request import JobRequest
from app.store.jobs import model_label
from app.store.measured import Measured, measured_on
from app.store.session import Database
from bitwright.views import AlternativeRecord, FigureView

DECIDES = {"smaller": "bytes", "quicker": "seconds", "nearer": "kl"}
"""Aim -> the figure that must be lower, where both requests have it on one basis."""

Figures = Sequence[FigureView]


def near_by(database: Database, tenant_id: str, preflight: Preflight) -> list[AlternativeRecord[JobRequest]]:
    """Up to three alternatives; none where nothing was seen of the model.

    Each may take a look at the model, so no transaction may be open.
    """
    if preflight.estimated is None or not preflight.estimates:
        return []
    with database.reading() as session:
        measured = measured_on(session, tenant_id, model_label(preflight.request.model))
    asked_for = _figures(preflight.request, preflight.estimates, measured)
    found = []
    for one in alternatives(preflight.request):
        estimates = preflight.estimated(one.request)
        if not estimates:
            continue
        figures = _figures(one.request, estimates, measured)
        if _is_better(one, figures, asked_for):
            found.append(
                AlternativeRecord[JobRequest](
                    why=one.why, changes=dict(one.changes), figures=figures, asked_for=asked_for, request=one.request
                )
            )
    return found


def _figures(request: JobRequest, estimates: Mapping[str, Any], measured: Sequence[Measured]) -> list[FigureView]:
    """Figures of the latest job with this quantization, and estimates of what was not measured."""
    wanted = request.model_dump(mode="json")["quantization"]
    like = next((one for one in measured if one.quantization == wanted), None)
    if like is not None:
        known = {"bytes": like.bytes, "seconds": like.seconds, "kl": like.kl}
        return [
            FigureView(name=name, value=value, basis="measured", device=like.device, job_id=like.job_id)
            for name, value in known.items()
            if value is not None
        ]
    seconds = [
        FigureView(name="seconds", value=value, basis="estimated", device=device)
        for device, value in estimates["seconds"].items()
        if request.device in ("any", device)
    ]
    return [FigureView(name="bytes", value=estimates["bytes_checkpoint"], basis="estimated"), *seconds]


def _is_better(one: Alternative, figures: Figures, asked_for: Figures) -> bool:
    """False if the figure that it is about says that it is not. Where nothing compares, the step itself is believed."""
    name = DECIDES[one.why]
    pairs = [
        (mine.value, theirs.value)
        for mine in figures
        for theirs in asked_for
        if mine.name == theirs.name == name and (mine.basis, mine.device) == (theirs.basis, theirs.device)
    ]
    return not pairs or (all(mine <= theirs for mine, theirs in pairs) and any(mine < theirs for mine, theirs in pairs))
