"""The base job's files on the worker: those that are read, complete and undamaged."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from app.domain.request.base_job import BaseJob
from app.domain.request.exports import ExportRequest, export_request
from app.domain.request.job_request import JobRequest
from app.store.blobs import BucketBlobs, materialise
from app.store.ids import new_id
from app.store.jobs import JobRepository
from app.store.tenancy.keys import ensure_tenant
from bitwright.errors import CorruptCheckpoint, DiskFull, SourceForbidden, SourceNotFound, StorageError
from bitwright.job_states import JobStatus
from tests.power_cut import PowerCut
from tests.supervise.bench import Bench
from workers.disk.orders import AttemptOrder
from workers.disk.workspace import Workspace
from workers.supervise.attempt import base_job as base_jobs
from workers.supervise.attempt.base_job import base_job_folder
from workers.supervise.context import WorkerContext

MADE = "file:bitwright.json:{},file:weights.safetensors:weights,file:report.json:{},file:README.md:card"
READ = {"bitwright.json": "{}", "weights.safetensors": "weights"}


def make(bench: Bench, script: str = MADE) -> str:
    """A job that has succeeded; its id."""
    job_id = bench.submit(script)
    assert bench.run() is JobStatus.SUCCEEDED
    return job_id


def submit_from(bench: Bench, job_id: str, script: str = MADE, **fields: object) -> str:
    """Queue a job that starts from another; its id."""
    before = BaseJob(job_id, bench.job(job_id).request)
    body = {"base_job": job_id, "finetune": {"dataset": "builtin"}, "metadata": {"script": script}, **fields}
    with bench.context.database.transaction() as session:
        return JobRepository(session, bench.tenant_id).add(JobRequest.parse(body, before)).id


def delete(bench: Bench, job_id: str) -> None:
    with bench.context.database.transaction() as session:
        JobRepository(session, bench.tenant_id).delete(job_id)


def blob_of(bench: Bench, job_id: str, path: str) -> Path:
    sha256 = next(file.sha256 for file in bench.artifacts(job_id) if file.path == path)
    found = bench.context.blobs.path(sha256)
    assert found is not None
    return found


def in_bucket(bench: Bench) -> WorkerContext:
    """The same worker with its blobs in a bucket, which has no files to link to."""
    bucket = BucketBlobs(MemoryStore())
    for entry in bench.context.blobs.entries():
        file = bench.context.blobs.path(entry.sha256)
        assert file is not None
        bucket.put(file)
    return replace(bench.context, blobs=bucket)


@pytest.mark.parametrize("bucket", [False, True])
def test_the_files_that_are_read_are_brought_once(bucket: bool, sqlite_bench: Bench, workspace: Workspace) -> None:
    job_id = make(sqlite_bench)
    context = in_bucket(sqlite_bench) if bucket else sqlite_bench.context
    found = base_job_folder(context, sqlite_bench.tenant_id, job_id, workspace)
    assert found is not None
    folder = Path(found) / "native"
    assert {file.name: file.read_text() for file in folder.iterdir()} == {**READ, "report.json": "{}"}
    linked = folder / "weights.safetensors"
    assert linked.samefile(blob_of(sqlite_bench, job_id, "weights.safetensors")) is not bucket
    delete(sqlite_bench, job_id)
    assert base_job_folder(context, sqlite_bench.tenant_id, job_id, workspace) == found, "a retry needs it no more"
    assert base_job_folder(context, sqlite_bench.tenant_id, None, workspace) is None


def test_only_the_tenants_own_jobs_are_found(sqlite_bench: Bench, workspace: Workspace) -> None:
    job_id = make(sqlite_bench)
    with sqlite_bench.context.database.transaction() as session:
        stranger = ensure_tenant(session, new_id("tnt")).id
    with pytest.raises(SourceNotFound) as refused:
        base_job_folder(sqlite_bench.context, stranger, job_id, workspace)
    assert (refused.value.field, refused.value.value) == ("base_job", job_id)
    assert not list(workspace.sources.iterdir())


@pytest.mark.parametrize("bucket", [False, True])
def test_damaged_bytes_are_refused_and_the_store_is_left_alone(
    bucket: bool, sqlite_bench: Bench, workspace: Workspace, tmp_path: Path
) -> None:
    job_id = make(sqlite_bench)
    blob = blob_of(sqlite_bench, job_id, "weights.safetensors")
    context = in_bucket(sqlite_bench)
    damaged = b"w3ights"
    if bucket:
        store = MemoryStore()
        store.put(f"{blob.name[:2]}/{blob.name}", damaged)
        assert not materialise(BucketBlobs(store), blob.name, tmp_path / "copy")
        assert list(tmp_path.glob("*copy*")) == []
        return
    blob.unlink()
    blob.write_bytes(damaged)
    with pytest.raises(CorruptCheckpoint, match=r"weights\.safetensors of the base job is damaged") as refused:
        base_job_folder(sqlite_bench.context, sqlite_bench.tenant_id, job_id, workspace)
    assert refused.value.field == "base_job"
    assert not (workspace.sources / job_id).exists()
    assert blob.read_bytes() == damaged
    assert base_job_folder(context, sqlite_bench.tenant_id, job_id, workspace), "what is sound is brought anew"


def test_bytes_that_are_gone_are_the_stores_fault(sqlite_bench: Bench, workspace: Workspace) -> None:
    job_id = make(sqlite_bench)
    blob_of(sqlite_bench, job_id, "weights.safetensors").unlink()
    with pytest.raises(StorageError):
        base_job_folder(sqlite_bench.context, sqlite_bench.tenant_id, job_id, workspace)
    assert not (workspace.sources / job_id).exists()


def test_an_export_gets_all_of_the_native_checkpoint_and_no_model(sqlite_bench: Bench, workspace: Workspace) -> None:
    job_id = make(sqlite_bench)
    context, tenant = sqlite_bench.context, sqlite_bench.tenant_id
    found = base_job_folder(context, tenant, job_id, workspace, exports=True)
    files = {file.name: file.read_text() for file in (Path(str(found)) / "native").iterdir()}
    assert files == {**READ, "report.json": "{}", "README.md": "card"}
    # A job that succeeded leaves no workspace: its order is looked at in one that fails.
    base = JobRequest.model_validate(sqlite_bench.job(job_id).request)
    script = {"script": "fail:invalid_dataset"}
    asked = export_request(base, job_id, ExportRequest.model_validate({"formats": ["gguf"], "metadata": script}))
    with context.database.transaction() as session:
        exported = JobRepository(session, tenant).add(asked).id
    assert sqlite_bench.run() is JobStatus.FAILED
    order = Workspace.of(context.settings.workspace_dir, exported).order
    read = AttemptOrder.model_validate_json(order.read_bytes())
    assert read.request.exports
    assert read.model_path == ""
    assert str(read.base_job_path).endswith(f"sources/{job_id}")


@pytest.mark.parametrize("bucket", [False, True])
def test_what_was_brought_is_whole_after_a_power_cut(
    bucket: bool, sqlite_bench: Bench, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retry finds the folder by its name, and looks at it no more."""
    cut = PowerCut(monkeypatch)
    job_id = make(sqlite_bench)
    context = in_bucket(sqlite_bench) if bucket else sqlite_bench.context
    found = base_job_folder(context, sqlite_bench.tenant_id, job_id, workspace)
    assert cut.renamed[-1] == job_id
    assert cut.torn == []
    assert str(workspace.sources) not in cut.lost()
    assert cut.unsynced(Path(str(found))) == set()


def test_a_disk_that_is_full_of_the_base_job_is_told(
    sqlite_bench: Bench, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = make(sqlite_bench)

    def bring(number: int) -> None:
        def refuse(*_: object) -> bool:
            raise OSError(number, "no")

        monkeypatch.setattr(base_jobs, "materialise", refuse)
        base_job_folder(sqlite_bench.context, sqlite_bench.tenant_id, job_id, workspace)

    with pytest.raises(DiskFull) as full:
        bring(errno.ENOSPC)
    assert full.value.field == "base_job"
    with pytest.raises(OSError, match="no"):
        bring(errno.EIO)
    assert not (workspace.sources / job_id).exists()


def test_a_name_that_leads_out_of_the_folder_is_refused(sqlite_bench: Bench, workspace: Workspace) -> None:
    from workers.supervise.attempt.base_job import _place

    with pytest.raises(SourceForbidden):
        _place(workspace.sources / "job", "native/weights/../../../../out.safetensors")


def test_an_attempt_is_told_where_the_result_lies_and_reads_no_calibration(sqlite_bench: Bench) -> None:
    text = sqlite_bench.model.parent / "text.jsonl"
    text.write_text('{"text": "a"}\n')
    before = sqlite_bench.submit(MADE, calibration={"dataset": str(text)})
    sqlite_bench.run()
    text.unlink()
    job_id = submit_from(sqlite_bench, before, "fail:internal_error")
    sqlite_bench.run()
    order = AttemptOrder.model_validate_json((sqlite_bench.workspace(job_id) / "order.json").read_bytes())
    assert order.base_job_path == str(sqlite_bench.workspace(job_id) / "sources" / before)
    assert json.loads(Path(order.base_job_path, "native/bitwright.json").read_text()) == {}
    assert order.calibration_path is None


def test_a_start_that_was_deleted_meanwhile_fails_the_job_clearly(bench: Bench) -> None:
    before = make(bench)
    job_id = submit_from(bench, before)
    delete(bench, before)
    assert bench.run() is JobStatus.FAILED
    error = bench.job(job_id).error
    assert error is not None
    assert (error["code"], error["field"], error["value"]) == ("source_not_found", "base_job", before)
    assert "has been deleted" in error["detail"]
    assert "without base_job" in error["hint"]
    assert len(bench.attempts(job_id)) == 1, "no retry: it would end the same way"
