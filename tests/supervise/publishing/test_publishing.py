"""Results sent to a Hub on loopback by the real client in its child: made, refused, limited, interrupted, resumed."""

import os
import signal
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import func, select, update

from app.store.clock import seconds_from_now
from app.store.models import HubToken, Publication
from app.store.tenancy.hub_tokens import Vault, keep_token, remove_old_tokens
from bitwright.errors import Conflict, InvalidRequest, NotFound
from bitwright.job_states import JobStatus, PublicationStatus
from bitwright.views import PublicationView
from tests.bitwright.service import Service, running_service
from tests.cli.processes import command
from tests.supervise.bench import make_context
from tests.supervise.publishing.fake_hub import FakeHub, Repository, running
from workers.supervise.publish.publisher import Publisher

TOKEN = "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00"
BODY = {"model": "org/model", "method": "rtn", "bits": 4}
SHARDS = {f"model-0000{n}-of-00002.safetensors": bytes([n]) * 100_000 for n in (1, 2)}
FILES = {"config.json": b"{}", "README.md": b"---\nlicense: mit\n---\n# card\n", "report.json": b"{}", **SHARDS}
HUB = "acme/tiny-w4"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    folder = tmp_path / "service"
    folder.mkdir()
    with running_service(folder) as running_one:
        yield running_one


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with running(TOKEN) as there:
        yield there


@pytest.fixture
def publisher(service: Service, hub: FakeHub) -> Publisher:
    return make_publisher(service, hub)


def make_publisher(service: Service, hub: FakeHub) -> Publisher:
    """A worker's publisher, whose child goes to this Hub."""
    settings = service.settings.model_copy(update={"hub_endpoint": hub.url, "lease_seconds": 6})
    context = make_context(service.folder, service.database)
    return Publisher(replace(context, settings=settings, blobs=service.blobs))


@pytest.fixture
def job(service: Service) -> str:
    return service.finished(BODY, {"compressed-tensors": FILES, "native": {"bitwright.json": b"{}"}})


def ask(service: Service, job: str, *, token: str | None = TOKEN, force: bool = False) -> PublicationView:
    with service.client() as client:
        return client.publish(job, HUB, hub_token=token, force=force)


def told(service: Service, job: str) -> PublicationView:
    with service.client() as client:
        assert client.job(job).status is JobStatus.SUCCEEDED, "whatever becomes of the publication"
        return client.publication(job)


def waits_no_more(service: Service) -> None:
    with service.database.transaction() as session:
        session.execute(update(Publication).values(available_at=Publication.created_at))


def kept_tokens(service: Service) -> int:
    with service.database.reading() as session:
        return session.scalar(select(func.count()).select_from(HubToken)) or 0


def found_in_clear(folder: Path) -> list[Path]:
    """Files of the service, its database and logs among them, that hold the token."""
    return [p for p in folder.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]


def test_a_result_is_published_and_the_token_is_found_nowhere(
    service: Service, hub: FakeHub, publisher: Publisher, job: str, capfd: pytest.CaptureFixture[str]
) -> None:
    while_it_runs: list[Path] = []
    logs: list[Path] = []

    def look(step: str, _oid: str) -> None:
        if step == "commit":
            while_it_runs.extend(found_in_clear(service.folder))
            logs.extend(service.folder.rglob("publish.log"))

    hub.during = look
    assert ask(service, job).status is PublicationStatus.QUEUED
    with pytest.raises(Conflict):
        ask(service, job)
    assert publisher.once()
    assert not publisher.once()
    done = told(service, job)
    repository = hub.repositories[HUB]
    assert (done.status, done.commit, done.error) == (PublicationStatus.DONE, repository.commits[0][0], None)
    assert done.url == f"{hub.url}/{HUB}/commit/{done.commit}"
    assert repository.private
    assert {path: content for path, content in repository.files.items() if path != ".gitattributes"} == FILES
    assert repository.commits[0][1] == f"Bitwright: {job}"
    assert kept_tokens(service) == 0
    output = capfd.readouterr()
    assert "published" in output.out + output.err
    assert TOKEN not in output.out + output.err
    assert len(logs) == 1
    assert while_it_runs == found_in_clear(service.folder) == []
    dump = "\n".join(sqlite3.connect(service.folder / "bitwright.db").iterdump())
    assert job in dump
    assert TOKEN not in dump
    assert not list(service.folder.glob("publish/*")), "nothing is left of its files"


@pytest.mark.slow
def test_an_interrupted_publication_sends_the_rest_alone(
    service: Service, hub: FakeHub, publisher: Publisher, job: str
) -> None:
    ask(service, job)
    stopped = threading.Event()

    def interrupt(step: str, _oid: str) -> None:
        if step == "put" and hub.objects and not stopped.is_set():
            stopped.set()
            threading.Thread(target=publisher.stop).start()
            threading.Event().wait(1.0)  # so long the child waits for its answer, and is ended meanwhile
            raise ConnectionError

    hub.during = interrupt
    hub_one_at_a_time(hub)
    publisher.once()
    assert stopped.is_set()
    assert told(service, job).status is PublicationStatus.QUEUED
    assert kept_tokens(service) == 1
    first = set(hub.objects)
    assert make_publisher(service, hub).once()
    done = told(service, job)
    assert done.status is PublicationStatus.DONE, done.error
    assert done.attempts == 2
    assert all(hub.asked[oid] == 1 for oid in first), "what the Hub has is not sent again"
    assert set(hub.repositories[HUB].files) == {*FILES, ".gitattributes"}


def hub_one_at_a_time(hub: FakeHub) -> None:
    """Let the files come one after the other: the second one waits for the first."""
    lock, during = threading.Lock(), hub.during

    def alone(step: str, oid: str) -> None:
        if step != "put":
            during(step, oid)
            return
        with lock:
            first = hub.asked["put"] == 1
        if not first:
            for _ in range(200):
                if hub.objects:
                    break
                threading.Event().wait(0.02)
        during(step, oid)

    hub.during = alone


@pytest.mark.slow
def test_a_child_that_is_killed_is_followed_by_another(
    service: Service, hub: FakeHub, publisher: Publisher, job: str
) -> None:
    ask(service, job)
    killed: list[int] = []

    def kill(step: str, _oid: str) -> None:
        if step == "preupload" and not killed:
            (pid,) = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdecimal() and is_child(p)]
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)

    hub.during = kill
    publisher.once()
    assert killed
    again = told(service, job)
    assert again.status is PublicationStatus.QUEUED
    assert again.error is not None
    assert again.error.code == "attempt_killed"
    waits_no_more(service)
    assert publisher.once()
    assert told(service, job).status is PublicationStatus.DONE


def is_child(process: Path) -> bool:
    """True for the child that publishes, not for its guard."""
    try:
        command = (process / "cmdline").read_bytes()
        parent = (process / "stat").read_text().rsplit(")", 1)[1].split()[1]
    except OSError:
        return False
    return b"workers.child.publish" in command and parent == str(os.getpid())


@pytest.mark.slow
def test_a_hub_that_limits_is_asked_again_later(service: Service, hub: FakeHub, publisher: Publisher, job: str) -> None:
    ask(service, job)
    hub.faults["info"] = [(429, {"Retry-After": "1800"})]
    publisher.once()
    limited = told(service, job)
    assert limited.status is PublicationStatus.QUEUED
    assert limited.error is not None
    assert limited.error.code == "hub_rate_limited"
    with service.database.reading() as session:
        row = session.scalars(select(Publication)).one()
        assert (row.available_at - row.updated_at).total_seconds() == pytest.approx(1800, abs=1)
    assert not publisher.once(), "not before that time"
    waits_no_more(service)
    publisher.once()
    assert told(service, job).status is PublicationStatus.DONE


@pytest.mark.slow
@pytest.mark.parametrize(("step", "status"), [("info", 401), ("create", 403), ("preupload", 403)])
def test_a_token_that_may_not_write_fails_at_once(
    service: Service, hub: FakeHub, publisher: Publisher, job: str, step: str, status: int
) -> None:
    ask(service, job)
    hub.faults[step] = [(status, {})] * 9
    publisher.once()
    refused = told(service, job)
    assert refused.status is PublicationStatus.FAILED
    assert refused.error is not None
    assert refused.error.code == "source_forbidden"
    assert str(status) in refused.error.detail
    assert kept_tokens(service) == 0
    hub.faults.clear()
    assert ask(service, job).status is PublicationStatus.QUEUED, "with a token it can be asked for again"


@pytest.mark.slow
def test_a_repository_that_others_write_to_is_refused_unless_forced(
    service: Service, hub: FakeHub, publisher: Publisher, job: str
) -> None:
    theirs = hub.repositories[HUB] = Repository(private=True)
    theirs.files["notes.md"] = b"by hand"
    theirs.commit("Bitwright: some earlier job")
    theirs.commit("Update notes.md")
    before = dict(theirs.files)
    ask(service, job)
    publisher.once()
    refused = told(service, job)
    assert refused.status is PublicationStatus.FAILED
    assert refused.error is not None
    assert refused.error.code == "conflict"
    assert "Update notes.md" in refused.error.detail
    assert "force" in str(refused.error.hint)
    assert theirs.files == before
    ask(service, job, force=True)
    publisher.once()
    assert told(service, job).status is PublicationStatus.DONE
    assert theirs.files["notes.md"] == b"by hand", "force adds a commit, and takes nothing away"
    other = service.finished(BODY, {"compressed-tensors": {"config.json": b"{}", "model.safetensors": b"new"}})
    ask(service, other)
    publisher.once()
    assert set(theirs.files) == {".gitattributes", "config.json", "model.safetensors"}, "on top of our own commit"


@pytest.mark.slow
def test_a_commit_between_the_look_and_ours_is_not_lost(
    service: Service, hub: FakeHub, publisher: Publisher, job: str
) -> None:
    ask(service, job)

    def commit_first(step: str, _oid: str) -> None:
        if step == "commit" and len(hub.repositories[HUB].commits) == 1:
            hub.repositories[HUB].files["theirs.md"] = b"x"
            hub.repositories[HUB].commit("Add theirs.md")

    hub.during = commit_first
    publisher.once()
    again = told(service, job)
    assert again.status is PublicationStatus.QUEUED
    assert "theirs.md" in hub.repositories[HUB].files
    assert "config.json" not in hub.repositories[HUB].files
    waits_no_more(service)
    publisher.once()
    assert told(service, job).status is PublicationStatus.FAILED, "now the last commit is somebody else's"


@pytest.mark.slow
def test_the_command_waits_and_its_exit_code_tells(
    service: Service, hub: FakeHub, publisher: Publisher, job: str, tmp_path: Path
) -> None:
    token = tmp_path / "token.txt"
    token.write_text(f"{TOKEN}\n")
    flags = ("--hub-token-file", str(token), "--wait", "--url", service.url, "--key", service.key)
    publisher.start()
    try:
        done = command("publish", job, HUB, *flags)
        assert done.returncode == 0, done.stderr
        assert f"{hub.url}/{HUB}/commit/{hub.repositories[HUB].commits[0][0]}" in done.stdout
        hub.repositories[HUB].commit("Update README.md")
        refused = command("publish", job, HUB, *flags)
    finally:
        publisher.stop()
    assert refused.returncode == 1
    assert "is not of Bitwright" in refused.stderr
    assert TOKEN not in done.stdout + done.stderr + refused.stdout + refused.stderr


def test_a_request_may_ask_to_be_published(service: Service) -> None:
    """Its token outlives the job's end until the publication has ended."""
    body = {**BODY, "publish": {"hub": HUB, "private": False}}
    with service.client() as client, pytest.raises(InvalidRequest) as refused:
        client.submit(body)
    assert "no Hub token" in str(refused.value)
    with service.client() as client:
        job = client.submit(body, hub_token=TOKEN).id
    with pytest.raises(NotFound):
        told_before(service, job)
    service.succeed_with(service.claim(), {"compressed-tensors": FILES})
    queued = told(service, job)
    assert (queued.status, queued.hub, queued.private) == (PublicationStatus.QUEUED, HUB, False)
    assert kept_tokens(service) == 1
    with service.client() as client:
        client.delete(job)
    assert kept_tokens(service) == 0
    assert found_in_clear(service.folder) == []


def test_a_jobs_token_is_forgotten_after_a_month_whatever_became_of_the_job(service: Service) -> None:
    with service.client() as client:
        client.submit(BODY, hub_token=TOKEN)
    with service.database.transaction() as session:
        tenant = session.scalars(select(HubToken.tenant_id)).one()
        keep_token(session, Vault(service.settings.token_keys), TOKEN, tenant_id=tenant)
        assert remove_old_tokens(session) == 0
        session.execute(update(HubToken).values(created_at=seconds_from_now(-30 * 86_400.0)))
        assert remove_old_tokens(session) == 1
    assert kept_tokens(service) == 1, "the tenant's own stays"


def test_what_the_job_will_not_keep_is_refused_at_once(service: Service) -> None:
    with service.client() as client, pytest.raises(InvalidRequest) as refused:
        client.submit({**BODY, "publish": {"hub": HUB, "format": "gguf"}}, hub_token=TOKEN)
    assert [problem.field for problem in refused.value.errors] == ["publish.format"]


def told_before(service: Service, job: str) -> PublicationView:
    with service.client() as client:
        return client.publication(job)


def test_what_cannot_be_published(service: Service, job: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        ask(service, job, token=None)
    assert refused.value.field == "header.X-Hub-Token"
    with service.client() as client:
        queued = client.submit(BODY).id
        with pytest.raises(Conflict):
            client.publish(queued, HUB, hub_token=TOKEN)
        with pytest.raises(InvalidRequest):
            client.publish(job, HUB, format="gguf", hub_token=TOKEN)
        for name in ("no-namespace", "a/b/c", "a/b--c", "a/b.git", "../x"):
            with pytest.raises(InvalidRequest):
                client.publish(job, name, hub_token=TOKEN)
