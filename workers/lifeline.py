"""What a child process of the supervisor does so that it never outlives it, and how it reports.

Standard input is the control pipe: the supervisor writes a byte a second. End of file means that it died; silence
means that it is stopped or its machine was asleep, so that its lease may be gone. Either way the child ends at once.
"""

import ctypes
import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import structlog

from app.domain.errors import BitwrightError
from app.domain.events import AttemptLine, ErrorData, FailedLine
from app.logs import configure_logging

REPORT_FD = "BITWRIGHT_REPORT_FD"
SUPERVISOR_PID = "BITWRIGHT_SUPERVISOR_PID"
SILENCE_SECONDS = "BITWRIGHT_SILENCE_SECONDS"
JOB_ID, ATTEMPT = "BITWRIGHT_JOB_ID", "BITWRIGHT_ATTEMPT"

EXIT_FAILED = 1
"""A `failed` line says why."""
EXIT_ABANDONED = 76
"""The supervisor is gone or silent; nobody reads this code but a person with a log."""

PR_SET_PDEATHSIG = 1


def follow_supervisor() -> None:
    """Arrange that this process ends with its supervisor. Call it before anything that takes time."""
    with suppress(OSError, AttributeError):  # prctl is Linux's own; elsewhere the control pipe does the work
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(os.environ[SUPERVISOR_PID]):
        os._exit(EXIT_ABANDONED)
    silence = float(os.environ[SILENCE_SECONDS])
    threading.Thread(target=_watch_control, args=(sys.stdin.fileno(), silence), name="lifeline", daemon=True).start()


def _watch_control(control: int, silence: float) -> None:
    heard = time.monotonic()
    while True:
        readable, _, _ = select.select([control], [], [], max(0.0, heard + silence - time.monotonic()))
        if not readable or not os.read(control, 4096):
            os._exit(EXIT_ABANDONED)
        heard = time.monotonic()


def prefer_for_oom_kill() -> None:
    """Ask the kernel to end this process, not its supervisor, when memory runs out."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


def log_as_json() -> None:
    """Log JSON lines that carry the ids of job and attempt; standard error is the workspace's attempt.log."""
    configure_logging(SimpleNamespace(log_format="json", log_level="INFO"))
    structlog.contextvars.bind_contextvars(job_id=os.environ[JOB_ID], attempt=int(os.environ[ATTEMPT]))


class ReportPipe:
    """Writes JSON lines to the supervisor. Safe to call from any thread."""

    def __init__(self) -> None:
        self._fd = int(os.environ[REPORT_FD])
        os.set_inheritable(self._fd, False)
        self._lock = threading.Lock()

    def write(self, line: AttemptLine) -> None:
        """Send one line; blocks while the supervisor is slow."""
        data = line.model_dump_json().encode() + b"\n"
        with self._lock:
            while data:
                data = data[os.write(self._fd, data) :]

    def fail(self, error: BitwrightError) -> None:
        """Send the `failed` line of an error."""
        self.write(FailedLine(error=ErrorData.of(error)))
