"""`python -m workers.child.attempt WORKSPACE [RANK]`: one attempt at one job, in a process of its own, or in several.

A process may be born before there is a job (`workers.child.birth`).

It knows no database, broker, bucket or key, and no network: its order lies in the workspace, its words go through a
pipe, its results into the workspace. Whatever goes wrong becomes one `failed` line and exit code 1.

Of several ranks (0 unless it is said) the first holds the workspace, writes and reports; the others only say what
failed. A rank never waits for the others once it has failed.
"""

import fcntl
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import structlog

from app.many_imports import many_imports
from bitwright.errors import BitwrightError, InternalError, OutOfMemory
from workers.child.birth import born
from workers.child.confinement import limit_to_plan
from workers.child.exceptions import as_bitwright_error
from workers.child.lifeline import EXIT_FAILED, SILENCE_SECONDS, ReportPipe
from workers.child.needs import limit_of, mapped_bytes, needs_of, over_limit, tell_needs
from workers.child.preparation import NOT_NEEDED, prepare, wait_quietly
from workers.disk.orders import AttemptOrder

LOCK_MARGIN_SECONDS = 10.0
"""An abandoned attempt lets go of the workspace after the silence that it tolerates; this comes on top."""

log = structlog.get_logger("workers.child.attempt")


def main(arguments: list[str]) -> NoReturn:
    """Run the attempt whose order lies in the folder `arguments[0]`, as rank `arguments[1]`, and end."""
    birth = born(arguments, prepare)
    report = ReportPipe()
    workspace, rank = birth.workspace, birth.rank
    structlog.contextvars.bind_contextvars(**({"rank": rank} if rank else {}))
    try:
        if rank == 0:
            take_lock(workspace / "lock", seconds=float(os.environ[SILENCE_SECONDS]) + LOCK_MARGIN_SECONDS)
        order = AttemptOrder.model_validate_json((workspace / "order.json").read_bytes())
        run_order(order.renumbered(birth.given), workspace, report, rank)
    except BaseException as error:
        known = within_limit(as_bitwright_error(error))
        log.error("attempt_failed", code=known.code, exc_info=error)
        report.fail(known)
        leave(EXIT_FAILED)
    leave(0)


def leave(code: int) -> NoReturn:
    """End at once: all that is to last is on the disk, to free what torch and its libraries hold takes the interpreter
    half a second, and a device's library may wait for ranks that are gone before it lets the interpreter end.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def take_lock(path: Path, *, seconds: float) -> int:
    """Hold the workspace alone until the process ends, or until the open file that is returned is closed.

    Raises:
        InternalError: another attempt did not let go within `seconds`.
    """
    handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise InternalError("another attempt still holds the workspace") from None
            time.sleep(0.1)
        else:
            return handle


_limit: int | None = None
"""Bytes that this process has limited itself to."""


def limit_memory_to_plan(order: AttemptOrder, needed: Mapping[str, object]) -> None:
    """On a CPU an allocation beyond the plan fails; a device's runtime reserves more than it ever holds."""
    global _limit  # noqa: PLW0603 - a process limits itself once
    limit = limit_of(order, needed)
    if limit is not None and order.device == "cpu":
        _limit = limit
        limit_to_plan(limit, mapped_bytes(order))


def within_limit(error: BitwrightError) -> BitwrightError:
    """The error of an attempt that has limited itself: a lack of memory is then not the machine's."""
    return error if _limit is None or not isinstance(error, OutOfMemory) else over_limit(_limit)


def run_order(order: AttemptOrder, workspace: Path, report: ReportPipe, rank: int = 0) -> None:
    """Do what the order says, with the engine, in this process; the first rank reports the result."""
    if rank == 0:
        # Output is made anew from the finished blocks in state/: what a killed attempt wrote may be half a file.
        shutil.rmtree(workspace / "output", ignore_errors=True)
    limit_memory_to_plan(order, tell_needs(order, report) if rank == 0 and order.tells_needs else needs_of(order))
    wait_quietly()
    # torch takes seconds to load: lock and lifeline come first.
    with many_imports(NOT_NEEDED):
        from workers.engine.reporter import Reporter  # noqa: PLC0415
        from workers.engine.run import assist, run  # noqa: PLC0415

    if rank:
        assist(order, workspace, rank)
    else:
        reporter = Reporter(report.write, order.traceparent)
        try:
            result = run(order, workspace, reporter)
        finally:
            reporter.spans.enter(None)
        report.write(result)


if __name__ == "__main__":
    main(sys.argv[1:])
