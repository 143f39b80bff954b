"""Reads of the store for pages: sessions, usage, models, events by type, lists without reports."""

from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import InvalidRequestError

from app.domain.access import Principal, Scope
from app.domain.request.job_request import JobRequest
from app.store.attempts import AttemptWriter, NewArtifact, claim
from app.store.clock import now, seconds_between, seconds_from_now
from app.store.events import EventRepository
from app.store.jobs import JobRepository
from app.store.models import Attempt, PageSession
from app.store.session import Database
from app.store.tenancy.keys import issue_key, revoke_key
from app.store.tenancy.page_sessions import end_session, find_session, open_session, remove_expired_sessions
from app.store.tenancy.totals import models_of, usage_of
from bitwright.events import LogEvent, MetricEvent, WarningEvent
from bitwright.job_states import DeviceClass, JobStatus
from tests.reports import report


def add(database: Database, tenant: str, model: str) -> str:
    with database.transaction() as session:
        request = JobRequest.parse({"model": model, "method": "rtn"})
        return JobRepository(session, tenant).add(request).id


def principal(database: Database, tenant: str) -> Principal:
    with database.transaction() as session:
        key, _ = issue_key(session, tenant, name="page", scopes=frozenset({Scope.READ}))
    return Principal(tenant_id=tenant, key_id=key.id, scopes=frozenset({Scope.READ}))


def test_a_session_lives_as_long_as_its_time_and_its_key(database: Database, tenant: str) -> None:
    owner = principal(database, tenant)
    with database.transaction() as session:
        texts = [open_session(session, owner) for _ in range(3)]
    with database.reading() as session:
        assert [find_session(session, text) for text in texts] == [owner] * 3
        assert find_session(session, texts[0][:-1]) is None
    with database.transaction() as session:
        end_session(session, texts[0])
        first = select(PageSession.digest).where(PageSession.expires_at > now()).limit(1)
        session.execute(
            update(PageSession)
            .where(PageSession.digest == session.scalars(first).one())
            .values(expires_at=seconds_from_now(-1))
        )
    with database.reading() as session:
        assert sorted(find_session(session, text) is None for text in texts) == [False, True, True]
    with database.transaction() as session:
        remove_expired_sessions(session)
        assert len(session.scalars(select(PageSession)).all()) == 1
        revoke_key(session, tenant, owner.key_id)
    with database.reading() as session:
        assert all(find_session(session, text) is None for text in texts)


def test_usage_is_the_tenants_own(database: Database, tenant: str, stranger: str) -> None:
    for owner in (tenant, tenant, stranger):
        add(database, owner, "org/model")
    with database.transaction() as session:
        held = claim(session, worker_id="w", device_class=DeviceClass.CPU, lease_seconds=60)
        assert held is not None
        made = NewArtifact("native", "weights", "0" * 64, 3_000_000_000, "application/octet-stream")
        AttemptWriter(session, held.job_id, held.attempt).succeed(report(), [made, replace(made, path="more")])
        attempt = session.scalars(select(Attempt)).one()
        ended = {"finished_at": attempt.started_at + timedelta(seconds=90.5)}
        session.execute(update(Attempt).values(ended))
    with database.reading() as session:
        ours, theirs = usage_of(session, tenant), usage_of(session, stranger)
    used, unused = (ours, theirs) if held.tenant_id == tenant else (theirs, ours)
    assert used.jobs[JobStatus.SUCCEEDED] == 1
    assert used.attempt_seconds == pytest.approx(90.5, abs=0.01)
    assert used.artifacts == (2, 6_000_000_000)
    assert unused.artifacts == (0, 0)
    assert unused.attempt_seconds == 0
    assert ours.jobs[JobStatus.QUEUED] + ours.jobs[JobStatus.SUCCEEDED] == 2


def test_models_are_those_of_the_latest_jobs(database: Database, tenant: str, stranger: str) -> None:
    for model in ("org/old", "org/a", "org/b", "org/a"):
        add(database, tenant, model)
    add(database, stranger, "org/theirs")
    with database.reading() as session:
        found = models_of(session, tenant, latest_jobs=3)
    assert [(one.model, one.jobs, one.succeeded) for one in found] == [("org/a", 2, 0), ("org/b", 1, 0)]
    assert found[0].latest.tzinfo is not None


def test_events_by_type_are_the_latest_in_order(database: Database, tenant: str, stranger: str) -> None:
    job_id = add(database, tenant, "org/model")
    with database.transaction() as session:
        held = claim(session, worker_id="w", device_class=DeviceClass.CPU, lease_seconds=60)
        assert held is not None
        writer = AttemptWriter(session, job_id, held.attempt)
        writer.append([MetricEvent(name="loss", value=float(n), step=n) for n in range(20)])
        writer.append([WarningEvent(code="w", message="m"), LogEvent(event="e")])
    with database.reading() as session:
        events = EventRepository(session, tenant)
        metrics = events.latest_of(job_id, ("metric",), 5)
        assert [stored.event.step for stored in metrics if isinstance(stored.event, MetricEvent)] == [
            15,
            16,
            17,
            18,
            19,
        ]
        assert [stored.event.type for stored in events.latest_of(job_id, ("log", "warning"), 9)] == ["warning", "log"]
        assert EventRepository(session, stranger).latest_of(job_id, ("metric",), 5) == []


def test_a_list_leaves_reports_where_they_are(database: Database, tenant: str) -> None:
    add(database, tenant, "org/model")
    with database.reading() as session:
        (listed,) = JobRepository(session, tenant).page(after=None, limit=10).items
        with pytest.raises(InvalidRequestError):
            _ = listed.report
    with database.reading() as session:
        assert JobRepository(session, tenant).get(listed.id).report is None


def test_seconds_between_are_of_both_databases(database: Database) -> None:
    with database.reading() as session:
        apart = session.scalars(select(seconds_between(now(), seconds_from_now(86_400.25)))).one()
    assert float(apart) == pytest.approx(86_400.25, abs=0.01)
