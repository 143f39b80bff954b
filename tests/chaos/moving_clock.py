"""`python -m tests.chaos.moving_clock FILE`: a real worker whose clock is wrong by the seconds that a file says.

The file is read at every look at the clock, so that it jumps while the worker runs. What measures intervals is not
moved. Python's own clocks are replaced before anything of ours or of Celery's is imported.
"""

import datetime as clock
import sys
import time
from pathlib import Path
from typing import Any

true_time, true_datetime = time.time, clock.datetime
FILE = Path(sys.argv[1]) if __name__ == "__main__" else Path("/nonexistent")


def wrong_by() -> float:
    """Seconds between this clock and the true one."""
    try:
        return float(FILE.read_text() or 0)
    except OSError:
        return 0.0


class _AlsoTheTrueOne(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, true_datetime)


class MovingDatetime(clock.datetime, metaclass=_AlsoTheTrueOne):
    """`datetime` of a clock that jumps."""

    @classmethod
    def now(cls, tz: clock.tzinfo | None = None) -> Any:
        return true_datetime.now(tz) + clock.timedelta(seconds=wrong_by())

    @classmethod
    def utcnow(cls) -> Any:
        return true_datetime.now(clock.UTC).replace(tzinfo=None) + clock.timedelta(seconds=wrong_by())


def main() -> int:
    """Run the worker."""
    del sys.argv[1]
    time.time = lambda: true_time() + wrong_by()
    clock.datetime = MovingDatetime  # type: ignore[misc]
    from workers.__main__ import main as run_worker

    return run_worker()


if __name__ == "__main__":
    sys.exit(main())
