"""Queue positions: the order is that of real claims, and times follow from durations that were stored."""

import pytest
from sqlalchemy import delete, update

from app.store.attempts import AttemptWriter, Claim
from app.store.clock import seconds_from_now
from app.store.models import Attempt, Job
from app.store.session import Database
from app.store.waiting import Place, places
from app.store.workers import gone, register
from bitwright.job_states import DeviceClass, JobStatus
from tests.reports import report
from tests.store.samples import add, request, take, try_take


def look(database: Database) -> dict[str, Place]:
    with database.reading() as session:
        return places(session)


def alive(database: Database, *workers: tuple[str, DeviceClass]) -> None:
    with database.transaction() as session:
        for name, device in workers:
            register(session, name, device)


def finish(database: Database, held: Claim, *, seconds: float) -> None:
    """Let the job succeed, as if it had taken so long."""
    with database.transaction() as session:
        AttemptWriter(session, held.job_id, held.attempt).succeed(report(), [])
    with database.transaction() as session:
        times = {"started_at": seconds_from_now(-seconds - 1000), "finished_at": seconds_from_now(-1000)}
        session.execute(update(Job).where(Job.id == held.job_id).values(times))


def begun(database: Database, held: Claim, *, ago: float) -> None:
    """As if the running attempt had begun then."""
    with database.transaction() as session:
        session.execute(update(Attempt).where(Attempt.job_id == held.job_id).values(started_at=seconds_from_now(-ago)))


def test_positions_are_the_order_of_claims(database: Database, tenant: str, stranger: str) -> None:
    add(database, tenant)
    assert take(database).attempt == 1  # the tenant has a running job, so that the stranger's go first
    for owner, priority in [(tenant, 0), (stranger, 0), (tenant, 5), (stranger, -5), (tenant, 0)]:
        add(database, owner, priority=priority)
    told = look(database)
    assert sorted(place.position for place in told.values()) == [1, 2, 3, 4, 5]
    first = min(told, key=lambda job_id: told[job_id].position)
    assert take(database).job_id == first
    assert first not in look(database)


def test_jobs_of_another_device_do_not_stand_before(database: Database, tenant: str) -> None:
    cuda, cpu, any_one, cpu_again = (add(database, tenant, device=device) for device in ("cuda", "cpu", "any", "cpu"))
    told = {job_id: place.position for job_id, place in look(database).items()}
    assert told == {cuda: 1, cpu: 1, any_one: 3, cpu_again: 3}
    taken = [try_take(database, f"w{n}", DeviceClass.CPU) for n in range(3)]
    assert [held.job_id for held in taken if held is not None] == [cpu, any_one, cpu_again]


def test_times_follow_from_measured_durations(database: Database, tenant: str) -> None:
    alive(database, ("w1", DeviceClass.CPU))
    for seconds in (50, 60, 400):
        add(database, tenant)
        finish(database, take(database), seconds=seconds)
    first = add(database, tenant)
    running = take(database)
    begun(database, running, ago=20)
    waiting = [add(database, tenant) for _ in range(3)]
    etas = [look(database)[job_id].eta_seconds for job_id in waiting]
    assert running.job_id == first
    assert etas == pytest.approx([40, 100, 160], abs=3)
    alive(database, ("w2", DeviceClass.CPU))
    assert [look(database)[job_id].eta_seconds for job_id in waiting] == pytest.approx([0, 40, 60], abs=3)


def test_a_time_that_nobody_can_know_is_not_told(database: Database, tenant: str) -> None:
    waiting = add(database, tenant)
    assert look(database)[waiting] == Place(1, None), "no worker is alive"
    alive(database, ("w1", DeviceClass.CUDA))
    assert look(database)[waiting].eta_seconds == 0
    behind, other = add(database, tenant), add(database, tenant, device="cpu")
    assert look(database)[behind] == Place(2, None), "nothing like the job before it has succeeded"
    assert look(database)[other] == Place(3, None), "no worker of its device is alive"
    with database.transaction() as session:
        gone(session, "w1")
    alive(database, ("w1", DeviceClass.CPU))
    finish(database, take(database), seconds=5)
    begun(database, take(database), ago=6)
    assert look(database)[other] == Place(1, None), "the running one already takes longer than others did"


def test_a_job_that_backs_off_begins_later(database: Database, tenant: str) -> None:
    alive(database, ("w1", DeviceClass.CPU))
    job_id = add(database, tenant)
    with database.transaction() as session:
        session.execute(update(Job).values(available_at=seconds_from_now(30)))
    assert look(database)[job_id].eta_seconds == pytest.approx(30, abs=3)


def test_recipes_have_durations_of_their_own(database: Database, tenant: str) -> None:
    from app.store.job_pages import JobFilters
    from app.store.jobs import JobRepository

    alive(database, ("w1", DeviceClass.CPU))
    with database.transaction() as session:
        job = JobRepository(session, tenant).add(request(), recipe="auto-round").id
    finish(database, take(database), seconds=70)
    with database.transaction() as session:
        jobs = JobRepository(session, tenant)
        plain, named = jobs.add(request()).id, [jobs.add(request(), recipe="auto-round").id for _ in range(2)]
        by_recipe, by_method = (
            [found.id for found in jobs.page(after=None, limit=9, filters=JobFilters(method=name)).items]
            for name in ("auto-round", "rtn")
        )
        assert by_recipe == [*named[::-1], job]
        assert set(by_method) == {plain, job, *named}
    assert look(database)[named[0]].eta_seconds is None
    with database.transaction() as session:
        session.execute(delete(Job).where(Job.id == plain))
    assert [look(database)[job_id].eta_seconds for job_id in named] == [0, 70]


def test_the_end_of_a_long_queue_is_not_told(database: Database, tenant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.store.waiting.LONGEST_QUEUE", 2)
    made = [add(database, tenant) for _ in range(3)]
    assert set(look(database)) == set(made[:2])
    with database.reading() as session:
        assert session.get_one(Job, made[2]).status is JobStatus.QUEUED


def test_two_durations_give_their_mean_and_only_the_latest_jobs_count(
    database: Database, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.store.waiting.MEASURED_JOBS", 2)
    alive(database, ("w1", DeviceClass.CPU))
    for seconds in (9000, 50, 70):
        add(database, tenant)
        finish(database, take(database), seconds=seconds)
    first, second = add(database, tenant), add(database, tenant)
    assert [look(database)[job_id].eta_seconds for job_id in (first, second)] == [0, 60]


def test_jobs_of_another_model_say_nothing_of_this_one(database: Database, tenant: str) -> None:
    alive(database, ("w1", DeviceClass.CPU))
    add(database, tenant, model="org/large")
    finish(database, take(database), seconds=900)
    small, behind = add(database, tenant), add(database, tenant)
    assert (look(database)[small].eta_seconds, look(database)[behind].eta_seconds) == (0, None)


def test_the_time_left_is_that_of_the_running_attempt(database: Database, tenant: str) -> None:
    alive(database, ("w1", DeviceClass.CPU))
    add(database, tenant)
    finish(database, take(database), seconds=100)
    add(database, tenant)
    first = take(database)
    with database.transaction() as session:
        assert AttemptWriter(session, first.job_id, first.attempt).release() is JobStatus.QUEUED
    take(database)
    for number, ago in ((2, 30), (1, 5000)):  # the ended one was written last, and is no row to go by
        with database.transaction() as session:
            this = (Attempt.job_id == first.job_id, Attempt.number == number)
            session.execute(update(Attempt).where(*this).values(started_at=seconds_from_now(-ago)))
    waiting = add(database, tenant)
    assert look(database)[waiting].eta_seconds == pytest.approx(70, abs=3)
