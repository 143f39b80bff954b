"""One try to deliver a message: signed by Standard Webhooks, sent by POST, its answer read up to 4 kB."""

import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpcore
import structlog
from standardwebhooks import Webhook

from app.domain.webhooks.addresses import Allowed, checked_url
from app.store.webhooks.deliveries import Outcome, Sending
from bitwright.errors import InvalidRequest
from workers.webhooks.connection import CheckedBackend, Deadline, ForbiddenAddress, OutOfTime, Resolve, addresses_of

SECONDS = 10.0
ANSWER_BYTES = 4096
WAITING = (429, 503)
"""Answers whose Retry-After is heard."""
USER_AGENT = "Bitwright-Webhooks/1"

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Post:
    """Ways and limits of the tries.

    allowed    where messages may go besides public addresses
    seconds    of a whole try
    """

    allowed: Allowed
    resolver: ThreadPoolExecutor
    seconds: float = SECONDS
    resolve: Resolve = addresses_of
    tls: ssl.SSLContext = field(default_factory=ssl.create_default_context)

    def send(self, message: Sending) -> Outcome:
        """Outcome of one try; nothing that a receiver does is an error here."""
        began = time.monotonic()
        try:
            checked_url(message.url, self.allowed)  # the operator may allow less by now
            status, answer, retry_after = self._exchange(message)
        except InvalidRequest as error:
            return Outcome(_since(began), error=f"forbidden_address: {error.detail}")
        except ForbiddenAddress as error:
            return Outcome(_since(began), error=f"forbidden_address: {error}")
        except (OutOfTime, httpcore.TimeoutException):
            return Outcome(_since(began), error=f"timeout: no answer within {self.seconds:g} s")
        except (httpcore.NetworkError, httpcore.ProtocolError, OSError, ValueError) as error:
            return Outcome(_since(began), error=f"no_connection: {type(error).__name__}: {error}")
        return Outcome(_since(began), status_code=status, answer=answer, retry_after=retry_after)

    def _exchange(self, message: Sending) -> tuple[int, str, float | None]:
        backend = CheckedBackend(self.allowed, Deadline.within(self.seconds), self.resolver, self.resolve)
        headers = {**signed_headers(message), "Content-Type": "application/json", "User-Agent": USER_AGENT}
        request = {"headers": {**headers, "Accept-Encoding": "identity", "Connection": "close"}}
        with (
            httpcore.ConnectionPool(ssl_context=self.tls, network_backend=backend, http2=False) as pool,
            # A redirect is an answer like any other: nothing is sent to where it leads.
            pool.stream("POST", message.url, content=message.body.encode(), **_listed(request)) as response,
        ):
            answer = _first_bytes(response)
        waits = response.status in WAITING
        return response.status, answer, _retry_after(response) if waits else None


def signed_headers(message: Sending, at: datetime | None = None) -> dict[str, str]:
    """Headers of Standard Webhooks: the message's id, the time of this try, and a signature by each secret."""
    at = at or datetime.now(UTC)
    signatures = [str(Webhook(secret).sign(message.message_id, at, message.body)) for secret in message.secrets]
    return {
        "webhook-id": message.message_id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": " ".join(signatures),
    }


def _listed(request: dict[str, dict[str, str]]) -> dict[str, Any]:
    return {"headers": [(name.encode(), value.encode()) for name, value in request["headers"].items()]}


def _first_bytes(response: httpcore.Response) -> str:
    """The beginning of an answer as text that every database stores; the rest is not read."""
    parts, size = [], 0
    for chunk in response.iter_stream():
        parts.append(chunk)
        size += len(chunk)
        if size >= ANSWER_BYTES:
            break
    return b"".join(parts)[:ANSWER_BYTES].decode("utf-8", "replace").replace("\0", "\ufffd")


def _retry_after(response: httpcore.Response) -> float | None:
    """Seconds that a receiver asks to wait, as a number or a date; None where it does not say."""
    said = {name.lower(): value for name, value in response.headers}.get(b"retry-after", b"").decode("latin-1").strip()
    if said.isdecimal():
        return float(said[:9])
    try:
        return max(0.0, (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def _since(began: float) -> float:
    return round(time.monotonic() - began, 3)
