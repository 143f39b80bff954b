"""Lookup of sources on the worker's machine, and its refusals."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from app.domain.request.job_request import JobRequest
from app.store.blobs import BlobStore
from app.store.tenancy.keys import ensure_tenant
from app.store.uploads import NewUploadFile, UploadRepository
from bitwright.errors import CorruptCheckpoint, InvalidDataset, SourceForbidden, SourceNotFound
from tests.api.checkpoints import as_hub_cache, write_checkpoint
from tests.supervise.bench import Bench
from workers.disk.workspace import Workspace
from workers.supervise.attempt.sources import fetch_order, materialise_upload, model_path, text_path, under_roots


def upload(bench: Bench, files: dict[str, bytes], *, complete: bool = True) -> str:
    """An upload whose bytes lie in the blob store; its id."""
    described = [NewUploadFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()]
    with bench.context.database.transaction() as session:
        uploads = UploadRepository(session, bench.tenant_id)
        upload_id = uploads.create(described).id
        for name, data in files.items():
            path = bench.model / name
            path.write_bytes(data)
            bench.context.blobs.put(path)
            uploads.advance(upload_id, name, start=0, end=len(data))
        if complete:
            uploads.complete(upload_id)
    return upload_id


def test_a_path_must_really_lie_under_a_root(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "root-of-another"
    for folder in (root / "model", outside):
        folder.mkdir(parents=True)
    (root / "link").symlink_to(outside)
    (root / "inside").symlink_to(root / "model")
    assert under_roots(str(root / "model"), [root], field="model") == root / "model"
    assert under_roots(str(root / "inside"), [root], field="model") == root / "model"
    for path in (outside, root / "link", root / ".." / "root-of-another", root / "model" / ".." / "..", Path("/etc")):
        with pytest.raises(SourceForbidden):
            under_roots(str(path), [root], field="model")
    with pytest.raises(SourceForbidden):
        under_roots(str(root / "model"), [], field="model")
    for name in ("nothing", "x" * 300):
        with pytest.raises(SourceNotFound):
            under_roots(str(root / name), [root], field="model")


def test_links_of_a_local_model_stay_under_the_roots(sqlite_bench: Bench, workspace: Workspace, tmp_path: Path) -> None:
    """The worker looks again: the API may have another disk, and it looked some time ago."""

    def found(model: Path) -> str | None:
        request = JobRequest.parse({"model": str(model), "method": "rtn"})
        return model_path(sqlite_bench.context, sqlite_bench.tenant_id, request, workspace)

    root = sqlite_bench.model.parent
    snapshot = as_hub_cache(write_checkpoint(tmp_path / "made"), root / "cache")
    assert found(snapshot) == str(snapshot)
    templates = snapshot / "additional_chat_templates"
    (root / "templates").mkdir()
    templates.symlink_to(root / "templates")
    assert found(snapshot) == str(snapshot)
    outside = tmp_path / "secret"
    outside.write_text("of the operator")
    for link in (snapshot / "LICENSE", root / "templates" / "a.jinja"):
        link.symlink_to(outside)
        with pytest.raises(SourceForbidden, match=f"{link.name} is a link out of the allowed folders") as caught:
            found(snapshot)
        assert "BITWRIGHT_MODEL_ROOTS" in str(caught.value.hint)
        link.unlink()
    assert found(snapshot) == str(snapshot)


def test_an_uploaded_checkpoint_becomes_a_folder(sqlite_bench: Bench, workspace: Workspace) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"weights"}
    upload_id = upload(sqlite_bench, files)
    request = JobRequest.parse({"model": upload_id, "method": "rtn"})
    found = model_path(sqlite_bench.context, sqlite_bench.tenant_id, request, workspace)
    assert found is not None
    assert {path.name: path.read_bytes() for path in Path(found).iterdir()} == files
    assert model_path(sqlite_bench.context, sqlite_bench.tenant_id, request, workspace) == found


class Bucket:
    """A blob store whose bytes lie in no local file."""

    def __init__(self, inner: BlobStore) -> None:
        self.open = inner.open

    def path(self, _: str) -> None:
        return None


def test_an_upload_in_a_bucket_is_copied(sqlite_bench: Bench, workspace: Workspace) -> None:
    upload_id = upload(sqlite_bench, {"a.jsonl": b'{"text": "x"}\n'})
    context = replace(sqlite_bench.context, blobs=Bucket(sqlite_bench.context.blobs))  # type: ignore[arg-type]
    folder = materialise_upload(context, sqlite_bench.tenant_id, upload_id, workspace, field="model")
    assert (folder / "a.jsonl").read_bytes() == b'{"text": "x"}\n'


def test_an_upload_that_is_damaged_in_the_store_is_refused(sqlite_bench: Bench, workspace: Workspace) -> None:
    upload_id = upload(sqlite_bench, {"a.jsonl": b'{"text": "x"}\n'})
    blob = sqlite_bench.context.blobs.path(hashlib.sha256(b'{"text": "x"}\n').hexdigest())
    assert blob is not None
    blob.write_bytes(b'{"text": "y"}\n')
    with pytest.raises(CorruptCheckpoint, match=r"a\.jsonl of the upload is damaged in the store") as refused:
        materialise_upload(sqlite_bench.context, sqlite_bench.tenant_id, upload_id, workspace, field="model")
    assert refused.value.field == "model"
    assert list((workspace.sources / upload_id).iterdir()) == []


def test_uploads_that_cannot_be_used(sqlite_bench: Bench, workspace: Workspace) -> None:
    context, tenant = sqlite_bench.context, sqlite_bench.tenant_id
    unfinished = upload(sqlite_bench, {"a.jsonl": b"{}"}, complete=False)
    two = upload(sqlite_bench, {"a.jsonl": b"{}", "b.jsonl": b"{}"})
    with context.database.transaction() as session:
        stranger = ensure_tenant(session, "stranger").id
    with pytest.raises(SourceNotFound, match="not complete"):
        materialise_upload(context, tenant, unfinished, workspace, field="model")
    with pytest.raises(SourceNotFound):
        materialise_upload(context, stranger, two, workspace, field="model")
    request = JobRequest.parse({"model": "a/b", "method": "signround", "calibration": {"dataset": two}})
    with pytest.raises(InvalidDataset, match="2 files"):
        text_path(context, tenant, request.calibration.dataset, workspace, field="calibration.dataset")


def test_what_the_hub_is_asked_for(workspace: Workspace, tmp_path: Path) -> None:
    same = {"dataset": "org/text", "num_samples": 2, "sequence_length": 100}
    request = JobRequest.parse({"model": "org/model", "method": "signround", "calibration": same, "evaluation": same})
    order = fetch_order(request, workspace, tmp_path)
    assert order.model is not None
    assert order.calibration is not None
    assert order.calibration == order.evaluation, "equal datasets are fetched once"
    assert order.calibration.characters >= 400 * 4
    assert order.finetuning is None
    learned = {"dataset": "org/text", "steps": 3, "batch_size": 2, "sequence_length": 50, "validation_share": 0.0}
    trained = JobRequest.parse({"model": "org/model", "method": "qlora", "finetune": learned, "evaluation": same})
    order = fetch_order(trained, workspace, tmp_path)
    assert order.finetuning is not None
    assert order.finetuning == order.evaluation
    assert order.finetuning.characters >= (200 + 3 * 2 * 50) * 4
    local = JobRequest.parse({"model": "/m", "method": "rtn", "evaluation": None})
    assert fetch_order(local, workspace, tmp_path).empty
