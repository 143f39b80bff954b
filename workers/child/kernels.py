"""`python -m workers.child.kernels`: compiles this machine's loops, finds the builtin text, and ends.

A worker runs it once for a version of the code; attempts begin with a copy of what it made. It knows nothing of jobs.
"""

import os

from app.many_imports import many_imports
from workers.child.lifeline import SPARE_OOM_SCORE, follow_supervisor, prefer_for_oom_kill

LOWEST_PRIORITY = 19


def main() -> None:
    follow_supervisor()
    prefer_for_oom_kill(SPARE_OOM_SCORE)
    os.nice(LOWEST_PRIORITY)
    with many_imports():
        from workers.engine.text.builtin import write_found  # noqa: PLC0415 - seconds
        from workers.numerics.backends.loops_ahead import compile_all  # noqa: PLC0415 - torch

    write_found()
    compile_all()


if __name__ == "__main__":
    main()
