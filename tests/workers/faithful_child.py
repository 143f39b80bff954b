"""`python -m tests.workers.faithful_child WHAT`: a child process on the real lifeline, for tests of that alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from workers.lifeline import ATTEMPT, JOB_ID, REPORT_FD, follow_supervisor
from workers.process import ChildProcess, child_environment


def main(what: str, argument: str = "") -> None:
    if what == "supervise":
        supervise(Path(argument))
    follow_supervisor()
    report = int(os.environ[REPORT_FD])
    if what == "say":
        with os.fdopen(report, "wb") as pipe:
            pipe.writelines(b"%d\n" % i for i in range(int(argument)))
        return
    if what == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        os.write(report, b"%d\n" % grandchild.pid)
    else:
        os.write(report, b"here\n")
    time.sleep(600)


def supervise(log: Path) -> None:
    """Be the supervisor of a deaf child; print its id and its child's."""
    environment = child_environment({name: os.environ[name] for name in (JOB_ID, ATTEMPT)})
    arguments = ["tests.workers.faithful_child", "deaf"]
    with ChildProcess(arguments, environment=environment, log_path=log, silence_seconds=600) as child:
        while not (grandchild := child.lines(0.1)):
            pass
        os.write(1, b"%d %s\n" % (child.pid, grandchild[0]))
        time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
