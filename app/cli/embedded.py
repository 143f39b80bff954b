"""A whole service of one's own for as long as a `with` block lasts: `bitwright serve` as a child process."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from app.cli.children import tied_to_this_process
from bitwright import Client
from bitwright.endpoint import Endpoint, load_endpoint
from bitwright.errors import BitwrightError, Unavailable

START_SECONDS = 120.0
STOP_SECONDS = 40.0
LOG_NAME = "serve.log"
ONE_JOB = {"BITWRIGHT_SPARES": "0"}
"""A spare takes a processor for seconds, for the job after the next one. A variable that is set goes first."""


class EmbeddedService:
    """`bitwright serve` on a free port of the loopback address. Its log goes to `serve.log` of the data folder."""

    def __init__(self, data_dir: Path, *, model_roots: Sequence[Path] = (), device: str | None = None) -> None:
        self._data_dir = data_dir
        self._flags = ["--data-dir", str(data_dir), "--host", "127.0.0.1", "--port", "0"]
        self._flags += [flag for root in model_roots for flag in ("--model-root", str(root))]
        self._flags += ["--device", device] if device is not None else []
        self._process: subprocess.Popen[bytes] | None = None
        self._endpoint: Endpoint | None = None

    def __enter__(self) -> Self:
        """Start it and wait until it can take jobs.

        Raises:
            Unavailable: it ended or was not ready in time; its last words are in the hint.
        """
        command = [sys.executable, "-P", "-m", "bitwright.cli", "serve", *self._flags]
        with (self._data_dir / LOG_NAME).open("ab") as log:
            # A session of its own: Ctrl-C goes to this process, which then ends the service in order.
            self._process = subprocess.Popen(
                tied_to_this_process(command),
                env=ONE_JOB | os.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._endpoint = self._await_ready(self._process)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The address at which it listens."""
        return self._ready_endpoint().url

    @property
    def pid(self) -> int:
        """Process id of `serve`."""
        assert self._process is not None  # noqa: S101 (inside the `with` block)
        return self._process.pid

    def client(self) -> Client:
        """A new client with the bootstrap key."""
        endpoint = self._ready_endpoint()
        return Client(endpoint.url, endpoint.key)

    def stop(self) -> None:
        """End it and everything that it started."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()  # its children are tied to it and end, too
            process.wait()

    def _ready_endpoint(self) -> Endpoint:
        assert self._endpoint is not None  # noqa: S101 (inside the `with` block)
        return self._endpoint

    def _await_ready(self, process: subprocess.Popen[bytes]) -> Endpoint:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            code = process.poll()
            if code is not None:
                raise Unavailable(f"the service ended with exit code {code}", hint=self._last_words())
            endpoint = load_endpoint(self._data_dir)
            if endpoint is not None and endpoint.pid == process.pid and _is_ready(endpoint):
                return endpoint
            time.sleep(0.1)
        raise Unavailable(f"the service is not ready after {START_SECONDS:.0f} s", hint=self._last_words())

    def _last_words(self) -> str:
        text = (self._data_dir / LOG_NAME).read_text(encoding="utf-8", errors="replace")
        return "\n  ".join(["its log ends with:", *text.splitlines()[-15:]])


def _is_ready(endpoint: Endpoint) -> bool:
    try:
        with Client(endpoint.url, endpoint.key) as client:
            return client.ready()
    except BitwrightError:
        return False
