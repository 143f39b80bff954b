"""The operator's part of the client, and what a quota means to one, over both clients and a real service."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import select

from app.store.models import HubToken
from bitwright.asynchronous.client import AsyncClient
from bitwright.blocking.client import Client
from bitwright.errors import Conflict, MissingScope, NotFound, QueuedJobsExceeded, Unauthenticated
from bitwright.tenancy import KeyRequest, Quotas, TenantChange
from tests.bitwright.driven import Driven
from tests.bitwright.service import Service

BOTH_CLIENTS = True
BODY = {"model": "org/name", "method": "rtn"}


def opened(service: Service, key: str) -> Any:
    url = f"http://127.0.0.1:{service.port}"
    return Driven(AsyncClient(url, key)) if service.asynchronous else Client(url, key)


@pytest.fixture
def client(service: Service) -> Iterator[Any]:
    with opened(service, service.key) as client:
        yield client


def test_a_tenant_its_keys_and_what_the_log_tells(client: Any, service: Service) -> None:
    admin = client.admin
    name = f"acme-{time.time_ns()}"
    tenant = admin.create_tenant(name, quotas=Quotas(queued_jobs=1), allowed_models=["org/*"])
    with pytest.raises(Conflict):
        admin.create_tenant(name)
    assert admin.tenant(tenant.id) == tenant
    assert tenant.id in [each.id for each in admin.tenants()]
    key = admin.create_key(tenant.id, KeyRequest(name="ci"))
    with opened(service, key.key) as theirs:
        with pytest.raises(MissingScope):
            list(theirs.admin.tenants())
        job = theirs.submit(BODY, hub_token="hf_x")
        began = time.monotonic()
        with pytest.raises(QueuedJobsExceeded):
            theirs.submit(BODY)
        assert time.monotonic() - began < 3, "waiting for seconds would not help, and is not tried"
        with service.database.reading() as session:
            assert session.scalars(select(HubToken.owner)).all() == [job.id]
        usage = theirs.usage()
        assert (usage.tenant, usage.quotas.queued_jobs, usage.used.queued_jobs) == (name, 1, 1)
        rotated = admin.rotate_key(tenant.id, key.id, overlap_seconds=0)
        with pytest.raises(Unauthenticated):
            theirs.usage()
    with opened(service, rotated.key) as theirs:
        theirs.cancel(job.id)
        admin.change_tenant(tenant.id, TenantChange(quotas=Quotas(queued_jobs=0)))
        with pytest.raises(QueuedJobsExceeded):
            theirs.retry(job.id, hub_token="hf_y")
        theirs.delete(job.id)
    assert [each.replaces for each in admin.keys(tenant.id)] == [None, key.id]
    admin.revoke_key(tenant.id, rotated.id)
    admin.set_hub_token(tenant.id, "hf_z")
    assert admin.tenant(tenant.id).has_hub_token
    admin.erase_hub_token(tenant.id)
    assert admin.usage(tenant.id).months[0].jobs == 1
    told = [entry.action for entry in admin.audit(tenant_id=tenant.id)]
    assert told == ["job.deleted", "job.cancelled", "job.submitted"]
    assert [entry.subject for entry in admin.audit(action="key.revoked", subject=rotated.id)] == [rotated.id]
    admin.delete_tenant(tenant.id)
    with pytest.raises(NotFound):
        admin.tenant(tenant.id)
