"""A child process: how it is started, heard and ended. It knows nothing of jobs.

The child leads a process group of its own, reports lines on a pipe, and has a control pipe as standard input
(`workers.lifeline` is the other end).
"""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

from workers.lifeline import REPORT_FD, SILENCE_SECONDS, SUPERVISOR_PID

MAX_LINE_BYTES = 32 << 20
"""A report names every linear of a model; nothing that a child says is longer."""
PULSE_SECONDS = 1.0
GRACE_SECONDS = 1.0
"""Between asking a child to end and ending it."""
ORPHAN_SECONDS = 1.0

PASSED_ON = ("PATH", "HOME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "SSL_CERT_FILE")
PASSED_ON_PREFIXES = ("LC_", "CUDA_", "NVIDIA_", "OMP_", "GOMP_", "MKL_", "TORCH", "PYTORCH_", "TRITON_", "PYTHON")


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """What a child gets of this process's environment: no database, broker, bucket or key is in it."""
    passed = {
        name: value for name, value in os.environ.items() if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)
    }
    return passed | dict(extra)


class LineSplitter:
    """Cuts a stream of bytes into lines and throws lines away that grow beyond `limit` bytes."""

    def __init__(self, limit: int = MAX_LINE_BYTES) -> None:
        self._limit = limit
        self._parts: list[bytes] = []
        self._size = 0
        self.dropped = 0

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes, without their ends."""
        *ended, rest = data.split(b"\n")
        lines = [line for line in map(self._end, ended) if line is not None]
        self._keep(rest)
        return lines

    def _keep(self, part: bytes) -> None:
        self._size += len(part)
        if self._size <= self._limit:
            self._parts.append(part)
        else:
            self._parts.clear()

    def _end(self, part: bytes) -> bytes | None:
        self._keep(part)
        line = b"".join(self._parts) if self._size <= self._limit else None
        self.dropped += line is None
        self._parts, self._size = [], 0
        return line


class ChildProcess:
    """One running child. Leaving the `with` block ends it and its whole group, however the block was left."""

    def __init__(
        self, arguments: list[str], *, environment: Mapping[str, str], log_path: Path, silence_seconds: float
    ) -> None:
        """Start `python -m *arguments`; standard output and error are appended to `log_path`."""
        reading, writing = os.pipe()
        try:
            with log_path.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", *arguments],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env={
                        **environment,
                        REPORT_FD: str(writing),
                        SUPERVISOR_PID: str(os.getpid()),
                        SILENCE_SECONDS: str(silence_seconds),
                    },
                    pass_fds=(writing,),
                    start_new_session=True,
                )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        os.set_blocking(reading, False)
        self._reading = reading
        self._splitter = LineSplitter()
        self._closing = threading.Event()
        self._pulse = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._pulse.start()

    @property
    def pid(self) -> int:
        """Process id; also the id of its group."""
        return self._process.pid

    @property
    def dropped_lines(self) -> int:
        """How many lines were thrown away for their length."""
        return self._splitter.dropped

    def lines(self, timeout: float) -> list[bytes]:
        """Lines that came; waits at most `timeout` seconds for the first byte."""
        readable, _, _ = select.select([self._reading], [], [], timeout)
        if not readable:
            return []
        with suppress(BlockingIOError):
            data = os.read(self._reading, 1 << 20)
            if data:
                return self._splitter.feed(data)
            self._closing.wait(timeout)  # end of file: do not spin until the process has ended, too
        return []

    def remaining_lines(self) -> list[bytes]:
        """What an ended child had written and nobody has read."""
        lines: list[bytes] = []
        with suppress(BlockingIOError):
            while data := os.read(self._reading, 1 << 20):
                lines += self._splitter.feed(data)
        return lines

    def ended(self) -> bool:
        """Whether the child has ended. It stays a zombie, so that its group's id cannot be given away."""
        if self._process.returncode is not None:
            return True
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def finish(self, grace_seconds: float = GRACE_SECONDS) -> int:
        """End the child and its group if they run, and return the exit code (negative: the signal)."""
        if self._process.returncode is None:
            self._end_group(grace_seconds)
            self._process.wait()
            self._reap_orphans()
        self._closing.set()
        return self._process.returncode

    def _end_group(self, grace_seconds: float) -> None:
        deadline = time.monotonic() + grace_seconds
        if not self.ended():
            self._signal(signal.SIGTERM)
        while not self.ended() and time.monotonic() < deadline:
            time.sleep(0.02)
        self._signal(signal.SIGKILL)

    def _reap_orphans(self) -> None:
        """As process 1 of a container, this process inherits what the child leaves behind, and must bury it."""
        deadline = time.monotonic() + ORPHAN_SECONDS
        with suppress(ChildProcessError):
            while time.monotonic() < deadline:
                if os.waitpid(-self.pid, os.WNOHANG) == (0, 0):
                    time.sleep(0.01)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def _beat(self) -> None:
        """Tell the child every second that its supervisor lives."""
        control = self._process.stdin
        assert control is not None  # noqa: S101 (Popen was given PIPE)
        with suppress(OSError):
            while not self._closing.wait(PULSE_SECONDS):
                os.write(control.fileno(), b".")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()
        self._pulse.join()
        if self._process.stdin is not None:
            self._process.stdin.close()
        os.close(self._reading)
