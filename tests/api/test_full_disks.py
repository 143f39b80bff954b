"""Uploads where the disk is full: before, while and after their bytes arrive. It is told, and nothing stays behind."""

import errno
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.api import uploads
from app.api.upload_parts import PartsFolder
from app.store import blobs
from tests.api.conftest import Api, make_settings, problem, run_api
from tests.api.test_uploads import begin, send

TEXT = b'{"text": "one"}\n' * 1000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 2 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_disk_that_fills_while_a_part_arrives(
    small_disk: Path, tmp_path: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "SPARE_BYTES", -(8 << 20))  # so that the upload begins
    for api in run_api(make_settings(tmp_path, sqlite_url, upload_dir=small_disk)):
        content = os.urandom(3 << 20)
        head, tail = content[: 1 << 20], content[1 << 20 :]
        upload_id = begin(api, {"config.json": b"{}", "model.safetensors": content})
        url = f"/v1/uploads/{upload_id}/files/model.safetensors"
        size = len(content)
        first = api.client.put(url, content=head, headers={"Content-Range": f"bytes 0-{len(head) - 1}/{size}"})
        assert first.status_code == 204
        free = shutil.disk_usage(small_disk).free
        ranged = {"Content-Range": f"bytes {len(head)}-{size - 1}/{size}"}
        told = problem(api.client.put(url, content=tail, headers=ranged), 507, "disk_full")
        assert told["hint"]
        assert shutil.disk_usage(small_disk).free == free
        assert api.client.head(url).headers["upload-offset"] == str(len(head))
        subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
        assert api.client.put(url, content=tail, headers=ranged).status_code == 204


def test_a_write_that_takes_a_part_of_the_bytes_goes_on(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the last write before a full disk does."""
    upload_id = begin(api, {"text.jsonl": TEXT})
    opened = PartsFolder.open_at

    class Slow:
        def __init__(self, file: object) -> None:
            self.file = file

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def __enter__(self) -> "Slow":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()  # type: ignore[attr-defined]

        def write(self, content: memoryview) -> int:
            return int(self.file.write(content[:100]))  # type: ignore[attr-defined]

    monkeypatch.setattr(PartsFolder, "open_at", lambda *args: Slow(opened(*args)))
    assert api.client.put(f"/v1/uploads/{upload_id}/files/text.jsonl", content=TEXT).status_code == 204
    monkeypatch.undo()
    assert api.client.post(f"/v1/uploads/{upload_id}/complete").status_code == 200


def test_a_disk_that_is_full_at_the_end(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    upload_id = send(api, {"text.jsonl": TEXT})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(blobs, "_copy", full)
    problem(api.client.post(f"/v1/uploads/{upload_id}/complete"), 507, "disk_full")
    assert list((api.settings.data_dir / "blobs" / "incoming").iterdir()) == []
    monkeypatch.undo()
    assert api.client.post(f"/v1/uploads/{upload_id}/complete").json()["status"] == "complete"


def test_an_upload_that_cannot_fit_is_not_begun(any_api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts and blobs share a disk here: each byte is needed twice. What was announced before counts, too."""
    free = 10_000

    def usage(_: Path) -> object:
        return shutil._ntuple_diskusage(0, 0, free + uploads.SPARE_BYTES)

    monkeypatch.setattr(shutil, "disk_usage", usage)

    def create(size: int) -> object:
        file = {"name": "text.jsonl", "size": size, "sha256": hashlib.sha256(b"").hexdigest()}
        return any_api.client.post("/v1/uploads", json={"files": [file]})

    told = problem(create(5001), 507, "disk_full")  # type: ignore[arg-type]
    assert (told["field"], told["value"]) == ("files", 5001)
    assert create(2000).status_code == 201  # type: ignore[attr-defined]
    problem(create(4001), 507, "disk_full")  # type: ignore[arg-type]
    assert create(4000).status_code == 201  # type: ignore[attr-defined]


def test_a_full_disk_is_told_wherever_it_is_met(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    upload_id = begin(api, {"text.jsonl": TEXT})
    for number, status, code in ((errno.EDQUOT, 507, "disk_full"), (errno.EIO, 500, "internal_error")):

        def fail(*_: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(PartsFolder, "present", fail)
        url = f"/v1/uploads/{upload_id}/files/text.jsonl"
        problem(api.client.put(url, content=TEXT), status, code)
