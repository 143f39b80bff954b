"""Random walks through the life of jobs, held against a model in memory: hypothesis chooses who does what next.

Callers of two tenants, workers that hold a claim, and workers that do not know that they have lost theirs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import func, select

from app.domain.job_states import MAX_RETRIES_WITHOUT_PROGRESS
from app.store.attempts import AttemptWriter, Claim
from app.store.endings import requeue_lost
from app.store.events import EventRepository
from app.store.idempotency import Idempotency
from app.store.jobs import JobRepository
from app.store.models import Attempt, Event, Job, JobLabel
from app.store.session import Database
from bitwright.errors import (
    AttemptSuperseded,
    BitwrightError,
    Conflict,
    IllegalTransition,
    InvalidDataset,
    KeyReused,
    NotFound,
    OutOfMemory,
    WorkerLost,
)
from bitwright.job_states import FINAL_STATUSES, JobStatus
from tests.reports import report
from tests.store.samples import block, end_back_off, get, let_lease_run_out, request, try_take

QUEUED, RUNNING, SUCCEEDED = JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.SUCCEEDED
FAILED, CANCELLED = JobStatus.FAILED, JobStatus.CANCELLED
ERRORS: dict[str, BitwrightError] = {
    "never": InvalidDataset("no text", field="calibration"),
    "later": WorkerLost("the worker is gone"),
    "smaller": OutOfMemory("too large"),
}


@dataclass
class Expected:
    """A job as the store's rules would have it."""

    tenant: str
    priority: int
    status: JobStatus = QUEUED
    attempt: int = 0
    events: int = 1
    cancel: bool = False
    blocks: int = 0
    fruitless: int = 0
    divided: bool = False


@dataclass
class Model:
    """All that there is: jobs by id, what Idempotency-Keys stand for, and the tenants that were served."""

    jobs: dict[str, Expected] = field(default_factory=dict)
    keys: dict[tuple[str, str], tuple[str, int]] = field(default_factory=dict)
    served: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)

    def enter(self, job_id: str, status: JobStatus) -> None:
        job = self.jobs[job_id]
        job.status, job.events = status, job.events + 1

    def holds(self, held: Claim) -> bool:
        """Whether the attempt of a claim still holds its job."""
        job = self.jobs.get(held.job_id)
        return job is not None and job.status is RUNNING and job.attempt == held.attempt

    def after(self, job: Expected, kind: str) -> JobStatus:
        """The status of a job whose attempt ends with an error of a kind."""
        if job.cancel:
            return CANCELLED
        if kind == "smaller" and not job.divided:
            job.divided = True
            return QUEUED
        return QUEUED if kind == "later" and job.fruitless <= MAX_RETRIES_WITHOUT_PROGRESS else FAILED

    def next_jobs(self) -> set[str]:
        """The jobs of which the next claim takes one."""
        running = {t: sum(j.status is RUNNING for j in self.jobs.values() if j.tenant == t) for t in self.tenants}
        waiting = {id_: job for id_, job in self.jobs.items() if job.status is QUEUED}
        oldest = {(job.tenant, job.priority): id_ for id_, job in sorted(waiting.items(), reverse=True)}
        best = min(((-p, running[t], t in self.served) for t, p in oldest), default=None)
        return {id_ for (t, p), id_ in oldest.items() if (-p, running[t], t in self.served) == best}

    @property
    def tenants(self) -> set[str]:
        return {job.tenant for job in self.jobs.values()}


Write = Callable[[AttemptWriter], object]
Ask = Callable[[JobRepository], object]


class Store(RuleBasedStateMachine):
    """Rules are what callers, workers and the sweep do; each is done to the model, too."""

    def __init__(self, database: Database, tenants: tuple[str, str]) -> None:
        super().__init__()
        self.database, self.tenants, self.model = database, tenants, Model()

    jobs: Bundle[str] = Bundle("jobs")
    claims: Bundle[Claim] = Bundle("claims")

    @rule(target=jobs, who=st.integers(0, 1), priority=st.integers(0, 2), key=st.sampled_from([None, "a", "b"]))
    def submit(self, who: int, priority: int, key: str | None) -> MultipleResults[str] | str:
        tenant = self.tenants[who]
        asked = request(priority=priority, metadata={"walk": "yes"})
        once = None if key is None else Idempotency.of(key, asked)
        standing = self.model.keys.get((tenant, key)) if key is not None else None

        def add() -> Job:
            with self.database.transaction() as session:
                return JobRepository(session, tenant).add(asked, idempotency=once)

        if standing is not None and standing[1] != priority:
            with pytest.raises(KeyReused):
                add()
            return multiple()
        job = add()
        assert job.replayed == (standing is not None)
        if standing is not None:
            assert job.id == standing[0]
            return multiple()
        self.model.jobs[job.id] = Expected(tenant, priority)
        if key is not None:
            self.model.keys[tenant, key] = (job.id, priority)
        return job.id

    @rule(target=claims)
    def take(self) -> MultipleResults[Claim] | Claim:
        expected = self.model.next_jobs()
        held = try_take(self.database)
        if held is None:
            assert not expected
            return multiple()
        assert held.job_id in expected
        job = self.model.jobs[held.job_id]
        job.attempt, job.fruitless = job.attempt + 1, job.fruitless + 1
        assert (held.attempt, held.tenant_id) == (job.attempt, job.tenant)
        self.model.enter(held.job_id, RUNNING)
        self.model.served.add(job.tenant)
        return held

    @rule(held=claims, index=st.integers(0, 7))
    def finish_a_block(self, held: Claim, index: int) -> None:
        if self.writes(held, lambda attempt: attempt.append([block(index)])):
            job = self.model.jobs[held.job_id]
            job.events += 1
            if job.blocks < index + 1:
                job.blocks, job.fruitless = index + 1, 0

    @rule(held=claims)
    def renew(self, held: Claim) -> None:
        self.writes(held, lambda attempt: attempt.renew(60))

    @rule(held=claims)
    def succeed(self, held: Claim) -> None:
        if self.writes(held, lambda attempt: attempt.succeed(report(), [])):
            self.model.enter(held.job_id, SUCCEEDED)

    @rule(held=claims, kind=st.sampled_from(sorted(ERRORS)))
    def fail(self, held: Claim, kind: str) -> None:
        if self.writes(held, lambda attempt: attempt.fail(ERRORS[kind])):
            self.ended(held.job_id, kind)

    @rule(held=claims)
    def give_back(self, held: Claim) -> None:
        if self.writes(held, lambda attempt: attempt.release()):
            job = self.model.jobs[held.job_id]
            if not job.cancel:
                job.fruitless = max(job.fruitless - 1, 0)
            self.model.enter(held.job_id, CANCELLED if job.cancel else QUEUED)

    @rule(held=claims)
    def end_as_cancelled(self, held: Claim) -> None:
        if self.writes(held, lambda attempt: attempt.cancelled()):
            self.model.enter(held.job_id, CANCELLED)

    @rule(held=claims)
    def lose_the_worker(self, held: Claim) -> None:
        if not self.model.holds(held):
            return
        let_lease_run_out(self.database, held.job_id)
        with pytest.raises(AttemptSuperseded):  # from then on it may write nothing, swept or not
            self.write(held, lambda attempt: attempt.append([block(0)]))
        with self.database.transaction() as session:
            assert [job_id for job_id, _ in requeue_lost(session)] == [held.job_id]
        self.ended(held.job_id, "later")

    @rule(job_id=jobs, own=st.booleans())
    def cancel(self, job_id: str, own: bool) -> None:
        job = self.asked(job_id, own, {QUEUED, RUNNING}, lambda jobs: jobs.cancel(job_id), IllegalTransition)
        if job is not None and job.status is QUEUED:
            self.model.enter(job_id, CANCELLED)
        elif job is not None:
            job.cancel = True

    @rule(job_id=jobs, own=st.booleans())
    def retry(self, job_id: str, own: bool) -> None:
        job = self.asked(job_id, own, {FAILED, CANCELLED}, lambda jobs: jobs.retry(job_id), IllegalTransition)
        if job is not None:
            job.cancel, job.fruitless, job.divided = False, 0, False
            self.model.enter(job_id, QUEUED)

    @rule(job_id=jobs, own=st.booleans())
    def delete(self, job_id: str, own: bool) -> None:
        if self.asked(job_id, own, set(FINAL_STATUSES), lambda jobs: jobs.delete(job_id), Conflict) is None:
            return
        del self.model.jobs[job_id]
        self.model.deleted.add(job_id)
        self.model.keys = {key: made for key, made in self.model.keys.items() if made[0] != job_id}

    @invariant()
    def every_job_is_as_expected(self) -> None:
        for job_id, job in self.model.jobs.items():
            stored = get(self.database, job.tenant, job_id)
            found = (stored.status, stored.attempt, stored.last_event, stored.blocks_done, stored.fruitless_attempts)
            assert found == (job.status, job.attempt, job.events, job.blocks, job.fruitless)
            assert (stored.worker_id is not None) == (job.status is RUNNING)
            with self.database.reading() as session:
                told = EventRepository(session, job.tenant).page(job_id, 0, 1000)
                tried = JobRepository(session, job.tenant).attempts(job_id)
            assert [event.sequence for event in told] == list(range(1, job.events + 1))
            assert [each.number for each in tried] == list(range(1, job.attempt + 1))
            open_attempts = [each.number for each in tried if each.status is RUNNING]
            assert open_attempts == ([job.attempt] if job.status is RUNNING else [])

    @invariant()
    def lists_have_each_tenants_own(self) -> None:
        for tenant in self.tenants:
            with self.database.reading() as session:
                page = JobRepository(session, tenant).page(after=None, limit=1000)
            mine = sorted((id_ for id_, job in self.model.jobs.items() if job.tenant == tenant), reverse=True)
            assert [job.id for job in page.items] == mine

    @invariant()
    def nothing_is_left_of_what_was_deleted(self) -> None:
        with self.database.reading() as session:
            for table, column in (
                (Job, Job.id),
                (Event, Event.job_id),
                (Attempt, Attempt.job_id),
                (JobLabel, JobLabel.job_id),
            ):
                gone = select(func.count()).select_from(table).where(column.in_(self.model.deleted))
                assert session.scalar(gone) == 0

    def teardown(self) -> None:
        """Leave the tenants without a job, for the next walk."""
        with self.database.transaction() as session:
            for job in session.scalars(select(Job)):
                session.delete(job)

    def writes(self, held: Claim, write: Write) -> bool:
        """Write for an attempt; False if it has lost its job, which the store must know, too."""
        if self.model.holds(held):
            self.write(held, write)
            return True
        with pytest.raises(AttemptSuperseded):
            self.write(held, write)
        return False

    def write(self, held: Claim, write: Write) -> None:
        with self.database.transaction() as session:
            write(AttemptWriter(session, held.job_id, held.attempt))

    def ended(self, job_id: str, kind: str) -> None:
        self.model.enter(job_id, self.model.after(self.model.jobs[job_id], kind))
        end_back_off(self.database, job_id)

    def asked(
        self, job_id: str, own: bool, allowed: set[JobStatus], ask: Ask, refusal: type[BitwrightError]
    ) -> Expected | None:
        """Ask for something as the job's tenant, or as the other one; the job, if it was allowed."""
        job = self.model.jobs.get(job_id)
        owner = self.tenants[0] if job is None else job.tenant
        caller = owner if own else next(tenant for tenant in self.tenants if tenant != owner)
        expected = NotFound if job is None or not own else None if job.status in allowed else refusal

        def do() -> None:
            with self.database.transaction() as session:
                ask(JobRepository(session, caller))

        if expected is None:
            do()
            return job
        with pytest.raises(expected):
            do()
        return None


@pytest.mark.slow
def test_random_walks_through_the_life_of_jobs(database: Database, tenant: str, stranger: str) -> None:
    run_state_machine_as_test(
        partial(Store, database, (tenant, stranger)),  # type: ignore[arg-type]  # it is called, no more
        settings=settings(
            max_examples=30,
            stateful_step_count=30,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
