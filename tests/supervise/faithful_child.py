"""`python -m tests.supervise.faithful_child WHAT`: a child process on the real lifeline, for tests of that alone.

say N           write the numbers below N      wait             say "here" and sleep
deaf            start a child of its own, say its id and sleep, whatever SIGTERM says
end CODE        end at once with this code     supervise LOG    be the supervisor of two deaf children, say all ids
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from workers.child.lifeline import ATTEMPT, JOB_ID, REPORT_FD, follow_supervisor
from workers.supervise.child_process import ChildProcess, child_environment


def main(what: str, argument: str = "") -> None:
    if what == "supervise":
        supervise(Path(argument))
    follow_supervisor()
    report = int(os.environ[REPORT_FD])
    if what == "say":
        with os.fdopen(report, "wb") as pipe:
            pipe.writelines(b"%d\n" % i for i in range(int(argument)))
        return
    if what == "end":
        os._exit(int(argument))
    if what == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        os.write(report, b"%d\n" % grandchild.pid)
    else:
        os.write(report, b"here\n")
    time.sleep(600)


def supervise(log: Path) -> None:
    """Be the supervisor of a deaf child and its deaf peer; print their ids and those of their children."""
    environment = child_environment({name: os.environ[name] for name in (JOB_ID, ATTEMPT)})
    arguments = ["tests.supervise.faithful_child", "deaf"]
    with ChildProcess(
        arguments, environment=environment, log_path=log, silence_seconds=600, peers=[arguments]
    ) as child:
        grandchildren: list[bytes] = []
        while len(grandchildren) < len(child.pids):
            grandchildren += child.lines(0.1)
        os.write(1, b" ".join([*(b"%d" % pid for pid in child.pids), *grandchildren]) + b"\n")
        time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
