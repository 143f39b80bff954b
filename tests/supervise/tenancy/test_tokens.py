"""Hub tokens of jobs and tenants: which one fetches, who reads what it brought, and that it is written nowhere."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr
from sqlalchemy import select

from app.store.models import HubToken
from app.store.tenancy.hub_tokens import Vault, keep_token
from app.store.tenancy.keys import ensure_tenant
from bitwright.errors import SourceForbidden
from bitwright.job_states import JobStatus
from tests.api.checkpoints import CONFIG, SHAPES, safetensors
from tests.child.hub_server import COMMIT, Hub, running_hub
from tests.supervise.bench import Bench
from workers.supervise.tenancy import own_token

MODEL = "org/gated"
FILES = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": safetensors(SHAPES), "tokenizer.json": b"{}"}
SERVICE, TENANT, JOB = ("hf_" + letter * 34 for letter in "STJ")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        hub.repositories[f"models/{MODEL}"] = FILES
        yield hub


@pytest.fixture
def online(sqlite_bench: Bench, hub: Hub) -> Bench:
    """A worker that may use this Hub, with the service's token and a key for others'."""
    changed = {
        "hub_enabled": True,
        "hub_endpoint": hub.url,
        "hub_token": SecretStr(SERVICE),
        "token_keys": (SecretStr(Fernet.generate_key().decode()),),
    }
    settings = sqlite_bench.context.settings.model_copy(update=changed)
    return replace(sqlite_bench, context=replace(sqlite_bench.context, settings=settings))


def keep(bench: Bench, token: str, job_id: str | None = None) -> None:
    with bench.context.database.transaction() as session:
        vault = Vault(bench.context.settings.token_keys)
        keep_token(session, vault, token, tenant_id=bench.tenant_id, job_id=job_id)


def files_under(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def test_the_nearest_token_fetches_and_others_do_not_read_what_it_brought(
    online: Bench, hub: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    """The Hub tells anybody about a gated repository, and its files only to those who may have them: the copy on the
    worker's disk must not be for everybody.
    """
    script = "environment,file:model.safetensors:weights"
    own = online.submit(script, model=MODEL, group_size=16)
    keep(online, JOB, own)
    keep(online, TENANT)
    assert online.run() is JobStatus.SUCCEEDED
    assert hub.tokens == {f"Bearer {JOB}"}
    hub.tokens.clear()
    for_tenant = online.submit(script, model=MODEL, group_size=16)
    assert online.run() is JobStatus.SUCCEEDED
    assert hub.tokens == {f"Bearer {TENANT}"}
    hub.tokens.clear()
    read_before = hub.bytes_of("model.safetensors")
    with online.context.database.transaction() as session:
        stranger = replace(online, tenant_id=ensure_tenant(session, "stranger").id)
    theirs = stranger.submit(script, model=MODEL, group_size=16)
    assert stranger.run() is JobStatus.SUCCEEDED
    assert hub.tokens == {f"Bearer {SERVICE}"}
    assert hub.bytes_of("model.safetensors") > read_before, "fetched anew, with a token of its own"
    folders = {path.name for path in online.context.settings.hub_dir.iterdir()}
    assert folders == {f"org--gated@{COMMIT}", f"org--gated@{COMMIT}+{online.tenant_id}"}
    with online.context.database.reading() as session:
        assert set(session.scalars(select(HubToken.owner))) == {online.tenant_id}, "the job's own is erased"
    told = [event.fields for event in online.events(own) if event.type == "log" and event.event == "environment"]
    assert "HF_TOKEN" not in str(told)
    assert "TOKEN_KEYS" not in str(told)
    written = "".join(capfd.readouterr()).encode()
    everything = [written, *(path.read_bytes() for path in files_under(online.context.settings.data_dir))]
    for secret in (SERVICE, TENANT, JOB, *(k.get_secret_value() for k in online.context.settings.token_keys)):
        assert not any(secret.encode() in content for content in everything)
    assert all(online.artifacts(job) for job in (own, for_tenant))
    assert stranger.artifacts(theirs)


def test_a_hub_that_refuses_is_told_without_the_token(online: Bench, hub: Hub) -> None:
    hub.gated.add(f"models/{MODEL}")
    job_id = online.submit("", model=MODEL, group_size=16)
    keep(online, JOB, job_id)
    assert online.run() is JobStatus.FAILED
    error = online.job(job_id).error
    assert error is not None
    assert error["code"] == "source_gated"
    said = json.dumps([error, [event.model_dump(mode="json") for event in online.events(job_id)]])
    assert JOB not in said
    with online.context.database.reading() as session:
        assert list(session.scalars(select(HubToken.owner))) == []


def test_a_worker_without_the_key_waits_for_one_that_has_it(online: Bench) -> None:
    job_id = online.submit("", model=MODEL, group_size=16)
    keep(online, JOB, job_id)
    settings = online.context.settings.model_copy(update={"token_keys": ()})
    blind = replace(online, context=replace(online.context, settings=settings))
    assert blind.run() is JobStatus.QUEUED
    assert (blind.attempts(job_id)[0].error or {})["code"] == "storage_error"
    held = online.claim()
    token = own_token(online.context, held)
    assert token is not None
    assert token.text == JOB
    assert JOB not in repr(token)


def test_a_tenants_folders_are_checked_where_the_job_runs(sqlite_bench: Bench) -> None:
    from app.store.tenancy.tenants import change_tenant
    from bitwright.tenancy import TenantChange

    job_id = sqlite_bench.submit("")
    with sqlite_bench.context.database.transaction() as session:
        change_tenant(session, sqlite_bench.tenant_id, TenantChange(model_roots=[]))
    assert sqlite_bench.run() is JobStatus.FAILED
    assert (sqlite_bench.job(job_id).error or {})["code"] == SourceForbidden.code
