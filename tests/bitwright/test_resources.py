"""`Bitwright` and `AsyncBitwright` against a real service: resources, pages, events, downloads."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import bitwright
from app.domain.request.job_request import JobRequest
from bitwright import Bitwright
from bitwright.endpoint import Endpoint, save_endpoint
from bitwright.errors import CorruptCheckpoint, InvalidRequest, InvalidSettings
from bitwright.job_fields import JobFields
from bitwright.job_states import JobStatus
from bitwright.request import RequestView
from tests.bitwright.service import Service
from tests.reports import BARE

BOTH_CLIENTS = True
FILES = {"model.safetensors": b"weights", "config.json": b"{}"}


@pytest.fixture
def client(service: Service) -> Iterator[Bitwright]:
    with service.resources() as opened:
        yield opened


def cancel_all(service: Service) -> None:
    """End what other tests have left in the queue, so that the next claim takes this test's job."""
    with service.client() as client:
        for job in client.jobs(status=JobStatus.QUEUED):
            client.cancel(job.id)


def test_a_job_from_its_creation_to_its_files(client: Bitwright, service: Service, tmp_path: Path) -> None:
    cancel_all(service)
    job = client.jobs.create(model="org/name", method="rtn", bits=4, metadata={"made": "here"})
    assert (job.status, job.done) == (JobStatus.QUEUED, False)
    assert job.request.quantization is not None
    assert job.request.quantization.group_size == 64
    service.succeed_with(service.claim(), {"compressed-tensors": FILES}, BARE)
    assert job.wait(progress=False) is job
    assert job.report is not None
    files = job.download(tmp_path / "checkpoint")
    assert {path.name: path.read_bytes() for path in files} == FILES
    assert [event.sequence for event in job.events()] == list(range(1, job.view.last_event + 1))
    assert [same.id for same in client.jobs.list(metadata={"made": "here"}, limit=1)] == [job.id]
    assert {artifact.path for artifact in client.jobs.artifacts(job.id)} == set(FILES)


def test_pages_are_asked_for_one_after_another(client: Bitwright) -> None:
    made = [client.jobs.create(model="org/name", method="rtn", metadata={"pages": "3"}).id for _ in range(3)]
    assert [job.id for job in client.jobs.list(metadata={"pages": "3"}, limit=2)] == made[::-1]


def test_a_failed_job_raises_its_error(client: Bitwright, service: Service) -> None:
    cancel_all(service)
    job = client.jobs.create(model="org/name", method="rtn")
    service.fail(service.claim(), CorruptCheckpoint("a tensor is missing"))
    assert client.jobs.wait(job.id, progress=False, check=False).status is JobStatus.FAILED
    with pytest.raises(CorruptCheckpoint, match="is missing"):
        job.wait(progress=False)
    assert job.retry().status is JobStatus.QUEUED
    assert job.cancel().status is JobStatus.CANCELLED
    job.delete()


def test_problems_come_back_with_their_fields(client: Bitwright) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.jobs.create(model="org/name", method="rtn", bits=99, extra_body={"brand_new": 1})
    assert {problem.field for problem in caught.value.errors} == {"bits", "brand_new"}


def test_what_the_service_offers_and_takes(client: Bitwright, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a"}\n')
    upload = client.uploads.create(text)
    assert client.uploads.retrieve(upload.id) == upload
    assert upload.id in [one.id for one in client.uploads.list()]
    assert "rtn" in [method.name for method in client.methods.list().items]
    assert "gguf" in [format.name for format in client.formats.list()]
    assert "llama" in [row.model_type for row in client.architectures.list().items]
    assert client.workers.list() == []
    full = client.jobs.preflight(model="org/name", method="rtn", calibration={"dataset": upload.id})
    assert full.request.model is not None
    assert full.request.model.shorthand() == "org/name"


def test_a_notebook_shows_a_table(client: Bitwright) -> None:
    job = client.jobs.create(model="org/name", method="rtn", metadata={"who": "<b>"})
    assert repr(job) == f"Job(id='{job.id}', status='queued', model='org/name', method='rtn')"
    shown = job._repr_html_()
    assert f"<td>{job.id}</td>" in shown
    assert "<b>" not in shown


def address(base_url: str | None = None) -> str:
    with Bitwright(base_url) as opened:
        return opened.base_url


def test_address_and_key_come_from_arguments_the_environment_or_a_service_of_this_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BITWRIGHT_DATA_DIR", str(tmp_path))
    monkeypatch.delenv("BITWRIGHT_URL", raising=False)
    monkeypatch.delenv("BITWRIGHT_KEY", raising=False)
    assert address() == "http://127.0.0.1:8080"
    save_endpoint(tmp_path, Endpoint("http://127.0.0.1:9", "bw_stored"))
    assert address() == "http://127.0.0.1:9"
    monkeypatch.setenv("BITWRIGHT_URL", "https://quantize.example/")
    assert address() == "https://quantize.example"
    assert address("http://127.0.0.1:7") == "http://127.0.0.1:7"
    with pytest.raises(InvalidSettings, match="scheme"):
        Bitwright("quantize.example")


def test_a_request_of_a_newer_service_is_read_and_written_back_as_it_came() -> None:
    newer = {"model": {"source": "moon", "id": "crater"}, "quantization": {"method": "new", "bits": 4, "spin": [1]}}
    view = RequestView.model_validate(newer)
    assert view.quantization is not None
    assert (view.quantization.method, view.merge) == ("new", None)
    assert json.loads(view.model_dump_json()) == newer


def test_a_value_that_is_not_understood_spoils_no_other() -> None:
    view = RequestView.model_validate({"quantization": {"method": "new", "bits": "a few"}, "formats": 3, "seed": 5})
    assert view.quantization is not None
    assert (view.quantization.method, view.quantization.bits) == ("new", None)
    assert (view.formats, view.seed) == (None, 5)


def test_client_and_service_name_the_same_fields_of_a_request() -> None:
    assert list(RequestView.model_fields) == list(JobRequest.model_fields)
    assert JobRequest.model_fields.keys() <= JobFields.__annotations__.keys()


def test_every_public_name_is_there() -> None:
    assert all(getattr(bitwright, name).__name__ == name for name in bitwright.__all__)
    with pytest.raises(AttributeError, match="quantise"):
        bitwright.quantise  # noqa: B018
