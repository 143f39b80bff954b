"""A limited child: a command that gets orders as JSON lines on its input and gives one line for each on its output.

    child = LimitedProcess.start([sys.executable, "-P", "-m", "..."], folder=folder, file_bytes=1 << 28)
    outcome = child.ask(order, Limits(seconds=60, memory_bytes=4 << 30))

It is started confined (`app.limited.launch`) and may wait for its first order as long as its owner likes. Whatever
happens to it while it has one is an `Outcome`: its death, too much time, memory or output. A child that did not answer
is ended, with its whole process group, and takes no further order.

A process that did not start it can use it as well, by its pipes (`Handle`): a supervisor keeps a child warm, and the
attempt asks it.
"""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from app.limited.environment import limited_environment
from app.limited.limits import Ended, Limits, Outcome

LOG = "child.log"
"""In the child's folder: all that it prints to its standard error."""
WATCH_SECONDS = 0.1
NO_PARENT = "0"
"""In place of a process id: whoever is the parent."""
MIB = 1 << 20


@dataclass(frozen=True)
class Handle:
    """The ends of a child's pipes, as descriptors that are passed on, and its process id."""

    orders: int
    answers: int
    pid: int


class LimitedProcess:
    """A child that takes one order after another until it fails at one."""

    def __init__(self, handle: Handle, process: "subprocess.Popen[bytes] | None" = None) -> None:
        self.handle = handle
        self._process = process
        self._usable = True
        self._heard = b""

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        *,
        folder: Path,
        file_bytes: int,
        extra: Mapping[str, str] | None = None,
        of_thread: bool = True,
        user: int = 0,
    ) -> Self:
        """Start a command; its working folder, caches and log are in `folder`, which is made if it is not there.

        extra       variables beside those of `limited_environment`
        of_thread   whether it ends with the thread that starts it; else with its input, which it must watch
        user        number of the user that it goes on as, whose folder it is; 0: this process's own
        """
        folder.mkdir(parents=True, exist_ok=True)
        if user:
            os.chown(folder, user, user)
        parent = str(os.getpid()) if of_thread else NO_PARENT
        launch = [sys.executable, "-P", "-m", "app.limited.launch", str(file_bytes), parent, str(user)]
        environment = limited_environment(folder, extra)
        (their_orders, orders), (answers, their_answers) = os.pipe(), os.pipe()
        try:
            with (folder / LOG).open("wb") as log:
                process = subprocess.Popen(
                    [*launch, *command],
                    stdin=their_orders,
                    stdout=their_answers,
                    stderr=log,
                    env=environment,
                    cwd=folder,
                    start_new_session=True,
                )
        except BaseException:
            os.close(orders)
            os.close(answers)
            raise
        finally:
            os.close(their_orders)
            os.close(their_answers)
        return cls(Handle(orders, answers, process.pid), process)

    @property
    def usable(self) -> bool:
        """True if it takes orders."""
        alive = self._process is None or self._process.poll() is None
        return self._usable and alive

    def ask(self, order: bytes, limits: Limits) -> Outcome:
        """Give an order, a line of JSON without its end, and wait for the answer; from one thread at a time."""
        self.send(order + b"\n")
        return self.hear(limits)

    def send(self, data: bytes) -> None:
        """Write bytes to its input: an order with its end, or what it has asked for. One that ended hears nothing."""
        with suppress(OSError):
            while self.usable and data:
                data = data[os.write(self.handle.orders, data) :]

    def hear(self, limits: Limits, since: float | None = None) -> Outcome:
        """Wait for its next line.

        since   the moment, of `time.monotonic`, from which the limit of time counts; None: now
        """
        if not self._usable:
            return Outcome(Ended.DIED, words="it had ended before it was asked")
        try:
            outcome = self._hear(limits, time.monotonic() if since is None else since)
        except OSError:
            outcome = self._died()
        if outcome.ended is not Ended.ANSWERED:
            self.kill()
        return outcome

    def kill(self) -> None:
        """End the child and its whole group, now."""
        if self._usable:
            self._usable, self._heard = False, b""
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.handle.pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def close(self) -> None:
        """The same, and let go of its pipes."""
        self.kill()
        for descriptor in (self.handle.orders, self.handle.answers):
            with suppress(OSError):
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hear(self, limits: Limits, since: float) -> Outcome:
        deadline = since + limits.seconds
        while True:
            line, newline, rest = self._heard.partition(b"\n")
            if len(line) > limits.answer_bytes:
                return Outcome(Ended.TOO_MUCH_OUTPUT, words=f"it wrote more than {limits.answer_bytes} bytes")
            if newline:
                self._heard = rest
                return Outcome(Ended.ANSWERED, line)
            if select.select([self.handle.answers], [], [], WATCH_SECONDS)[0]:
                chunk = os.read(self.handle.answers, 1 << 16)
                if not chunk:
                    return self._died()
                self._heard += chunk
            elif (used := group_memory(self.handle.pid)) > limits.memory_bytes:
                words = f"it took {used // MIB} MiB of memory, and may take {limits.memory_bytes // MIB}"
                return Outcome(Ended.TOO_MUCH_MEMORY, words=words)
            if time.monotonic() > deadline:
                return Outcome(Ended.TIMED_OUT, words=f"it did not answer within {limits.seconds:g} seconds")

    def _died(self) -> Outcome:
        words = "it ended without an answer"
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                words = f"it ended without an answer, {exit_words(self._process.wait(1.0))}"
        return Outcome(Ended.DIED, words=words)


def exit_words(code: int) -> str:
    """An exit code in words; negative: the signal."""
    if code >= 0:
        return f"with exit code {code}"
    try:
        return f"by {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"


def group_memory(group: int, root: Path = Path("/proc")) -> int:
    """Bytes that the processes of a group hold, mapped files not counted; 0 where the system does not say."""
    total = 0
    for folder in root.iterdir() if root.is_dir() else ():
        if folder.name.isdigit():
            with suppress(OSError, ValueError, IndexError):
                # The name of the program is in brackets, and may hold anything.
                if int((folder / "stat").read_text().rpartition(")")[2].split()[2]) == group:
                    total += _held(folder / "status")
    return total


def held_memory(pid: int, root: Path = Path("/proc")) -> int:
    """Bytes that a process holds, mapped files not counted; 0 where it has ended or the system does not say."""
    with suppress(OSError, ValueError, IndexError):
        return _held(root / str(pid) / "status")
    return 0


def _held(status: Path) -> int:
    lines = (line.split() for line in status.read_text().splitlines())
    return sum(int(line[1]) << 10 for line in lines if line and line[0] in ("RssAnon:", "RssShmem:"))
