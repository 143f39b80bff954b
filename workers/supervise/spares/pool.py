"""The spares of a worker: how many wait, when the next one starts, and when they end so that a job has their memory.

All of it happens in the worker's one thread that runs jobs: the kernel ends a spare when the thread that started it
ends.
"""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import structlog

from app.settings import Settings
from workers.machine import available_threads
from workers.supervise.capacity import Capacity
from workers.supervise.child_env import attempt_user, spare_environment
from workers.supervise.spares.spare import Spare, leftovers
from workers.supervise.spares.stamp import stamp

FOLDER = "spares"
"""In the folder of workspaces: for each worker a folder, for each of its spares a log and caches."""
ENOUGH_MEMORY = 16_000_000_000
"""Bytes of a machine, or of its container, from which on a worker has a spare unless it is told otherwise."""
HOST_BYTES, DEVICE_BYTES = 1 << 30, 600_000_000
"""The most that a spare holds of the machine's memory and of its GPU's."""
NAMES = ("host_memory_bytes", "device_memory_bytes")
"""Of these two in what a job says that it needs."""
MARGIN = 2.0
"""A job's need is told within a factor of about two."""
OLDEST_SECONDS = 3600.0
LOOK_SECONDS = 60.0
"""Between two looks at what waits: of yesterday's code, or older than an hour."""
AGAIN_SECONDS = 60.0
"""After a spare that ended by itself, until the next one."""
MANY_PROCESSORS = 4
LATER_SECONDS = 10.0
"""After an attempt's begin, until the next spare starts where there are fewer: an import takes one for itself."""
LEFTOVER_SECONDS = 86_400.0

log = structlog.get_logger(__name__)


def spares_of(settings: Settings, capacity: Capacity) -> int:
    """The number of spares of a worker: as its settings say, else one where there is memory enough."""
    if settings.spares is not None:
        return settings.spares
    return 1 if capacity.host_memory_bytes >= ENOUGH_MEMORY else 0


def leaves_room(needed: Mapping[str, object], capacity: Capacity, count: int) -> bool:
    """True if a job that says what it needs, in bytes by name, has room beside so many spares."""
    host, device = (value if isinstance(value, int) else 0 for value in map(needed.get, NAMES))
    if capacity.device_memory_bytes is None:
        host, device = host + device, 0  # what would lie on a GPU lies here, too
    elif MARGIN * device + count * DEVICE_BYTES > capacity.device_memory_bytes:
        return False
    return MARGIN * host + count * HOST_BYTES <= capacity.host_memory_bytes


class Spares:
    """Processes that wait to be attempts; none where `count` is 0."""

    def __init__(self, module: str, worker_id: str, settings: Settings, capacity: Capacity) -> None:
        self._module = module
        self._capacity = capacity
        self._settings = settings
        self._silence = float(settings.lease_seconds)
        self._count = spares_of(settings, capacity)
        self._folder = settings.workspace_dir / FOLDER / worker_id
        self._waiting: list[Spare] = []
        self._number = 0
        self._held = False
        self._next_start = self._next_look = 0.0

    @property
    def count(self) -> int:
        """Spares that are to wait while nothing keeps them from it."""
        return self._count

    @property
    def waiting(self) -> tuple[Spare, ...]:
        """Those that have no order, the oldest first."""
        return tuple(self._waiting)

    def tend(self) -> None:
        """Bury what has ended, end what is of yesterday, start what is missing. Takes some milliseconds."""
        if not self._count or self._held:
            return
        self._bury()
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            self._end_stale()
        if len(self._waiting) < self._count and now >= self._next_start:
            self._start()

    def take(self) -> Spare | None:
        """One for the attempt that begins, which is the caller's then; None if none waits."""
        if not self._count:
            return None
        self._bury()
        self._end_stale()
        later = LATER_SECONDS if available_threads() < MANY_PROCESSORS else 0.0
        self._next_start = max(self._next_start, time.monotonic() + later)
        if not self._waiting:
            return None
        best = next((spare for spare in self._waiting if spare.ready), self._waiting[0])
        self._waiting.remove(best)
        return best

    def make_room(self, needed: Mapping[str, object]) -> None:
        """End those that wait if an attempt's job has no room beside them, until `attempt_ended`."""
        if not self._held and not leaves_room(needed, self._capacity, self._count):
            self.give_back()

    def give_back(self) -> None:
        """End those that wait, and start none until `attempt_ended`."""
        self._held = True
        if self._waiting:
            log.info("spares_given_back", pids=[spare.pid for spare in self._waiting])
        self._end_all()

    def attempt_ended(self) -> None:
        """Let spares start again, now."""
        self._held = False
        if self._next_start <= time.monotonic() + LATER_SECONDS:
            self._next_start = 0.0

    def close(self) -> None:
        """End all, and start none any more. Safe to call twice."""
        self._count = 0
        self._end_all()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        self._number += 1
        folder = self._folder / str(self._number)
        environment = self._environment(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for old in leftovers(self._folder.parent, LEFTOVER_SECONDS):
                shutil.rmtree(old, ignore_errors=True)
            # Before it starts: what changes while it imports makes it one of yesterday.
            made_of = self._stamp()
            spare = Spare(
                self._module,
                self._capacity.device.value,
                folder,
                environment=environment,
                silence_seconds=self._silence,
                stamp=made_of,
                user=attempt_user(self._settings),
            )
        except OSError as error:
            self._next_start = time.monotonic() + AGAIN_SECONDS
            log.warning("spare_not_started", error=type(error).__name__)
            return
        self._waiting.append(spare)
        log.info("spare_started", pid=spare.pid)

    def _bury(self) -> None:
        for spare in [spare for spare in self._waiting if spare.child.ended()]:
            self._waiting.remove(spare)
            self._next_start = time.monotonic() + AGAIN_SECONDS
            words = spare.last_words()
            log.warning("spare_lost", pid=spare.pid, code=spare.end(), said=words)

    def _end_stale(self) -> None:
        if not self._waiting:
            return
        current = self._stamp()
        for spare in [s for s in self._waiting if s.stamp != current or s.age > OLDEST_SECONDS]:
            self._waiting.remove(spare)
            log.info("spare_renewed", pid=spare.pid, age=round(spare.age))
            spare.end()

    def _end_all(self) -> None:
        waiting, self._waiting = self._waiting, []
        for spare in waiting:
            spare.end()

    def _stamp(self) -> str:
        """Of a process that is started now; the folder of its own is left out."""
        return stamp(self._environment(self._folder))

    def _environment(self, folder: Path) -> dict[str, str]:
        return spare_environment(self._settings, self._capacity.device, folder)
