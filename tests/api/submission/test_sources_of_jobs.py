"""Sources of jobs: the service looks at every field of a request that names one, and keeps what a job will read."""

import hashlib
from pathlib import Path

import pytest

from tests.api.checkpoints import write_checkpoint
from tests.api.conftest import Api, problem
from tests.domain.request.request_fields import body_with, place_of, source_fields

FIELDS = source_fields()
TEXT = b'{"text": "one"}\n'


def upload(api: Api, folder: Path, *, model: bool) -> str:
    """A complete upload: a checkpoint, or a text; its id."""
    files = {"text.jsonl": TEXT}
    if model:
        files = {file.name: file.read_bytes() for file in write_checkpoint(folder / "uploaded").iterdir()}
    specs = [
        {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    ]
    upload_id = str(api.client.post("/v1/uploads", json={"files": specs}).json()["id"])
    for name, data in files.items():
        assert api.client.put(f"/v1/uploads/{upload_id}/files/{name}", content=data).status_code == 204
    assert api.client.post(f"/v1/uploads/{upload_id}/complete").status_code == 200
    return upload_id


@pytest.mark.parametrize("field", FIELDS)
def test_an_upload_stays_while_a_job_waits_that_names_it_anywhere(any_api: Api, tmp_path: Path, field: str) -> None:
    upload_id = upload(any_api, tmp_path, model=field == "model")
    answer = any_api.client.post("/v1/jobs", json=body_with(field, upload_id))
    assert answer.status_code == 202, answer.text
    job_id = answer.json()["id"]
    refused = problem(any_api.client.delete(f"/v1/uploads/{upload_id}"), 409, "conflict")
    assert job_id in str(refused["detail"])
    held = any_api.claim()
    assert held.job_id == job_id
    problem(any_api.client.delete(f"/v1/uploads/{upload_id}"), 409, "conflict")
    any_api.succeed(held)
    assert any_api.client.delete(f"/v1/uploads/{upload_id}").status_code == 204


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    ("source", "code", "part"),
    [
        ("upl_0123456789abcdefghjkmnpqrs", "source_not_found", "id"),
        ("/etc/passwd", "source_forbidden", "path"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_in_any_field(
    api: Api, field: str, source: str, code: str, part: str
) -> None:
    refused = problem(api.client.post("/v1/jobs", json=body_with(field, source)), 422, code)
    assert refused["field"] == f"{place_of(field)}.{part}"


@pytest.mark.parametrize("field", [field for field in FIELDS if field != "model"])
def test_a_local_text_is_kept_by_its_real_path_in_any_field(api: Api, field: str) -> None:
    real = api.folder / "models" / "real.jsonl"
    real.write_bytes(TEXT)
    link = real.with_name("link.jsonl")
    link.symlink_to(real)
    answer = api.client.post("/v1/jobs", json=body_with(field, str(link)))
    assert answer.status_code == 202, answer.text
    part = answer.json()["request"]
    for name in place_of(field).split("."):
        part = part[int(name) if name.isdigit() else name]
    assert part["path"] == str(real)
