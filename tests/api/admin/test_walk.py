"""Every operation of the document, with every kind of key, on ids of other tenants: who may ask, and what shows."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr
from sqlalchemy import update
from starlette.testclient import TestClient

from app.domain.access import Scope
from app.store.models import ApiKey, Tenant
from app.store.tenancy.hub_tokens import Vault
from app.store.tenancy.keys import ensure_tenant, issue_key, revoke_key
from app.store.webhooks.endpoints import WebhookRepository
from bitwright.webhooks.views import WebhookRequest
from tests.api.conftest import SHORTHAND, Api
from tests.api.test_openapi import operations

FILES = [{"name": "t.jsonl", "size": 1, "sha256": "0" * 64}]
BODIES = {
    "create_job": SHORTHAND,
    "export_job": {"formats": ["gguf"]},
    "publish_job": {"hub": "acme/walk"},
    "create_upload": {"files": FILES},
    "create_webhook": {"url": "https://example.org/hooks"},
    "change_webhook": {"description": "x"},
    "rotate_webhook_secret": {},
    "create_fine_tuning_job": {"model": "org/model", "training_file": "upl_" + "0" * 26},
    "create_tenant": {"name": "made-by-the-walk"},
    "change_tenant": {"suspended": True},
    "set_hub_token": {"token": "hf_x"},
    "create_key": {"name": "walk", "scopes": ["admin"]},
    "rotate_key": {"overlap_seconds": 0},
}
PUBLIC = {"livez", "readyz", "metrics"}
SUBMITTERS_READ = {
    *("list_uploads", "get_upload", "head_upload_file"),
    *("list_files", "get_file", "get_file_content"),
}
"""Reads of what only a submitter has."""


def needed(operation_id: str, method: str, path: str) -> Scope:
    """The scope that an operation must ask for: a rule that does not look at the code."""
    if path.startswith("/v1/admin/"):
        return Scope.ADMIN
    reads = method in ("get", "head") and operation_id not in SUBMITTERS_READ
    return Scope.READ if reads else Scope.SUBMIT


@pytest.fixture
def ids(any_api: Api) -> dict[str, str]:
    """Ids of the first tenant, by the parameter of a path."""
    file_id = any_api.send_file()
    asked = {"model": "org/model", "training_file": file_id, "bitwright": {"formats": ["native"], "merge": None}}
    job_id = any_api.client.post("/v1/fine_tuning/jobs", json=asked).json()["id"]
    any_api.succeed(any_api.claim(), {"native": {"bitwright.json": b"{}", "secret.bin": b"theirs", "folder/x": b""}})
    artifacts = any_api.client.get(f"/v1/jobs/{job_id}/artifacts").json()["items"]
    upload = any_api.client.post("/v1/uploads", json={"files": FILES}).json()["id"]
    (key, *_) = any_api.admin.get(f"/v1/admin/tenants/{any_api.tenant_id}/keys").json()["items"]
    return {
        "job_id": job_id,
        "artifact_id": artifacts[0]["id"],
        "upload_id": upload,
        "file_id": file_id,
        **hook(any_api),
        "name": "t.jsonl",
        "namespace": "jobs",
        "repository": job_id,
        "revision": "native",
        "path": "secret.bin",
        "folder": "folder",
        "tenant_id": any_api.tenant_id,
        "key_id": key["id"],
    }


def hook(api: Api) -> dict[str, str]:
    """A webhook of the first tenant, and a delivery to it, by the parameter of a path."""
    keys = Vault((SecretStr(Fernet.generate_key().decode()),))
    asked = WebhookRequest(url="https://example.org/hooks", description="theirs")
    with api.database.transaction() as session:
        repository = WebhookRepository(session, api.tenant_id)
        webhook, _ = repository.add(asked, keys)
        return {"webhook_id": webhook.id, "delivery_id": repository.test(webhook.id).id}


def calls(api: Api, ids: dict[str, str]) -> Iterator[tuple[str, str, str, str]]:
    """(operation id, method, path with the first tenant's ids, template) of everything that needs a key."""
    for path, method, operation in operations(api.anonymous.get("/openapi.json").json()):
        if operation["operationId"] not in PUBLIC:
            yield operation["operationId"], method, path.format(**ids), path


def ask(client: TestClient, operation_id: str, method: str, url: str) -> tuple[int, str]:
    answer = client.request(method.upper(), url, json=BODIES.get(operation_id))
    return answer.status_code, answer.text


def bad_keys(api: Api) -> dict[str, str]:
    """Keys that open nothing, by what is wrong with them."""
    everything = frozenset(Scope)
    with api.database.transaction() as session:
        revoked, revoked_text = issue_key(session, api.tenant_id, name="revoked", scopes=everything)
        revoke_key(session, api.tenant_id, revoked.id)
        expired, expired_text = issue_key(session, api.tenant_id, name="expired", scopes=everything)
        past = datetime.now(UTC) - timedelta(hours=1)
        session.execute(update(ApiKey).where(ApiKey.id == expired.id).values(expires_at=past))
        suspended = ensure_tenant(session, "suspended")
        _, suspended_text = issue_key(session, suspended.id, name="suspended", scopes=everything)
        session.execute(update(Tenant).where(Tenant.id == suspended.id).values(suspended_at=past))
    return {"malformed": "bw_x", "revoked": revoked_text, "expired": expired_text, "suspended": suspended_text}


def with_key(api: Api, key: str) -> TestClient:
    return TestClient(api.client.app, headers={"Authorization": f"Bearer {key}"}, raise_server_exceptions=False)


def test_no_key_and_no_bad_key_opens_anything(any_api: Api, ids: dict[str, str]) -> None:
    clients = {"none": any_api.anonymous, **{name: with_key(any_api, key) for name, key in bad_keys(any_api).items()}}
    for operation_id, method, url, template in calls(any_api, ids):
        for name, client in clients.items():
            status, body = ask(client, operation_id, method, url)
            assert status == 401, f"{method} {template} with {name}: {body}"


def test_each_operation_asks_for_its_scope(any_api: Api, ids: dict[str, str]) -> None:
    for operation_id, method, url, template in calls(any_api, ids):
        scope = needed(operation_id, method, template)
        if scope is not Scope.READ:
            assert ask(any_api.reader, operation_id, method, url)[0] == 403, f"{method} {template}"
        if scope is Scope.ADMIN:
            assert ask(any_api.client, operation_id, method, url)[0] == 403, f"{method} {template}"
        else:
            # What follows is refused for another reason, or done.
            read = scope is Scope.READ
            assert ask(any_api.reader if read else any_api.stranger, operation_id, method, url)[0] not in (401, 403)


def test_other_tenants_ids_do_not_exist_and_show_nowhere(any_api: Api, ids: dict[str, str]) -> None:
    """A stranger's key and an operator's, which is of another tenant, too: it sees tenants and keys, but no job."""
    for client in (any_api.stranger, any_api.admin):
        for operation_id, method, url, template in calls(any_api, ids):
            if template.startswith("/v1/admin/"):
                continue
            status, body = ask(client, operation_id, method, url)
            if "{" in template:
                assert status == 404, f"{method} {template}: {status} {body}"
            shown = {name for name, value in ids.items() if name[-3:] == "_id" and value not in url and value in body}
            assert not shown, f"{method} {template} shows {shown}"
            assert "theirs" not in body
    kept = any_api.client.get(f"/v1/jobs/{ids['job_id']}/artifacts").json()["items"]
    assert len(kept) == 3, "nothing of it was changed"
    assert any_api.client.get(f"/v1/uploads/{ids['upload_id']}").json()["status"] == "open"
    assert any_api.client.get(f"/v1/files/{ids['file_id']}").status_code == 200


def test_a_key_of_one_tenant_is_not_anothers(any_api: Api, ids: dict[str, str]) -> None:
    """An operator who names a key under the wrong tenant does not touch it."""
    wrong = f"/v1/admin/tenants/{any_api.stranger_id}/keys/{ids['key_id']}"
    assert any_api.admin.delete(wrong).status_code == 404
    assert any_api.admin.post(f"{wrong}/rotate", json={"overlap_seconds": 0}).status_code == 404
    assert any_api.client.get("/v1/jobs").status_code == 200


def test_the_walk_knows_every_parameter(any_api: Api, ids: dict[str, str]) -> None:
    templates = {template for *_, template in calls(any_api, ids)}
    assert len(templates) >= 34
    assert {"/hub/{namespace}/{repository}/resolve/{revision}/{path}", "/hub/api/whoami-v2"} <= templates
    assert {"/v1/admin/audit", "/v1/usage", "/v1/admin/tenants/{tenant_id}/keys/{key_id}/rotate"} <= templates
