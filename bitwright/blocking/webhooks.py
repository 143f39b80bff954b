# Made from bitwright/asynchronous/webhooks.py by `make client`: change it there.
"""Webhooks of this key's tenant: endpoints that the service calls, and the log of what went to them."""

from collections.abc import Generator, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel

from bitwright.blocking.transport import Transport
from bitwright.views import Page
from bitwright.webhooks.views import (
    BY_DEFAULT,
    DeliveryView,
    MessageType,
    NewWebhookView,
    WebhookView,
)

ModelT = TypeVar("ModelT", bound=BaseModel)
WEBHOOKS = "/v1/webhooks"


class Webhooks:
    """The webhook routes, one method per endpoint; `Client.webhooks` is one."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(self, url: str, *, events: Sequence[MessageType] = BY_DEFAULT, description: str = "") -> NewWebhookView:
        """A new webhook. Its `secret`, by which a receiver checks signatures, is in this answer alone.

        Raises:
            InvalidRequest: the service does not send there, or keeps no secrets.
            Conflict: there are 16 already.
        """
        body = {"url": url, "events": list(events), "description": description}
        return self._read(NewWebhookView, "POST", WEBHOOKS, json=body)

    def list(self) -> Sequence[WebhookView]:
        """All webhooks, oldest first."""
        return self._read(Page[WebhookView], "GET", WEBHOOKS).items

    def retrieve(self, webhook_id: str) -> WebhookView:
        """The webhook as it is now."""
        return self._read(WebhookView, "GET", f"{WEBHOOKS}/{webhook_id}")

    def change(
        self,
        webhook_id: str,
        *,
        url: str | None = None,
        events: Sequence[MessageType] | None = None,
        description: str | None = None,
        enabled: bool | None = None,
    ) -> WebhookView:
        """Give the webhook what is named; None leaves a field as it is."""
        given = {"url": url, "events": events, "description": description, "enabled": enabled}
        body = {name: value for name, value in given.items() if value is not None}
        return self._read(WebhookView, "PATCH", f"{WEBHOOKS}/{webhook_id}", json=body)

    def delete(self, webhook_id: str) -> None:
        """Remove the webhook with its log."""
        self._transport.send("DELETE", f"{WEBHOOKS}/{webhook_id}")

    def rotate(self, webhook_id: str, *, overlap_seconds: int = 86_400) -> NewWebhookView:
        """A new secret; messages are signed with the old one too until the overlap ends."""
        body = {"overlap_seconds": overlap_seconds}
        return self._read(NewWebhookView, "POST", f"{WEBHOOKS}/{webhook_id}/rotate", json=body)

    def test(self, webhook_id: str) -> DeliveryView:
        """Queue a test message; its delivery, which `delivery` brings up to date."""
        return self._read(DeliveryView, "POST", f"{WEBHOOKS}/{webhook_id}/test")

    def delivery(self, webhook_id: str, delivery_id: str) -> DeliveryView:
        """A message with every try to deliver it."""
        return self._read(DeliveryView, "GET", f"{WEBHOOKS}/{webhook_id}/deliveries/{delivery_id}")

    def deliveries(
        self, webhook_id: str, *, status: str | None = None, limit: int = 50
    ) -> Generator[DeliveryView, None, None]:
        """Messages to the webhook, newest first; `status` is `pending`, `delivered` or `failed`."""
        after: str | None = None
        while True:
            params = {"limit": limit, **_given(after=after, status=status)}
            page = self._read(Page[DeliveryView], "GET", f"{WEBHOOKS}/{webhook_id}/deliveries", params=params)
            yield from page.items
            if (after := page.next_cursor) is None:
                return

    def replay(self, webhook_id: str, delivery_id: str) -> DeliveryView:
        """Send a message again, under the same message id."""
        return self._read(DeliveryView, "POST", f"{WEBHOOKS}/{webhook_id}/deliveries/{delivery_id}/replay")

    def _read(self, model: type[ModelT], method: str, path: str, **options: Any) -> ModelT:
        response = self._transport.send(method, path, **options)
        return model.model_validate_json(response.content)


def _given(**params: str | None) -> dict[str, str]:
    return {name: value for name, value in params.items() if value is not None}
