"""Artifacts and archives: ranges, validators, digests, and bytes that never change."""

import asyncio
import base64
import hashlib
import io
import tarfile
from collections.abc import Generator, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from app.api.http.archive import archive_digest, tar_member, write_tar
from app.api.http.content import Unsatisfiable, attachment, parse_range, stream
from app.store.blobs import FolderBlobs
from tests.api.conftest import Api, problem

WEIGHTS = bytes(range(256)) * 2000
NAMES = {
    "compressed-tensors": {
        "config.json": b"{}",
        "model.safetensors": WEIGHTS,
        "empty": b"",
        "x" * 150 + ".json": b"long",
    },
    "native": {"model.safetensors": b"native", "sub/ü.txt": b"text"},
}


@pytest.fixture
def job_id(api: Api) -> str:
    """A succeeded job with two checkpoints."""
    job = api.submit()
    api.succeed(api.claim(), NAMES)
    return job


def content_url(api: Api, job_id: str, path: str, export_format: str = "compressed-tensors") -> str:
    """URL of the bytes of a file."""
    items = api.client.get(f"/v1/jobs/{job_id}/artifacts").json()["items"]
    found = next(item for item in items if (item["path"], item["format"]) == (path, export_format))
    return f"/v1/artifacts/{found['id']}/content"


def test_the_whole_content_comes_with_its_hash(api: Api, job_id: str) -> None:
    url = content_url(api, job_id, "model.safetensors")
    answer = api.reader.get(url)
    assert (answer.status_code, answer.content) == (200, WEIGHTS)
    digest = hashlib.sha256(WEIGHTS)
    assert answer.headers["etag"] == f'"{digest.hexdigest()}"'
    assert answer.headers["repr-digest"] == f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-disposition"] == 'attachment; filename="model.safetensors"'
    assert answer.headers["cache-control"] == "private, max-age=31536000, immutable", "an id never gets other bytes"
    head = api.reader.head(url)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(WEIGHTS))
    assert api.reader.get(content_url(api, job_id, "empty")).content == b""
    named = api.reader.get(content_url(api, job_id, "sub/ü.txt", "native"))
    assert named.headers["content-disposition"] == "attachment; filename=\"_.txt\"; filename*=UTF-8''%C3%BC.txt"


@pytest.mark.parametrize(
    ("value", "start", "stop"),
    [("bytes=0-0", 0, 1), ("bytes=10-", 10, None), ("bytes=-7", -7, None), ("bytes=5-9999999999", 5, None)],
)
def test_a_range_is_a_part(api: Api, job_id: str, value: str, start: int, stop: int | None) -> None:
    url = content_url(api, job_id, "model.safetensors")
    answer = api.reader.get(url, headers={"Range": value})
    part = WEIGHTS[start:stop]
    assert (answer.status_code, answer.content) == (206, part)
    first = start % len(WEIGHTS)
    assert answer.headers["content-range"] == f"bytes {first}-{first + len(part) - 1}/{len(WEIGHTS)}"
    assert answer.headers["content-length"] == str(len(part))
    assert answer.headers["repr-digest"] == api.reader.head(url).headers["repr-digest"]


@pytest.mark.parametrize(
    "value", ["bytes=0-1,5-6", "bytes=5-2", "bytes=-", "lines=0-1", "bytes=a-b", "bytes=" + "0-1," * 9999]
)
def test_a_range_that_cannot_be_read_gives_all(api: Api, job_id: str, value: str) -> None:
    answer = api.reader.get(content_url(api, job_id, "model.safetensors"), headers={"Range": value})
    assert (answer.status_code, len(answer.content)) == (200, len(WEIGHTS))


@pytest.mark.parametrize("value", [f"bytes={len(WEIGHTS)}-", "bytes=-0", "bytes=999999999999-"])
def test_a_range_outside_is_refused(api: Api, job_id: str, value: str) -> None:
    answer = api.reader.get(content_url(api, job_id, "model.safetensors"), headers={"Range": value})
    problem(answer, 416, "range_not_satisfiable")
    assert answer.headers["content-range"] == f"bytes */{len(WEIGHTS)}"


def test_validators_decide(api: Api, job_id: str) -> None:
    url = content_url(api, job_id, "model.safetensors")
    etag = api.reader.head(url).headers["etag"]

    def status(**headers: str) -> int:
        return api.reader.get(
            url, headers={name.replace("_", "-"): value for name, value in headers.items()}
        ).status_code

    assert status(Range="bytes=0-1", If_Range=etag) == 206
    assert status(Range="bytes=0-1", If_Range='"other"') == 200
    assert status(Range="bytes=0-1", If_Range=f"W/{etag}") == 200
    assert status(If_None_Match=f'"x", W/{etag}') == 304
    assert status(If_None_Match="*") == 304
    assert status(If_None_Match='"x"') == 200
    assert status(If_None_Match=etag.strip('"')) == 200, "a tag is quoted"
    assert status(If_Match="*") == 200
    assert status(If_Match=etag, If_None_Match=etag) == 304
    assert status(Range="bytes=0-1", If_None_Match=etag) == 304
    assert status(Range="bytes=0-1") == 206
    problem(api.reader.get(url, headers={"If-Match": f"W/{etag}"}), 412, "precondition_failed")
    unchanged = api.reader.get(url, headers={"If-None-Match": etag})
    assert (unchanged.content, unchanged.headers["etag"]) == (b"", etag)
    assert unchanged.headers["cache-control"] == "private, max-age=31536000, immutable"
    head = api.reader.head(url, headers={"Range": "bytes=0-1"})
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(WEIGHTS)))
    assert status(If_Match=etag) == 200
    problem(api.reader.get(url, headers={"If-Match": '"x"'}), 412, "precondition_failed")


def test_an_archive_is_the_checkpoint_byte_for_byte_every_time(api: Api, job_id: str) -> None:
    url = f"/v1/jobs/{job_id}/archive"
    answer = api.reader.get(url)
    assert answer.headers["content-length"] == str(len(answer.content))
    assert answer.headers["content-disposition"] == f'attachment; filename="{job_id}-compressed-tensors.tar"'
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        members = archive.getmembers()
        held = {member.name: archive.extractfile(member) for member in members}
        contents = {name.split("/", 1)[1]: file.read() for name, file in held.items() if file}
    assert contents == NAMES["compressed-tensors"]
    assert all((member.mtime, member.uid, member.mode, member.isfile()) == (0, 0, 0o644, True) for member in members)
    assert {member.name.split("/")[0] for member in members} == {f"{job_id}-compressed-tensors"}
    again = api.reader.get(url)
    assert (again.content, again.headers["etag"]) == (answer.content, answer.headers["etag"])
    assert api.reader.get(url, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    head = api.reader.head(url)
    assert head.headers["content-length"] == str(len(answer.content))
    native = api.reader.get(url, params={"format": "native"})
    assert native.headers["etag"] != answer.headers["etag"]
    with tarfile.open(fileobj=io.BytesIO(native.content)) as archive:
        assert [name.split("/", 1)[1] for name in archive.getnames()] == ["model.safetensors", "sub/ü.txt"]


TRAINED = {"bits": 4, "finetune": {"dataset": "org/text"}}


def unpacked(api: Api, job_id: str, **params: str) -> list[str]:
    answer = api.reader.get(f"/v1/jobs/{job_id}/archive", params=params)
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        return archive.getnames()


@pytest.mark.parametrize(
    ("fields", "kept", "together"),
    [
        ({"method": "qlora"}, ["adapter", "merged", "native", "peft"], ["merged", "peft"]),
        ({"method": "qlora", "formats": ["merged"]}, ["adapter", "merged", "native"], ["merged"]),
        ({"method": "qlora", "merge": "16bit"}, ["adapter", "merged", "native"], ["merged"]),
        ({"method": "qlora", "formats": ["peft"]}, ["adapter", "native", "peft"], ["peft"]),
        ({"method": "qa-lora"}, ["adapter", "compressed-tensors", "native"], ["compressed-tensors", "adapter"]),
        ({"method": "qa-lora", "formats": ["native"]}, ["adapter", "native"], ["native", "adapter"]),
        ({"method": "qa-lora", "merge": "quantized"}, ["adapter", "native"], ["native"]),
        ({"method": "qa-lora", "merge": "quantized", "formats": ["gguf"]}, ["adapter", "gguf", "native"], ["gguf"]),
        ({"method": "q-bara"}, ["adapter", "merged", "native"], ["merged", "adapter"]),
    ],
)
def test_a_job_that_trains_gives_the_base_and_the_adapter_for_it(
    api: Api, fields: dict[str, object], kept: list[str], together: list[str]
) -> None:
    job_id = api.submit(**TRAINED | fields)
    api.succeed(api.claim(), {name: {"file": name.encode()} for name in kept})
    names = unpacked(api, job_id)
    if len(together) == 1:
        assert names == [f"{job_id}-{together[0]}/file"]
    else:
        assert sorted(names) == sorted(f"{job_id}/{name}/file" for name in together)
    assert unpacked(api, job_id, format="adapter") == [f"{job_id}-adapter/file"], "alone if it is asked for"


def test_an_archive_unpacks_to_the_folder_that_was_asked_for(api: Api, job_id: str) -> None:
    names = unpacked(api, job_id, format="native", folder="smollm2-w4")
    assert names == ["smollm2-w4/model.safetensors", "smollm2-w4/sub/ü.txt"]
    answer = api.reader.head(f"/v1/jobs/{job_id}/archive?folder=smollm2-w4")
    assert answer.headers["content-disposition"] == 'attachment; filename="smollm2-w4.tar"'
    for name in ("..", "a/b", "", "/etc", "a\\b", ".hidden"):
        problem(api.reader.get(f"/v1/jobs/{job_id}/archive", params={"folder": name}), 422, "invalid_request")


def test_an_archive_needs_artifacts(api: Api) -> None:
    job_id = api.submit()
    problem(api.reader.get(f"/v1/jobs/{job_id}/archive"), 409, "conflict")
    problem(api.reader.get(f"/v1/jobs/{job_id}/archive?format=zip"), 422, "invalid_request")
    assert api.reader.get(f"/v1/jobs/{job_id}/artifacts").json()["items"] == []
    api.succeed(api.claim(), {"native": {"a": b"a"}})
    problem(api.reader.get(f"/v1/jobs/{job_id}/archive?format=compressed-tensors"), 404, "not_found")
    assert api.reader.get(f"/v1/jobs/{job_id}/archive").status_code == 200


def test_lost_bytes_are_an_error_and_not_an_empty_file(api: Api, job_id: str) -> None:
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    (api.settings.data_dir / "blobs" / digest[:2] / digest).unlink()
    problem(api.reader.get(content_url(api, job_id, "model.safetensors")), 500, "storage_error")
    problem(api.reader.get(f"/v1/jobs/{job_id}/archive"), 500, "storage_error")


def test_ranges_of_nothing() -> None:
    with pytest.raises(Unsatisfiable):
        parse_range("bytes=0-", 0)
    with pytest.raises(Unsatisfiable):
        parse_range("bytes=-5", 0)


def test_a_name_cannot_break_out_of_its_header() -> None:
    header = attachment('a"\r\nX: y\\.bin')
    assert "\r" not in header
    assert header.startswith('attachment; filename="a___X: y_.bin"; filename*=')


def test_archives_of_equal_names_and_sizes_are_told_apart_by_their_bytes(api: Api) -> None:
    tags = []
    for content in (b"one", b"two", b"one"):
        job_id = api.submit()
        api.succeed(api.claim(), {"native": {"model.safetensors": content}})
        tags.append(api.reader.head(f"/v1/jobs/{job_id}/archive?folder=same").headers["etag"])
    assert tags[0] == tags[2] != tags[1]
    other = api.reader.get(f"/v1/jobs/{job_id}/archive?folder=same", headers={"If-None-Match": tags[1]})
    assert other.status_code == 200
    problem(
        api.reader.get(f"/v1/jobs/{job_id}/archive?folder=same", headers={"If-Match": tags[1]}),
        412,
        "precondition_failed",
    )


def test_an_archives_tag_is_the_hash_of_its_layout_headers_and_contents() -> None:
    first, second = tar_member("f/a", 3, "0a" * 32), tar_member("f/b", 700, "0b" * 32)
    said = b"bitwright tar 1\n" + first.header + b"\x0a" * 32 + second.header + b"\x0b" * 32
    assert archive_digest([first, second]) == hashlib.sha256(said).hexdigest()
    assert (first.length, second.length) == (1024, 1536)
    assert len({archive_digest(members) for members in ([], [first], [second], [second, first])}) == 4


def test_an_archive_is_asked_for_anew_because_a_retry_may_change_it(api: Api) -> None:
    job_id = api.submit()
    url = f"/v1/jobs/{job_id}/archive"
    api.miss(api.claim(), {"native": {"model.safetensors": b"one"}})
    first = api.reader.get(url)
    assert first.headers["cache-control"] == "private, no-cache"
    same = api.reader.get(url, headers={"If-None-Match": first.headers["etag"]})
    assert (same.status_code, same.headers["cache-control"]) == (304, "private, no-cache")
    assert same.headers["etag"] == first.headers["etag"]
    api.client.post(f"/v1/jobs/{job_id}/retry").raise_for_status()
    api.succeed(api.claim(), {"native": {"model.safetensors": b"two"}})
    again = api.reader.get(url, headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.headers["etag"] != first.headers["etag"]) == (200, True)
    assert b"two" in again.content


class _Watched(FolderBlobs):
    """A store that remembers what it has opened."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.opened: list[Any] = []

    def open(self, sha256: str, start: int = 0) -> Any:
        self.opened.append(super().open(sha256, start))
        return self.opened[-1]


@pytest.mark.parametrize("archive", [False, True], ids=["file", "archive"])
@pytest.mark.parametrize("version", ["2.3", "2.4"])
def test_a_caller_who_goes_away_leaves_no_file_open(tmp_path: Path, archive: bool, version: str) -> None:
    """Of both kinds of servers: one tells it by a message, the other by a send that fails."""
    blobs, source = _Watched(tmp_path / "blobs"), tmp_path / "source"
    source.write_bytes(bytes(3 << 20))
    blob = blobs.put(source)
    chunks: Iterator[bytes]
    if archive:
        chunks = write_tar(blobs, [tar_member("f/a", blob.size, blob.sha256)])
    else:
        chunks = blobs.read_range(blob.sha256, 0, blob.size)
    answer = stream(chunks, blob.size, media_type="x/y", headers={}, status=200)
    sent = 0

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal sent
        sent += len(message.get("body", b""))
        if sent > 1 << 20:
            if version == "2.4":
                raise OSError("the connection is gone")
            await asyncio.Event().wait()

    async def receive() -> MutableMapping[str, Any]:
        while sent <= 1 << 20:
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    scope = {"type": "http", "asgi": {"spec_version": version}}
    try:
        asyncio.run(answer(scope, receive, send))
    except ClientDisconnect:
        assert version == "2.4"
    assert isinstance(chunks, Generator)
    assert chunks.gi_frame is None, "it is closed, not left to the collector"  # type: ignore[attr-defined]
    assert [reader.closed for reader in blobs.opened] == [True]


def test_a_whole_answer_has_its_length_and_closes_its_file(tmp_path: Path) -> None:
    blobs, source = _Watched(tmp_path / "blobs"), tmp_path / "source"
    source.write_bytes(b"12345")
    blob = blobs.put(source)
    answer = stream(blobs.read_range(blob.sha256, 1, 4), 3, media_type="x/y", headers={"ETag": '"a"'}, status=206)
    assert (answer.status_code, answer.headers["content-length"], answer.headers["etag"]) == (206, "3", '"a"')
    assert answer.headers["content-type"] == "x/y"


@pytest.mark.parametrize(
    ("value", "size", "span"),
    [
        ("bytes=0-0", 1, (0, 1)),
        ("bytes=9-9", 10, (9, 1)),
        ("bytes=9-", 10, (9, 1)),
        ("bytes=0-10", 10, (0, 10)),
        ("bytes=-10", 10, (0, 10)),
        ("bytes=-11", 10, (0, 10)),
        ("bytes=-1", 10, (9, 1)),
        ("bytes= 3-5 ", 10, (3, 3)),
        ("bytes=5-5", 10, (5, 1)),
        ("bytes=5-4", 10, None),
        ("bytes=12-11", 10, None),
        ("Bytes=0-0", 10, None),
        ("bytes=0-0,2-3", 10, None),
        ("bytes=--1", 10, None),
    ],
)
def test_a_range_by_hand(value: str, size: int, span: tuple[int, int] | None) -> None:
    found = parse_range(value, size)
    assert (found and (found.start, found.length)) == span


@pytest.mark.parametrize(("value", "size"), [("bytes=10-", 10), ("bytes=10-10", 10), ("bytes=-0", 10), ("bytes=0-", 0)])
def test_a_range_that_begins_at_the_end_is_unsatisfiable(value: str, size: int) -> None:
    with pytest.raises(Unsatisfiable) as caught:
        parse_range(value, size)
    assert caught.value.headers == {"Content-Range": f"bytes */{size}"}
