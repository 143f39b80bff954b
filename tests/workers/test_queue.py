"""The doorbell on a real Valkey."""

import base64
import json
import time
from collections.abc import Iterator

import pytest
import redis

from app.queue import notify_workers
from app.settings import get_settings


@pytest.fixture
def use_broker(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    get_settings.cache_clear()
    yield monkeypatch
    get_settings.cache_clear()


@pytest.fixture
def broker(use_broker: pytest.MonkeyPatch, broker_url: str) -> Iterator[redis.Redis]:
    use_broker.setenv("BITWRIGHT_BROKER_URL", broker_url)
    client = redis.Redis.from_url(broker_url)
    client.flushdb()
    yield client
    client.flushdb()
    client.close()


def messages(broker: redis.Redis, queue: str) -> list[dict[str, object]]:
    return [json.loads(raw) for raw in broker.lrange(queue, 0, -1)]


def test_a_message_names_a_device_and_no_job(broker: redis.Redis) -> None:
    notify_workers("cuda")
    (message,) = messages(broker, "work.cuda")
    assert message["content-type"] == "application/json"
    body = json.loads(base64.b64decode(str(message["body"])))
    assert body[:2] == [["cuda"], {}]
    headers = message["headers"]
    assert isinstance(headers, dict)
    assert headers["task"] == "workers.work"
    assert headers["ignore_result"] is True
    assert headers["expires"]
    assert messages(broker, "work.cpu") == []


def test_any_rings_for_both(broker: redis.Redis) -> None:
    notify_workers("any")
    assert [len(messages(broker, queue)) for queue in ("work.cpu", "work.cuda")] == [1, 1]


def test_a_restarted_broker_hears_the_next_message(broker: redis.Redis) -> None:
    notify_workers("cpu")
    broker.client_kill_filter(_type="normal", skipme=True)
    notify_workers("cpu")
    assert len(messages(broker, "work.cpu")) == 2


def test_a_broker_that_refuses_raises_nothing(broker: redis.Redis) -> None:
    limit = broker.config_get("maxmemory")["maxmemory"] or 0
    broker.config_set("maxmemory", 1)
    try:
        notify_workers("cpu")
    finally:
        broker.config_set("maxmemory", limit)
    assert messages(broker, "work.cpu") == []


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "redis+socket:///no/such.sock", ""])
def test_a_broker_out_of_reach_raises_nothing_and_takes_no_time(use_broker: pytest.MonkeyPatch, url: str) -> None:
    use_broker.setenv("BITWRIGHT_BROKER_URL", url)
    started = time.monotonic()
    notify_workers("any")
    assert time.monotonic() - started < 3
