"""Durable writes in a thread of their own while the next block is worked on.

On a GPU the thread packs and copies on a stream of its own. Errors of the thread are raised in the thread that waits.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from workers.engine.device.side_stream import SideStream, mark

T = TypeVar("T")


class WriteBehind:
    """Runs what it is given in one thread, in order. Leaving the context waits for all of it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = SideStream(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write-behind")
        self._given: list[Future[Any]] = []

    def give(self, write: Callable[[], T]) -> Future[T]:
        """Has `write` run when the device has done what the calling thread gave it before; what it will return."""
        before = mark(self._device)

        def run() -> T:
            with self._side.running(after=before):
                return write()

        future = self._thread.submit(run)
        self._given.append(future)
        return future

    def wait(self) -> None:
        """Returns when all that was given is written.

        Raises:
            Exception: what the first write that failed raised, as it was; again at every later call.
        """
        while self._given:
            self._given[0].result()
            self._given.pop(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)
        if error is None:
            self.wait()
