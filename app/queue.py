"""The doorbell: a Celery message that says "there is work for this class of device", and nothing else.

The database is the truth. A message carries no job, is acknowledged on arrival, expires, and has no result, so one
that is lost or doubled costs nothing: `sweep` rings again.
"""

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

import structlog
from celery import Celery
from kombu import Queue
from kombu.exceptions import OperationalError

from app.domain.jobs import DeviceClass
from app.settings import get_settings

WORK_TASK = "workers.work"
EXPIRES_SECONDS = 60
"""A message that no worker took by then is dropped: the sweep has rung again since."""

TRANSPORT_OPTIONS: Mapping[str, object] = MappingProxyType(
    {
        # Celery's defaults wait for ever on a connection whose other end is gone.
        "socket_timeout": 10,
        "socket_connect_timeout": 2,
        "socket_keepalive": True,
        # One try: who rings does not wait for the broker. 0 would mean "for ever".
        "max_retries": 1,
        "interval_start": 0,
        "interval_step": 0,
        "interval_max": 0,
        "connect_retries_timeout": 2,
    }
)

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


@lru_cache(maxsize=4)
def _sender(broker_url: str) -> Celery:
    return celery_app(broker_url)


def notify_workers(device: str) -> None:
    """Ring for workers of `device` ("cpu", "cuda", or "any" for both). Never raises: the sweep will ring later."""
    broker_url = get_settings().broker_url
    if not broker_url:
        log.debug("broker_not_configured", device=device)
        return
    classes = tuple(DeviceClass) if device == "any" else (DeviceClass(device),)
    try:
        for device_class in classes:
            _ring(_sender(broker_url), device_class)
    except (OperationalError, OSError) as error:
        log.warning("broker_unreachable", device=device, error=type(error).__name__)


def _ring(sender: Celery, device_class: DeviceClass) -> None:
    sender.send_task(
        WORK_TASK,
        args=[device_class.value],
        queue=queue_name(device_class),
        expires=EXPIRES_SECONDS,
        ignore_result=True,
        # A pooled connection may have outlived a restart of the broker: the second try makes a new one.
        retry=True,
        retry_policy={"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0},
    )
