"""Exit codes and signals of an attempt as errors of the error tree."""

import signal

from bitwright.errors import AttemptKilled, BitwrightError, InternalError, OutOfMemory, error_from_code
from bitwright.events import ErrorData


def error_of_exit(code: int, failed: ErrorData | None, *, oom_killed: bool, what: str = "attempt") -> BitwrightError:
    """The error of a child that ended without a result.

    code        exit code, or minus the signal
    failed      what it said itself before it ended, if anything: believed unless a signal came after
    oom_killed  whether the kernel killed for want of memory in the meantime
    """
    if code < 0:
        return _error_of_signal(-code, oom_killed, what)
    if failed is not None:
        error = error_from_code(failed.code, failed.detail, field=failed.field, hint=failed.hint)
        error.value = failed.value
        return error
    return InternalError(f"the {what} ended with exit code {code} and no result; its log has more")


def _error_of_signal(number: int, oom_killed: bool, what: str) -> BitwrightError:
    if number == signal.SIGKILL and oom_killed:
        return OutOfMemory(
            f"the kernel killed the {what} because memory ran out",
            hint="fewer calibration sequences, shorter sequences, or a machine with more memory",
        )
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return AttemptKilled(f"the {what}'s process was ended by {name}", value=name)
