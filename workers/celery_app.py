"""The Celery side of a worker process: one task, one thread for it, and nothing kept in the broker.

The pool is `threads` with one thread. A job takes hours, so the task must not block the process's event loop (`solo`
would stop answering ping and control), and it computes nothing itself, so a forked pool child (`prefork`) would only
be one more process that can outlive its parent: here worker and supervisor are the same process, and the attempt dies
with it. Celery's own time limits, which `threads` lacks, are not used: the supervisor has its own.
"""

import warnings

from celery import Celery, signals
from celery.exceptions import CPendingDeprecationWarning, SecurityWarning
from kombu import Queue

from app.logs import configure_logging
from app.queue import WORK_TASK, celery_app, queue_name
from workers.context import WorkerContext
from workers.presence import Presence
from workers.tasks import work


def worker_app(context: WorkerContext) -> Celery:
    """A Celery application that serves one worker's queue."""
    app = celery_app(context.settings.broker_url)
    app.conf.update(
        task_queues=[Queue(queue_name(context.device))],
        task_default_queue=queue_name(context.device),
        # A message is acknowledged when it arrives: what is lost with a worker, the sweep rings again.
        task_acks_late=False,
        worker_pool="threads",
        worker_concurrency=1,
        worker_prefetch_multiplier=1,
        # A busy worker takes no message, so that the next one rings for a worker that is free.
        worker_disable_prefetch=True,
        worker_send_task_events=False,
        worker_redirect_stdouts=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
    )

    def ring(device_class: str) -> None:
        work(context, device_class)

    app.task(name=WORK_TASK, ignore_result=True)(ring)
    return app


def run_worker(context: WorkerContext) -> None:
    """Serve until the process is asked to end. Blocks; to be called once a process, from its main thread.

    On SIGTERM the attempt in hand is ended and its job given back at once.
    """
    # Root is a danger where messages are pickled; ours are JSON. And what Celery 6 will do to late acknowledgements on
    # a lost connection is no matter to messages that are acknowledged early.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    warnings.filterwarnings("ignore", category=CPendingDeprecationWarning)
    presence = Presence(context)
    signals.setup_logging.connect(lambda **_: configure_logging(context.settings), weak=False)
    signals.worker_ready.connect(lambda **_: presence.start(), weak=False)
    signals.worker_shutting_down.connect(lambda **_: context.stopping.set(), weak=False)
    try:
        worker_app(context).worker_main(
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
    finally:
        presence.stop()
