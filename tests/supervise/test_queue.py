"""Notification of workers on a real Valkey."""

import base64
import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from app import queue
from app.queue import broker_state, notify_workers, silence
from app.settings import get_settings
from bitwright.job_states import DeviceClass
from tests import servers
from tests.supervise.bench import wait_for

CPU, CUDA = DeviceClass.CPU, DeviceClass.CUDA
BOTH = frozenset(DeviceClass)
QUEUES = ("work.cpu", "work.cuda")


@pytest.fixture
def use_broker(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for cache in (get_settings, queue._broker):
        cache.cache_clear()
    yield monkeypatch
    for cache in (get_settings, queue._broker):
        cache.cache_clear()


@pytest.fixture
def broker(use_broker: pytest.MonkeyPatch, broker_url: str) -> Iterator[redis.Redis]:
    use_broker.setenv("BITWRIGHT_BROKER_URL", broker_url)
    client = redis.Redis.from_url(broker_url)
    client.flushdb()
    yield client
    client.flushdb()
    client.close()


def messages(broker: redis.Redis, name: str) -> list[dict[str, object]]:
    return [json.loads(raw) for raw in broker.lrange(name, 0, -1)]


def test_a_message_names_a_device_and_no_job(broker: redis.Redis) -> None:
    notify_workers("cuda", BOTH)
    (message,) = messages(broker, "work.cuda")
    assert message["content-type"] == "application/json"
    body = json.loads(base64.b64decode(str(message["body"])))
    assert body[:2] == [["cuda"], {}]
    headers = message["headers"]
    assert isinstance(headers, dict)
    assert headers["task"] == "workers.work"
    assert headers["ignore_result"] is True
    assert (headers["expires"], headers["eta"]) == (None, None), "no host's time is compared with another's"
    assert messages(broker, "work.cpu") == []


def test_any_notifies_both(broker: redis.Redis) -> None:
    notify_workers("any", BOTH)
    assert [len(messages(broker, name)) for name in QUEUES] == [1, 1]


def test_a_restarted_broker_hears_the_next_message(broker: redis.Redis) -> None:
    notify_workers("cpu", BOTH)
    broker.client_kill_filter(_type="normal", skipme=True)
    notify_workers("cuda", BOTH)
    assert [len(messages(broker, name)) for name in QUEUES] == [1, 1]


def test_only_a_class_with_a_live_worker_is_rung_for(broker: redis.Redis) -> None:
    notify_workers("any", {CPU})
    notify_workers("cuda", {CPU})
    notify_workers("any", set())
    assert [len(messages(broker, name)) for name in QUEUES] == [1, 0]


def test_nothing_is_added_to_a_queue_that_nobody_reads(broker: redis.Redis) -> None:
    notify_workers("cpu", BOTH, times=3)
    for _ in range(20):
        notify_workers("any", BOTH, times=3)
    assert [len(messages(broker, name)) for name in QUEUES] == [3, 3]


def test_threads_of_a_process_do_not_fill_a_queue_together(broker: redis.Redis) -> None:
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda _: notify_workers("cpu", BOTH), range(200)))
    assert len(messages(broker, "work.cpu")) == 1


def test_messages_of_long_ago_are_thrown_away_even_from_a_full_broker(broker: redis.Redis) -> None:
    broker.lpush("work.cuda", *[b"x" * 1000] * 50)
    notify_workers("cpu", BOTH)
    broker.config_set("maxmemory", 1)
    try:
        silence({CUDA})
    finally:
        broker.config_set("maxmemory", 0)
    assert [len(messages(broker, name)) if name == "work.cpu" else broker.llen(name) for name in QUEUES] == [1, 0]


def test_the_state_of_the_broker_is_found_out(broker: redis.Redis, broker_url: str) -> None:
    assert broker_state(broker_url) == "ok"
    broker.config_set("maxmemory", 1)
    try:
        wait_for(lambda: broker_state(broker_url) == "refuses", 10)
    finally:
        broker.config_set("maxmemory", 0)
    wait_for(lambda: broker_state(broker_url) == "ok", 10)
    for url in ("redis://127.0.0.1:1/0", "redis+socket:///no/such.sock"):
        assert broker_state(url) == "unreachable"


def test_a_broker_that_hangs_is_left_alone(use_broker: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stopped server takes connections and never answers: one caller waits, the others find that out from it."""
    with servers.valkey_server(tmp_path) as running:
        use_broker.setenv("BITWRIGHT_BROKER_URL", running.url)
        notify_workers("cpu", BOTH)
        running.process.send_signal(signal.SIGSTOP)
        try:
            started = time.monotonic()
            with ThreadPoolExecutor(40) as threads:
                list(threads.map(lambda _: notify_workers("cpu", BOTH), range(400)))
            assert broker_state(running.url) == "unreachable"
            assert time.monotonic() - started < 15
        finally:
            running.process.send_signal(signal.SIGCONT)


def test_a_broker_that_refuses_raises_nothing(broker: redis.Redis) -> None:
    limit = broker.config_get("maxmemory")["maxmemory"] or 0
    broker.config_set("maxmemory", 1)
    try:
        notify_workers("cpu", BOTH)
    finally:
        broker.config_set("maxmemory", limit)
    assert messages(broker, "work.cpu") == []


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "redis+socket:///no/such.sock", ""])
def test_a_broker_out_of_reach_raises_nothing_and_takes_no_time(use_broker: pytest.MonkeyPatch, url: str) -> None:
    use_broker.setenv("BITWRIGHT_BROKER_URL", url)
    started = time.monotonic()
    notify_workers("any", BOTH)
    assert time.monotonic() - started < 3
