"""The audit log, Hub tokens and use by month, on both databases."""

from datetime import UTC, datetime

import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr
from sqlalchemy import delete, select, text, update
from sqlalchemy.exc import DBAPIError

from app.store.attempts import AttemptWriter, Claim, Terms, claim
from app.store.clock import seconds_from_now
from app.store.jobs import JobRepository
from app.store.models import Attempt, AuditEntry, HubToken, Tenant
from app.store.session import Database
from app.store.tenancy.audit import Actor, audit_page, record, remove_old_entries
from app.store.tenancy.hub_tokens import Vault, erase_token, keep_token, renew_tokens, token_of
from app.store.tenancy.tenants import policy_of
from app.store.tenancy.usage import add_usage, months_of
from bitwright.errors import InvalidDataset, InvalidRequest, StorageError, WorkerLost
from bitwright.job_states import DeviceClass
from bitwright.money import Money
from bitwright.tenancy import MonthView, Quotas
from tests.reports import report
from tests.store.samples import add, artifact, end_back_off, get, succeed, take

TOKEN = "hf_" + "S" * 34


def vault(*keys: bytes) -> Vault:
    return Vault([SecretStr(key.decode()) for key in keys or (Fernet.generate_key(),)])


def stored(database: Database) -> list[str]:
    with database.reading() as session:
        return list(session.scalars(select(HubToken.sealed)))


def test_entries_are_listed_by_page_and_filter(database: Database, tenant: str, stranger: str) -> None:
    for owner, action, subject in [
        (tenant, "job.submitted", "a"),
        (stranger, "job.submitted", "b"),
        (tenant, "x", "a"),
    ]:
        with database.transaction() as session:
            record(session, Actor(owner, "key_1", "request-1"), action, subject, {"method": "rtn"})
    with database.reading() as session:
        first = audit_page(session, after=None, limit=2)
        second = audit_page(session, after=first.next_cursor, limit=2)
        assert [entry.subject for entry in (*first.items, *second.items)] == ["a", "b", "a"]
        assert second.next_cursor is None
        assert first.items[0].details == {"method": "rtn"}
        assert (first.items[0].key_id, first.items[0].request_id) == ("key_1", "request-1")
        found = audit_page(session, after=None, limit=9, tenant_id=tenant, action="job.submitted", subject="a")
        assert len(found.items) == 1
        assert audit_page(session, after=None, limit=9, subject="\0").items == []
        with pytest.raises(InvalidRequest):
            audit_page(session, after="job_x", limit=1)


def test_an_entry_cannot_be_changed_and_outlives_its_tenant(database: Database, tenant: str) -> None:
    with database.transaction() as session:
        record(session, Actor(tenant), "tenant.created", tenant)
    with pytest.raises(DBAPIError, match="append-only"), database.transaction() as session:
        session.execute(update(AuditEntry).values(action="nothing"))
    with pytest.raises(DBAPIError, match="append-only"), database.transaction() as session:
        session.execute(text("UPDATE audit SET tenant_id = 'tnt_other'"))
    with database.transaction() as session:
        session.execute(delete(Tenant).where(Tenant.id == tenant))
    with database.reading() as session:
        assert [entry.action for entry in audit_page(session, after=None, limit=9).items] == ["tenant.created"]


def test_retention_removes_old_entries_alone(database: Database, tenant: str) -> None:
    with database.transaction() as session:
        for ago in (100.0, 5000.0):
            session.add(
                AuditEntry(id=f"aud_{ago}", at=seconds_from_now(-ago), tenant_id=tenant, action="a", subject="s")
            )
            session.flush()
        assert remove_old_entries(session, older_than_seconds=1000.0) == 1
        assert session.scalars(select(AuditEntry.id)).all() == ["aud_100.0"]


def test_a_jobs_token_goes_before_its_tenants_and_ends_with_it(database: Database, tenant: str, stranger: str) -> None:
    keys, first = vault(), add(database, tenant)
    second, other = add(database, tenant), add(database, stranger)
    with database.transaction() as session:
        keep_token(session, keys, TOKEN, tenant_id=tenant, job_id=first)
        keep_token(session, keys, "hf_tenant", tenant_id=tenant)
    assert TOKEN not in "".join(stored(database))
    with database.reading() as session:
        told = [token_of(session, keys, tenant_id=tenant, job_id=job_id) for job_id in (first, second)]
        assert told == [TOKEN, "hf_tenant"]
        assert token_of(session, keys, tenant_id=stranger, job_id=other) is None
        assert token_of(session, keys, tenant_id=stranger, job_id=first) is None, "another tenant's job"
        assert [policy_of(session, each, Quotas()).own_token for each in (tenant, stranger)] == [True, False]
    succeed(database, take(database))
    with database.reading() as session:
        assert session.scalars(select(HubToken.owner)).all() == [tenant]
    with database.transaction() as session:
        erase_token(session, tenant)
    assert stored(database) == []


@pytest.mark.parametrize("end", ["cancel", "fail", "delete"])
def test_every_end_erases_a_jobs_token(database: Database, tenant: str, end: str) -> None:
    job_id = add(database, tenant)
    with database.transaction() as session:
        keep_token(session, vault(), TOKEN, tenant_id=tenant, job_id=job_id)
    if end == "fail":
        held = take(database)
        with database.transaction() as session:
            AttemptWriter(session, job_id, held.attempt).fail(WorkerLost("gone"))
        assert len(stored(database)) == 1, "it will be tried again, and needs its token"
        end_back_off(database, job_id)
        held = take(database)
        with database.transaction() as session:
            AttemptWriter(session, job_id, held.attempt).fail(InvalidDataset("no text"))
    else:
        with database.transaction() as session:
            JobRepository(session, tenant).cancel(job_id)
    assert stored(database) == []


def test_keys_follow_each_other(database: Database, tenant: str) -> None:
    old, new = Fernet.generate_key(), Fernet.generate_key()
    with database.transaction() as session:
        keep_token(session, vault(old), TOKEN, tenant_id=tenant)
    with database.reading() as session:
        assert token_of(session, vault(new, old), tenant_id=tenant, job_id="") == TOKEN
        with pytest.raises(StorageError):
            token_of(session, vault(new), tenant_id=tenant, job_id="")
        with pytest.raises(StorageError):
            token_of(session, Vault(()), tenant_id=tenant, job_id="")
    with database.transaction() as session:
        assert renew_tokens(session, vault(new, old)) == 1
    with database.reading() as session:
        assert token_of(session, vault(new), tenant_id=tenant, job_id="") == TOKEN
    with database.transaction() as session, pytest.raises(InvalidRequest, match="no key"):
        keep_token(session, Vault(()), TOKEN, tenant_id=tenant)


def take_for(database: Database, device: DeviceClass, terms: Terms, *, seconds: float) -> Claim:
    """A claimed attempt, as if it had begun so long ago."""
    with database.transaction() as session:
        held = claim(session, worker_id="w", device_class=device, lease_seconds=600, terms=terms)
        assert held is not None
        this = (Attempt.job_id == held.job_id, Attempt.number == held.attempt)
        session.execute(update(Attempt).where(*this).values(started_at=seconds_from_now(-seconds)))
    return held


def month(database: Database, tenant: str) -> MonthView:
    with database.reading() as session:
        (only,) = months_of(session, tenant, "EUR")
    return only


def test_time_of_devices_is_counted_at_the_price_of_its_beginning(database: Database, tenant: str) -> None:
    """Two GPUs for 1800 s at 3.00 an hour are 3.00, a CPU for 720 s at 0.50 is 0.10."""
    add(database, tenant, device="cuda")
    held = take_for(database, DeviceClass.CUDA, Terms(devices=2, price_micros=3_000_000), seconds=1800)
    with database.transaction() as session:
        AttemptWriter(session, held.job_id, held.attempt).succeed(report(), [artifact(size=50)], currency="EUR")
    stored_report = get(database, tenant, held.job_id).report
    assert stored_report is not None
    cost = Money.model_validate(stored_report["cost"])
    assert cost.currency == "EUR"
    assert float(cost.amount) == pytest.approx(3.0, abs=0.01)
    add(database, tenant, device="cpu")
    held = take_for(database, DeviceClass.CPU, Terms(price_micros=500_000), seconds=720)
    with database.transaction() as session:
        AttemptWriter(session, held.job_id, held.attempt).fail(InvalidDataset("no text"))
    used = month(database, tenant)
    assert used.month == datetime.now(UTC).strftime("%Y-%m")
    assert (used.jobs, used.stored_bytes) == (2, 50)
    assert used.gpu_seconds == pytest.approx(3600, abs=10)
    assert used.cpu_seconds == pytest.approx(720, abs=5)
    assert used.cost is not None
    assert float(used.cost.amount) == pytest.approx(3.1, abs=0.01)


def test_faults_of_the_service_cost_nothing(database: Database, tenant: str, stranger: str) -> None:
    job_id = add(database, tenant)
    held = take_for(database, DeviceClass.CPU, Terms(price_micros=1_000_000), seconds=3600)
    with database.transaction() as session:
        AttemptWriter(session, job_id, held.attempt).fail(WorkerLost("gone"))
    end_back_off(database, job_id)
    held = take_for(database, DeviceClass.CPU, Terms(price_micros=1_000_000), seconds=3600)
    with database.transaction() as session:
        AttemptWriter(session, job_id, held.attempt).release()
    end_back_off(database, job_id)
    held = take_for(database, DeviceClass.CPU, Terms(price_micros=1_000_000), seconds=1800)
    with database.transaction() as session:
        AttemptWriter(session, job_id, held.attempt).succeed(report(), [])
    used = month(database, tenant)
    assert used.cpu_seconds == pytest.approx(1800, abs=5)
    assert used.cost is not None
    assert float(used.cost.amount) == pytest.approx(0.5, abs=0.01)
    with database.reading() as session:
        assert months_of(session, stranger, "EUR") == []


def test_without_a_price_there_is_no_money(database: Database, tenant: str) -> None:
    add(database, tenant)
    held = take(database)
    succeed(database, held)
    assert (get(database, tenant, held.job_id).report or {}).get("cost") is None
    with database.transaction() as session:
        add_usage(session, tenant, downloaded_bytes=7)
        add_usage(session, tenant, downloaded_bytes=5, uploaded_bytes=1)
    used = month(database, tenant)
    assert (used.cost, used.downloaded_bytes, used.uploaded_bytes, used.jobs) == (None, 12, 1, 1)
