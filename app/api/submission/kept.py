"""Answers of the store that are dear and may be a moment old, asked for once for many callers."""

import threading
from collections.abc import Callable
from math import inf
from time import monotonic, sleep
from typing import Generic, TypeVar

Value = TypeVar("Value")


SHARE = 9
"""After a change it is asked again once this many times the last question's duration is over: a tenth of the time."""
UNWAITED_SHARE = 49
"""The same for a caller who would not wait for the answer: a fiftieth of the time."""


class Kept(Generic[Value]):
    """A value that is asked for at most once in `seconds`, by one of its callers.

    While one asks, the others take the value from before; of the first value they wait for the answer.
    """

    def __init__(self, ask: Callable[[], Value], seconds: float) -> None:
        self._ask = ask
        self._seconds = seconds
        self._lock = threading.Lock()
        self._value: Value | None = None
        self._until = -inf
        self._asked = (-inf, 0.0)

    def __call__(self, *, wait: bool = False) -> Value:
        """The value. What the question raises is raised, and it is asked again next time.

        wait   after a change, sleep until the question may be asked again, instead of taking the value from before
        """
        before = self._value
        if not self._lock.acquire(blocking=wait or before is None) and before is not None:
            return before
        try:
            return self._fresh(wait)
        finally:
            self._lock.release()

    def _fresh(self, wait: bool) -> Value:
        ended, seconds = self._asked
        not_before = ended + (SHARE if wait else UNWAITED_SHARE) * seconds
        if wait and self._until == -inf:
            sleep(max(not_before - monotonic(), 0.0))
        started = monotonic()
        if self._value is None or not_before <= started >= self._until:
            self._value = self._ask()
            ended = monotonic()
            self._until = ended + self._seconds
            self._asked = (ended, ended - started)
        return self._value

    def forget(self) -> None:
        """Ask anew: this process has just changed what the answer is about."""
        self._until = -inf
