"""Notification of workers: a Celery message that says "there is work for this class of device", and nothing else.

The database is the truth, and idle workers ask it by themselves. A message only spares them the wait: it carries no job
and no time, is acknowledged on arrival, and has no result, so one that is lost or doubled costs nothing. A class is
notified only if it has a live worker and nothing lies in its queue: nothing grows while nobody reads.
"""

import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

import structlog
from celery import Celery
from kombu import Queue
from kombu.exceptions import OperationalError
from redis.exceptions import AuthenticationError, RedisError
from redis.exceptions import ConnectionError as BrokerAway
from redis.exceptions import TimeoutError as BrokerSilent

from app.settings import get_settings
from bitwright.job_states import DeviceClass

WORK_TASK = "workers.work"
QUIET_SECONDS = 2.0
"""Pause of this process after a failure: callers do not queue up before a broker that hangs."""
PROBE_SECONDS = 1.0
"""Longest time for an answer to a probe, and the age up to which an answer is used again."""
PROBE_KEY = "bitwright.probe"

BrokerState = Literal["ok", "refuses", "unreachable"]
"""`ok` if messages can be sent, `refuses` if the broker answers and takes none, as one whose memory is full does."""

TRANSPORT_OPTIONS: Mapping[str, object] = MappingProxyType(
    {
        # Celery's defaults wait for ever on a connection whose other end is gone.
        "socket_timeout": 10,
        "socket_connect_timeout": 2,
        "socket_keepalive": True,
        # One try: a sender does not wait for the broker. 0 would mean "for ever".
        "max_retries": 1,
        "interval_start": 0,
        "interval_step": 0,
        "interval_max": 0,
        "connect_retries_timeout": 2,
    }
)
SENDING: Mapping[str, object] = MappingProxyType({"socket_timeout": 2})
"""A worker waits for messages, which takes long; a sender does not."""

log = structlog.get_logger(__name__)


def queue_name(device: DeviceClass) -> str:
    """The queue on which workers of this class listen."""
    return f"work.{device.value}"


def celery_app(broker_url: str) -> Celery:
    """A Celery application that speaks JSON and keeps no results; senders and workers share it."""
    app = Celery("bitwright", broker=broker_url or None, set_as_current=False)
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_create_missing_queues=False,
        task_queues=[Queue(queue_name(device)) for device in DeviceClass],
        task_default_queue=queue_name(DeviceClass.CPU),
        broker_transport_options=dict(TRANSPORT_OPTIONS),
        broker_connection_timeout=2,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        enable_utc=True,
        # Reading the level of our own logs is structlog's business.
        worker_hijack_root_logger=False,
    )
    return app


class _Broker:
    """State of the broker at one URL, as this process knows it, and the connection to it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.sender = celery_app(url)
        self.sender.conf.broker_transport_options = {**TRANSPORT_OPTIONS, **SENDING}
        self._sending = threading.Lock()
        self._quiet_until = 0.0
        self._probing = threading.Lock()
        self._probed_at = -PROBE_SECONDS
        self._state: BrokerState = "ok"

    @contextmanager
    def trying(self) -> Iterator[bool]:
        """True if the caller may try now: one thread per process at a time, so that no two find the same queue empty.

        For the others a message is on its way. A failure inside is logged, and no thread tries again for a while.
        """
        if time.monotonic() < self._quiet_until or not self._sending.acquire(blocking=False):
            yield False
            return
        try:
            yield True
        except Exception as error:  # a transport's own kinds, too: a message is never worth the failure of its sender
            self._quiet_until = time.monotonic() + QUIET_SECONDS
            log.warning("broker_not_reached", error=type(error).__name__, reason=_reason(error))
        finally:
            self._sending.release()

    def state(self) -> BrokerState:
        """State of the broker, probed at most once per `PROBE_SECONDS`."""
        if self._probing.acquire(blocking=False):
            try:
                if time.monotonic() - self._probed_at >= PROBE_SECONDS:
                    self._state = _probe(self.sender)
                    self._probed_at = time.monotonic()
            finally:
                self._probing.release()
        return self._state


@lru_cache(maxsize=4)
def _broker(broker_url: str) -> _Broker:
    return _Broker(broker_url)


def notify_workers(device: str, alive: Collection[DeviceClass], *, times: int = 1) -> None:
    """Notify workers of `device` ("cpu", "cuda", or "any" for both). Never raises: idle workers ask by themselves.

    alive   classes with a live worker; no other is notified
    times   messages for each class, if none lies in its queue
    """
    broker_url = get_settings().broker_url
    if not broker_url:
        log.debug("broker_not_configured", device=device)
        return
    classes = [name for name in DeviceClass if name in alive and device in ("any", name.value)]
    broker = _broker(broker_url)
    for device_class in classes:
        with broker.trying() as now:
            if now and not _length(broker.sender, device_class):
                for _ in range(times):
                    _send(broker.sender, device_class)


def silence(classes: Collection[DeviceClass]) -> None:
    """Throw away what lies in the queues of these classes, which have no worker: messages of long ago. Never raises."""
    broker_url = get_settings().broker_url
    if not broker_url:
        return
    broker = _broker(broker_url)
    for device_class in classes:
        with broker.trying() as now:
            if now and (length := _length(broker.sender, device_class)):
                with broker.sender.connection_for_write() as connection:
                    connection.default_channel.queue_purge(queue_name(device_class))
                log.info("queue_emptied", device=device_class.value, messages=length)


def broker_state(broker_url: str) -> BrokerState:
    """State of the broker: "ok" if workers can be notified now. Takes about a second at the most."""
    return _broker(broker_url).state()


def _length(sender: Celery, device_class: DeviceClass) -> int:
    """Messages that lie in the queue; those that a worker has in hand are not among them."""
    with sender.connection_for_write() as connection:
        return int(connection.default_channel.queue_declare(queue_name(device_class)).message_count)


def _send(sender: Celery, device_class: DeviceClass) -> None:
    sender.send_task(
        WORK_TASK,
        args=[device_class.value],
        queue=queue_name(device_class),
        ignore_result=True,
        # A pooled connection may have outlived a restart of the broker: the second try makes a new one.
        retry=True,
        retry_policy={"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0},
    )


def _probe(sender: Celery) -> BrokerState:
    """Write a key that expires: a server that is full, or a replica, answers and refuses."""
    patience = {"socket_timeout": PROBE_SECONDS, "socket_connect_timeout": PROBE_SECONDS}
    try:
        with sender.connection_for_write(transport_options=patience) as connection:
            connection.default_channel.client.set(PROBE_KEY, 1, ex=60)
    except AuthenticationError:
        return "refuses"
    except (BrokerAway, BrokerSilent, OSError, OperationalError):
        return "unreachable"
    except RedisError:
        return "refuses"
    except Exception as error:
        log.warning("broker_not_probed", error=type(error).__name__)
        return "unreachable"
    return "ok"


def _reason(error: Exception) -> str:
    """The first words of what a server or a socket said; they hold no URL."""
    return str(error).partition("\n")[0][:120]
