"""Names that tenants give to their jobs: one job each, until the job is deleted."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.store.models import Job, JobName
from app.store.upsert import upsert
from bitwright.errors import Conflict


def take_name(session: Session, tenant_id: str, job_id: str, name: str) -> None:
    """Give a job, whose row is there, its name.

    Raises:
        Conflict: another job of the tenant has it.
    """
    values = {"tenant_id": tenant_id, "name": name, "job_id": job_id}
    taken = upsert(session, JobName).values(**values).on_conflict_do_nothing(index_elements=["tenant_id", "name"])
    session.execute(taken)
    holder = session.scalars(select(JobName.job_id).where(JobName.tenant_id == tenant_id, JobName.name == name)).one()
    if holder != job_id:
        hint = f"take another name, or delete job {holder}"
        raise Conflict(f"job {holder} has the name {name!r}", field="name", value=name, hint=hint)


def job_of_name(session: Session, tenant_id: str, name: str) -> Job | None:
    """The tenant's job of this name; None if there is none."""
    named = select(Job).join(JobName, JobName.job_id == Job.id)
    return session.scalars(named.where(JobName.tenant_id == tenant_id, JobName.name == name)).one_or_none()
