"""Celery side of a worker process: one task, one thread for it, and nothing kept in the broker.

The task wakes the runner, which works in a thread of its own, and waits for it. The pool is `threads` with one thread.
A job takes hours, so the task must not block the process's event loop, as it would with `solo`, and it computes nothing
itself, so a forked pool child (`prefork`) would only be one more process that can outlive its parent: here worker and
supervisor are the same process, and the attempt dies with it. Celery's own time limits, which `threads` lacks, are not
used: the supervisor has its own.
"""

import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event
from types import FrameType

import structlog
from celery import Celery, signals
from celery.exceptions import CPendingDeprecationWarning, SecurityWarning
from celery.worker import state
from kombu import Queue

from app.logs import configure_logging
from app.queue import WORK_TASK, celery_app, queue_name
from workers.supervise.context import WorkerContext
from workers.supervise.heartbeat import Heartbeat
from workers.supervise.publish.publisher import Publisher
from workers.supervise.runner import Runner

SHORTEST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
"""Between two tries to listen to a broker that answers and refuses. One that is away is Celery's own to wait for."""

log = structlog.get_logger(__name__)


def worker_app(context: WorkerContext, notify: Callable[[], None]) -> Celery:
    """A Celery application that listens to one worker's queue; `notify` is called for each message."""
    app = celery_app(context.settings.broker_url)
    app.conf.update(
        task_queues=[Queue(queue_name(context.device))],
        task_default_queue=queue_name(context.device),
        # A message is acknowledged when it arrives: what is lost with a worker, the others find by themselves.
        task_acks_late=False,
        worker_pool="threads",
        worker_concurrency=1,
        worker_prefetch_multiplier=1,
        # A busy worker takes no message, so that the next one reaches a worker that is free.
        worker_disable_prefetch=True,
        # Whoever can write to the broker can notify, and nothing else: end no worker, and change no setting.
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_redirect_stdouts=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
    )

    def receive(device_class: str) -> None:
        if device_class == context.device.value:
            notify()
        else:
            log.warning("message_for_another_device", wanted=device_class, device=context.device.value)

    # Not shared: Celery would give the task to every other application of the process, too.
    app.task(name=WORK_TASK, ignore_result=True, shared=False)(receive)
    return app


def run_worker(context: WorkerContext) -> None:
    """Serve until the process is asked to end. Blocks; to be called once per process, from its main thread.

    Jobs run with or without a broker. On SIGTERM the attempt in hand is ended and its job given back at once.
    """
    # Root is a danger where messages are pickled; ours are JSON. And what Celery 6 will do to late acknowledgements on
    # a lost connection is no matter to messages that are acknowledged early.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    warnings.filterwarnings("ignore", category=CPendingDeprecationWarning)
    signals.setup_logging.connect(lambda **_: configure_logging(context.settings), weak=False)
    signals.worker_shutting_down.connect(lambda **_: context.stopping.set(), weak=False)
    heartbeat, runner, publisher = Heartbeat(context), Runner(context), Publisher(context)
    with _stopping_on_signals(context.stopping):
        heartbeat.start()
        runner.start()
        publisher.start()
        try:
            _listen(context, runner.notify)
        finally:
            publisher.stop()
            runner.stop()
            heartbeat.stop()


def _listen(context: WorkerContext, notify: Callable[[], None]) -> None:
    """Hear messages until the process is asked to end; begin anew when Celery gives up on a broker that refuses."""
    pause = SHORTEST_PAUSE_SECONDS
    while not context.stopping.is_set():
        began = time.monotonic()
        try:
            worker_app(context, notify).worker_main(
                [
                    "--quiet",
                    "worker",
                    f"--hostname={context.worker_id}",
                    f"--loglevel={context.settings.log_level}",
                    "--without-gossip",
                    "--without-mingle",
                    "--without-heartbeat",
                ]
            )
        except Exception as error:
            log.warning("broker_not_heard", error=type(error).__name__)
        if time.monotonic() - began > LONGEST_PAUSE_SECONDS:
            pause = SHORTEST_PAUSE_SECONDS
        context.stopping.wait(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


@contextmanager
def _stopping_on_signals(stopping: Event) -> Iterator[None]:
    """SIGTERM and SIGINT set `stopping` before Celery has its own handlers for them, and after it has given up.

    Celery that is about to start looks at its own word for it first.
    """

    def stop(_number: int, _frame: FrameType | None) -> None:
        stopping.set()
        state.should_stop = os.EX_OK

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
