"""Lifeline and report channel of a child process: it never outlives the supervisor.

Standard input is the control pipe: the supervisor writes a byte a second. End of file means that it died; silence
means that it is stopped, so that its lease may be gone. Either way the child ends at once, with all that it started.
"""

import ctypes
import os
import select
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import structlog

from app.domain.attempt_lines import FailedLine
from app.logs import configure_logging
from bitwright.errors import BitwrightError
from bitwright.events import ErrorData, Message

REPORT_FD = "BITWRIGHT_REPORT_FD"
SUPERVISOR_PID = "BITWRIGHT_SUPERVISOR_PID"
SILENCE_SECONDS = "BITWRIGHT_SILENCE_SECONDS"
JOB_ID, ATTEMPT = "BITWRIGHT_JOB_ID", "BITWRIGHT_ATTEMPT"

EXIT_FAILED = 1
"""A `failed` line says why."""
EXIT_ABANDONED = 76
"""The supervisor is gone or silent; nobody reads this code but a person with a log."""

PR_SET_PDEATHSIG = 1
ATTEMPT_OOM_SCORE, SPARE_OOM_SCORE = 500, 1000
"""Of processes alike the kernel ends that of the highest score first when memory runs out: one that waits."""


def follow_supervisor() -> None:
    """Arrange that this process and all that it starts end with its supervisor. Call it first, before any thread.

    The kernel ends this process when its supervisor dies. A guard, forked here, listens to the control pipe and ends
    the whole process group; it needs nothing from this process, which may be deep in a computation or stopped.
    """
    if os.getpgrp() != os.getpid():
        os.setpgrp()
    with suppress(OSError, AttributeError):  # prctl is Linux's own; elsewhere the guard does the work
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(os.environ[SUPERVISOR_PID]):
        os._exit(EXIT_ABANDONED)
    if os.fork() == 0:
        _guard(sys.stdin.fileno(), float(os.environ[SILENCE_SECONDS]))


def _guard(control: int, silence: float) -> NoReturn:
    """End the process group, this process included, at end of file or after `silence` seconds without a byte."""
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        os.close(int(os.environ[REPORT_FD]))
        while select.select([control], [], [], silence)[0] and os.read(control, 4096):
            pass
    finally:
        os.killpg(0, signal.SIGKILL)
    raise AssertionError("not reached")


def prefer_for_oom_kill(score: int) -> None:
    """Ask the kernel to end this process, not its supervisor, when memory runs out."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(score))


def log_as_json() -> None:
    """Log JSON lines; standard error is the workspace's attempt.log, or a file of a process that has no job yet."""
    configure_logging(SimpleNamespace(log_format="json", log_level="INFO"))


def name_in_log(job_id: str, attempt: int) -> None:
    """Let log lines carry the ids of job and attempt."""
    structlog.contextvars.bind_contextvars(job_id=job_id, attempt=attempt)


class ReportPipe:
    """Writes JSON lines to the supervisor. Safe to call from any thread."""

    def __init__(self) -> None:
        self._fd = int(os.environ[REPORT_FD])
        os.set_inheritable(self._fd, False)
        self._lock = threading.Lock()

    def write(self, line: Message) -> None:
        """Send one line; blocks while the supervisor is slow."""
        data = line.model_dump_json().encode() + b"\n"
        with self._lock:
            while data:
                data = data[os.write(self._fd, data) :]

    def fail(self, error: BitwrightError) -> None:
        """Send the `failed` line of an error."""
        self.write(FailedLine(error=ErrorData.of(error)))
