"""`bitwright serve` with real processes: what it starts, what it keeps alive, what it leaves behind (nothing)."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from app.cli.embedded import LOG_NAME, EmbeddedService
from bitwright.endpoint import load_endpoint
from bitwright.errors import Unavailable
from bitwright.job_states import JobStatus
from tests.cli.processes import alive, bitwright, command, command_of, descendants, eventually

REQUEST = {"model": "org/name", "method": "rtn", "bits": 4}


class EmptyHub(BaseHTTPRequestHandler):
    """Answers as the Hub does about a repository that is not there."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[EmbeddedService]:
    """A service whose Hub has no repository: a job on a model of it fails, and only a worker can say so."""
    with pytest.MonkeyPatch.context() as environment, ThreadingHTTPServer(("127.0.0.1", 0), EmptyHub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        environment.setenv("BITWRIGHT_HUB_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        environment.delenv("BITWRIGHT_SPARES", raising=False)
        with EmbeddedService(folder) as running:
            yield running
        hub.shutdown()


def child(service: EmbeddedService, part: str) -> int | None:
    """The child whose command holds `part`."""
    return next((pid for pid in sorted(descendants(service.pid)) if part in command_of(pid)), None)


def test_address_and_key_are_where_the_other_commands_find_them(service: EmbeddedService, folder: Path) -> None:
    stored = folder / "client.json"
    assert stored.stat().st_mode & 0o777 == 0o600
    shown = bitwright("jobs", "--data-dir", str(folder))
    assert (shown.returncode, shown.stderr) == (0, "")
    key = load_endpoint(folder)
    assert key is not None
    assert key.key is not None
    assert (folder / LOG_NAME).read_text().count(key.key) == 1


def test_a_service_for_one_job_keeps_no_spare(service: EmbeddedService) -> None:
    assert b"BITWRIGHT_SPARES=0\0" in Path(f"/proc/{service.pid}/environ").read_bytes()
    assert eventually(lambda: child(service, "workers") is not None)
    assert child(service, "--spare") is None


def test_it_says_that_it_serves_once_its_worker_lives(service: EmbeddedService, folder: Path) -> None:
    said = (folder / LOG_NAME).read_text
    assert eventually(lambda: "Bitwright serves" in said())
    with service.client() as client:
        alive_now = [worker.id for worker in client.workers()]
    lines = said().splitlines()
    assert f"The API answers at {service.url}" in lines
    assert [line for line in lines if "Bitwright serves" in line] == [
        f"Bitwright serves {service.url} with worker {name}" for name in alive_now
    ]
    assert any("--model-root" in line for line in lines), "nothing local can be read, and it says so"


def test_without_a_worker_it_says_so(tmp_path: Path) -> None:
    service = EmbeddedService(tmp_path, model_roots=[tmp_path])
    service._flags.append("--no-worker")
    with service, service.client() as client:
        said = (tmp_path / LOG_NAME).read_text
        assert eventually(lambda: f"Bitwright serves {service.url} without a worker" in said())
        assert client.workers() == []
    assert f"Local models may be read below: {tmp_path}" in said().splitlines()


def test_a_submitted_job_is_listed_shown_and_cancelled(service: EmbeddedService, folder: Path) -> None:
    where = ("--data-dir", str(folder))
    # A device that this service's worker is not: the job stays in the queue.
    job_id = command("submit", "org/name", "--method", "rtn", "--device", "cuda", *where).stdout.strip()
    assert job_id.startswith("job_")
    assert job_id in command("jobs", "--status", "queued", *where).stdout
    shown = json.loads(command("show", job_id, "--json", *where).stdout)
    assert shown["request"]["quantization"]["method"] == "rtn"
    assert command("cancel", job_id, *where).stdout.strip() == f"{job_id} cancelled"
    watched = command("watch", job_id, *where)
    assert watched.returncode == 1
    assert "cancelled" in watched.stdout
    again = command("cancel", job_id, *where)
    assert again.returncode == 2
    assert again.stderr.startswith("illegal_transition: ")


def test_a_job_that_fails_exits_with_1(service: EmbeddedService, folder: Path) -> None:
    failed = command("submit", "org/name", "--method", "rtn", "--wait", "--data-dir", str(folder))
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert "failed" in failed.stderr
    assert "source_not_found: " in failed.stderr


@pytest.mark.parametrize("killed", ["valkey-server", "-m workers.sweep", "-m workers "])
def test_a_killed_child_comes_back_and_the_service_with_it(service: EmbeddedService, killed: str) -> None:
    assert eventually(lambda: child(service, killed) is not None)
    first = child(service, killed)
    assert first is not None
    os.kill(first, signal.SIGKILL)
    assert eventually(lambda: child(service, killed) not in {None, first})
    with service.client() as client:
        assert client.ready()
        # It fails, and only a worker that claimed it can say so.
        job = client.submit(REQUEST)
        assert client.wait(job.id).status is JobStatus.FAILED


def test_a_second_service_on_the_folder_is_refused(service: EmbeddedService, folder: Path) -> None:
    second = bitwright("serve", "--data-dir", str(folder), "--port", "0")
    assert second.returncode == 2
    assert service.url in second.stderr


def test_a_taken_port_is_a_bad_request(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = bitwright("serve", "--data-dir", str(tmp_path), "--port", str(port))
    assert refused.returncode == 2
    assert f"127.0.0.1:{port}" in refused.stderr


def test_a_service_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "bitwright.db").write_text("this is no database")
    with pytest.raises(Unavailable, match="ended with exit code"), EmbeddedService(tmp_path):
        pass


@pytest.mark.parametrize(
    "signals",
    [[signal.SIGTERM], pytest.param([signal.SIGTERM, signal.SIGINT, signal.SIGHUP], marks=pytest.mark.slow)],
    ids=["one", "each"],
)
def test_a_signal_ends_the_service_and_leaves_no_process_but_the_key(
    tmp_path: Path, signals: list[signal.Signals]
) -> None:
    """Lives of one data folder, each ended by another signal though a stream is open."""
    keys = set()
    for number in signals:
        with EmbeddedService(tmp_path, model_roots=[tmp_path]) as service:
            assert eventually(lambda: child(service, "-m workers ") is not None)
            below = descendants(service.pid)
            runtime = next(part for pid in below for part in command_of(pid).split() if part.endswith("valkey.sock"))
            assert len(below) >= 3
            endpoint = load_endpoint(tmp_path)
            assert endpoint is not None
            keys.add(endpoint.key)
            with service.client() as client:
                stream = client.events(client.submit(REQUEST | {"device": "cuda"}).id)
                next(stream)
                started = time.monotonic()
                os.kill(service.pid, number)
                assert eventually(lambda: not alive(service.pid), seconds=30)
                assert time.monotonic() - started < 25
        assert [command_of(pid) for pid in below if alive(pid)] == [], number
        assert not Path(runtime).parent.exists()
    assert len(keys) == 1
    assert (tmp_path / LOG_NAME).read_text().count("API key, shown once") == 1


def test_nothing_outlives_a_killed_service(service: EmbeddedService) -> None:
    """The last test of this file: the others use the same service."""
    below = descendants(service.pid)
    assert len(below) >= 3
    os.kill(service.pid, signal.SIGKILL)
    assert eventually(lambda: not any(alive(pid) for pid in below), seconds=5)
