"""Deliveries from a job's end to a real receiver, and what the log says of them."""

import datetime
import json
import ssl
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.fernet import Fernet
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import SecretStr
from sqlalchemy import update
from standardwebhooks import Webhook
from standardwebhooks.webhooks import WebhookVerificationError

from app.domain.webhooks.addresses import Allowed
from app.store.clock import seconds_from_now
from app.store.webhooks.deliveries import Sending
from app.store.webhooks.endpoints import new_secret
from app.store.webhooks.tables import WebhookDelivery, WebhookEndpoint
from bitwright.errors import InvalidDataset
from bitwright.webhooks.views import RETRY_SECONDS
from tests.api.conftest import Api, make_settings, plain_logs, problem, run_api
from tests.webhooks.receiver import Heard, running_receiver
from workers.webhooks.courier import Courier
from workers.webhooks.sending import ANSWER_BYTES, Post

__all__ = ["plain_logs"]
LOOPBACK = Allowed.of(["127.0.0.1"])


@pytest.fixture
def receiver() -> Iterator[Heard]:
    with running_receiver() as heard:
        yield heard


@pytest.fixture
def names() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def open_api(folder: Path, url: str) -> Iterator[Api]:
    keys = (SecretStr(Fernet.generate_key().decode()),)
    settings = make_settings(folder, url, webhook_allowed=("127.0.0.1",))
    yield from run_api(settings.model_copy(update={"token_keys": keys}))


@pytest.fixture
def hooked(tmp_path: Path, sqlite_url: str) -> Iterator[Api]:
    """An API that may send to loopback."""
    yield from open_api(tmp_path, sqlite_url)


@pytest.fixture
def any_hooked(tmp_path: Path, database_url: str) -> Iterator[Api]:
    """The same on each database in turn."""
    yield from open_api(tmp_path, database_url)


class Hand:
    """The tenant's and the courier's hand."""

    def __init__(self, api: Api, names: ThreadPoolExecutor, seconds: float = 1.0) -> None:
        self.api = api
        self.courier = Courier(api.settings, api.database, Post(LOOPBACK, names, seconds=seconds))

    def make(self, url: str, **fields: object) -> dict[str, Any]:
        answer = self.api.client.post("/v1/webhooks", json={"url": url, **fields})
        assert answer.status_code == 201, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def deliver(self) -> int:
        """Send what is due, to its end."""
        count = self.courier.round()
        self.courier.settle()
        return count

    def hurry(self) -> None:
        """Make everything that waits due."""
        with self.api.database.transaction() as session:
            waiting = update(WebhookDelivery).where(WebhookDelivery.status == "pending")
            session.execute(waiting.values(due_at=seconds_from_now(-1)))

    def last(self, webhook: Mapping[str, Any]) -> dict[str, Any]:
        """The webhook's newest delivery with its log."""
        url = f"/v1/webhooks/{webhook['id']}/deliveries"
        (first, *_) = self.api.client.get(url).json()["items"]
        found: dict[str, Any] = self.api.client.get(f"{url}/{first['id']}").json()
        return found


def test_receivers_of_every_kind(hooked: Api, receiver: Heard, names: ThreadPoolExecutor) -> None:
    hand = Hand(hooked, names)
    paths = ("/ok", "/fail", "/slow", "/redirect", "/gone", "/later", "/long")
    made = {path: hand.make(receiver.url(path)) for path in paths}
    job_id = hooked.submit(metadata={"note": "text of a tenant"})
    hooked.fail(hooked.claim(), InvalidDataset("a line of somebody's text"))
    began = time.monotonic()
    assert hand.deliver() == len(paths)
    assert time.monotonic() - began < 5, "one that drips holds nobody for longer than its time"
    ((headers, body),) = receiver.of("/ok")
    payload = Webhook(made["/ok"]["secret"]).verify(body, headers)
    assert (payload["type"], payload["id"]) == ("job.failed", headers["webhook-id"])
    assert payload["data"] == {"id": job_id, "status": "failed", "attempt": 1, "error": "invalid_dataset"}
    assert set(payload) == {"id", "object", "type", "timestamp", "created_at", "data"}
    assert b"text" not in body
    assert b"org/model" not in body
    with pytest.raises(WebhookVerificationError):
        Webhook(made["/fail"]["secret"]).verify(body, headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(made["/ok"]["secret"]).verify(body.replace(b"failed", b"failee"), headers)
    found = {path: hand.last(made[path]) for path in paths}
    logs = {path: one["log"][0] for path, one in found.items()}
    assert {path: (one["status"], logs[path]["status_code"]) for path, one in found.items()} == {
        "/ok": ("delivered", 204),
        "/fail": ("pending", 500),
        "/slow": ("pending", None),
        "/redirect": ("pending", 302),
        "/gone": ("failed", 410),
        "/later": ("pending", 503),
        "/long": ("pending", 400),
    }
    assert logs["/slow"]["error"] == "timeout: no answer within 1 s"
    assert logs["/fail"]["answer"] == "no \ufffd \ufffd"
    assert len(logs["/long"]["answer"]) == ANSWER_BYTES
    assert receiver.of("/elsewhere") == [], "nothing follows a redirect"
    waits = {path: next_in(one) for path, one in found.items()}
    assert 0 < waits["/fail"] <= RETRY_SECONDS[1]
    assert 590 < waits["/later"] <= 600, "as the receiver asked"
    gone = hooked.client.get(f"/v1/webhooks/{made['/gone']['id']}").json()
    assert (gone["enabled"], gone["disabled_why"]) == (False, "gone")
    problem(hooked.client.post(f"/v1/webhooks/{gone['id']}/test"), 409, "conflict")
    hooked.client.post(f"/v1/jobs/{job_id}/retry")
    hooked.client.post(f"/v1/jobs/{job_id}/cancel")
    assert len(hooked.client.get(f"/v1/webhooks/{gone['id']}/deliveries").json()["items"]) == 1
    assert hooked.client.patch(f"/v1/webhooks/{gone['id']}", json={"enabled": True}).json()["enabled"]


def next_in(delivery: Mapping[str, Any]) -> float:
    """Seconds from a delivery's last try to its next one."""
    if delivery["next_attempt_at"] is None:
        return -1.0
    due = datetime.datetime.fromisoformat(delivery["next_attempt_at"])
    return (due - datetime.datetime.now(datetime.UTC)).total_seconds()


@pytest.mark.slow
def test_the_schedule_ends_and_a_replay_is_the_same_message(
    any_hooked: Api, receiver: Heard, names: ThreadPoolExecutor
) -> None:
    hand = Hand(any_hooked, names)
    webhook = hand.make(receiver.url("/fail"), events=["job.queued"])
    any_hooked.submit()
    for count in range(1, len(RETRY_SECONDS) + 1):
        hand.hurry()
        assert hand.deliver() == 1
        found = hand.last(webhook)
        assert found["attempts"] == count
        if count < len(RETRY_SECONDS):
            assert RETRY_SECONDS[count] - 5 < next_in(found) <= RETRY_SECONDS[count]
    assert (found["status"], found["next_attempt_at"]) == ("failed", None)
    assert hand.deliver() == 0
    any_hooked.client.patch(f"/v1/webhooks/{webhook['id']}", json={"url": receiver.url("/ok")})
    url = f"/v1/webhooks/{webhook['id']}/deliveries/{found['id']}/replay"
    assert any_hooked.client.post(url).json()["status"] == "pending"
    problem(any_hooked.client.post(url), 409, "conflict")
    assert hand.deliver() == 1
    assert (hand.last(webhook)["status"], hand.last(webhook)["attempts"]) == ("delivered", len(RETRY_SECONDS) + 1)
    ids = {headers["webhook-id"] for path in ("/fail", "/ok") for headers, _ in receiver.of(path)}
    assert ids == {found["message_id"]}


@pytest.mark.slow
def test_both_secrets_sign_while_they_overlap(any_hooked: Api, receiver: Heard, names: ThreadPoolExecutor) -> None:
    hand = Hand(any_hooked, names)
    webhook = hand.make(receiver.url("/ok"))
    url = f"/v1/webhooks/{webhook['id']}"
    fresh = any_hooked.client.post(f"{url}/rotate", json={}).json()["secret"]
    assert fresh != webhook["secret"]
    sent = any_hooked.client.post(f"{url}/test").json()
    assert (sent["type"], sent["status"], sent["attempts"]) == ("webhook.test", "pending", 0)
    hand.deliver()
    headers, body = receiver.of("/ok")[-1]
    for secret in (webhook["secret"], fresh):
        assert Webhook(secret).verify(body, headers)["type"] == "webhook.test"
    with any_hooked.database.transaction() as session:
        session.execute(update(WebhookEndpoint).values(before_until=seconds_from_now(-1)))
    any_hooked.client.post(f"{url}/test")
    hand.deliver()
    headers, body = receiver.of("/ok")[-1]
    Webhook(fresh).verify(body, headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(webhook["secret"]).verify(body, headers)
    shown = any_hooked.client.get(url).text + any_hooked.client.get("/v1/webhooks").text
    assert "whsec_" not in shown
    stored = any_hooked.database.engine.connect().exec_driver_sql("SELECT sealed, sealed_before FROM webhook_endpoint")
    assert all("whsec_" not in str(value) and webhook["secret"][6:] not in str(value) for value in stored.one())


@pytest.mark.slow
def test_a_finetuning_job_is_told_in_openais_words(hooked: Api, receiver: Heard, names: ThreadPoolExecutor) -> None:
    import openai

    hand = Hand(hooked, names)
    webhook = hand.make(receiver.url("/ok"), events=["fine_tuning.job.succeeded", "job.paused", "job.resumed"])
    asked = {"model": "org/model", "training_file": hooked.send_file()}
    job_id = hooked.client.post("/v1/fine_tuning/jobs", json=asked).json()["id"]
    hooked.client.post(f"/v1/jobs/{job_id}/pause")
    hooked.client.post(f"/v1/jobs/{job_id}/resume")
    hooked.succeed(hooked.claim(), {})
    other = hooked.submit()
    hooked.succeed(hooked.claim(), {})
    hand.deliver()
    hand.deliver()
    told = [json.loads(body) for _, body in receiver.of("/ok")]
    assert sorted(one["type"] for one in told) == ["fine_tuning.job.succeeded", "job.paused", "job.resumed"]
    assert all(one["data"]["id"] != other for one in told)
    (headers, body) = next(one for one in receiver.of("/ok") if b"fine_tuning" in one[1])
    client = openai.OpenAI(api_key="x", webhook_secret=webhook["secret"])
    event = client.webhooks.unwrap(body, headers)
    assert (event.type, event.data.id) == ("fine_tuning.job.succeeded", job_id)


@pytest.mark.slow
def test_a_tenant_has_sixteen_and_strangers_get_nothing(
    hooked: Api, receiver: Heard, names: ThreadPoolExecutor
) -> None:
    hand = Hand(hooked, names)
    for _ in range(16):
        hand.make(receiver.url("/ok"))
    told = problem(hooked.client.post("/v1/webhooks", json={"url": receiver.url("/ok")}), 409, "conflict")
    assert told["value"] == 16
    assert hooked.stranger.get("/v1/webhooks").json()["items"] == []
    job_id = hooked.stranger.post("/v1/jobs", json={"model": "org/model", "method": "rtn"}).json()["id"]
    hooked.stranger.post(f"/v1/jobs/{job_id}/cancel")
    assert hand.deliver() == 0
    for url in ("http://10.0.0.1/", "https://10.0.0.1/", "http://example.org/", "https://u:p@example.org/"):
        assert problem(hooked.client.post("/v1/webhooks", json={"url": url}), 422, "invalid_request")["field"] == "url"


def sending(url: str, secret: str | None = None) -> Sending:
    return Sending("whd_x", "whe_x", "tnt_x", "msg_x", 1, 1, url, body="{}", secrets=(secret or new_secret(),))


@pytest.mark.slow
def test_a_name_is_asked_once_and_its_checked_address_connected_to(receiver: Heard, names: ThreadPoolExecutor) -> None:
    asked: list[str] = []

    def rebinding(host: str, port: int) -> list[str]:
        """A public answer first, loopback ever after."""
        asked.append(host)
        return ["127.0.0.1"]

    def late(host: str, port: int) -> list[str]:
        time.sleep(1)
        return []

    url = f"http://hooks.test:{receiver.port}/ok"
    post = Post(Allowed.of(["hooks.test"]), names, seconds=1.0, resolve=rebinding)
    assert post.send(sending(url)).delivered
    assert asked == ["hooks.test"]
    headers, _ = receiver.of("/ok")[0]
    assert headers["host"] == f"hooks.test:{receiver.port}"
    strict = Post(Allowed(), names, seconds=1.0, resolve=rebinding)
    outcome = strict.send(sending(f"https://hooks.test:{receiver.port}/ok"))
    assert str(outcome.error).startswith("forbidden_address: hooks.test has the address 127.0.0.1")
    mixed = Post(Allowed(), names, seconds=1.0, resolve=lambda *_: ["93.184.215.14", "::ffff:127.0.0.1"])
    assert "forbidden_address" in str(mixed.send(sending("https://hooks.test/ok")).error), "each of them is judged"
    assert str(strict.send(sending(url)).error).startswith("forbidden_address"), "the operator allows it no more"
    slow = Post(Allowed(), names, seconds=0.2, resolve=late)
    assert "timeout" in str(slow.send(sending("https://hooks.test/ok")).error)
    assert len(receiver.requests) == 1


@pytest.mark.slow
def test_the_certificate_is_that_of_the_name(names: ThreadPoolExecutor, tmp_path: Path) -> None:
    server, client = certificates(tmp_path, "hooks.test")
    with running_receiver(server) as heard:

        def send(host: str, tls: ssl.SSLContext) -> Any:
            post = Post(LOOPBACK, names, seconds=2.0, resolve=lambda *_: ["127.0.0.1"], tls=tls)
            return post.send(sending(f"https://{host}:{heard.port}/ok"))

        assert send("hooks.test", client).delivered
        for host, tls in (("other.test", client), ("hooks.test", ssl.create_default_context())):
            assert "certificate" in str(send(host, tls).error).lower()
        assert len(heard.requests) == 1


def certificates(folder: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS of a server with this name, and of a client that trusts it alone."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    today = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "server.pem").write_bytes(private + pem)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.pem")
    return server, ssl.create_default_context(cadata=pem.decode())
