"""Downloads and uploads over connections that break."""

import hashlib
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import select

from app.api.upload_parts import PartsFolder
from app.store.models import UploadFile
from bitwright.errors import NotFound, RequestError, StorageError, Unavailable
from bitwright.files.downloads import partial_path, target_path
from bitwright.views import ArtifactView
from tests.bitwright.cutting_proxy import Corrupt, CutAnswer, CuttingProxy, Fate, Pass
from tests.bitwright.service import Service

BOTH_CLIENTS = True
REQUEST = {"model": "org/name", "method": "rtn", "bits": 4}
CONTENT = random.Random(0).randbytes(3_000_000)
FILES = {"model.safetensors": CONTENT, "config.json": b"{}", "deep/er/empty.txt": b""}


@pytest.fixture
def artifacts(service: Service) -> list[ArtifactView]:
    with service.client() as client:
        job = client.submit(REQUEST)
        while (claimed := service.claim()).job_id != job.id:
            service.succeed(claimed)
        service.succeed(claimed, FILES)
        return client.artifacts(job.id)


def weights(artifacts: list[ArtifactView]) -> ArtifactView:
    return next(artifact for artifact in artifacts if artifact.path == "model.safetensors")


def ranges(proxy: CuttingProxy) -> list[bytes]:
    lines = [line for text in proxy.heard for line in text.split(b"\r\n")]
    return [line.split(b": ")[1] for line in lines if line.lower().startswith(b"range:")]


def test_a_checkpoint_arrives_whole(service: Service, artifacts: list[ArtifactView], tmp_path: Path) -> None:
    received: list[int] = []
    with service.client() as client:
        client.download(artifacts[0].job_id, tmp_path, on_bytes=received.append)
    assert {path: (tmp_path / path).read_bytes() for path in FILES} == FILES
    assert [path for path in tmp_path.rglob("*") if path.name.endswith(".partial")] == []
    assert sum(received) == sum(map(len, FILES.values()))


def test_a_cut_download_goes_on_where_it_was(service: Service, artifacts: list[ArtifactView], tmp_path: Path) -> None:
    received: list[int] = []
    plan: list[Fate] = [CutAnswer(700_000), CutAnswer(900_000), CutAnswer(50), Pass()]
    with CuttingProxy(service.address, plan) as proxy, service.client(proxy.url) as client:
        path = client.download_artifact(weights(artifacts), tmp_path, received.append)
    assert path.read_bytes() == CONTENT
    assert sum(received) == len(CONTENT)
    asked = [int(value.removeprefix(b"bytes=").removesuffix(b"-")) for value in ranges(proxy)]
    assert len(asked) == 3
    assert 0 < asked[0] < asked[1] == asked[2]
    assert b'if-range: "' + weights(artifacts).sha256.encode() in proxy.heard[1].lower()


def test_a_later_run_takes_up_the_partial_file(service: Service, artifacts: list[ArtifactView], tmp_path: Path) -> None:
    artifact = weights(artifacts)
    gone = CuttingProxy(service.address, [CutAnswer(500_000)] + [CutAnswer(0)] * 9)
    with gone, service.client(gone.url) as client, pytest.raises(Unavailable):
        client.download_artifact(artifact, tmp_path)
    partial = partial_path(tmp_path / "model.safetensors", artifact.sha256)
    there = partial.stat().st_size
    assert 0 < there < len(CONTENT)
    with CuttingProxy(service.address) as proxy, service.client(proxy.url) as client:
        assert client.download_artifact(artifact, tmp_path).read_bytes() == CONTENT
    assert ranges(proxy) == [f"bytes={there}-".encode()]
    assert not partial.exists()


def test_a_damaged_partial_file_is_thrown_away(service: Service, artifacts: list[ArtifactView], tmp_path: Path) -> None:
    artifact, received = weights(artifacts), list[int]()
    partial_path(tmp_path / "model.safetensors", artifact.sha256).write_bytes(b"x" * 1000)
    with service.client() as client:
        assert client.download_artifact(artifact, tmp_path, received.append).read_bytes() == CONTENT
    assert sum(received) == len(CONTENT)


def test_bytes_without_the_promised_hash_never_get_the_files_name(
    service: Service, artifacts: list[ArtifactView], tmp_path: Path
) -> None:
    promised = hashlib.sha256(b"something else").hexdigest()
    with service.client() as client, pytest.raises(StorageError, match=promised) as caught:
        client.download_artifact(weights(artifacts).model_copy(update={"sha256": promised}), tmp_path)
    assert caught.value.value == weights(artifacts).sha256
    assert list(tmp_path.iterdir()) == []


def test_one_bad_transfer_is_made_good_by_a_second(
    service: Service, artifacts: list[ArtifactView], tmp_path: Path
) -> None:
    received: list[int] = []
    with CuttingProxy(service.address, [Corrupt(1_000_000)]) as proxy, service.client(proxy.url) as client:
        assert client.download_artifact(weights(artifacts), tmp_path, received.append).read_bytes() == CONTENT
        assert proxy.heard[0].count(b"GET ") == 2
    assert -len(CONTENT) in received
    assert sum(received) == len(CONTENT)


def test_a_file_that_is_there_is_not_fetched(service: Service, artifacts: list[ArtifactView], tmp_path: Path) -> None:
    with CuttingProxy(service.address) as proxy, service.client(proxy.url) as client:
        client.download_artifact(weights(artifacts), tmp_path)
        told = len(proxy.heard[0])
        client.download_artifact(weights(artifacts), tmp_path)
        assert len(proxy.heard) == 1
        assert len(proxy.heard[0]) == told


@pytest.mark.parametrize("path", ["../out", "/etc/passwd", "a/../../b", "", "..", "a\\..\\b", "a\0b"])
def test_a_path_never_leaves_the_folder(artifacts: list[ArtifactView], tmp_path: Path, path: str) -> None:
    with pytest.raises(StorageError, match="leaves its folder"):
        target_path(tmp_path, artifacts[0].model_copy(update={"path": path}))


def test_a_format_that_the_job_does_not_have(service: Service, artifacts: list[ArtifactView], tmp_path: Path) -> None:
    with service.client() as client, pytest.raises(NotFound, match="it has: compressed-tensors"):
        client.download(artifacts[0].job_id, tmp_path, format="native")


def test_a_completion_that_takes_long_is_waited_for(service: Service, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "some words"}\n')
    with ThreadPoolExecutor() as threads, service.client() as client:
        upload = client.upload([text])
        begun = client._transport.send(
            "POST", "/v1/uploads", json={"files": [upload.files[0].model_dump(exclude={"offset"})]}
        ).json()["id"]
        url = f"/v1/uploads/{begun}/files/{text.name}"
        client._transport.send("PUT", url, content=text.read_bytes())
        with PartsFolder(service.folder / "uploads", begun).locked():
            # Another request is at it for longer than all tries of one request take.
            waiting = threads.submit(client.upload, [text], upload_id=begun)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=1)
        assert waiting.result(timeout=10).status == "complete"


def test_an_upload_arrives_though_connections_break(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitwright.files.uploads.PART_BYTES", 1_000_000)
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "some words"}\n' * 120_000)
    sent: list[int] = []
    # The answers of the creation, of a part, and of the completion are lost.
    plan = [CutAnswer(0), CutAnswer(1200), CutAnswer(0), CutAnswer(400)]
    with CuttingProxy(service.address, plan) as proxy, service.client(proxy.url) as client:
        upload = client.upload([text], on_bytes=sent.append)
    assert upload.status == "complete"
    assert [(file.offset, file.sha256) for file in upload.files] == [
        (text.stat().st_size, hashlib.sha256(text.read_bytes()).hexdigest())
    ]
    assert sum(sent) == text.stat().st_size
    assert len(proxy.heard) > 4
    with service.database.reading() as session:
        made = session.scalars(select(UploadFile.upload_id).where(UploadFile.sha256 == upload.files[0].sha256))
        assert made.all() == [upload.id], "the creation whose answer was lost is the one that counts"


def test_two_files_of_one_name_and_a_missing_file_are_refused(service: Service, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for file in (tmp_path / "x", tmp_path / "a" / "x"):
        file.write_text("x")
    with service.client() as client:
        with pytest.raises(RequestError, match="two files are named x"):
            client.upload([tmp_path / "x", tmp_path / "a" / "x"])
        with pytest.raises(RequestError, match="is not a file"):
            client.upload([tmp_path / "y"])
