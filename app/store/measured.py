"""Figures of a tenant's finished jobs, by model and quantization, for whoever wonders what a like one would come to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.store.models import Job
from bitwright.job_states import JobStatus

LATEST = 60
"""Jobs on the model that are looked at."""


@dataclass(frozen=True)
class Measured:
    """Figures of one job.

    quantization   of its request, in full
    seconds        of its attempt, from loading to the last file
    kl             nats a token; None without an evaluation
    """

    job_id: str
    quantization: Mapping[str, Any]
    device: str
    bytes: float
    seconds: float
    kl: float | None


def measured_on(session: Session, tenant_id: str, model: str) -> Sequence[Measured]:
    """Figures of the latest jobs on a model that quantized it, newest first. Reports stay in the database."""
    report = Job.report
    query = (
        select(
            Job.id,
            Job.request,
            report["plan"]["device"].as_string(),
            report["size"]["bytes_quantized"].as_float(),
            report["seconds"]["total"].as_float(),
            report["quality"]["kl_divergence"].as_float(),
        )
        .where(Job.tenant_id == tenant_id, Job.model == model, Job.status == JobStatus.SUCCEEDED)
        .order_by(Job.id.desc())
        .limit(LATEST)
    )
    return [
        Measured(job_id, request.get("quantization", {}), device or "", size, seconds, kl)
        for job_id, request, device, size, seconds, kl in session.execute(query)
        if size is not None and seconds is not None and not request.get("base_job")
    ]
