"""The life of an attempt: how it ends, and what is written then."""

import json
import os
import time
from dataclasses import replace

import pytest
from sqlalchemy import update

from app.store.attempts import AttemptWriter
from app.store.clock import seconds_from_now
from app.store.endings import requeue_lost
from app.store.jobs import JobRepository
from app.store.models import Job
from bitwright.events import ProgressEvent, StatusEvent
from bitwright.job_states import JobStatus
from tests.supervise.bench import Bench, alive, wait_for
from workers.supervise.attempt import attempt_runner
from workers.supervise.attempt.attempt_runner import supervise
from workers.supervise.attempt.outputs import store_outputs


def statuses(bench: Bench, job_id: str) -> list[str]:
    return [event.status.value for event in bench.events(job_id) if isinstance(event, StatusEvent)]


def error_code(bench: Bench, job_id: str) -> str:
    error = bench.job(job_id).error
    assert error is not None
    return str(error["code"])


def test_a_good_attempt_stores_files_report_and_status(bench: Bench) -> None:
    job_id = bench.submit("block,block,file:model.safetensors:weights,file:deep/config.json:{}")
    assert bench.run() is JobStatus.SUCCEEDED
    job = bench.job(job_id)
    assert job.report is not None
    assert job.report["quality"]["perplexity"] == 12.0
    stored = {(a.format, a.path): (a.size, a.media_type) for a in bench.artifacts(job_id)}
    assert stored == {
        ("native", "model.safetensors"): (7, "application/octet-stream"),
        ("native", "deep/config.json"): (2, "application/json"),
    }
    for artifact in bench.artifacts(job_id):
        assert bench.context.blobs.exists(artifact.sha256)
    assert statuses(bench, job_id) == ["queued", "running", "succeeded"]
    assert [event.type for event in bench.events(job_id)].count("block") == 2
    assert not bench.workspace(job_id).exists()


def test_progress_is_coalesced_and_its_last_word_kept(sqlite_bench: Bench) -> None:
    job_id = sqlite_bench.submit("progress:3000,file:a.json:{}")
    sqlite_bench.run()
    progress = [e for e in sqlite_bench.events(job_id) if isinstance(e, ProgressEvent) and e.stage == "quantize"]
    assert 1 <= len(progress) <= 5
    assert progress[-1].done == 3000


@pytest.mark.parametrize(
    ("script", "code", "status"),
    [
        ("fail:unsupported_architecture", "unsupported_architecture", JobStatus.FAILED),
        ("fail:cuda_error", "cuda_error", JobStatus.QUEUED),
        ("fail:no_such_code", "internal_error", JobStatus.QUEUED),
        ("raise:MemoryError", "out_of_memory", JobStatus.QUEUED),
        ("raise:ValueError", "internal_error", JobStatus.QUEUED),
        ("signal:SIGKILL", "attempt_killed", JobStatus.QUEUED),
        ("signal:SIGSEGV", "attempt_killed", JobStatus.QUEUED),
        ("exit:0", "internal_error", JobStatus.QUEUED),
        ("exit:7", "internal_error", JobStatus.QUEUED),
        ("outside", "internal_error", JobStatus.QUEUED),
        ("", "internal_error", JobStatus.QUEUED),  # a result that names a folder that is not there
    ],
)
def test_how_an_attempt_ends_decides_the_code(sqlite_bench: Bench, script: str, code: str, status: JobStatus) -> None:
    job_id = sqlite_bench.submit(script)
    assert sqlite_bench.run() is status
    error = sqlite_bench.attempts(job_id)[0].error
    assert error is not None
    assert error["code"] == code
    if script in {"exit:7", "signal:SIGKILL"}:
        assert "the attempt" in str(error["detail"]), "and not the fetch"
    assert sqlite_bench.artifacts(job_id) == []


def test_a_killed_attempt_is_followed_by_another(bench: Bench) -> None:
    job_id = bench.submit("block,once:signal:SIGKILL,block,file:a.json:{}")
    assert bench.run() is JobStatus.QUEUED
    assert bench.run() is JobStatus.SUCCEEDED
    assert [(a.number, a.status.value) for a in bench.attempts(job_id)] == [(1, "failed"), (2, "succeeded")]
    assert statuses(bench, job_id) == ["queued", "running", "queued", "running", "succeeded"]


def test_an_attempt_knows_which_blocks_are_told(sqlite_bench: Bench) -> None:
    job_id = sqlite_bench.submit("once:block,once:block,once:signal:SIGKILL")
    told = []
    for _ in range(2):
        sqlite_bench.run()
        told.append(json.loads((sqlite_bench.workspace(job_id) / "order.json").read_text())["told"])
    assert told == [0, 2]


def test_out_of_memory_is_tried_once_more_with_smaller_batches(sqlite_bench: Bench) -> None:
    job_id = sqlite_bench.submit("raise:MemoryError")
    assert sqlite_bench.run() is JobStatus.QUEUED
    again = sqlite_bench.claim()
    assert again.micro_batch_divisor == 2
    assert supervise(sqlite_bench.context, again) is JobStatus.FAILED
    assert error_code(sqlite_bench, job_id) == "out_of_memory"


def test_lines_that_are_no_lines_do_no_harm(sqlite_bench: Bench) -> None:
    forged = json.dumps({"type": "status", "status": "succeeded"}).replace(",", ";")
    job_id = sqlite_bench.submit(f"raw:nonsense,raw:[1],raw:{forged},raw:,long:40000000,block,file:a.json:{{}}")
    assert sqlite_bench.run() is JobStatus.SUCCEEDED
    assert [event.type for event in sqlite_bench.events(job_id)].count("block") == 1
    assert statuses(sqlite_bench, job_id) == ["queued", "running", "succeeded"]


def test_a_cancel_frees_the_process_within_five_seconds(bench: Bench) -> None:
    job_id = bench.submit("child,block,hang")
    running = bench.start()
    grandchild = running.log_event("grandchild")["pid"]
    running.log_event("hanging")
    asked = time.monotonic()
    bench.cancel(job_id)
    assert running.wait() is JobStatus.CANCELLED
    assert time.monotonic() - asked < 5
    assert isinstance(grandchild, int)
    wait_for(lambda: not alive(grandchild), 1)
    assert statuses(bench, job_id)[-1] == "cancelled"


def test_an_attempt_that_runs_too_long_fails(sqlite_bench: Bench) -> None:
    job_id = sqlite_bench.submit("hang", time_limit_seconds=2)
    started = time.monotonic()
    assert sqlite_bench.run() is JobStatus.FAILED
    assert time.monotonic() - started < 8
    assert error_code(sqlite_bench, job_id) == "time_limit_exceeded"


def test_a_supervisor_that_lost_its_lease_kills_its_attempt_and_writes_nothing(bench: Bench) -> None:
    job_id = bench.submit("child,block,hang")
    running = bench.start()
    grandchild = running.log_event("grandchild")["pid"]
    running.log_event("hanging")
    with bench.context.database.transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(lease_expires_at=seconds_from_now(-1)))
        assert requeue_lost(session) == [(job_id, "any")]
    before = bench.events(job_id)
    assert running.wait() is None
    assert isinstance(grandchild, int)
    wait_for(lambda: not alive(grandchild), 1)
    assert bench.events(job_id) == before
    assert bench.job(job_id).status is JobStatus.QUEUED
    assert bench.artifacts(job_id) == []


def test_a_lost_lease_is_noticed_before_files_are_committed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease goes in the last moment: after the files are stored, before the transaction."""
    job_id = bench.submit("block,file:a.json:{}")
    claimed = bench.claim()

    def store_and_lose(*arguments: object) -> object:
        stored = store_outputs(*arguments)  # type: ignore[arg-type]
        with bench.context.database.transaction() as session:
            session.execute(update(Job).where(Job.id == job_id).values(attempt=Job.attempt + 1))
        return stored

    monkeypatch.setattr(attempt_runner, "store_outputs", store_and_lose)
    assert supervise(bench.context, claimed) is None
    assert bench.artifacts(job_id) == []
    assert bench.job(job_id).status is JobStatus.RUNNING


def test_a_missed_requirement_fails_the_job_and_keeps_its_files(bench: Bench) -> None:
    job_id = bench.submit("block,file:a.json:{}", require={"max_perplexity_ratio": 1.1})
    assert bench.run() is JobStatus.FAILED
    assert error_code(bench, job_id) == "requirement_missed"
    assert [a.path for a in bench.artifacts(job_id)] == ["a.json"]
    assert bench.job(job_id).report is not None


def test_a_stopping_worker_gives_the_job_back_uncounted(sqlite_bench: Bench) -> None:
    job_id = sqlite_bench.submit("once:hang,file:a.json:{}")
    running = sqlite_bench.start()
    running.log_event("hanging")
    sqlite_bench.context.stopping.set()
    assert running.wait() is JobStatus.QUEUED
    assert sqlite_bench.job(job_id).fruitless_attempts == 0
    sqlite_bench.context.stopping.clear()
    assert sqlite_bench.run() is JobStatus.SUCCEEDED


def test_a_paused_job_is_given_back_and_goes_on_when_it_is_resumed(sqlite_bench: Bench) -> None:
    job_id = sqlite_bench.submit("once:hang,file:a.json:{}")
    running = sqlite_bench.start()
    running.log_event("hanging")
    with sqlite_bench.context.database.transaction() as session:
        JobRepository(session, sqlite_bench.tenant_id).pause(job_id)
    assert running.wait() is JobStatus.QUEUED
    job = sqlite_bench.job(job_id)
    assert (job.held, job.fruitless_attempts) == (True, 0)
    with sqlite_bench.context.database.transaction() as session:
        JobRepository(session, sqlite_bench.tenant_id).resume(job_id)
    assert sqlite_bench.run() is JobStatus.SUCCEEDED


def test_the_attempt_sees_no_secret_and_no_network(sqlite_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"BITWRIGHT_DATABASE_URL": "x", "BITWRIGHT_HUB_TOKEN": "x", "HF_TOKEN": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    sqlite_bench.submit("environment,file:a.json:{}")
    running = sqlite_bench.start()
    names = json.loads(str(running.log_event("environment")["names"]))
    running.wait()
    assert not set(names) & set(secrets)
    assert {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "DISABLE_SAFETENSORS_CONVERSION"} <= set(names)


def test_the_log_of_a_failed_attempt_carries_the_ids(sqlite_bench: Bench) -> None:
    job_id = sqlite_bench.submit("log:hello,fail:corrupt_checkpoint")
    sqlite_bench.run()
    lines = sqlite_bench.log(job_id)
    assert [(line["event"], line["job_id"], line["attempt"]) for line in lines] == [("hello", job_id, 1)]


def test_a_database_that_is_away_delays_the_end_and_loses_nothing(
    sqlite_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two tries to write the end meet a locked database."""
    from bitwright.errors import Unavailable

    refusals = iter([True, True])
    succeed = AttemptWriter.succeed

    def refuse_first(self: AttemptWriter, *arguments: object, **named: object) -> None:
        if next(refusals, False):
            raise Unavailable("the database is not available now; try again")
        succeed(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(AttemptWriter, "succeed", refuse_first)
    job_id = sqlite_bench.submit("block,file:a.json:{}")
    assert sqlite_bench.run() is JobStatus.SUCCEEDED
    assert len(sqlite_bench.artifacts(job_id)) == 1


def test_the_hub_is_refused_where_it_is_disabled(sqlite_bench: Bench) -> None:
    settings = sqlite_bench.context.settings.model_copy(update={"hub_enabled": False})
    job_id = sqlite_bench.submit("", model="org/model")
    claimed = sqlite_bench.claim()
    assert supervise(replace(sqlite_bench.context, settings=settings), claimed) is JobStatus.FAILED
    assert error_code(sqlite_bench, job_id) == "source_forbidden"


def test_a_path_that_left_the_roots_is_refused_by_the_worker(sqlite_bench: Bench) -> None:
    (sqlite_bench.model.parent / "link").symlink_to(os.sep)
    job_id = sqlite_bench.submit("", model=str(sqlite_bench.model.parent / "link" / "etc"))
    assert sqlite_bench.run() is JobStatus.FAILED
    assert error_code(sqlite_bench, job_id) == "source_forbidden"


def test_a_worker_without_room_says_so(sqlite_bench: Bench) -> None:
    """The workspace folder cannot be made: the job goes back, and the worker lives."""
    sqlite_bench.context.settings.workspace_dir.write_text("a file is in the way")
    job_id = sqlite_bench.submit("")
    assert sqlite_bench.run() is JobStatus.QUEUED
    error = sqlite_bench.attempts(job_id)[0].error
    assert error is not None
    assert error["code"] == "internal_error"
