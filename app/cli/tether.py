"""`python -m app.cli.tether PARENT COMMAND...`: run a command that ends when process PARENT ends, however it ends.

A small program of its own, because the kernel's death signal is set by the child between fork and exec, and Python
code between the two is not safe in a process with threads. It imports nothing, so that it costs a few milliseconds.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
EXIT_ORPHANED = 75


def main(arguments: list[str]) -> None:
    """Tie this process to its parent, then become the command."""
    parent, command = int(arguments[0]), arguments[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the line above
        sys.exit(EXIT_ORPHANED)
    os.execvp(command[0], command)  # noqa: S606


if __name__ == "__main__":
    main(sys.argv[1:])
