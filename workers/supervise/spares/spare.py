"""One spare: a process that will be an attempt, from its birth to the order that it takes or to its end without one."""

import os
import shutil
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

from workers.child.birth import READY, SPARE, TAKEN
from workers.disk.handover import hand_over
from workers.disk.orders import SpareOrder
from workers.supervise.child_process import ChildProcess

LOG = "spare.log"
"""In the spare's folder: what it prints before it has a job."""
LAST_BYTES = 2000


class Spare:
    """A child process that waits for an order. Leaving the `with` block ends it, and removes its folder."""

    def __init__(
        self,
        module: str,
        device: str,
        folder: Path,
        *,
        environment: Mapping[str, str],
        silence_seconds: float,
        stamp: str = "",
        user: int | None = None,
    ) -> None:
        """Start `python -m module --spare ...` with the variables `environment`; its log and caches are in `folder`.

        stamp   of what it is made of; kept for whoever asks
        user    that it goes on as, whose folder it is; None: this process's
        """
        self.stamp = stamp
        folder.mkdir(parents=True)
        if user is not None:
            hand_over(folder, user)
        self._folder = folder
        self._born = time.monotonic()
        self._heard = b""
        self._code: int | None = None
        self._supervisor, theirs = socket.socketpair()
        with theirs:
            try:
                self.child = ChildProcess(
                    [module, SPARE, str(theirs.fileno()), device],
                    environment=environment,
                    log_path=folder / LOG,
                    silence_seconds=silence_seconds,
                    given=(theirs.fileno(),),
                )
            except BaseException:
                self._supervisor.close()
                shutil.rmtree(folder, ignore_errors=True)
                raise
        self._supervisor.setblocking(False)

    @property
    def pid(self) -> int:
        return self.child.pid

    @property
    def age(self) -> float:
        """Seconds since its birth."""
        return time.monotonic() - self._born

    @property
    def ready(self) -> bool:
        """True once it has nothing left to import or open."""
        return READY in self._listen()

    @property
    def took_order(self) -> bool:
        """True once it has read its order: from then on its end is the attempt's."""
        return TAKEN in self._listen()

    def order(self, order: SpareOrder) -> None:
        """Give it its order; what it does then, `child` hears.

        Raises:
            OSError: it has ended.
        """
        data = order.model_dump_json().encode() + b"\n"
        self._supervisor.setblocking(True)
        try:
            sent = socket.send_fds(self._supervisor, [data], order.given)
            self._supervisor.sendall(data[sent:])
        finally:
            self._supervisor.setblocking(False)

    def last_words(self) -> str:
        """The end of what it printed."""
        try:
            return (self._folder / LOG).read_bytes()[-LAST_BYTES:].decode(errors="replace")
        except OSError:
            return ""

    def end(self) -> int:
        """End it, whatever it does, and return its exit code (negative: the signal). A second call does nothing."""
        if self._code is None:
            # Nothing is lost with one that waits: it gets no time to end by itself.
            self._code = self.child.finish(0)
            self.child.__exit__()
            self._listen()
            self._supervisor.close()
            shutil.rmtree(self._folder, ignore_errors=True)
        return self._code

    def _listen(self) -> bytes:
        with suppress(OSError):
            self._heard += self._supervisor.recv(16)
        return self._heard

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.finish()
        self.end()


def leftovers(folder: Path, unused_seconds: float) -> list[Path]:
    """Folders of spares whose worker was killed: those that nobody has touched for so long."""
    found = []
    with suppress(OSError):
        for entry in os.scandir(folder):
            if time.time() - entry.stat().st_mtime > unused_seconds:
                found.append(Path(entry.path))
    return found
