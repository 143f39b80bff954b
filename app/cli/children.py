"""The processes that `serve` starts: kept alive, and all ended with it."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import structlog

from bitwright.errors import Unavailable

log = structlog.get_logger(__name__)

POLL_SECONDS = 0.1
FIRST_DELAY_SECONDS = 0.5
LONGEST_DELAY_SECONDS = 30.0
HEALTHY_SECONDS = 60.0
"""A child that lived for so long starts again at once and with the shortest delay after that."""
READY_SECONDS = 60.0


def tied_to_this_process(command: Sequence[str]) -> list[str]:
    """`command` in a form that ends when this process (on Linux: the thread that starts it) ends, however it ends."""
    return [sys.executable, "-P", "-m", "app.cli.tether", str(os.getpid()), *command]


@dataclass(frozen=True)
class Program:
    """A child: its command, how long it may take to end, and how one sees that it is ready (None: at once)."""

    name: str
    command: tuple[str, ...]
    stop_seconds: float = 10.0
    ready: Callable[[], bool] | None = None


@dataclass
class _Child:
    program: Program
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    restart_at: float = 0.0
    crashes: int = 0


@dataclass
class Children:
    """Starts programs in order, starts a crashed one again with a growing delay, and ends them in reverse order.

    One thread starts and ends all of them, and lives as long as they do: on Linux the death signal that ties a child
    to this process (see `app.cli.tether`) follows the thread that started it.
    """

    programs: Sequence[Program]
    environment: Mapping[str, str]
    _stopping: threading.Event = field(default_factory=threading.Event)
    _up: threading.Event = field(default_factory=threading.Event)
    _failure: Unavailable | None = None

    def __post_init__(self) -> None:
        self._children = [_Child(program) for program in self.programs]
        self._thread = threading.Thread(target=self._run, name="children", daemon=True)

    def start(self) -> None:
        """Start all; returns when each is ready.

        Raises:
            Unavailable: one did not become ready in time; all are ended again.
        """
        self._thread.start()
        self._up.wait()
        if self._failure is not None:
            self.stop()
            raise self._failure

    def stop(self) -> None:
        """End all and their process groups; returns when none is left."""
        self._stopping.set()
        self._thread.join()

    def pids(self) -> dict[str, int]:
        """Process id of each child that runs now, by name."""
        return {c.program.name: c.process.pid for c in self._children if c.process is not None}

    def _run(self) -> None:
        try:
            for child in self._children:
                self._spawn(child)
                self._await_ready(child)
                if self._stopping.is_set() or self._failure is not None:
                    return
            self._up.set()
            while not self._stopping.wait(POLL_SECONDS):
                for child in self._children:
                    self._look_after(child)
        finally:
            self._end_all()
            self._up.set()

    def _spawn(self, child: _Child) -> None:
        child.process = subprocess.Popen(
            tied_to_this_process(child.program.command),
            env=dict(self.environment),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        child.started = time.monotonic()
        log.info("child_started", name=child.program.name, pid=child.process.pid)

    def _await_ready(self, child: _Child) -> None:
        ready, process = child.program.ready, child.process
        deadline = time.monotonic() + READY_SECONDS
        while ready is not None and process is not None and not ready():
            code = process.poll()
            if code is not None or time.monotonic() > deadline:
                what = f"ended with exit code {code}" if code is not None else f"is not up after {READY_SECONDS:.0f} s"
                self._failure = Unavailable(f"{child.program.name} {what}", hint="its own messages are above")
                return
            if self._stopping.wait(0.05):
                return

    def _look_after(self, child: _Child) -> None:
        now = time.monotonic()
        if child.process is None:
            if now >= child.restart_at:
                self._spawn(child)
            return
        code = child.process.poll()
        if code is None:
            return
        _signal_group(child.process, signal.SIGKILL)  # what it left behind
        child.crashes = 1 if now - child.started > HEALTHY_SECONDS else child.crashes + 1
        delay = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2 ** (child.crashes - 1))
        child.process, child.restart_at = None, now + delay
        log.warning("child_ended", name=child.program.name, exit_code=code, restart_in_seconds=delay)

    def _end_all(self) -> None:
        """In reverse order; those that no other one waits for are asked to end at once."""
        for child in self._children:
            if child.process is not None and child.program.ready is None and child.process.poll() is None:
                child.process.terminate()
        for child in reversed(self._children):
            if child.process is not None:
                _end(child.process, child.program.stop_seconds, asked=child.program.ready is None)
                log.info("child_stopped", name=child.program.name, exit_code=child.process.returncode)
                child.process = None


def _end(process: subprocess.Popen[bytes], grace_seconds: float, *, asked: bool) -> None:
    """End it, after `grace_seconds` by force; `asked` if it has been told to end."""
    if process.poll() is None:
        if not asked:
            process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace_seconds)
    _signal_group(process, signal.SIGKILL)
    process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
