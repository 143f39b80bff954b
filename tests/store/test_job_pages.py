"""Lists by every combination of filters are what a search through all jobs finds, whatever index is read."""

import random
from itertools import product

import pytest
from sqlalchemy import update

from app.store import job_pages
from app.store.job_pages import JobFilters
from app.store.jobs import JobRepository
from app.store.models import Job
from app.store.session import Database
from bitwright.job_states import JobStatus
from tests.store.samples import request

LONG = "/models/" + "m" * 300
LABELS: tuple[dict[str, str], ...] = (
    {},
    {"team": "a"},
    {"team": "b"},
    {"team": "a", "ci": "1"},
    {"ci": "1"},
    {"ci": "2"},
    {"team": "a", "rare": "1"},
)


def source(label: str) -> object:
    return {"source": "local", "path": label} if label.startswith("/") else label


@pytest.fixture
def jobs(database: Database, tenant: str, stranger: str) -> list[Job]:
    """Sixty jobs of one tenant in all statuses, newest last; and as many of another."""
    chance = random.Random(7)
    for owner in (stranger, tenant):
        with database.transaction() as session:
            repository = JobRepository(session, owner)
            for _ in range(60):
                labels = {"team": chance.choice("ab"), "ci": "1"}
                labels |= {"rare": "1"} if chance.random() < 0.05 else {}
                asked = request(
                    method=chance.choice(["rtn", "gptq"]),
                    model=source(chance.choice(["org/a", LONG, LONG + "x"])),
                    metadata=labels,
                )
                job = repository.add(asked, recipe=chance.choice([None, "qlora", "gptq"]))
                ended = chance.choice([JobStatus.QUEUED, JobStatus.FAILED, JobStatus.SUCCEEDED])
                session.execute(update(Job).where(Job.id == job.id).values(status=ended))
    with database.reading() as session:
        return [*session.query(Job).where(Job.tenant_id == tenant).order_by(Job.id)]


def matches(job: Job, filters: JobFilters) -> bool:
    return (
        filters.status in (None, job.status)
        and filters.method in (None, job.method, job.recipe)
        and filters.model in (None, job.model)
        and filters.labels.items() <= job.metadata_.items()
    )


@pytest.mark.parametrize("few", [10, 1000])
def test_every_combination_of_filters(
    database: Database, tenant: str, jobs: list[Job], few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_pages, "FEW", few)
    monkeypatch.setattr(job_pages, "MANY", 2 * few)
    every = product((None, JobStatus.FAILED), (None, "gptq", "awq"), (None, LONG), LABELS)
    with database.reading() as session:
        repository = JobRepository(session, tenant)
        for status, method, model, labels in every:
            filters = JobFilters(status, method, model, labels)
            expected = [job.id for job in reversed(jobs) if matches(job, filters)]
            first = repository.page(after=None, limit=3, filters=filters)
            rest = repository.page(after=first.next_cursor, limit=100, filters=filters) if first.next_cursor else None
            assert [job.id for job in first.items] == expected[:3], filters
            assert [job.id for job in rest.items] == expected[3:] if rest else len(expected) <= 3, filters
