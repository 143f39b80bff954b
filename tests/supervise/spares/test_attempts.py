"""An attempt that begins as a spare is an attempt like any other; and what happens to a spare is no job's fault."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from bitwright.job_states import JobStatus
from tests.supervise.bench import CPU, Running, alive, wait_for
from tests.supervise.spares.conftest import Waiting
from workers.disk.orders import BUILTIN_TEXT, SpareOrder, WarmChild
from workers.supervise.attempt import attempt_runner
from workers.supervise.attempt.attempt_runner import supervise
from workers.supervise.spares import pool
from workers.supervise.spares.spare import Spare

GOOD = "block,log:hello,file:a.json:{}"


def test_a_job_is_done_by_the_spare_and_the_next_one_waits(waiting: Waiting) -> None:
    bench, pids = waiting.bench, list[int]()
    for number in (1, 2):
        pids.append(waiting.spare().pid)
        job_id = bench.submit("log:hello,fail:corrupt_checkpoint" if number == 2 else GOOD)
        with capture_logs() as logs:
            status = bench.run()
        assert status is (JobStatus.SUCCEEDED if number == 1 else JobStatus.FAILED)
        assert [log["pid"] for log in logs if log["event"] == "spare_taken"] == [pids[-1]]
    assert len(set(pids)) == 2
    assert not any(map(alive, pids))
    lines = bench.log(job_id)
    assert [(line["event"], line["job_id"], line["attempt"]) for line in lines] == [("hello", job_id, 1)]
    assert waiting.spare().pid not in pids
    folder = bench.context.settings.workspace_dir / "spares" / bench.context.worker_id
    assert len(list(folder.iterdir())) == 1, "the folders of spares that were taken are gone"


@pytest.mark.slow
def test_the_next_spare_starts_while_the_job_runs(waiting: Waiting) -> None:
    first = waiting.spare()
    waiting.bench.submit("hang", time_limit_seconds=1)
    assert waiting.bench.run() is JobStatus.FAILED
    (second,) = waiting.spares.waiting
    assert second.pid != first.pid
    assert second.age > 0.3


def test_a_cancel_frees_an_attempt_that_was_a_spare_within_five_seconds(waiting: Waiting) -> None:
    bench, spare = waiting.bench, waiting.spare()
    job_id = bench.submit("child,block,hang")
    running = bench.start()
    grandchild = running.log_event("grandchild")["pid"]
    running.log_event("hanging")
    asked = time.monotonic()
    bench.cancel(job_id)
    assert running.wait() is JobStatus.CANCELLED
    assert time.monotonic() - asked < 5
    assert isinstance(grandchild, int)
    wait_for(lambda: not alive(grandchild) and not alive(spare.pid), 1)


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("signal:SIGKILL", "attempt_killed"),
        pytest.param("exit:7", "internal_error", marks=pytest.mark.slow),
        pytest.param("fail:cuda_error", "cuda_error", marks=pytest.mark.slow),
    ],
)
def test_an_attempt_that_was_a_spare_ends_like_any_other(waiting: Waiting, script: str, code: str) -> None:
    waiting.spare()
    job_id = waiting.bench.submit(f"block,once:{script},file:a.json:{{}}")
    assert waiting.bench.run() is JobStatus.QUEUED
    error = waiting.bench.attempts(job_id)[0].error
    assert error is not None
    assert error["code"] == code
    assert waiting.bench.run() is JobStatus.SUCCEEDED


def test_a_spare_that_was_killed_costs_a_job_nothing(waiting: Waiting) -> None:
    spare = waiting.spare()
    os.kill(spare.pid, signal.SIGKILL)
    job_id = waiting.bench.submit(GOOD)
    assert waiting.bench.run() is JobStatus.SUCCEEDED
    assert [(a.number, a.error) for a in waiting.bench.attempts(job_id)] == [(1, None)]


@pytest.mark.parametrize(
    "moment", [pytest.param("before its order is sent", marks=pytest.mark.slow), "before it reads its order"]
)
def test_a_spare_that_dies_with_an_order_that_it_did_not_read_costs_a_job_nothing(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The same attempt goes on in a process that is started for it."""
    spare, order = waiting.spare(), Spare.order

    def kill_and_order(self: Spare, given: SpareOrder) -> None:
        if moment == "before its order is sent":
            os.kill(self.pid, signal.SIGKILL)
            wait_for(self.child.ended, what="the end of the spare")
            order(self, given)
        else:
            os.kill(self.pid, signal.SIGSTOP)
            order(self, given)
            os.kill(self.pid, signal.SIGKILL)

    monkeypatch.setattr(Spare, "order", kill_and_order)
    job_id = waiting.bench.submit(GOOD)
    with capture_logs() as logs:
        assert waiting.bench.run() is JobStatus.SUCCEEDED
    assert [log["pid"] for log in logs if log["event"] == "spare_lost"] == [spare.pid]
    assert [(a.number, a.error) for a in waiting.bench.attempts(job_id)] == [(1, None)]
    assert not alive(spare.pid)


def test_after_an_upgrade_a_job_is_done_by_a_process_of_the_new_code(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = waiting.spare()
    monkeypatch.setattr(pool, "stamp", lambda _: "after an upgrade")
    waiting.bench.submit(GOOD)
    with capture_logs() as logs:
        assert waiting.bench.run() is JobStatus.SUCCEEDED
    events = [log["event"] for log in logs]
    assert ("spare_renewed" in events, "spare_taken" in events, "process_started" in events) == (True, False, True)
    assert not alive(stale.pid)


def test_out_of_memory_is_tried_again_with_all_memory_and_no_spare_beside(waiting: Waiting) -> None:
    waiting.spare()
    job_id = waiting.bench.submit("once:raise:MemoryError,sleep:0.5,file:a.json:{}")
    assert waiting.bench.run() is JobStatus.QUEUED
    waiting.spare()
    claim = waiting.bench.claim()
    assert claim.micro_batch_divisor == 2
    assert supervise(waiting.bench.context, claim) is JobStatus.SUCCEEDED
    assert waiting.spares.waiting == (), "the next one started while the job had to have all memory"
    assert [a.error and a.error["code"] for a in waiting.bench.attempts(job_id)] == ["out_of_memory", None]
    waiting.spare()


@pytest.mark.slow
@pytest.mark.parametrize(("needed", "stays"), [pytest.param(1 << 30, True, marks=pytest.mark.slow), (40 << 30, False)])
def test_a_job_gets_the_memory_of_a_spare_that_it_needs(waiting: Waiting, needed: int, stays: bool) -> None:
    waiting.spare()
    waiting.bench.submit(f"sleep:0.3,needs:{needed},sleep:0.8,file:a.json:{{}}")
    assert waiting.bench.run() is JobStatus.SUCCEEDED
    assert len(waiting.spares.waiting) == int(stays)
    waiting.spare()


def test_no_spare_stands_beside_a_model_that_writes_its_text(waiting: Waiting) -> None:
    """It writes as many sequences at once as the free memory holds, which must not depend on who waits."""
    waiting.spare()
    waiting.bench.submit("sleep:0.5,file:a.json:{}", calibration={"dataset": "generated"}, method="gptq")
    assert waiting.bench.run() is JobStatus.SUCCEEDED
    assert waiting.spares.waiting == ()


@pytest.mark.slow
def test_ranks_are_started_for_their_job_and_the_spare_waits_on(waiting: Waiting) -> None:
    spare = waiting.spare()
    context = replace(waiting.bench.context, capacity=replace(CPU, devices=2))
    waiting.bench.submit("pid,rank:1:pid,file:a.json:{}", method="gptq")
    with capture_logs() as logs:
        assert supervise(context, waiting.bench.claim()) is JobStatus.SUCCEEDED
    assert [log["ranks"] for log in logs if log["event"] == "process_started"] == [2]
    assert [each.pid for each in waiting.spares.waiting] == [spare.pid]


def test_a_spare_gets_the_pipes_of_the_child_that_reads_results(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was born before them, and has other numbers for them."""
    waiting.spare()
    (orders, asking), (answering, answers) = os.pipe(), os.pipe()
    os.write(answers, b"read")
    warm = WarmChild(orders=asking, answers=answering, pid=1)
    order = attempt_runner._Attempt._order
    monkeypatch.setattr(attempt_runner._Attempt, "_order", lambda self, _: order(self, warm))
    compute = attempt_runner._Attempt._compute
    given = (asking, answering)
    monkeypatch.setattr(attempt_runner._Attempt, "_compute", lambda self, order, _: compute(self, order, given))
    waiting.bench.submit("given,file:a.json:{}")
    claim = waiting.bench.claim()
    with capture_logs() as logs:
        running = Running(waiting.bench, claim)
        assert running.log_event("given")["said"] == "read"
        assert running.wait() is JobStatus.SUCCEEDED
    assert [log["event"] for log in logs if log["event"].startswith("spare_")][:1] == ["spare_taken"]
    assert os.read(orders, 100) == b"asked\n"
    for descriptor in (orders, asking, answering, answers):
        os.close(descriptor)


def test_an_attempt_and_a_spare_have_the_same_variables_but_for_the_jobs_names(waiting: Waiting) -> None:
    spare = waiting.spare()
    born = dict(variable.split("=", 1) for variable in _environ(spare.pid))
    waiting.spares.give_back()
    running = _hanging(waiting)
    started = dict(variable.split("=", 1) for variable in _environ(_attempt_pid(waiting)))
    waiting.bench.cancel(running.claim.job_id)
    running.wait()
    own = {"BITWRIGHT_REPORT_FD", "HF_HOME", "NUMBA_CACHE_DIR", BUILTIN_TEXT}  # each in a folder of its own
    assert {
        name: value for name, value in started.items() if name not in own | {"BITWRIGHT_JOB_ID", "BITWRIGHT_ATTEMPT"}
    } == {name: value for name, value in born.items() if name not in own}


def _environ(pid: int) -> list[str]:
    return [each for each in Path(f"/proc/{pid}/environ").read_text().split("\0") if each]


def _hanging(waiting: Waiting) -> Running:
    waiting.bench.submit("pid,hang")
    running = waiting.bench.start()
    running.log_event("hanging")
    return running


def _attempt_pid(waiting: Waiting) -> int:
    (job,) = waiting.bench.context.settings.workspace_dir.glob("job_*")
    (event,) = [e for e in waiting.bench.events(job.name) if e.type == "log" and e.event == "rank_0"]
    pid = event.fields["pid"]
    assert isinstance(pid, int)
    return pid
