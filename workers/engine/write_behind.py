"""What must become durable is written in a thread while the next block begins.

The rule that bounds what a kill costs: whoever computes waits, before it computes on, for all that was given to be
written (`WriteBehind.wait`). So at any moment either the block in hand or the one before it can be lost, never both.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from workers.engine.side_stream import SideStream, mark

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
            Exception: what the first write that failed raised, as it was.
        """
        given, self._given = self._given, []
        for future in given:
            future.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)
        if error is None:
            self.wait()
