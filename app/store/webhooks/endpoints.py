"""A tenant's webhook endpoints, and the log of what went to them."""

import base64
import secrets
from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.store.clock import now, seconds_from_now
from app.store.ids import is_id, new_id, require_id
from app.store.jobs import Page
from app.store.models import Tenant
from app.store.tenancy.hub_tokens import Vault
from app.store.webhooks.outbox import tell_test
from app.store.webhooks.tables import WebhookAttempt, WebhookDelivery, WebhookEndpoint
from bitwright.errors import Conflict, InvalidRequest, NotFound
from bitwright.webhooks.views import WebhookChange, WebhookRequest

MOST_ENDPOINTS = 16
"""Of a tenant."""
SECRET_BYTES = 32
SECRET_FIELD = "secret"  # noqa: S105 (a name)


def new_secret() -> str:
    """A secret as Standard Webhooks writes one."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


class WebhookRepository:
    """The endpoints of one tenant and their deliveries."""

    def __init__(self, session: Session, tenant_id: str) -> None:
        self._session = session
        self._tenant_id = tenant_id

    def add(self, asked: WebhookRequest, vault: Vault) -> tuple[WebhookEndpoint, str]:
        """A new endpoint, and its secret, which is not told again.

        Raises:
            Conflict: the tenant has as many as it may.
            InvalidRequest: the service has no key to keep the secret with.
        """
        self._session.execute(select(Tenant.id).where(Tenant.id == self._tenant_id).with_for_update(key_share=True))
        ours = WebhookEndpoint.tenant_id == self._tenant_id
        count = self._session.scalar(select(func.count()).select_from(WebhookEndpoint).where(ours)) or 0
        if count >= MOST_ENDPOINTS:
            detail = f"a tenant has up to {MOST_ENDPOINTS} webhooks, and this one has as many"
            raise Conflict(detail, value=count, hint="delete one that is no longer needed")
        secret = new_secret()
        endpoint = WebhookEndpoint(
            id=new_id("whe"),
            tenant_id=self._tenant_id,
            url=asked.url,
            events=list(asked.events),
            description=asked.description,
            sealed=vault.seal(secret, field=SECRET_FIELD),
        )
        self._session.add(endpoint)
        self._session.flush()
        return endpoint, secret

    def all(self) -> Sequence[WebhookEndpoint]:
        """All endpoints, oldest first."""
        ours = WebhookEndpoint.tenant_id == self._tenant_id
        return self._session.scalars(select(WebhookEndpoint).where(ours).order_by(WebhookEndpoint.id)).all()

    def get(self, endpoint_id: str, *, lock: bool = False) -> WebhookEndpoint:
        """The endpoint.

        Raises:
            NotFound: the tenant has no such one.
        """
        require_id("whe", endpoint_id, "webhook")
        ours = (WebhookEndpoint.id == endpoint_id, WebhookEndpoint.tenant_id == self._tenant_id)
        query = select(WebhookEndpoint).where(*ours)
        found = self._session.scalars(query.with_for_update() if lock else query).one_or_none()
        if found is None:
            raise NotFound(f"there is no webhook {endpoint_id}", value=endpoint_id)
        return found

    def change(self, endpoint_id: str, asked: WebhookChange) -> WebhookEndpoint:
        """Give the endpoint what is named of its fields.

        Raises:
            NotFound: see `get`.
        """
        endpoint = self.get(endpoint_id, lock=True)
        for name in ("url", "events", "description"):
            value = getattr(asked, name)
            if value is not None:
                setattr(endpoint, name, value)
        if asked.enabled is not None and asked.enabled != (endpoint.disabled_at is None):
            endpoint.disabled_at = None if asked.enabled else self._session.scalars(select(now())).one()
            endpoint.disabled_why = None if asked.enabled else "owner"
        self._session.flush()
        return endpoint

    def rotate(self, endpoint_id: str, vault: Vault, *, overlap_seconds: int) -> tuple[WebhookEndpoint, str]:
        """A new secret; messages are signed with the old one too until the overlap ends.

        Raises:
            NotFound: see `get`.
        """
        endpoint, secret = self.get(endpoint_id, lock=True), new_secret()
        endpoint.sealed_before, endpoint.sealed = endpoint.sealed, vault.seal(secret, field=SECRET_FIELD)
        endpoint.before_until = self._session.scalars(select(seconds_from_now(overlap_seconds))).one()
        self._session.flush()
        return endpoint, secret

    def remove(self, endpoint_id: str) -> None:
        """Remove the endpoint with its log.

        Raises:
            NotFound: see `get`.
        """
        self._session.delete(self.get(endpoint_id, lock=True))
        self._session.flush()

    def test(self, endpoint_id: str) -> WebhookDelivery:
        """Put down a message that tells nothing.

        Raises:
            NotFound: see `get`.
            Conflict: the endpoint is off.
        """
        endpoint = self.get(endpoint_id, lock=True)
        _demand_on(endpoint)
        return tell_test(self._session, endpoint)

    def deliveries(
        self, endpoint_id: str, *, after: str | None, limit: int, status: str | None = None
    ) -> Page[WebhookDelivery]:
        """Up to `limit` deliveries, newest first, of this status; `after` is a page's `next_cursor`.

        Raises:
            NotFound: see `get`.
            InvalidRequest: `after` is no cursor.
        """
        self.get(endpoint_id)
        if after is not None and not is_id("whd", after):
            hint = "start without one"
            raise InvalidRequest("the cursor is not one that a page gave", field="after", value=after, hint=hint)
        query = select(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id)
        query = query if after is None else query.where(WebhookDelivery.id < after)
        query = query if status is None else query.where(WebhookDelivery.status == status)
        rows = self._session.scalars(query.order_by(WebhookDelivery.id.desc()).limit(limit + 1)).all()
        items = rows[:limit]
        return Page(items=items, next_cursor=items[-1].id if len(rows) > limit else None)

    def delivery(self, endpoint_id: str, delivery_id: str, *, lock: bool = False) -> WebhookDelivery:
        """One delivery.

        Raises:
            NotFound: the endpoint has no such one.
        """
        self.get(endpoint_id)
        require_id("whd", delivery_id, "delivery")
        this = (WebhookDelivery.id == delivery_id, WebhookDelivery.endpoint_id == endpoint_id)
        query = select(WebhookDelivery).where(*this)
        found = self._session.scalars(query.with_for_update() if lock else query).one_or_none()
        if found is None:
            raise NotFound(f"webhook {endpoint_id} has no delivery {delivery_id}", value=delivery_id)
        return found

    def tries(self, delivery: WebhookDelivery) -> Sequence[WebhookAttempt]:
        """Tries of a delivery, first to last."""
        query = select(WebhookAttempt).where(WebhookAttempt.delivery_id == delivery.id)
        return self._session.scalars(query.order_by(WebhookAttempt.number)).all()

    def replay(self, endpoint_id: str, delivery_id: str) -> WebhookDelivery:
        """Send a message again, under the same message id, with the whole schedule before it.

        Raises:
            NotFound: see `delivery`.
            Conflict: it is still on its way, or the endpoint is off.
        """
        _demand_on(self.get(endpoint_id, lock=True))
        delivery = self.delivery(endpoint_id, delivery_id, lock=True)
        if delivery.status == "pending":
            detail = f"delivery {delivery_id} is still on its way"
            raise Conflict(detail, value=delivery.status, hint="wait for its next try")
        delivery.status, delivery.tries, delivery.ended_at = "pending", 0, None
        delivery.due_at = self._session.scalars(select(now())).one()
        self._session.flush()
        return delivery


def renew_secrets(session: Session, vault: Vault) -> int:
    """Encrypt every secret with the first key, so that the others can go; how many endpoints there are.

    Raises:
        StorageError: see `Vault.open`.
    """
    rows = session.scalars(select(WebhookEndpoint).with_for_update()).all()
    for row in rows:
        row.sealed = vault.renewed(row.sealed)
        row.sealed_before = None if row.sealed_before is None else vault.renewed(row.sealed_before)
    session.flush()
    return len(rows)


def _demand_on(endpoint: WebhookEndpoint) -> None:
    if endpoint.disabled_at is not None:
        detail = f"webhook {endpoint.id} is off: {endpoint.disabled_why}"
        raise Conflict(detail, value=endpoint.disabled_why, hint="switch it on with PATCH, enabled true")
