"""`python -m tests.supervise.skewed_worker SECONDS`: the scripted worker on a machine whose clock is wrong by so much.

Python's own clocks are shifted before anything of ours or of Celery's is imported; what measures intervals is not.
"""

import datetime as clock
import sys
import time
from typing import Any

SECONDS = float(sys.argv.pop(1))
true_time, true_datetime = time.time, clock.datetime


class _AlsoTheTrueOne(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, true_datetime)


class SkewedDatetime(clock.datetime, metaclass=_AlsoTheTrueOne):
    """`datetime` that tells the wrong time."""

    @classmethod
    def now(cls, tz: clock.tzinfo | None = None) -> Any:
        return true_datetime.now(tz) + clock.timedelta(seconds=SECONDS)

    @classmethod
    def utcnow(cls) -> Any:
        return true_datetime.now(clock.UTC).replace(tzinfo=None) + clock.timedelta(seconds=SECONDS)


def main() -> int:
    time.time = lambda: true_time() + SECONDS
    clock.datetime = SkewedDatetime  # type: ignore[misc]
    from workers.__main__ import main as run_worker

    return run_worker(attempt_module="tests.supervise.scripted_attempt")


if __name__ == "__main__":
    sys.exit(main())
