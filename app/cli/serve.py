"""`bitwright serve`: the whole service in one command.

The API runs in this process; the broker, one worker and the sweep are its children. Without BITWRIGHT_* variables all
of it lives in one data folder, and nothing listens but the API on the loopback address.
"""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import structlog
import typer

from app.cli.announcement import Announcement, own_workers
from app.cli.api import HostOption, PortOption, bound_socket
from app.cli.broker import broker_program, broker_url, runtime_folder
from app.cli.children import Children, Program
from app.cli.environment import apply
from app.cli.private_files import keep_private
from app.cli.processes import sweep_command, worker_command
from app.domain.access import Scope
from app.logs import configure_logging
from app.settings import Settings
from bitwright.cli.connection import DataDirOption
from bitwright.endpoint import Endpoint, load_endpoint
from bitwright.errors import Conflict, Unauthenticated, Unavailable

log = structlog.get_logger(__name__)

BOOTSTRAP_TENANT = "default"
LOCK_NAME = "serve.lock"


def serve(
    data_dir: DataDirOption = None,
    host: HostOption = None,
    port: PortOption = None,
    model_root: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder under which local models and datasets may be read; without one, only those of the Hub and "
            "uploads are. May be given several times."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.", show_default="auto")] = None,
    no_worker: Annotated[bool, typer.Option("--no-worker", help="Serve the API and the sweep only.")] = False,
) -> None:
    """Start the API, a worker, the sweep and a broker; stop them with Ctrl-C."""
    roots = os.pathsep.join(str(root.expanduser().absolute()) for root in model_root) if model_root else None
    flags = {"data_dir": data_dir, "host": host, "port": port, "model_roots": roots, "device": device}
    settings = apply(flags)
    keep_private(settings)
    with ExitStack() as stack:
        stack.enter_context(_signals_as_interrupts())
        stack.enter_context(_data_folder_lock(settings.data_dir))
        listener = stack.enter_context(bound_socket(settings))
        programs = []
        if not settings.broker_url:
            folder = stack.enter_context(runtime_folder())
            programs.append(broker_program(folder))
            settings = apply({"broker_url": broker_url(folder)})
        configure_logging(settings)
        key, is_new = _prepare_database(settings)
        programs += _service_programs(with_worker=not no_worker)
        known = None if no_worker else own_workers(settings)
        children = Children(programs, environment=dict(os.environ))
        stack.callback(children.stop)
        children.start()
        endpoint = Endpoint(url=_url(settings, listener), key=key, pid=os.getpid())
        if not _serve_api(listener, Announcement(settings, endpoint, is_new, known)):
            raise Unavailable("the API did not start", hint="its own messages are above")


def _service_programs(*, with_worker: bool) -> list[Program]:
    sweep = Program("sweep", sweep_command(), stop_seconds=5.0)
    # A running attempt gives its job back when its worker is told to end; it gets the time to do so.
    worker = Program("worker", worker_command(), stop_seconds=15.0)
    return [worker, sweep] if with_worker else [sweep]


def _prepare_database(settings: Settings) -> tuple[str, bool]:
    """Newest schema, and a key for this user: the stored one if it is still good, else a new one (then True)."""
    from app.store.session import Database, migrate  # noqa: PLC0415
    from app.store.tenancy.keys import authenticate, ensure_tenant, issue_key  # noqa: PLC0415 (needs the `api` extra)

    migrate(settings.database_url)
    database = Database(settings.database_url)
    try:
        stored = load_endpoint(settings.data_dir)
        with database.transaction() as session:
            if stored is not None and stored.key is not None:
                try:
                    authenticate(session, stored.key)
                except Unauthenticated:
                    log.info("stored_key_refused")
                else:
                    return stored.key, False
            tenant = ensure_tenant(session, BOOTSTRAP_TENANT)
            _, plaintext = issue_key(session, tenant.id, name="bootstrap", scopes=frozenset(Scope))
            return plaintext, True
    finally:
        database.close()


def _serve_api(listener: socket.socket, announcement: Announcement) -> bool:
    """Run the API until a signal; whether it ever came up."""
    from app.cli.api_server import Server  # noqa: PLC0415 (needs the `api` extra)

    server = Server()
    ended = threading.Event()

    def announce() -> None:
        while not ended.wait(0.02):
            if server.started:
                announcement.make(ended)
                return

    thread = threading.Thread(target=announce, name="announce")
    thread.start()
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        log.info("interrupted")
    finally:
        ended.set()
        thread.join()
    return server.started


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """SIGTERM and SIGHUP end this process as Ctrl-C does: through every `finally`, so that no child is left.

    uvicorn takes SIGINT and SIGTERM for itself while it serves, and raises them again when it has ended.
    """

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _data_folder_lock(data_dir: Path) -> Iterator[None]:
    """Hold the data folder: a second `serve` on it would fight for workspaces and the stored address.

    Raises:
        Conflict: another `serve` holds it.
    """
    import fcntl  # noqa: PLC0415 (not on Windows, where only `serve` is missing)

    with (data_dir / LOCK_NAME).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stored = load_endpoint(data_dir)
            where = f" at {stored.url}" if stored is not None else ""
            raise Conflict(
                f"a service already runs on {data_dir}{where}", hint="use it, or give another folder with --data-dir"
            ) from None
        yield


def _url(settings: Settings, listener: socket.socket) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)  # noqa: S104 (not bound here)
    return f"http://{host}:{listener.getsockname()[1]}"
