"""A job goes on where another machine left it: what was finished there is kept in the blob store, and brought."""

from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select, update

from app.domain.request.job_request import JobRequest
from app.store.clock import seconds_from_now
from app.store.endings import requeue_lost
from app.store.models import Job, KeptFile
from app.store.upkeep.backup import PASSING
from app.store.upkeep.garbage import collect_blobs
from app.store.upkeep.kept_files import Kept, forget_kept, keep, kept_state
from bitwright.errors import AttemptSuperseded
from bitwright.events import LogEvent
from bitwright.job_states import JobStatus
from tests.supervise.bench import Bench, wait_for
from workers.disk.orders import AttemptOrder
from workers.disk.workspace import Workspace
from workers.supervise.attempt.kept_state import bring_state

SECOND = 1.0
UPLOAD = "upl_" + "0" * 26


def on_machine(bench: Bench, name: str, **settings: object) -> Bench:
    """The same database and blob store, on a machine with a disk of its own."""
    context, folder = bench.context, bench.context.settings.data_dir / name
    changed = {"workspace_dir": folder, "keep_state_seconds": SECOND, **settings}
    return replace(bench, context=replace(context, settings=context.settings.model_copy(update=changed)))


def finished(bench: Bench, job_id: str) -> list[str]:
    """What the job's attempts found finished, in turn."""
    events = [event for event in bench.events(job_id) if isinstance(event, LogEvent)]
    return [str(event.fields["files"]) for event in events if event.event == "finished"]


def kept(bench: Bench, job_id: str) -> dict[str, bytes]:
    """The bytes that are kept of a job, by path."""
    with bench.context.database.reading() as session:
        files = kept_state(session, job_id).files
    return {file.path: b"".join(bench.context.blobs.read_range(file.sha256, 0, file.size)) for file in files}


def lose(bench: Bench) -> None:
    """The machine of the running attempt is gone: nobody renews its lease, and the job waits for another."""
    with bench.context.database.transaction() as session:
        session.execute(update(Job).values(lease_expires_at=seconds_from_now(-1)))
        assert requeue_lost(session)


def run(bench: Bench) -> JobStatus | None:
    """Let the machine make the next attempt, without the wait that follows a fault."""
    with bench.context.database.transaction() as session:
        session.execute(update(Job).values(available_at=seconds_from_now(-1)))
    return bench.run()


@pytest.mark.slow
def test_a_lost_machine_costs_what_was_finished_since_the_last_interval(bench: Bench) -> None:
    first, second = on_machine(bench, "first"), on_machine(bench, "second")
    script = "finished,once:state:state.json:2,once:state:deep/block:b,once:hang,file:a.json:{}"
    job_id = bench.submit(script)
    running = first.start()
    wait_for(lambda: kept(bench, job_id) == {"state.json": b"2", "deep/block": b"b"}, what="the first files")
    lose(bench)
    running.wait()
    assert run(second) is JobStatus.SUCCEEDED
    assert finished(bench, job_id)[-1] == "deep/block:b,state.json:2"


@pytest.mark.slow
def test_the_machine_that_computed_last_goes_on_from_its_own(sqlite_bench: Bench) -> None:
    """And one that is behind takes what is kept, all of it: a file of its own from before is no part of that."""
    first, second = on_machine(sqlite_bench, "first"), on_machine(sqlite_bench, "second")
    job_id = sqlite_bench.submit("finished,once:state:old:1,once:fail:cuda_error,state:new:2,fail:cuda_error")
    for machine, extra in ((first, "of-first"), (second, None), (first, None)):
        assert run(machine) is JobStatus.QUEUED
        if extra:
            (first.workspace(job_id) / "state" / extra).write_text("x")
    assert run(first) is JobStatus.FAILED
    assert finished(sqlite_bench, job_id) == ["", "old:1", "new:2,old:1", "new:2,old:1"]


def test_an_attempt_that_ends_keeps_what_it_had_finished_at_once(sqlite_bench: Bench) -> None:
    """A worker that is asked to end gives its job back with all that is done."""
    patient = on_machine(sqlite_bench, "first", keep_state_seconds=3600.0)
    job_id = sqlite_bench.submit("state:state.json:1,once:hang,finished,file:a.json:{}")
    running = patient.start()
    running.log_event("hanging")
    assert kept(sqlite_bench, job_id) == {}
    patient.context.stopping.set()
    assert running.wait() is JobStatus.QUEUED
    assert kept(sqlite_bench, job_id) == {"state.json": b"1"}


def test_links_are_no_files_of_a_job(sqlite_bench: Bench, tmp_path: Path) -> None:
    """An attempt computes for a stranger, and may be made to name what it cannot read itself."""
    secret = tmp_path / "secrets" / "key"
    secret.parent.mkdir()
    secret.write_text("secret")
    machine = on_machine(sqlite_bench, "first")
    job_id = sqlite_bench.submit(f"state:a:1,state:link:{secret},state:folder:{secret.parent},fail:cuda_error")
    machine.run()
    assert kept(sqlite_bench, job_id) == {"a": b"1"}


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["gone", "changed", "outside"])
def test_what_cannot_be_brought_is_computed_again(sqlite_bench: Bench, damage: str) -> None:
    first, second = on_machine(sqlite_bench, "first"), on_machine(sqlite_bench, "second")
    job_id = sqlite_bench.submit("finished,state:a:1,state:b:2,once:fail:cuda_error,file:a.json:{}")
    assert run(first) is JobStatus.QUEUED
    with sqlite_bench.context.database.transaction() as session:
        file = session.scalars(select(KeptFile).where(KeptFile.path == "b")).one()
        place = sqlite_bench.context.blobs.path(file.sha256)
        assert place is not None
        if damage == "gone":
            place.unlink()
        elif damage == "changed":
            place.write_text("3")
        else:
            file.path = "../../outside"
    assert run(second) is JobStatus.SUCCEEDED
    assert finished(sqlite_bench, job_id) == ["", ""]
    assert not (second.context.settings.workspace_dir / "outside").exists()


@pytest.mark.slow
def test_nothing_is_kept_unless_a_setting_asks_for_it(sqlite_bench: Bench) -> None:
    job_id = sqlite_bench.submit("state:a:1,sleep:1.5,fail:cuda_error")
    sqlite_bench.run()
    assert kept(sqlite_bench, job_id) == {}


def test_kept_files_are_fenced_named_and_forgotten(bench: Bench, tmp_path: Path) -> None:
    """They belong to the attempt that holds the job; collecting blobs spares them until the job is over."""
    source = tmp_path / "file"
    source.write_text("kept")
    blobs, database = bench.context.blobs, bench.context.database
    blob = blobs.put(source)
    job_id = bench.submit("")
    claim = bench.claim()

    def tell(attempt: int, path: str) -> None:
        with database.transaction() as session:
            keep(session, job_id, attempt, [Kept(path, blob.sha256, blob.size)], 30)

    tell(claim.attempt, "first")
    tell(claim.attempt, "second")
    with pytest.raises(AttemptSuperseded):
        tell(claim.attempt + 1, "third")
    assert list(kept(bench, job_id)) == ["second"]
    assert collect_blobs(database, blobs, grace_seconds=0) == []
    with database.transaction() as session:
        assert forget_kept(session, older_than_seconds=0) == 0, "it runs"
        ended = {"status": JobStatus.FAILED, "finished_at": seconds_from_now(-100)}
        session.execute(update(Job).values(**ended, worker_id=None, lease_expires_at=None))
    for seconds, count in ((200, 0), (50, 1)):
        with database.transaction() as session:
            assert forget_kept(session, older_than_seconds=seconds) == count
    assert collect_blobs(database, blobs, grace_seconds=0) == [blob.sha256]


def test_a_backup_leaves_out_what_only_running_jobs_name() -> None:
    assert "kept_file" in PASSING


def test_a_machine_that_has_computed_later_brings_nothing(sqlite_bench: Bench) -> None:
    machine = on_machine(sqlite_bench, "first")
    job_id = sqlite_bench.submit("state:a:1,fail:cuda_error")
    machine.run()
    with sqlite_bench.context.database.transaction() as session:
        session.execute(update(Job).values(available_at=seconds_from_now(-1)))
    state = Workspace(machine.workspace(job_id)).state
    (state / "a").write_text("newer")
    bring_state(machine.context, machine.claim(), Workspace(machine.workspace(job_id)))
    assert (state / "a").read_text() == "newer"


@pytest.mark.parametrize(
    ("model", "revision", "pin"),
    [
        ({"source": "upload", "id": UPLOAD}, None, UPLOAD),
        ({"source": "hub", "id": "org/model"}, "c" * 40, "c" * 40),
        ("/models/m", None, None),
    ],
)
def test_a_model_is_pinned_by_its_commit_or_its_upload(model: object, revision: str | None, pin: str | None) -> None:
    """Files have other times on each machine: by them alone a job would begin anew there."""
    request = JobRequest.parse({"model": model, "method": "rtn", "bits": 4})
    order = AttemptOrder(
        job_id="job_x", attempt=1, request=request, model_path="/m", model_revision=revision, device="cpu"
    )
    assert order.model_pin == pin
