# Made from bitwright/asynchronous/admin.py by `make client`: change it there.
"""The operator's part of the client: tenants, their keys, the audit log. Needs a key with the scope `admin`."""

from collections.abc import Generator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from bitwright.blocking.transport import Transport
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


class Admin:
    """The admin routes, one method per endpoint; `Client.admin` is one."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create_tenant(
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
        return self._read(TenantView, "POST", TENANTS, json=asked.model_dump(mode="json"))

    def tenant(self, tenant_id: str) -> TenantView:
        """The tenant as it is now."""
        return self._read(TenantView, "GET", f"{TENANTS}/{tenant_id}")

    def tenants(self) -> Generator[TenantView, None, None]:
        """All tenants, oldest first, page by page."""
        after: str | None = None
        while True:
            page = self._read(Page[TenantView], "GET", TENANTS, params=_given(after=after))
            yield from page.items
            if (after := page.next_cursor) is None:
                return

    def change_tenant(self, tenant_id: str, change: TenantChange) -> TenantView:
        """Set what the change gives; what it leaves out stays."""
        body = change.model_dump(mode="json", exclude_unset=True)
        return self._read(TenantView, "PATCH", f"{TENANTS}/{tenant_id}", json=body)

    def delete_tenant(self, tenant_id: str) -> None:
        """Remove a tenant that has no job and no upload.

        Raises:
            Conflict: it has one.
        """
        self._transport.send("DELETE", f"{TENANTS}/{tenant_id}")

    def set_hub_token(self, tenant_id: str, token: str) -> None:
        """Keep a Hub token of the tenant, encrypted, in place of an earlier one."""
        self._transport.send("PUT", f"{TENANTS}/{tenant_id}/hub-token", json={"token": token})

    def erase_hub_token(self, tenant_id: str) -> None:
        """Forget the tenant's Hub token."""
        self._transport.send("DELETE", f"{TENANTS}/{tenant_id}/hub-token")

    def usage(self, tenant_id: str) -> UsageView:
        """Quotas and use of a tenant."""
        return self._read(UsageView, "GET", f"{TENANTS}/{tenant_id}/usage")

    def create_key(self, tenant_id: str, request: KeyRequest) -> NewKeyView:
        """A new key; its text is in this answer alone."""
        return self._read(NewKeyView, "POST", f"{TENANTS}/{tenant_id}/keys", json=request.model_dump(mode="json"))

    def keys(self, tenant_id: str) -> list[KeyView]:
        """All keys of a tenant, revoked and expired ones too."""
        return self._read(Page[KeyView], "GET", f"{TENANTS}/{tenant_id}/keys").items

    def rotate_key(self, tenant_id: str, key_id: str, *, overlap_seconds: int = 86_400) -> NewKeyView:
        """A new key in place of this one, which stays valid during the overlap.

        Raises:
            Conflict: it is not valid any more, or was rotated before.
        """
        body = RotationRequest(overlap_seconds=overlap_seconds).model_dump(mode="json")
        return self._read(NewKeyView, "POST", f"{TENANTS}/{tenant_id}/keys/{key_id}/rotate", json=body)

    def revoke_key(self, tenant_id: str, key_id: str) -> None:
        """End a key's life."""
        self._transport.send("DELETE", f"{TENANTS}/{tenant_id}/keys/{key_id}")

    def audit(
        self, *, tenant_id: str | None = None, action: str | None = None, subject: str | None = None
    ) -> Generator[AuditView, None, None]:
        """Entries of the audit log that match, newest first, page by page."""
        filters = _given(tenant_id=tenant_id, action=action, subject=subject)
        after: str | None = None
        while True:
            params = {**filters, **_given(after=after)}
            page = self._read(Page[AuditView], "GET", "/v1/admin/audit", params=params)
            yield from page.items
            if (after := page.next_cursor) is None:
                return

    def _read(self, kind: type[ModelT], method: str, path: str, **options: Any) -> ModelT:
        """The answer as a `kind`; options as of `Transport.send`."""
        return kind.model_validate_json(self._transport.send(method, path, **options).content)


def _given(**values: str | None) -> Mapping[str, str]:
    return {name: value for name, value in values.items() if value is not None}
