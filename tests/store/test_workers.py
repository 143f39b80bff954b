import pytest
from sqlalchemy import update

from app.store.attempts import AttemptWriter
from app.store.clock import seconds_from_now
from app.store.models import Worker
from app.store.session import Database
from app.store.workers import (
    FRESH_SECONDS,
    clock_skew,
    describe,
    forget_workers,
    gone,
    heartbeat,
    list_workers,
    live_classes,
    register,
    sweep_lease,
    waiting,
)
from bitwright.errors import CudaError
from bitwright.job_states import DeviceClass
from tests.reports import report
from tests.store.samples import add, take


def states(database: Database) -> dict[str, str | None]:
    with database.reading() as session:
        return {state.worker.id: state.job_id for state in list_workers(session)}


def unseen(database: Database, worker_id: str, seconds: float) -> None:
    with database.transaction() as session:
        session.execute(update(Worker).where(Worker.id == worker_id).values(last_seen_at=seconds_from_now(-seconds)))


def test_workers_are_idle_until_they_hold_a_job(database: Database, tenant: str) -> None:
    with database.transaction() as session:
        register(session, "w1", DeviceClass.CPU, {"host_memory_bytes": 2**36})
        register(session, "w2", DeviceClass.CUDA)
    assert states(database) == {"w1": None, "w2": None}
    job_id = add(database, tenant)
    held = take(database, "w1")
    assert states(database) == {"w1": job_id, "w2": None}
    with database.transaction() as session:
        AttemptWriter(session, job_id, held.attempt).succeed(report(), [])
    assert states(database) == {"w1": None, "w2": None}
    with database.reading() as session:
        worker = session.get_one(Worker, "w1")
    assert (worker.device_class, worker.capacity) == ("cpu", {"host_memory_bytes": 2**36})


def test_a_worker_that_is_silent_is_not_listed_and_may_come_back(database: Database) -> None:
    with database.transaction() as session:
        register(session, "w1", DeviceClass.CPU)
        register(session, "w2", DeviceClass.CPU)
    unseen(database, "w1", FRESH_SECONDS + 1)
    assert states(database) == {"w2": None}
    with database.transaction() as session:
        assert heartbeat(session, "w1") is True
    assert states(database) == {"w1": None, "w2": None}
    unseen(database, "w1", 3600)
    with database.transaction() as session:
        forget_workers(session, unseen_seconds=3000)
        assert heartbeat(session, "w1") is False
        gone(session, "w2")
    assert states(database) == {}


def test_registering_again_renews_what_was_told(database: Database) -> None:
    for device in (DeviceClass.CPU, DeviceClass.CUDA):
        with database.transaction() as session:
            register(session, "w1", device, {"device": device.value})
    with database.reading() as session:
        worker = session.get_one(Worker, "w1")
    assert (worker.device_class, worker.capacity) == ("cuda", {"device": "cuda"})


def test_only_jobs_that_can_be_claimed_now_wait(database: Database, tenant: str) -> None:
    for device in ("any", "any", "cuda", "cpu"):
        add(database, tenant, device=device)
    held = take(database)
    with database.transaction() as session:
        AttemptWriter(session, held.job_id, held.attempt).fail(CudaError("Xid"))
        assert waiting(session) == {"any": 1, "cuda": 1, "cpu": 1}


@pytest.mark.parametrize("ended", [False, True])
def test_the_sweep_has_one_holder_until_its_lease_ends(database: Database, ended: bool) -> None:
    with database.transaction() as session:
        assert sweep_lease(session, "a", 0 if ended else 60)
    with database.transaction() as session:
        assert sweep_lease(session, "b", 60) is ended
    with database.transaction() as session:
        assert sweep_lease(session, "a", 60) is not ended


def test_only_classes_with_a_worker_that_was_seen_are_alive(database: Database) -> None:
    with database.transaction() as session:
        assert live_classes(session) == frozenset()
        register(session, "w1", DeviceClass.CPU)
        register(session, "w2", DeviceClass.CUDA)
        session.execute(update(Worker).where(Worker.id == "w2").values(last_seen_at=seconds_from_now(-91)))
        assert live_classes(session) == {DeviceClass.CPU}


def test_what_is_known_of_a_machine_can_be_told_anew(database: Database) -> None:
    with database.transaction() as session:
        register(session, "w1", DeviceClass.CPU, {"disk_bytes": 1})
        (before,) = (state.worker.started_at for state in list_workers(session))
        describe(session, "w1", {"disk_bytes": 1, "clock_skew_seconds": 3.0})
    with database.reading() as session:
        (state,) = list_workers(session)
        assert state.worker.capacity == {"disk_bytes": 1, "clock_skew_seconds": 3.0}
        assert state.worker.started_at == before


def test_this_hosts_clock_is_the_databases(database: Database) -> None:
    """Both run on this machine; a worker whose clock is wrong is in the end-to-end tests."""
    with database.reading() as session:
        assert abs(clock_skew(session)) < 0.5
