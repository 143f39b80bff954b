"""Webhook endpoints: made, listed, changed, rotated, tested, deleted; and their deliveries, which can be sent again."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query

from app.api.auth import Reader, Submitter
from app.api.deps import DatabaseOf, SettingsOf, VaultOf
from app.api.http.documentation import problems
from app.api.tenancy.admission import actor
from app.domain.webhooks.addresses import Allowed, checked_url
from app.store.ids import id_pattern
from app.store.tenancy.audit import record
from app.store.webhooks.endpoints import WebhookRepository
from app.store.webhooks.tables import WebhookAttempt, WebhookDelivery, WebhookEndpoint
from bitwright.views import Page
from bitwright.webhooks.views import (
    DeliveryAttemptView,
    DeliveryView,
    NewWebhookView,
    SecretRotation,
    WebhookChange,
    WebhookRequest,
    WebhookView,
)

router = APIRouter(tags=["webhooks"])

WEBHOOKS, ONE = "/v1/webhooks", "/v1/webhooks/{webhook_id}"
DELIVERIES = f"{ONE}/deliveries"


@router.post(
    WEBHOOKS,
    summary="Make a webhook",
    operation_id="create_webhook",
    status_code=201,
    responses=problems("conflict", "rate_limit_exceeded"),
)
def create_webhook(
    body: WebhookRequest, principal: Submitter, settings: SettingsOf, database: DatabaseOf, vault: VaultOf
) -> NewWebhookView:
    """An address that is called when jobs come into a state, up to 16 of them. The secret is in this answer alone.

    Messages have ids and states; a receiver asks for the rest with a key.
    """
    checked_url(body.url, Allowed.of(settings.webhook_allowed))
    with database.transaction() as session:
        endpoint, secret = WebhookRepository(session, principal.tenant_id).add(body, vault)
        record(session, actor(principal), "webhook.created", endpoint.id)
        session.refresh(endpoint)
        return NewWebhookView(**_fields(endpoint), secret=secret)


@router.get(WEBHOOKS, summary="List webhooks", operation_id="list_webhooks", responses=problems())
def list_webhooks(principal: Reader, database: DatabaseOf) -> Page[WebhookView]:
    """All of them, oldest first, without their secrets."""
    with database.reading() as session:
        return Page(items=[webhook_view(one) for one in WebhookRepository(session, principal.tenant_id).all()])


@router.get(ONE, summary="Get a webhook", operation_id="get_webhook", responses=problems("not_found"))
def get_webhook(webhook_id: str, principal: Reader, database: DatabaseOf) -> WebhookView:
    """A webhook without its secret, and whether it is on."""
    with database.reading() as session:
        return webhook_view(WebhookRepository(session, principal.tenant_id).get(webhook_id))


@router.patch(ONE, summary="Change a webhook", operation_id="change_webhook", responses=problems("not_found"))
def change_webhook(
    webhook_id: str, body: WebhookChange, principal: Submitter, settings: SettingsOf, database: DatabaseOf
) -> WebhookView:
    """Another address or other messages; on or off. One that answered 410 is off until it is switched on here."""
    if body.url is not None:
        checked_url(body.url, Allowed.of(settings.webhook_allowed))
    with database.transaction() as session:
        endpoint = WebhookRepository(session, principal.tenant_id).change(webhook_id, body)
        record(session, actor(principal), "webhook.changed", webhook_id)
        return webhook_view(endpoint)


@router.delete(
    ONE,
    summary="Delete a webhook",
    operation_id="delete_webhook",
    status_code=204,
    responses=problems("not_found"),
)
def delete_webhook(webhook_id: str, principal: Submitter, database: DatabaseOf) -> None:
    """Remove a webhook with the log of its deliveries. What is on its way may still arrive."""
    with database.transaction() as session:
        WebhookRepository(session, principal.tenant_id).remove(webhook_id)
        record(session, actor(principal), "webhook.deleted", webhook_id)


@router.post(
    f"{ONE}/rotate",
    summary="Rotate a webhook's secret",
    operation_id="rotate_webhook_secret",
    responses=problems("not_found", "rate_limit_exceeded"),
)
def rotate_webhook_secret(
    webhook_id: str, body: SecretRotation, principal: Submitter, database: DatabaseOf, vault: VaultOf
) -> NewWebhookView:
    """A new secret, in this answer alone. Messages carry signatures of both until the overlap ends."""
    with database.transaction() as session:
        repository = WebhookRepository(session, principal.tenant_id)
        endpoint, secret = repository.rotate(webhook_id, vault, overlap_seconds=body.overlap_seconds)
        record(session, actor(principal), "webhook.rotated", webhook_id)
        return NewWebhookView(**_fields(endpoint), secret=secret)


@router.post(
    f"{ONE}/test",
    summary="Send a test message",
    operation_id="test_webhook",
    status_code=202,
    responses=problems("not_found", "conflict", "rate_limit_exceeded"),
)
def send_test(webhook_id: str, principal: Submitter, database: DatabaseOf) -> DeliveryView:
    """Queue a message of the type `webhook.test`; the delivery tells what came of it, seconds later."""
    with database.transaction() as session:
        return delivery_view(WebhookRepository(session, principal.tenant_id).test(webhook_id))


@router.get(
    DELIVERIES, summary="List deliveries", operation_id="list_webhook_deliveries", responses=problems("not_found")
)
def list_webhook_deliveries(
    *,
    webhook_id: str,
    principal: Reader,
    database: DatabaseOf,
    after: Annotated[
        str | None,
        Query(description="`next_cursor` of the page before.", json_schema_extra={"pattern": id_pattern("whd")}),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=200, description="Deliveries a page.")] = 50,
    status: Annotated[
        Literal["pending", "delivered", "failed"] | None, Query(description="Only deliveries in this status.")
    ] = None,
) -> Page[DeliveryView]:
    """Messages to this webhook, newest first, for thirty days."""
    with database.reading() as session:
        repository = WebhookRepository(session, principal.tenant_id)
        page = repository.deliveries(webhook_id, after=after, limit=limit, status=status)
        return Page(items=[delivery_view(one) for one in page.items], next_cursor=page.next_cursor)


@router.get(
    f"{DELIVERIES}/{{delivery_id}}",
    summary="Get a delivery",
    operation_id="get_webhook_delivery",
    responses=problems("not_found"),
)
def get_webhook_delivery(webhook_id: str, delivery_id: str, principal: Reader, database: DatabaseOf) -> DeliveryView:
    """A message with every try to deliver it, and the first 4 kB of each answer."""
    with database.reading() as session:
        repository = WebhookRepository(session, principal.tenant_id)
        delivery = repository.delivery(webhook_id, delivery_id)
        return delivery_view(delivery, repository.tries(delivery))


@router.post(
    f"{DELIVERIES}/{{delivery_id}}/replay",
    summary="Send a message again",
    operation_id="replay_webhook_delivery",
    status_code=202,
    responses=problems("not_found", "conflict", "rate_limit_exceeded"),
)
def replay_webhook_delivery(
    webhook_id: str, delivery_id: str, principal: Submitter, database: DatabaseOf
) -> DeliveryView:
    """Queue a message that has arrived or failed once more, under the same `webhook-id`."""
    with database.transaction() as session:
        return delivery_view(WebhookRepository(session, principal.tenant_id).replay(webhook_id, delivery_id))


def webhook_view(endpoint: WebhookEndpoint) -> WebhookView:
    """An endpoint without its secret."""
    return WebhookView.model_validate(_fields(endpoint))


def delivery_view(delivery: WebhookDelivery, tries: Sequence[WebhookAttempt] = ()) -> DeliveryView:
    """A delivery, and its tries where they are asked for."""
    return DeliveryView.model_validate(
        {
            "id": delivery.id,
            "message_id": delivery.message_id,
            "type": delivery.type,
            "status": delivery.status,
            "attempts": delivery.attempts,
            "next_attempt_at": delivery.due_at,
            "created_at": delivery.created_at,
            "ended_at": delivery.ended_at,
            "body": delivery.body,
            "log": [
                DeliveryAttemptView(
                    number=one.number,
                    at=one.at,
                    seconds=one.seconds,
                    status_code=one.status_code,
                    error=one.error,
                    answer=one.answer,
                )
                for one in tries
            ],
        }
    )


def _fields(endpoint: WebhookEndpoint) -> dict[str, Any]:
    return {
        "id": endpoint.id,
        "url": endpoint.url,
        "events": list(endpoint.events),
        "description": endpoint.description,
        "enabled": endpoint.disabled_at is None,
        "disabled_at": endpoint.disabled_at,
        "disabled_why": endpoint.disabled_why,
        "created_at": endpoint.created_at,
    }
