"""A tenant's jobs, as the API sees them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from sqlalchemy import Select, delete, func, insert, select, update
from sqlalchemy.orm import Session

from app.domain.request.job_request import JobRequest
from app.domain.request.source_walk import read_uploads
from app.domain.request.sources import LocalModel, ModelSource
from app.store.clock import now
from app.store.first_rows import Row
from app.store.hub.names import take_name
from app.store.idempotency import Idempotency, find_key, made_by, take_key
from app.store.ids import is_id, new_id, require_id
from app.store.job_pages import JobFilters, ListedJob, jobs_of, newest_jobs, newest_states
from app.store.models import Attempt, IdempotencyKey, Job, JobUpload, Upload, table_of
from app.store.status import begin, enter, hold
from bitwright.errors import Conflict, IllegalTransition, InvalidRequest, NotFound
from bitwright.job_states import FINAL_STATUSES, JobStatus

Item = TypeVar("Item")
Listed = TypeVar("Listed", Job, ListedJob)
Finding = Callable[[Session, str, JobFilters, str | None, int], Sequence[Listed]]
"""Newest jobs of a tenant that match filters, behind a job, so many."""
Noted = Callable[[str], Row]
"""Row of the audit log about the job of an id."""
MAX_PAGE = 1000


@dataclass(frozen=True)
class Page(Generic[Item]):
    """A part of a list; `next_cursor` asks for the part after it, None at the end."""

    items: Sequence[Item]
    next_cursor: str | None


class JobRepository:
    """The jobs of one tenant; ids of other tenants' jobs do not exist here."""

    def __init__(self, session: Session, tenant_id: str) -> None:
        self._session = session
        self._tenant_id = tenant_id

    def add(
        self,
        request: JobRequest,
        *,
        recipe: str | None = None,
        idempotency: Idempotency | None = None,
        noted: Noted | None = None,
        traced: Callable[[str], str | None] | None = None,
    ) -> Job:
        """Queue a job, asked for by this recipe. For a repeated key, the earlier job with `replayed` set.

        noted    the entry of the audit log for a new job's id
        traced   gives the place of what makes the job in its trace, by the job's id

        Raises:
            InvalidRequest: an upload that the request names does not exist or is not complete.
            Conflict: another job has the name.
            KeyReused: the key was used for another request.
        """
        job_id = new_id("job")
        if idempotency is not None:
            standing = take_key(self._session, self._tenant_id, idempotency, IdempotencyKey.job_id, job_id)
            if standing != job_id:
                earlier = self.get(standing)
                earlier.replayed = True
                return earlier
        uploads = self._uploads(request)
        labels = [{"name": name, "value": value} for name, value in request.metadata.items()]
        row = _row(job_id, self._tenant_id, request, recipe, None if traced is None else traced(job_id))
        job = begin(self._session, row, labels=labels, entry=None if noted is None else noted(job_id))
        if request.name is not None:
            take_name(self._session, self._tenant_id, job_id, request.name)
        for upload_id in uploads:
            reads = {"job_id": job_id, "tenant_id": self._tenant_id, "upload_id": upload_id}
            self._session.execute(insert(table_of(JobUpload)), reads)
        return job

    def find_replayed(self, idempotency: Idempotency) -> Job | None:
        """The job that an earlier request with this key made, with `replayed` set; None if the key is free.

        Raises:
            KeyReused: the key was used for another request.
        """
        standing = find_key(self._session, self._tenant_id, idempotency, IdempotencyKey.job_id)
        if standing is None:
            return None
        earlier = self.get(standing)
        earlier.replayed = True
        return earlier

    def made_by(self, key: str) -> Job | None:
        """The job that an Idempotency-Key stands for, whatever its request was; None if the key is free."""
        standing = made_by(self._session, self._tenant_id, key, IdempotencyKey.job_id)
        return None if standing is None else self.get(standing)

    def get(self, job_id: str) -> Job:
        """The job as it is now.

        Raises:
            NotFound: the tenant has no such job.
        """
        return self._one(job_id, select(Job))

    def page(self, *, after: str | None, limit: int, filters: JobFilters | None = None) -> Page[Job]:
        """Up to `limit` jobs, newest first, that match every filter, without their reports.

        after   a page's `next_cursor`

        Raises:
            InvalidRequest: `after` is no cursor.
        """
        return self._page(newest_jobs, after, limit, filters)

    def listed(self, *, after: str | None, limit: int, filters: JobFilters | None = None) -> Page[ListedJob]:
        """The same page, of each job only what changes during its life.

        Raises:
            InvalidRequest: `after` is no cursor.
        """
        return self._page(newest_states, after, limit, filters)

    def listed_jobs(self, ids: Sequence[str]) -> Sequence[Job]:
        """Those of a page's jobs in full that are still there, newest first, without their reports."""
        return jobs_of(self._session, ids)

    def cancel(self, job_id: str) -> Job:
        """End a queued job at once; ask a running one's worker to end it.

        Raises:
            NotFound: the tenant has no such job.
            IllegalTransition: the job has ended already.
        """
        job = self._locked(job_id)
        if job.status is JobStatus.QUEUED:
            enter(self._session, JobStatus.CANCELLED, Job.id == job_id, values={"finished_at": now()})
        elif job.status is JobStatus.RUNNING:
            asked = {"cancel_requested": True, "updated_at": now()}
            self._session.execute(update(Job).where(Job.id == job_id).values(asked))
        else:
            raise _illegal(job, "cancelled", "only queued and running jobs can be cancelled")
        return self.get(job_id)

    def pause(self, job_id: str) -> Job:
        """Hold a job: no worker takes it, and the one that runs it gives it back. Once more changes nothing.

        Raises:
            NotFound: the tenant has no such job.
            IllegalTransition: the job has ended already.
        """
        return self._hold(job_id, held=True)

    def resume(self, job_id: str) -> Job:
        """Let workers take a held job again. Of one that is not held nothing changes.

        Raises:
            NotFound: the tenant has no such job.
            IllegalTransition: the job has ended already.
        """
        return self._hold(job_id, held=False)

    def retry(self, job_id: str) -> Job:
        """Queue a failed or cancelled job again, as if it had never been tried; finished blocks are still adopted.

        Raises:
            NotFound: the tenant has no such job.
            IllegalTransition: the job did not fail and was not cancelled.
        """
        job = self._locked(job_id)
        afresh: dict[str, object] = {
            "available_at": now(),
            "finished_at": None,
            "cancel_requested": False,
            "error": None,
            "fruitless_attempts": 0,
            "micro_batch_divisor": 1,
        }
        if job.status not in (JobStatus.FAILED, JobStatus.CANCELLED):
            raise _illegal(job, "retried", "only failed and cancelled jobs can be retried")
        enter(self._session, JobStatus.QUEUED, Job.id == job_id, values=afresh)
        return self.get(job_id)

    def delete(self, job_id: str) -> None:
        """Remove an ended job with its events, attempts and artifacts; a later sweep frees bytes that nobody names.

        Raises:
            NotFound: the tenant has no such job.
            Conflict: the job has not ended.
        """
        job = self._locked(job_id)
        if job.status not in FINAL_STATUSES:
            hint = f"POST /v1/jobs/{job_id}/cancel, or wait for its end"
            detail = f"job {job_id} is {job.status.value}; cancel it before deleting it"
            raise Conflict(detail, value=job.status.value, hint=hint)
        self._session.execute(delete(Job).where(Job.id == job_id))
        self._session.expunge(job)

    def attempts(self, job_id: str) -> Sequence[Attempt]:
        """The job's attempts, first to last.

        Raises:
            NotFound: the tenant has no such job.
        """
        return self.attempts_of(self.get(job_id))

    def attempts_of(self, job: Job) -> Sequence[Attempt]:
        """The attempts of a job that was read here, first to last."""
        if not job.attempt:
            return ()
        return self._session.scalars(select(Attempt).where(Attempt.job_id == job.id).order_by(Attempt.number)).all()

    def _page(self, find: Finding[Listed], after: str | None, limit: int, filters: JobFilters | None) -> Page[Listed]:
        if after is not None and not is_id("job", after):
            raise InvalidRequest(
                "the cursor is not one that a page gave", field="after", value=after, hint="start without one"
            )
        filters = filters or JobFilters()
        if any("\0" in text for text in filters.texts):
            return Page(items=[], next_cursor=None)  # no stored text holds NUL, and PostgreSQL refuses to compare it
        limit = min(max(limit, 1), MAX_PAGE)
        rows = find(self._session, self._tenant_id, filters, after, limit + 1)
        items = rows[:limit]
        return Page(items=items, next_cursor=items[-1].id if len(rows) > limit else None)

    def _hold(self, job_id: str, *, held: bool) -> Job:
        job = self._locked(job_id)
        if job.status in FINAL_STATUSES:
            verb = "paused" if held else "resumed"
            raise _illegal(job, verb, f"only queued and running jobs can be {verb}")
        if job.held != held:
            hold(self._session, job, held=held)
        return self.get(job_id)

    def _locked(self, job_id: str) -> Job:
        return self._one(job_id, select(Job).with_for_update())

    def _one(self, job_id: str, query: Select[Job]) -> Job:
        require_id("job", job_id, "job")
        query = query.where(Job.id == job_id, Job.tenant_id == self._tenant_id)
        job = self._session.scalars(query.execution_options(populate_existing=True)).one_or_none()
        if job is None:
            raise NotFound(f"there is no job {job_id}", value=job_id)
        return job

    def _uploads(self, request: JobRequest) -> frozenset[str]:
        """Ids of the uploads that the request reads, locked so that none is deleted meanwhile."""
        named = read_uploads(request)
        for field, upload_id in named.items():
            conditions = (Upload.id == upload_id, Upload.tenant_id == self._tenant_id)
            upload = self._session.scalars(select(Upload).where(*conditions).with_for_update(read=True)).one_or_none()
            if upload is None:
                detail = f"there is no upload {upload_id}"
                raise InvalidRequest(detail, field=field, value=upload_id, hint="POST /v1/uploads makes one")
            if not upload.complete:
                hint = f"send its files, then POST /v1/uploads/{upload_id}/complete"
                detail = f"upload {upload_id} is not complete"
                raise InvalidRequest(detail, field=field, value=upload_id, hint=hint)
        return frozenset(named.values())


def count_by_status(session: Session) -> dict[JobStatus, int]:
    """Number of jobs of all tenants by status, for metrics."""
    rows = session.execute(select(Job.status, func.count()).group_by(Job.status)).all()
    return dict.fromkeys(JobStatus, 0) | {row[0]: row[1] for row in rows}


def _row(job_id: str, tenant_id: str, request: JobRequest, recipe: str | None, traceparent: str | None) -> Row:
    return {
        "id": job_id,
        "tenant_id": tenant_id,
        "request": request.model_dump(mode="json"),
        "method": request.quantization.method,
        "recipe": recipe,
        "model": model_label(request.model),
        "device": request.device,
        "priority": request.priority,
        "traceparent": traceparent,
    }


def model_label(source: ModelSource) -> str:
    """The source's shorthand: what lists show and filter by."""
    return source.path if isinstance(source, LocalModel) else source.id


def _illegal(job: Job, verb: str, rule: str) -> IllegalTransition:
    return IllegalTransition(f"job {job.id} is {job.status.value} and cannot be {verb}; {rule}", value=job.status.value)
