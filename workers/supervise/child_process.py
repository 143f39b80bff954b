"""A child process, alone or with peers: how it is started, heard and ended. It knows nothing of jobs.

Each process leads a process group of its own and has a control pipe as standard input (`workers.child.lifeline` is
the other
end). All of a child's processes report lines on one pipe, so that they are heard in the order in which they spoke.
"""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Self

from workers.child.lifeline import REPORT_FD, SILENCE_SECONDS, SUPERVISOR_PID

MAX_LINE_BYTES = 32 << 20
"""A report names every linear of a model; nothing that a child says is longer."""
PULSE_SECONDS = 1.0
GRACE_SECONDS = 1.0
"""Between asking a child to end and ending it."""
ORPHAN_SECONDS = 1.0
END_SECONDS = 0.01
"""Between two looks whether a child that has closed its report pipe has ended."""

PASSED_ON = ("PATH", "HOME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "SSL_CERT_FILE")
PASSED_ON_PREFIXES = (
    *("LC_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "OMP_", "GOMP_", "MKL_"),
    *("TORCH", "PYTORCH_", "TRITON_", "PYTHON"),
)


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The variables that a child gets of this process's environment: no database, broker, bucket or key is in it."""
    passed = {
        name: value for name, value in os.environ.items() if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)
    }
    return passed | dict(extra)


def cause(codes: Sequence[int | None]) -> int | None:
    """The exit code that is the cause of a child's end, of its own and its peers' (None for those that run).

    A process that loses another ends with an error of its own, so a signal tells more than an exit code.
    """
    if codes[0] == 0:
        return 0
    return min((code for code in codes if code), default=None)


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

    def _keep(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if self._size <= self._limit:
            self._parts.append(chunk)
        else:
            self._parts.clear()

    def _end(self, chunk: bytes) -> bytes | None:
        self._keep(chunk)
        line = b"".join(self._parts) if self._size <= self._limit else None
        self.dropped += line is None
        self._parts, self._size = [], 0
        return line


class ChildProcess:
    """One running child, and its peers if it has any: processes that compute with it and are nothing without it.

    The child ends when its first process does, or when a peer ends in any way but with exit code 0. Leaving the `with`
    block ends all processes and their groups, however the block was left.
    """

    def __init__(
        self,
        arguments: list[str],
        *,
        environment: Mapping[str, str],
        log_path: Path,
        silence_seconds: float,
        peers: Sequence[list[str]] = (),
        given: Sequence[int] = (),
    ) -> None:
        """Start `python -m *arguments`, and the same for each of `peers`; what they print is appended to `log_path`.

        given   open descriptors that they get, too
        """
        variables = {**environment, SUPERVISOR_PID: str(os.getpid()), SILENCE_SECONDS: str(silence_seconds)}
        self._reading, writing = os.pipe()
        self._processes: list[_Process] = []
        self._code: int | None = None
        try:
            for command in (arguments, *peers):
                descriptors = (writing, *given)
                self._processes.append(_Process(command, environment=variables, log_path=log_path, pipes=descriptors))
        except BaseException:
            self._end_groups(0)
            os.close(self._reading)
            raise
        finally:
            os.close(writing)
        os.set_blocking(self._reading, False)
        self._splitter = LineSplitter()
        self._closing = threading.Event()
        self._pulse = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._pulse.start()

    @property
    def pid(self) -> int:
        """Id of the first process."""
        return self._processes[0].pid

    @property
    def pids(self) -> list[int]:
        """Ids of all processes, peers after the first; each is also the id of its group."""
        return [process.pid for process in self._processes]

    @property
    def dropped_lines(self) -> int:
        """Number of lines that were thrown away for their length."""
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
            self._closing.wait(min(timeout, END_SECONDS))  # end of file: do not spin until the process has ended, too
        return []

    def remaining_lines(self) -> list[bytes]:
        """Lines that an ended child had written and nobody has read."""
        lines: list[bytes] = []
        with suppress(BlockingIOError):
            while data := os.read(self._reading, 1 << 20):
                lines += self._splitter.feed(data)
        return lines

    def ended(self) -> bool:
        """True if the child has ended."""
        first, *peers = (process.code() for process in self._processes)
        return first is not None or any(peers)

    def finish(self, grace_seconds: float = GRACE_SECONDS) -> int:
        """End all processes and their groups if they run, and return the exit code (negative: the signal).

        Of a child with peers, the code is that of the process whose end ended the others.
        """
        if self._code is None:
            status = cause([process.code() for process in self._processes])
            self._end_groups(grace_seconds)
            self._code = self._processes[0].bury() if status is None else status
        self._closing.set()
        return self._code

    def _end_groups(self, grace_seconds: float) -> None:
        deadline = time.monotonic() + grace_seconds
        running = [process for process in self._processes if process.code() is None]
        for process in running:
            process.signal(signal.SIGTERM)
        while any(process.code() is None for process in running) and time.monotonic() < deadline:
            time.sleep(0.02)
        for process in self._processes:
            process.signal(signal.SIGKILL)
        for process in self._processes:
            process.bury()

    def _beat(self) -> None:
        """Tell every process each second that its supervisor lives."""
        while not self._closing.wait(PULSE_SECONDS):
            for process in self._processes:
                process.beat()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()
        self._pulse.join()
        for process in self._processes:
            process.close()
        os.close(self._reading)


class _Process:
    """One process of a child, the leader of a process group."""

    def __init__(
        self, arguments: list[str], *, environment: Mapping[str, str], log_path: Path, pipes: tuple[int, ...]
    ) -> None:
        """pipes    descriptors that it gets; the first is the report pipe's writing end"""
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**environment, REPORT_FD: str(pipes[0])},
                pass_fds=pipes,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def code(self) -> int | None:
        """Exit code, negative for a signal, or None while it runs.

        It stays a zombie until `bury`, so that its group's id cannot be given away.
        """
        if self._process.returncode is not None:
            return self._process.returncode
        status = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if status is None:
            return None
        return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the whole group."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def bury(self) -> int:
        """Wait for its end and the exit code; bury what its group leaves behind."""
        if self._process.returncode is None:
            self._process.wait()
            self._reap_orphans()
        return self._process.returncode

    def beat(self) -> None:
        """Write a byte to the control pipe."""
        with suppress(OSError):
            os.write(self._control.fileno(), b".")

    def close(self) -> None:
        """Close the control pipe."""
        self._control.close()

    @property
    def _control(self) -> IO[bytes]:
        assert self._process.stdin is not None  # noqa: S101 (Popen was given PIPE)
        return self._process.stdin

    def _reap_orphans(self) -> None:
        """As process 1 of a container, this process inherits what the child leaves behind, and must bury it."""
        deadline = time.monotonic() + ORPHAN_SECONDS
        with suppress(ChildProcessError):
            while time.monotonic() < deadline:
                if os.waitpid(-self.pid, os.WNOHANG) == (0, 0):
                    time.sleep(0.01)
