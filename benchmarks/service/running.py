"""`bitwright api` of this version or of another one, as a process beside the benchmark, with a database of its own."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import psycopg
from sqlalchemy import URL

from tests.servers import free_port, libpq

START_SECONDS = 60.0
BEFORE = ["-m", "uvicorn", "--factory", "app.api.main:create_app"]
"""Start of the API before there was `bitwright api`."""
PREPARATION = """
import sys
from app.domain.access import Scope
from app.store.session import Database, migrate
try:
    from app.store.tenancy.keys import ensure_tenant, issue_key
except ImportError:
    from app.store.keys import ensure_tenant, issue_key
migrate(sys.argv[1])
with Database(sys.argv[1]).transaction() as session:
    tenant = ensure_tenant(session, sys.argv[2]).id
    print(issue_key(session, tenant, name="load", scopes=frozenset({Scope.SUBMIT}))[1])
"""
"""Brings a database to the schema of the version that runs it, and prints a key of a tenant."""


@dataclass(frozen=True)
class RunningApi:
    """An API that answers, and its process."""

    address: str
    pid: int


def prepared(url: str, tenant: str, *, tree: str = "") -> str:
    """A key of the tenant in a database that is brought to the version's own schema."""
    command = [sys.executable, "-P", "-c", PREPARATION, url, tenant]
    environment = {**os.environ, **({"PYTHONPATH": tree} if tree else {})}
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


@contextmanager
def running_api(url: str, *, tree: str = "", broker_url: str = "", **settings: str) -> Iterator[RunningApi]:
    """The API on a database. `tree` is the folder of another version's source."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="bitwright-load-") as folder:
        values = {"DATABASE_URL": url, "DATA_DIR": folder, "PORT": str(port), "LOG_LEVEL": "WARNING", **settings}
        values |= {"BROKER_URL": broker_url} if broker_url else {}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("BITWRIGHT_")}
        environment = {**kept, **{f"BITWRIGHT_{name}": value for name, value in values.items()}}
        command = ["-m", "bitwright.cli", "api"]
        if tree:
            environment["PYTHONPATH"] = tree
            command = [*BEFORE, "--port", str(port), "--no-access-log"]
        process = subprocess.Popen([sys.executable, "-P", *command], env=environment, cwd=tree or None)
        try:
            _await_answer(process, f"http://127.0.0.1:{port}/livez")
            yield RunningApi(f"http://127.0.0.1:{port}", process.pid)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def postgres_pid(url: URL) -> int:
    """Process of the PostgreSQL server on this machine."""
    with psycopg.connect(libpq(url)) as connection:
        folder = connection.execute("SHOW data_directory").fetchone()
    assert folder is not None
    return int((Path(folder[0]) / "postmaster.pid").read_text().split("\n")[0])


def processor_seconds(pid: int) -> float:
    """Processor time so far of a process and its children, with those that have ended."""
    process = psutil.Process(pid)
    return sum(_seconds(each) for each in (process, *process.children(recursive=True)))


def _seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system + times.children_user + times.children_system


def _await_answer(process: subprocess.Popen[bytes], address: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        if process.poll() is not None:
            raise RuntimeError(f"the API ended with {process.returncode}")
        try:
            httpx.get(address, timeout=20)
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return
