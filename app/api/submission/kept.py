"""Answers of the store that are dear and may be a moment old, asked for once for many callers."""

import threading
from collections.abc import Callable
from math import inf
from time import monotonic
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """A value that is asked for at most once in `seconds`; of callers at the same time, one asks and all wait."""

    def __init__(self, ask: Callable[[], Value], seconds: float) -> None:
        self._ask = ask
        self._seconds = seconds
        self._lock = threading.Lock()
        self._value: Value | None = None
        self._until = -inf

    def __call__(self) -> Value:
        """The value, at most `seconds` old. What the question raises is raised, and it is asked again next time."""
        with self._lock:
            if self._value is None or monotonic() >= self._until:
                self._value = self._ask()
                self._until = monotonic() + self._seconds
            return self._value

    def forget(self) -> None:
        """Ask again next time: this process has just changed what the answer is about."""
        self._until = -inf
