"""Uploads: parts, broken connections, hashes, texts that are none, checkpoints that become models."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.api.upload_parts import PartsFolder
from app.api.upload_receiving import Target, parse_content_range
from bitwright.errors import InvalidRequest
from tests.api.checkpoints import write_checkpoint
from tests.api.conftest import SHORTHAND, Answer, Api, problem
from tests.store.samples import wait_until

TEXT = b'{"text": "one"}\n\n{"prompt": "a", "completion": "b"}\n{"messages": [{"role": "user", "content": "c"}]}\n'


def begin(api: Api, files: Mapping[str, bytes]) -> str:
    """Open an upload of these files; its id."""
    specs = [
        {"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    ]
    response = api.client.post("/v1/uploads", json={"files": specs})
    assert response.status_code == 201, response.text
    assert response.headers["location"] == f"/v1/uploads/{response.json()['id']}"
    return str(response.json()["id"])


def send(api: Api, files: Mapping[str, bytes]) -> str:
    """Upload these files whole; the upload's id."""
    upload_id = begin(api, files)
    for name, content in files.items():
        if content:
            assert api.client.put(f"/v1/uploads/{upload_id}/files/{name}", content=content).status_code == 204
    return upload_id


def test_parts_make_a_file_and_a_text_calibrates_a_job(any_api: Api) -> None:
    upload_id = begin(any_api, {"text.jsonl": TEXT})
    url = f"/v1/uploads/{upload_id}/files/text.jsonl"
    size = len(TEXT)
    for first, last in ((0, 9), (10, 40)):
        part = TEXT[first : last + 1]
        answer = any_api.client.put(url, content=part, headers={"Content-Range": f"bytes {first}-{last}/{size}"})
        assert (answer.status_code, answer.headers["upload-offset"]) == (204, str(last + 1))
    assert any_api.client.head(url).headers["upload-offset"] == "41"
    twice = any_api.client.put(url, content=TEXT[10:41], headers={"Content-Range": f"bytes 10-40/{size}"})
    problem(twice, 409, "conflict")
    problem(any_api.client.post(f"/v1/uploads/{upload_id}/complete"), 409, "conflict")
    used = {**SHORTHAND, "calibration": {"dataset": upload_id}}
    assert (
        problem(any_api.client.post("/v1/jobs", json=used), 422, "source_not_found")["field"]
        == "calibration.dataset.id"
    )

    any_api.client.put(url, content=TEXT[41:], headers={"Content-Range": f"bytes 41-{size - 1}/{size}"})
    done = any_api.client.post(f"/v1/uploads/{upload_id}/complete")
    assert (done.status_code, done.json()["status"]) == (200, "complete")
    assert any_api.client.post(f"/v1/uploads/{upload_id}/complete").json() == done.json()
    assert not (any_api.settings.upload_dir / upload_id).exists()
    problem(any_api.client.put(url, content=TEXT), 409, "conflict")
    job_id = any_api.submit(calibration={"dataset": upload_id})
    problem(any_api.client.delete(f"/v1/uploads/{upload_id}"), 409, "conflict")
    any_api.client.post(f"/v1/jobs/{job_id}/cancel")
    assert any_api.client.delete(f"/v1/uploads/{upload_id}").status_code == 204
    problem(any_api.client.get(f"/v1/uploads/{upload_id}"), 404, "not_found")


def test_a_repeated_key_gives_the_same_upload(any_api: Api) -> None:
    size = len(TEXT)
    announced = [{"name": "text.jsonl", "size": size, "sha256": hashlib.sha256(TEXT).hexdigest()}]
    headers = {"Idempotency-Key": "run-19"}

    def post(client: TestClient, files: object = announced) -> Answer:
        return client.post("/v1/uploads", json={"files": files}, headers=headers)

    first = post(any_api.client)
    url = first.headers["location"]
    part = {"Content-Range": f"bytes 0-9/{size}"}
    assert any_api.client.put(f"{url}/files/text.jsonl", content=TEXT[:10], headers=part).status_code == 204
    again = post(any_api.client)
    assert (again.status_code, again.headers["location"]) == (201, url)
    assert again.json()["files"][0]["offset"] == 10, "the upload as it is by now"
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    problem(post(any_api.client, [{**announced[0], "size": 1}]), 422, "idempotency_key_reused")
    problem(any_api.client.post("/v1/jobs", json=SHORTHAND, headers=headers), 422, "idempotency_key_reused")
    assert post(any_api.stranger).headers["location"] != url
    assert any_api.client.delete(url).status_code == 204
    assert post(any_api.client).headers["location"] != url, "a key goes with what it stands for"
    bad = any_api.client.post("/v1/uploads", json={"files": announced}, headers={"Idempotency-Key": "a b"})
    assert problem(bad, 422, "invalid_request")["field"] == "Idempotency-Key"


def test_two_completions_at_once_are_one(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    upload_id = send(api, {"text.jsonl": TEXT})
    url = f"/v1/uploads/{upload_id}/complete"
    locked, others = PartsFolder.locked, []

    @contextmanager
    def locked_by_another_first(parts: PartsFolder) -> Iterator[None]:
        monkeypatch.setattr(PartsFolder, "locked", locked)
        others.append(api.client.post(url))
        with locked(parts):
            yield

    monkeypatch.setattr(PartsFolder, "locked", locked_by_another_first)
    answer = api.client.post(url)
    assert [answer.status_code, others[0].status_code] == [200, 200]
    assert answer.json() == others[0].json()
    assert not (api.settings.upload_dir / upload_id).exists()


def checkpoint_files(folder: Path) -> dict[str, bytes]:
    """A small checkpoint as an upload's files."""
    return {file.name: file.read_bytes() for file in write_checkpoint(folder, shards=True).iterdir()}


def test_an_uploaded_checkpoint_is_a_model_and_is_inspected(api: Api) -> None:
    files = checkpoint_files(api.folder / "source")
    upload_id = send(api, files)
    api.client.post(f"/v1/uploads/{upload_id}/complete").raise_for_status()
    view = api.client.post("/v1/jobs?dry_run=true", json={**SHORTHAND, "model": upload_id}).json()
    assert view["estimates"]["weights"] == 128 * 64 + 64
    bad = api.client.post("/v1/jobs", json={**SHORTHAND, "model": upload_id, "group_size": 128})
    problem(bad, 422, "group_size_does_not_divide")
    text = {**SHORTHAND, "calibration": {"dataset": upload_id}}
    problem(api.client.post("/v1/jobs", json=text), 422, "invalid_dataset")
    api.submit(model=upload_id)


def test_a_damaged_uploaded_checkpoint_is_refused(api: Api) -> None:
    files = checkpoint_files(api.folder / "source")
    name = next(name for name in files if name.endswith("1-of-00002.safetensors"))
    upload_id = send(api, {**files, name: files[name][:-2]})
    api.client.post(f"/v1/uploads/{upload_id}/complete").raise_for_status()
    problem(api.client.post("/v1/jobs", json={**SHORTHAND, "model": upload_id}), 422, "corrupt_checkpoint")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"text": "a"}\n[1]\n', "line 2 is not a JSON object"),
        (b'{"text": "a"}\n{"text": 1}\n', "line 2: text is a number"),
        (b'{"text": "a"}\n\n{"prompt": "only"}\n', "line 3: prompt has no completion"),
        (b'{"messages": []}', "line 1: messages is empty"),
        (b'{"messages": [{"content": "x"}]}', "line 1: messages.0.role is missing"),
        (b'{"txt": "x"}', "line 1 is an object without text"),
        (b'{"messages": [{"role": "user", "content": "x"}], "images": ["y"]}', "line 1: images is not honoured"),
        (b'{"text": ""}\n{"text": " "}\n', "holds no text"),
        (b"plain text\n", "line 1 is not JSON"),
        (b"\xff\xfe\n", "is a text in UTF-16"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b"\n\n", "holds no text"),
        (b"", "holds no text"),
    ],
)
def test_a_text_that_is_none_is_refused_by_line(api: Api, content: bytes, says: str) -> None:
    upload_id = send(api, {"text.jsonl": content})
    found = problem(api.client.post(f"/v1/uploads/{upload_id}/complete"), 422, "invalid_dataset")
    assert says in str(found["detail"])
    assert found["hint"]
    assert api.client.get(f"/v1/uploads/{upload_id}").json()["status"] == "open"


def test_wrong_bytes_are_found_and_can_be_sent_again(api: Api) -> None:
    upload_id = begin(api, {"text.jsonl": TEXT})
    url = f"/v1/uploads/{upload_id}/files/text.jsonl"
    api.client.put(url, content=TEXT.replace(b"one", b"two"))
    found = problem(api.client.post(f"/v1/uploads/{upload_id}/complete"), 422, "invalid_request")
    assert found["field"] == "files.0.sha256"
    assert api.client.head(url).headers["upload-offset"] == "0"
    assert api.client.put(url, content=TEXT).status_code == 204
    assert api.client.post(f"/v1/uploads/{upload_id}/complete").status_code == 200


@pytest.mark.parametrize(
    "content_range", ["bytes 0-9/11", "bytes 5-4/103", "bytes 0-103/103", "bytes 0-9/*", "0-9", "bytes -1-9/103"]
)
def test_a_part_must_lie_in_its_file(api: Api, content_range: str) -> None:
    upload_id = begin(api, {"text.jsonl": TEXT[:103]})
    url = f"/v1/uploads/{upload_id}/files/text.jsonl"
    answer = api.client.put(url, content=TEXT[:10], headers={"Content-Range": content_range})
    assert problem(answer, 422, "invalid_request")["field"] == "Content-Range"


def test_a_body_of_another_length_counts_as_far_as_it_goes(api: Api) -> None:
    upload_id = begin(api, {"text.jsonl": TEXT})
    url = f"/v1/uploads/{upload_id}/files/text.jsonl"
    size = len(TEXT)
    short = api.client.put(url, content=TEXT[:10], headers={"Content-Range": f"bytes 0-19/{size}"})
    assert "10 bytes early" in str(problem(short, 400, "malformed_body")["detail"])
    assert api.client.head(url).headers["upload-offset"] == "10"

    def chunks() -> Iterator[bytes]:
        yield TEXT[10:15]
        yield TEXT[15:40]

    long = api.client.put(url, content=chunks(), headers={"Content-Range": f"bytes 10-19/{size}"})
    assert "longer" in str(problem(long, 400, "malformed_body")["detail"])
    reached = int(api.client.head(url).headers["upload-offset"])
    assert 10 <= reached <= 20
    rest = {"Content-Range": f"bytes {reached}-{size - 1}/{size}"}
    assert api.client.put(url, content=TEXT[reached:], headers=rest).status_code == 204
    assert api.client.post(f"/v1/uploads/{upload_id}/complete").status_code == 200


def test_two_writers_do_not_mix(api: Api) -> None:
    upload_id = begin(api, {"text.jsonl": TEXT})
    url = f"/v1/uploads/{upload_id}/files/text.jsonl"
    with PartsFolder(api.settings.upload_dir, upload_id).locked():
        problem(api.client.put(url, content=TEXT), 409, "request_in_progress")
    assert api.client.put(url, content=TEXT).status_code == 204
    with PartsFolder(api.settings.upload_dir, upload_id).locked():
        problem(api.client.post(f"/v1/uploads/{upload_id}/complete"), 409, "request_in_progress")


def test_lost_parts_are_sent_again(api: Api) -> None:
    upload_id = begin(api, {"text.jsonl": TEXT})
    url = f"/v1/uploads/{upload_id}/files/text.jsonl"
    size = len(TEXT)
    api.client.put(url, content=TEXT[:10], headers={"Content-Range": f"bytes 0-9/{size}"})
    PartsFolder(api.settings.upload_dir, upload_id).remove()
    rest = {"Content-Range": f"bytes 10-{size - 1}/{size}"}
    problem(api.client.put(url, content=TEXT[10:], headers=rest), 409, "conflict")
    assert api.client.head(url).headers["upload-offset"] == "0"


@pytest.mark.parametrize(
    "name",
    ["../x.jsonl", "/x.jsonl", "a/b.jsonl", "..", "", "a\\b.jsonl", "C:x.jsonl", "a\0.jsonl", "a\n.jsonl", "x" * 256],
)
def test_names_are_plain(api: Api, name: str) -> None:
    body = {"files": [{"name": name, "size": 1, "sha256": "0" * 64}]}
    found = problem(api.client.post("/v1/uploads", json=body), 422, "invalid_request")
    assert isinstance(found["errors"], list)
    assert found["errors"][0]["field"] == "files.0.name"


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (["config.json", "pytorch_model.bin"], "unsafe_checkpoint"),
        (["config.json", "model.safetensors", "training.pt"], "unsafe_checkpoint"),
        (["notes.txt"], "invalid_request"),
        (["a.jsonl", "b.jsonl"], "invalid_request"),
        (["model.safetensors"], "invalid_request"),
        (["config.json", "config.json", "model.safetensors"], "invalid_request"),
    ],
)
def test_files_make_a_text_or_a_checkpoint(api: Api, names: list[str], code: str) -> None:
    body = {"files": [{"name": name, "size": 1, "sha256": "0" * 64} for name in names]}
    problem(api.client.post("/v1/uploads", json=body), 422, code)


def test_an_upload_has_its_limits(api: Api) -> None:
    too_large = {"files": [{"name": "a.jsonl", "size": api.settings.max_upload_bytes + 1, "sha256": "0" * 64}]}
    problem(api.client.post("/v1/uploads", json=too_large), 413, "body_too_large")
    for spoiled in ({"size": -1}, {"size": 1.5}, {"sha256": "A" * 64}, {"mode": 7}):
        body = {"files": [{"name": "a.jsonl", "size": 1, "sha256": "0" * 64, **spoiled}]}
        problem(api.client.post("/v1/uploads", content=json.dumps(body)), 422, "invalid_request")
    problem(api.client.post("/v1/uploads", json={"files": []}), 422, "invalid_request")


def test_a_large_part_goes_through_in_pieces(api: Api) -> None:
    line = b'{"text": "' + b"x" * 990 + b'"}\n'
    content = line * 3000
    assert len(content) > 2 * api.settings.max_body_bytes
    upload_id = send(api, {"text.jsonl": content})
    assert api.client.post(f"/v1/uploads/{upload_id}/complete").status_code == 200


def test_uploads_are_listed_page_by_page(any_api: Api) -> None:
    opened = [begin(any_api, {"text.jsonl": TEXT}) for _ in range(3)]
    complete = send(any_api, {"text.jsonl": TEXT})
    assert any_api.client.post(f"/v1/uploads/{complete}/complete").status_code == 200
    seen: list[str] = []
    params: dict[str, str | int] = {"limit": 2}
    while True:
        page = any_api.client.get("/v1/uploads", params=params).json()
        seen += [item["id"] for item in page["items"]]
        if page["next_cursor"] is None:
            break
        params["after"] = page["next_cursor"]
    assert seen == [complete, *opened[::-1]]
    assert [u["id"] for u in any_api.client.get("/v1/uploads?status=complete").json()["items"]] == [complete]
    assert [u["id"] for u in any_api.client.get("/v1/uploads?status=open").json()["items"]] == opened[::-1]
    assert any_api.stranger.get("/v1/uploads").json()["items"] == []
    problem(any_api.client.get("/v1/uploads?after=x"), 422, "invalid_request")
    problem(any_api.client.get("/v1/uploads?status=half"), 422, "invalid_request")


def test_a_queued_job_says_where_it_stands(any_api: Api) -> None:
    first, second = any_api.submit(), any_api.submit(method="signround")
    told = {job["id"]: job["queue"] for job in any_api.reader.get("/v1/jobs").json()["items"]}
    assert told[first] == {"position": 1, "eta_seconds": None}
    assert (
        told[second] == any_api.reader.get(f"/v1/jobs/{second}").json()["queue"] == {"position": 2, "eta_seconds": None}
    )
    any_api.claim()
    assert any_api.reader.get(f"/v1/jobs/{first}").json()["queue"] is None
    # A place is a second old at the most.
    wait_until(5, lambda: any_api.reader.get(f"/v1/jobs/{second}").json()["queue"]["position"] == 1)


def test_jobs_are_filtered_by_the_recipe_that_was_asked_for(any_api: Api) -> None:
    trained = any_api.submit(method="qlora", finetune={"dataset": "org/text"})
    plain = any_api.submit(method="rtn")

    def found(method: str) -> list[tuple[str, str, str | None]]:
        items = any_api.reader.get("/v1/jobs", params={"method": method}).json()["items"]
        return [(item["id"], item["method"], item["recipe"]) for item in items]

    assert found("qlora") == found("nf") == [(trained, "nf", "qlora")]
    assert found("rtn") == [(plain, "rtn", None)]


@pytest.mark.parametrize(
    ("value", "part"),
    [(None, (0, 10)), ("bytes 0-9/10", (0, 10)), ("bytes 9-9/10", (9, 10)), (" bytes 3-5/10 ", (3, 6))],
)
def test_a_content_range_is_a_part_of_the_file(value: str | None, part: tuple[int, int]) -> None:
    assert parse_content_range(value, 10) == part


@pytest.mark.parametrize(
    "value",
    ["bytes 0-10/10", "bytes 10-10/10", "bytes 5-4/10", "bytes 0-9/9", "bytes 0-9/11", "bytes 0-9", "items 0-9/10"],
)
def test_a_content_range_ends_before_the_file_does(value: str) -> None:
    """The last byte of ten is number 9. It is told before the request reaches the disk."""
    with pytest.raises(InvalidRequest) as caught:
        parse_content_range(value, 10)
    assert (caught.value.field, caught.value.value) == ("Content-Range", value)


def test_a_part_is_on_disk_before_its_offset_is_told(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    upload_id = begin(api, {"text.jsonl": TEXT})
    steps: list[tuple[str, int]] = []
    fsync, advance = os.fsync, Target.advance

    def record_fsync(descriptor: int) -> None:
        steps.append(("fsync", os.fstat(descriptor).st_size))
        fsync(descriptor)

    def record_advance(target: Target, start: int, end: int) -> None:
        steps.append(("advance", end))
        advance(target, start, end)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Target, "advance", record_advance)
    url = f"/v1/uploads/{upload_id}/files/text.jsonl"
    assert api.client.put(url, content=TEXT).status_code == 204
    assert steps == [("fsync", len(TEXT)), ("advance", len(TEXT))]


def test_parts_stay_until_the_upload_is_complete(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that is away at the last step costs nothing but the call again."""
    from app.store.uploads import UploadRepository
    from bitwright.errors import Unavailable

    upload_id = send(api, {"text.jsonl": TEXT})
    with monkeypatch.context() as patched:

        def fail(*_: object) -> None:
            raise Unavailable("the database is not available now; try again")

        patched.setattr(UploadRepository, "complete", fail)
        answer = api.client.post(f"/v1/uploads/{upload_id}/complete")
        problem(answer, 503, "unavailable")
        assert answer.headers["retry-after"] == "5"
    assert PartsFolder(api.settings.upload_dir, upload_id).present(0) == len(TEXT)
    assert api.client.post(f"/v1/uploads/{upload_id}/complete").json()["status"] == "complete"
    assert not (api.settings.upload_dir / upload_id).exists()


def test_a_part_cuts_off_what_does_not_count(tmp_path: Path) -> None:
    parts = PartsFolder(tmp_path, "upl_x")
    with parts.locked():
        with parts.open_at(3, 0) as file:
            file.write(b"0123456789")
        with parts.open_at(3, 4) as file:
            file.write(b"x")
    assert parts.path(3).read_bytes() == b"0123x"
    assert parts.path(3).name == "0003.part"
    assert (parts.present(3), parts.present(0)) == (5, 0)
    assert parts.path(3).stat().st_mode & 0o777 == 0o600


def test_the_hash_is_looked_at_before_the_content(api: Api) -> None:
    """Bytes that were mangled on the way are no text either, and their owner is to hear of the way."""
    upload_id = begin(api, {"text.jsonl": TEXT})
    url = f"/v1/uploads/{upload_id}/files/text.jsonl"
    api.client.put(url, content=b"\x1f\x8b" + TEXT[2:])
    found = problem(api.client.post(f"/v1/uploads/{upload_id}/complete"), 422, "invalid_request")
    assert found["field"] == "files.0.sha256"


def test_after_a_refusal_of_its_content_a_file_can_be_sent_again(api: Api) -> None:
    upload_id = send(api, {"text.jsonl": b"no text\n"})
    url = f"/v1/uploads/{upload_id}/files/text.jsonl"
    for _ in range(2):
        problem(api.client.post(f"/v1/uploads/{upload_id}/complete"), 422, "invalid_dataset")
        assert api.client.head(url).headers["upload-offset"] == "0"
        assert PartsFolder(api.settings.upload_dir, upload_id).present(0) == 0
        assert api.client.put(url, content=b"no text\n").status_code == 204
