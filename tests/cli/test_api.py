"""`bitwright api`, which containers start: it serves, and it ends within seconds of SIGTERM whatever is open."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from app.cli.api_server import EXIT_HANGING
from app.domain.access import Scope
from app.store.session import Database
from app.store.tenancy.keys import ensure_tenant, issue_key
from tests import servers
from tests.cli.processes import command, eventually

HANGING = """
import time
from app.api import main
from app.cli import api_server
api_server.LAST_SECONDS = 1.0
def hang(): time.sleep(60)
create = main.create_app
def create_app():
    app = create()
    app.add_api_route("/hang", hang)
    return app
main.create_app = create_app
from app.cli.api import api
api()
"""


def start(url: str, folder: Path, *words: str) -> tuple[subprocess.Popen[bytes], str]:
    """The process and its address, once it answers."""
    port = servers.free_port()
    environment = {"BITWRIGHT_DATABASE_URL": url, "BITWRIGHT_DATA_DIR": str(folder), "BITWRIGHT_PORT": str(port)}
    process = subprocess.Popen([sys.executable, *words], env=environment, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None
        try:
            return httpx.get(f"{address}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    assert eventually(answers)
    return process, address


def test_it_ends_within_seconds_and_tells_streams_when_to_come_back(sqlite_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    with database.transaction() as session:
        tenant = ensure_tenant(session, "t").id
        _, key = issue_key(session, tenant, name="k", scopes=frozenset({Scope.SUBMIT}))
    process, address = start(sqlite_url, tmp_path, "-m", "bitwright.cli", "api")
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=address, headers=headers, timeout=20) as client:
        job = client.post("/v1/jobs", json={"model": "o/m", "method": "rtn"}).json()
        url = f"/v1/jobs/{job['id']}/events"
        with client.stream("GET", url, headers={"Accept": "text/event-stream"}) as stream:
            chunks = stream.iter_text()
            while "queued" not in next(chunks):
                pass
            asked = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert "".join(chunks) == "retry: 2000\n\n"
    assert process.wait(10) == 0
    assert time.monotonic() - asked < 5
    database.close()


@pytest.mark.slow
def test_a_thread_that_hangs_does_not_keep_it(sqlite_url: str, tmp_path: Path) -> None:
    process, address = start(sqlite_url, tmp_path, "-c", HANGING)
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as connection:
        connection.sendall(b"GET /hang HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == EXIT_HANGING


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = command("api", "--port", str(taken.getsockname()[1]), "--data-dir", str(tmp_path))
    assert done.returncode != 0
    assert "cannot listen" in done.stderr
