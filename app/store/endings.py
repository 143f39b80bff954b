"""The end of an attempt by an error or a lost worker, and the status that its job gets."""

from collections.abc import Mapping

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app.domain.job_states import MAX_RETRIES_WITHOUT_PROGRESS
from app.store.clock import now, seconds_from_now
from app.store.documents import document
from app.store.models import Attempt, Job
from app.store.status import NOT_RUNNING, enter
from app.store.tenancy.usage import count_attempt
from bitwright.errors import BitwrightError, Retry, WorkerLost
from bitwright.events import ErrorData
from bitwright.job_states import JobStatus
from bitwright.report import Report

BACK_OFF_SECONDS = 1.0
"""Delay after a fault; doubled with each further attempt that made no progress."""
MAX_BACK_OFF_SECONDS = 60.0
SMALLER_DIVISOR = 2
"""A job that ran out of memory is tried once more, with micro-batches divided by this."""


def end_with_error(session: Session, job: Job, error: BitwrightError, report: Report | None = None) -> JobStatus:
    """End the attempt that holds `job`, a row that the session has locked and found running. The new status."""
    status, values = _verdict(job, error)
    error_data = ErrorData.of(error)
    if status is not JobStatus.QUEUED:
        values = {**values, "finished_at": now()}
    if report is not None:
        values = {**values, "report": document(report)}
    if status is not JobStatus.CANCELLED:
        values = {**values, "error": document(error_data)}
    this = (Job.id == job.id, Job.attempt == job.attempt)
    event_error = error_data if status is not JobStatus.CANCELLED else None
    enter(session, status, *this, values={**values, **NOT_RUNNING}, error=event_error)
    how = JobStatus.CANCELLED if status is JobStatus.CANCELLED else JobStatus.FAILED
    close_attempt(session, job.id, job.attempt, how, error_data)
    return status


def close_attempt(
    session: Session, job_id: str, number: int, status: JobStatus, error: ErrorData | None = None
) -> None:
    """Write how an attempt ended, and count it; its row is never changed again."""
    values = {"status": status, "finished_at": now(), "error": error and document(error)}
    session.execute(update(Attempt).where(Attempt.job_id == job_id, Attempt.number == number).values(values))
    count_attempt(session, job_id, number)


def requeue_lost(session: Session) -> list[tuple[str, str]]:
    """End every attempt whose lease has run out; id and device of their jobs, which wait again or have failed."""
    lost = (
        select(Job)
        .where(Job.status == JobStatus.RUNNING, Job.lease_expires_at <= now())
        .order_by(Job.id)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    )
    jobs = session.scalars(lost).all()
    for job in jobs:
        detail = f"worker {job.worker_id} stopped renewing its lease on attempt {job.attempt}"
        end_with_error(session, job, WorkerLost(detail))
    return [(job.id, job.device) for job in jobs]


def _verdict(job: Job, error: BitwrightError) -> tuple[JobStatus, Mapping[str, object]]:
    if job.cancel_requested:
        return JobStatus.CANCELLED, {}
    if error.retry is Retry.SMALLER and job.micro_batch_divisor < SMALLER_DIVISOR:
        smaller = job.micro_batch_divisor * SMALLER_DIVISOR
        return JobStatus.QUEUED, {"micro_batch_divisor": smaller, "available_at": now()}
    if error.retry is Retry.LATER and job.fruitless_attempts <= MAX_RETRIES_WITHOUT_PROGRESS:
        return JobStatus.QUEUED, {"available_at": seconds_from_now(back_off(job.fruitless_attempts))}
    return JobStatus.FAILED, {}


def back_off(fruitless_attempts: int) -> float:
    """Seconds until the next attempt."""
    return min(BACK_OFF_SECONDS * 2.0**fruitless_attempts, MAX_BACK_OFF_SECONDS)
