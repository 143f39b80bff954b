"""The operator's part of the client: tenants, their keys, the audit log. Needs a key with the scope `admin`."""

from collections.abc import AsyncGenerator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from bitwright.asynchronous.transport import AsyncTransport
from bitwright.tenancy import (
    AuditView,
    KeyRequest,
    KeyView,
    NewKeyView,
    Quotas,
    RotationRequest,
    TenantChange,
    TenantRequest,
    TenantView,
    UsageView,
)
from bitwright.views import Page

ModelT = TypeVar("ModelT", bound=BaseModel)
TENANTS = "/v1/admin/tenants"


class AsyncAdmin:
    """The admin routes, one method per endpoint; `AsyncClient.admin` is one."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def create_tenant(
        self,
        name: str,
        *,
        quotas: Quotas | None = None,
        model_roots: list[str] | None = None,
        allowed_models: list[str] | None = None,
    ) -> TenantView:
        """A new tenant, without a key.

        Raises:
            Conflict: there is one of this name.
        """
        asked = TenantRequest(
            name=name, quotas=quotas or Quotas(), model_roots=model_roots, allowed_models=allowed_models
        )
        return await self._read(TenantView, "POST", TENANTS, json=asked.model_dump(mode="json"))

    async def tenant(self, tenant_id: str) -> TenantView:
        """The tenant as it is now."""
        return await self._read(TenantView, "GET", f"{TENANTS}/{tenant_id}")

    async def tenants(self) -> AsyncGenerator[TenantView, None]:
        """All tenants, oldest first, page by page."""
        after: str | None = None
        while True:
            page = await self._read(Page[TenantView], "GET", TENANTS, params=_given(after=after))
            for tenant in page.items:
                yield tenant
            if (after := page.next_cursor) is None:
                return

    async def change_tenant(self, tenant_id: str, change: TenantChange) -> TenantView:
        """Set what the change gives; what it leaves out stays."""
        body = change.model_dump(mode="json", exclude_unset=True)
        return await self._read(TenantView, "PATCH", f"{TENANTS}/{tenant_id}", json=body)

    async def delete_tenant(self, tenant_id: str) -> None:
        """Remove a tenant that has no job and no upload.

        Raises:
            Conflict: it has one.
        """
        await self._transport.send("DELETE", f"{TENANTS}/{tenant_id}")

    async def set_hub_token(self, tenant_id: str, token: str) -> None:
        """Keep a Hub token of the tenant, encrypted, in place of an earlier one."""
        await self._transport.send("PUT", f"{TENANTS}/{tenant_id}/hub-token", json={"token": token})

    async def erase_hub_token(self, tenant_id: str) -> None:
        """Forget the tenant's Hub token."""
        await self._transport.send("DELETE", f"{TENANTS}/{tenant_id}/hub-token")

    async def usage(self, tenant_id: str) -> UsageView:
        """Quotas and use of a tenant."""
        return await self._read(UsageView, "GET", f"{TENANTS}/{tenant_id}/usage")

    async def create_key(self, tenant_id: str, request: KeyRequest) -> NewKeyView:
        """A new key; its text is in this answer alone."""
        return await self._read(NewKeyView, "POST", f"{TENANTS}/{tenant_id}/keys", json=request.model_dump(mode="json"))

    async def keys(self, tenant_id: str) -> list[KeyView]:
        """All keys of a tenant, revoked and expired ones too."""
        return (await self._read(Page[KeyView], "GET", f"{TENANTS}/{tenant_id}/keys")).items

    async def rotate_key(self, tenant_id: str, key_id: str, *, overlap_seconds: int = 86_400) -> NewKeyView:
        """A new key in place of this one, which stays valid during the overlap.

        Raises:
            Conflict: it is not valid any more, or was rotated before.
        """
        body = RotationRequest(overlap_seconds=overlap_seconds).model_dump(mode="json")
        return await self._read(NewKeyView, "POST", f"{TENANTS}/{tenant_id}/keys/{key_id}/rotate", json=body)

    async def revoke_key(self, tenant_id: str, key_id: str) -> None:
        """End a key's life."""
        await self._transport.send("DELETE", f"{TENANTS}/{tenant_id}/keys/{key_id}")

    async def audit(
        self, *, tenant_id: str | None = None, action: str | None = None, subject: str | None = None
    ) -> AsyncGenerator[AuditView, None]:
        """Entries of the audit log that match, newest first, page by page."""
        filters = _given(tenant_id=tenant_id, action=action, subject=subject)
        after: str | None = None
        while True:
            params = {**filters, **_given(after=after)}
            page = await self._read(Page[AuditView], "GET", "/v1/admin/audit", params=params)
            for entry in page.items:
                yield entry
            if (after := page.next_cursor) is None:
                return

    async def _read(self, kind: type[ModelT], method: str, path: str, **options: Any) -> ModelT:
        """The answer as a `kind`; options as of `AsyncTransport.send`."""
        return kind.model_validate_json((await self._transport.send(method, path, **options)).content)


def _given(**values: str | None) -> Mapping[str, str]:
    return {name: value for name, value in values.items() if value is not None}
