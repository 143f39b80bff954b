"""Tenants: their policy, their turns in the queue, and their quotas, on both databases."""

import threading
from collections import Counter
from collections.abc import Callable

import pytest
from sqlalchemy import update

from app.domain.access import Scope
from app.store.attempts import Terms, claim
from app.store.clock import seconds_from_now
from app.store.jobs import JobRepository
from app.store.models import RateWindow
from app.store.session import Database
from app.store.tenancy import tenants
from app.store.tenancy.keys import authenticate, find_tenant, issue_key
from app.store.tenancy.quotas import (
    require_queue_room,
    require_storage,
    require_upload_room,
    spend_post,
    stored_bytes_by_tenant,
    used_by,
)
from app.store.uploads import NewUploadFile, UploadRepository
from app.store.waiting import places
from bitwright.errors import (
    BitwrightError,
    BodyTooLarge,
    Conflict,
    InvalidRequest,
    NotFound,
    QueuedJobsExceeded,
    RateLimitExceeded,
    StorageExceeded,
    Unauthenticated,
    UploadsExceeded,
)
from bitwright.job_states import DeviceClass
from bitwright.tenancy import Quotas, TenantChange, TenantRequest
from tests.store.samples import add, artifact, request, succeed, take, try_take


def change(database: Database, tenant: str, **fields: object) -> None:
    with database.transaction() as session:
        tenants.change_tenant(session, tenant, TenantChange.model_validate(fields))


def in_force(database: Database, tenant: str, defaults: Quotas) -> Quotas:
    with database.reading() as session:
        return tenants.policy_of(session, tenant, defaults).quotas


def take_with(database: Database, worker: str, terms: Terms) -> str | None:
    with database.transaction() as session:
        held = claim(session, worker_id=worker, device_class=DeviceClass.CPU, lease_seconds=600, terms=terms)
    return None if held is None else held.job_id


def test_a_tenant_is_made_found_changed_and_deleted(database: Database) -> None:
    asked = TenantRequest(name="acme", quotas=Quotas(queued_jobs=3), allowed_models=["org/*"])
    with database.transaction() as session:
        made = tenants.create_tenant(session, asked)
        assert (made.name, made.quotas, made.allowed_models) == ("acme", {"queued_jobs": 3}, ["org/*"])
        with pytest.raises(Conflict, match="acme"):
            tenants.create_tenant(session, asked)
        assert find_tenant(session, "acme").id == made.id
    change(database, made.id, quotas={"streams": 2})
    assert in_force(database, made.id, Quotas()) == Quotas(queued_jobs=3, streams=2)
    change(database, made.id, quotas={"queued_jobs": None}, allowed_models=None)
    assert in_force(database, made.id, Quotas(queued_jobs=9, uploads=1)) == Quotas(queued_jobs=9, uploads=1, streams=2)
    add(database, made.id)
    with database.transaction() as session, pytest.raises(Conflict, match="jobs"):
        tenants.delete_tenant(session, made.id)
    with database.reading() as session:
        assert tenants.policy_of(session, made.id, Quotas()).allowed_models is None
        page = tenants.tenants_page(session, after=None, limit=1)
        assert [tenant.id for tenant in page.items] == [made.id]
        assert page.next_cursor is None
        with pytest.raises(InvalidRequest):
            tenants.tenants_page(session, after="nonsense", limit=1)


def test_a_deleted_tenant_is_no_more(database: Database, tenant: str) -> None:
    with database.transaction() as session:
        issue_key(session, tenant, name="ci", scopes=frozenset({Scope.READ}))
        tenants.delete_tenant(session, tenant)
    with database.transaction() as session, pytest.raises(NotFound):
        tenants.delete_tenant(session, tenant)


def test_a_suspended_tenants_keys_are_refused_and_its_jobs_wait(database: Database, tenant: str, stranger: str) -> None:
    with database.transaction() as session:
        _, key = issue_key(session, tenant, name="ci", scopes=frozenset({Scope.SUBMIT}))
    mine, theirs = add(database, tenant), add(database, stranger)
    change(database, tenant, suspended=True)
    with database.reading() as session, pytest.raises(Unauthenticated, match="suspended"):
        authenticate(session, key)
    assert take(database).job_id == theirs
    assert try_take(database) is None
    change(database, tenant, suspended=False)
    with database.reading() as session:
        assert authenticate(session, key).tenant_id == tenant
    assert take(database).job_id == mine


def test_tenants_take_turns_however_many_jobs_each_has(database: Database, tenant: str, stranger: str) -> None:
    """One worker, which has nothing running whenever it claims: age alone would serve the first tenant's jobs first."""
    many = [add(database, tenant) for _ in range(12)]
    few = [add(database, stranger) for _ in range(2)]
    with database.reading() as session:
        told = sorted(places(session).items(), key=lambda item: item[1].position)
    taken = []
    for _ in range(6):
        held = take(database)
        taken.append(held.job_id)
        succeed(database, held)
    assert taken[:4] in ([many[0], few[0], many[1], few[1]], [few[0], many[0], few[1], many[1]])
    assert taken[4:] == many[2:4]
    assert [job_id for job_id, _ in told][:6] == taken, "the positions that were told are the order of the claims"


def test_priority_goes_before_turns(database: Database, tenant: str, stranger: str) -> None:
    add(database, stranger)
    urgent = [add(database, tenant, priority=5) for _ in range(2)]
    taken = []
    for _ in range(2):
        held = take(database)
        taken.append(held.job_id)
        succeed(database, held)
    assert taken == urgent


def test_no_tenant_has_more_running_than_it_may(database: Database, tenant: str, stranger: str) -> None:
    mine, theirs = [add(database, tenant) for _ in range(3)], [add(database, stranger) for _ in range(3)]
    change(database, tenant, quotas={"running_jobs": 1})
    terms = Terms(running_jobs=2)
    taken = [take_with(database, f"w{number}", terms) for number in range(6)]
    assert Counter(job in mine for job in taken if job is not None) == {True: 1, False: 2}
    assert set(theirs[:2]) <= set(taken)


def test_claims_at_one_moment_keep_the_limit(database: Database, tenant: str) -> None:
    for _ in range(8):
        add(database, tenant)
    change(database, tenant, quotas={"running_jobs": 2})
    taken: list[str | None] = []
    ready = threading.Barrier(6)

    def worker(number: int) -> None:
        ready.wait()
        taken.append(take_with(database, f"w{number}", Terms()))

    threads = [threading.Thread(target=worker, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([job for job in taken if job is not None]) == 2
    assert len(taken) == 6


def test_a_rate_counts_down_refuses_and_begins_anew(database: Database, tenant: str, stranger: str) -> None:
    spent = []
    for _ in range(3):
        with database.transaction() as session:
            spent.append(spend_post(session, tenant, 3))
    assert [each.remaining for each in spent] == [2, 1, 0]
    assert all(1 <= each.seconds <= 60 for each in spent)
    with database.transaction() as session, pytest.raises(RateLimitExceeded) as caught:
        spend_post(session, tenant, 3)
    assert (caught.value.quota, caught.value.window_seconds) == (3, 60)
    assert 1 <= caught.value.retry_after_seconds <= 60
    with database.transaction() as session:
        assert spend_post(session, stranger, 3).remaining == 2, "another tenant's window is its own"
        session.execute(update(RateWindow).values(ends_at=seconds_from_now(-1)))
    with database.transaction() as session:
        assert spend_post(session, tenant, 3).remaining == 2
    with database.transaction() as session, pytest.raises(RateLimitExceeded):
        spend_post(session, stranger, 0)


def test_the_last_place_in_the_queue_is_taken_once(database: Database, tenant: str) -> None:
    quotas = Quotas(queued_jobs=2)
    add(database, tenant)
    outcomes: list[str] = []
    ready = threading.Barrier(4)

    def submit() -> None:
        ready.wait()
        try:
            with database.transaction() as session:
                require_queue_room(session, tenant, quotas)
                JobRepository(session, tenant).add(request())
            outcomes.append("queued")
        except QueuedJobsExceeded as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(outcomes) == {"queued": 1, "queued_jobs_exceeded": 3}


def test_storage_counts_artifacts_and_announced_uploads(database: Database, tenant: str, stranger: str) -> None:
    add(database, tenant)
    succeed(database, take(database), [artifact(size=700)])
    with database.transaction() as session:
        UploadRepository(session, tenant).create([NewUploadFile("t.jsonl", 200, "0" * 64)])
    with database.reading() as session:
        used = used_by(session, tenant)
        assert (used.storage_bytes, used.uploads, used.queued_jobs, used.running_jobs) == (900, 1, 0, 0)
        assert used_by(session, stranger).storage_bytes == 0
        assert stored_bytes_by_tenant(session) == {tenant: 900}
    allowed: list[tuple[Quotas, int, type[BitwrightError] | None]] = [
        (Quotas(), 10**15, None),
        (Quotas(storage_bytes=1000), 100, None),
        (Quotas(storage_bytes=1000), 101, StorageExceeded),
        (Quotas(upload_bytes=50), 50, None),
        (Quotas(upload_bytes=50), 51, BodyTooLarge),
        (Quotas(uploads=2), 1, None),
        (Quotas(uploads=1), 1, UploadsExceeded),
    ]
    for quotas, size, refusal in allowed:
        assert raised(database, lambda session, q=quotas, s=size: require_upload_room(session, tenant, q, s)) is refusal
    full = Quotas(storage_bytes=900)
    assert raised(database, lambda session: require_storage(session, tenant, full)) is StorageExceeded
    assert raised(database, lambda session: require_storage(session, stranger, full)) is None


def raised(database: Database, action: Callable[..., None]) -> type[BitwrightError] | None:
    try:
        with database.transaction() as session:
            action(session)
    except BitwrightError as error:
        return type(error)
    return None
