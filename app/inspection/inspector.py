"""Looks at checkpoints in limited children: one at a time for each tenant, a few for all of them.

A child gets the bytes that it asks for, and nothing else: it has no folder, no key of a store and no network. Where one
takes more than its limits, it is ended, and the answer says so; the next look starts another.
"""

import atexit
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache

import structlog

from app.domain.inputs.inspection import CheckpointFiles
from app.domain.request.job_request import JobRequest
from app.inspection.lines import COUNT_BYTES, REFUSED, Look, Said, Verdict, Wanted
from app.inspection.own_folder import OwnFolder
from app.limited.limits import Ended, Limits, Outcome
from app.limited.process import LimitedProcess
from bitwright.errors import CorruptCheckpoint, OverLimit, TooManyRequests
from bitwright.events import ErrorData

COMMAND = (sys.executable, "-P", "-m", "app.inspection.child")
LIMITS = Limits(seconds=30.0, memory_bytes=1 << 30, answer_bytes=16 << 20)
"""Of a look."""
OWN_BYTES = 256 << 20
"""Of a child before it looks."""
PIECE_BYTES = 1 << 20
MOST_BYTES = 1 << 30
"""Of a checkpoint's files, all that a look may read."""
AT_ONCE = 2
WAITING = 16
"""Looks of one tenant that may wait for their turn: they hold threads that others need."""
HINT = "mend the checkpoint, or name a smaller one; the same limits hold for everybody"

log = structlog.get_logger(__name__)
Start = Callable[[], LimitedProcess]


@cache
def inspector_of_process() -> "Inspector":
    """The one that a process has, whatever applications it serves; its children end with the process."""
    inspector = Inspector()
    atexit.register(inspector.close)
    return inspector


class Inspector:
    """The children of a process, and the turns of its tenants. For any thread."""

    def __init__(self, limits: Limits = LIMITS, at_once: int = AT_ONCE) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._places = threading.Semaphore(at_once)
        self._idle: list[LimitedProcess] = []
        self._turns: dict[str, threading.Lock] = {}
        self._wanting: Counter[str] = Counter()
        self._folder: OwnFolder | None = None

    def look(self, tenant: str, request: JobRequest, files: CheckpointFiles) -> Verdict:
        """The verdict on a request for a checkpoint.

        Raises:
            OSError: a file cannot be read.
            TooManyRequests: too many looks of the tenant wait.
        """
        sizes = {name: files.size(name) for name in files.names()}
        limits = self._limits
        order = Look(request=request, sizes=sizes, memory_bytes=limits.memory_bytes, seconds=limits.seconds)
        with self._turn(tenant), self._places, self._child() as child:
            return _Watched(child, files, limits).verdict(order)

    def close(self) -> None:
        """End the children; looks that go on are not waited for."""
        with self._lock:
            idle, self._idle = self._idle, []
            folder, self._folder = self._folder, None
        for child in idle:
            child.close()
        if folder is not None:
            folder.remove()

    @contextmanager
    def _turn(self, tenant: str) -> Iterator[None]:
        with self._lock:
            if self._wanting[tenant] > WAITING:
                raise TooManyRequests(
                    f"{WAITING} checkpoints wait to be looked at for this tenant", hint="send fewer jobs at once"
                )
            self._wanting[tenant] += 1
            turn = self._turns.setdefault(tenant, threading.Lock())
        try:
            with turn:
                yield
        finally:
            with self._lock:
                self._wanting[tenant] -= 1
                if not self._wanting[tenant]:
                    del self._wanting[tenant], self._turns[tenant]

    @contextmanager
    def _child(self) -> Iterator[LimitedProcess]:
        """A child, kept for the next look unless this one broke it."""
        with self._lock:
            child = self._idle.pop() if self._idle else None
        if child is None or not child.usable:
            if child is not None:
                child.close()
            child = self._start()
        try:
            yield child
        except BaseException:
            child.close()
            raise
        if child.usable:
            with self._lock:
                self._idle.append(child)
        else:
            child.close()

    def _start(self) -> LimitedProcess:
        with self._lock:
            if self._folder is None:
                self._folder = OwnFolder()
            folder = self._folder.path
        # A thread of a pool ends when it is idle, and would take the child along.
        child = LimitedProcess.start(COMMAND, folder=folder, file_bytes=1 << 20, of_thread=False)
        log.info("inspection_child_started", pid=child.handle.pid)
        return child


class _Watched:
    """One look: what the child wants is read for it, until its verdict comes or its limits are used up."""

    def __init__(self, child: LimitedProcess, files: CheckpointFiles, limits: Limits) -> None:
        self._child, self._files, self._limits = child, files, limits
        self._given = 0

    def verdict(self, order: Look) -> Verdict:
        since = time.monotonic()
        memory = self._limits.memory_bytes + OWN_BYTES
        limits = Limits(self._limits.seconds, memory, self._limits.answer_bytes)
        self._child.send(order.model_dump_json().encode() + b"\n")
        while True:
            outcome = self._child.hear(limits, since)
            if outcome.ended is not Ended.ANSWERED:
                log.warning("inspection_ended", end=outcome.ended.value, words=outcome.words)
                return Verdict(error=ErrorData.of(_of_outcome(outcome)))
            said = Said.model_validate_json(outcome.answer)
            if said.verdict is not None:
                return said.verdict
            if said.wanted is not None:
                self._give(said.wanted)

    def _give(self, wanted: Wanted) -> None:
        """Bytes of a file, as many as it has."""
        length = max(0, min(wanted.length, self._files.size(wanted.name) - wanted.start))
        self._given += length
        if self._given > MOST_BYTES:
            detail = f"to look at the checkpoint takes more than {MOST_BYTES} bytes of its files"
            raise CorruptCheckpoint(detail, field="model", value=self._given, hint=HINT)
        try:
            piece = self._files.read(wanted.name, wanted.start, min(length, PIECE_BYTES))
        except OSError:
            with suppress(OSError):
                self._child.send(REFUSED.to_bytes(COUNT_BYTES, "little"))
            raise
        self._child.send(length.to_bytes(COUNT_BYTES, "little"))
        given = 0
        while piece:
            self._child.send(piece)
            given += len(piece)
            piece = self._files.read(wanted.name, wanted.start + given, min(length - given, PIECE_BYTES))
        if given < length:
            raise OSError(f"{wanted.name} is shorter than it was")


def _of_outcome(outcome: Outcome) -> OverLimit:
    return OverLimit(f"what looks at the checkpoint was ended: {outcome.words}", field="model", hint=HINT)
