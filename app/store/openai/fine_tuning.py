"""Jobs that came through OpenAI's interface: what was asked there, their pages, and their events from the newest on."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, exists, or_, select
from sqlalchemy.orm import Session, defer

from app.store.events import StoredEvent
from app.store.ids import is_id, require_id
from app.store.jobs import Page
from app.store.models import Event, FineTuningJob, Job, JobLabel
from bitwright.errors import InvalidRequest, NotFound
from bitwright.events import EVENT

TOLD_TYPES = ("status", "metric", "checkpoint", "warning")


@dataclass(frozen=True)
class FineTuning:
    """A finetuning job, with what its caller asked for in OpenAI's words.

    trained_tokens   that its report tells
    """

    job: Job
    asked: Mapping[str, Any]
    trained_tokens: int | None


class FineTuningRepository:
    """The finetuning jobs of one tenant that came through this interface."""

    def __init__(self, session: Session, tenant_id: str) -> None:
        self._session = session
        self._tenant_id = tenant_id

    def add(self, job: Job, asked: dict[str, Any]) -> None:
        """Note what was asked for a job that was just queued."""
        self._session.add(FineTuningJob(job_id=job.id, tenant_id=self._tenant_id, asked=asked))
        self._session.flush()

    def get(self, job_id: str) -> FineTuning:
        """The job as it is now, without its report.

        Raises:
            NotFound: the tenant has no such job, or it came another way.
        """
        require_id("job", job_id, "fine-tuning job")
        row = self._session.execute(self._query().where(Job.id == job_id)).one_or_none()
        if row is None:
            raise NotFound(f"there is no fine-tuning job {job_id}", value=job_id)
        return FineTuning(*row)

    def page(self, *, after: str | None, limit: int, labels: Mapping[str, str]) -> Page[FineTuning]:
        """Up to `limit` jobs, newest first, that have all of these labels; `after` is the id of the last one before.

        Raises:
            InvalidRequest: `after` is no id.
        """
        require_cursor("job", after)
        if any("\0" in text for text in (*labels, *labels.values())):
            return Page(items=[], next_cursor=None)  # no stored text holds NUL, and PostgreSQL refuses to compare it
        query = self._query() if after is None else self._query().where(FineTuningJob.job_id < after)
        for name, value in labels.items():
            label = (JobLabel.job_id == FineTuningJob.job_id, JobLabel.name == name, JobLabel.value == value)
            query = query.where(exists().where(*label))
        rows = self._session.execute(query.order_by(FineTuningJob.job_id.desc()).limit(limit + 1)).all()
        items = [FineTuning(*row) for row in rows[:limit]]
        return Page(items=items, next_cursor=items[-1].job.id if len(rows) > limit else None)

    def events(self, job_id: str, *, before: int | None, logged: Collection[str], limit: int) -> Sequence[StoredEvent]:
        """Up to `limit` events of the job, newest first, with numbers below `before`: those that people look for.

        logged   names of the log's events that are among them

        Raises:
            NotFound: see `get`.
        """
        self.get(job_id)
        kind, name = Event.data["type"].as_string(), Event.data["event"].as_string()
        told = or_(kind.in_(TOLD_TYPES), (kind == "log") & name.in_(logged))
        query = select(Event).where(Event.job_id == job_id, told)
        if before is not None:
            query = query.where(Event.sequence < min(before, 2**31 - 1))
        rows = self._session.scalars(query.order_by(Event.sequence.desc()).limit(limit)).all()
        return [
            StoredEvent(row.job_id, row.sequence, row.created_at, row.attempt, EVENT.validate_python(row.data))
            for row in rows
        ]

    def _query(self) -> Select[Any]:
        tokens = Job.report["finetuning"]["tokens_read"].as_integer()
        query = select(Job, FineTuningJob.asked, tokens).join(FineTuningJob, FineTuningJob.job_id == Job.id)
        ours = query.where(FineTuningJob.tenant_id == self._tenant_id)
        return ours.options(defer(Job.report, raiseload=True)).execution_options(populate_existing=True)


def require_cursor(prefix: Any, after: str | None) -> None:
    """Check the id that a page begins after.

    Raises:
        InvalidRequest: it has not the shape of one.
    """
    if after is not None and not is_id(prefix, after):
        hint = "give the last id of the page before, or start without"
        raise InvalidRequest("the cursor is not an id that a page gave", field="query.after", value=after, hint=hint)
