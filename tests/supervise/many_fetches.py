"""`python -m tests.supervise.many_fetches WORKSPACE ...`: several fetches, one after the other, in one process.

Most of a fetch's time is the start of its process. Their lines go where REPORT_FD says, as those of one fetch do.
"""

import sys
from pathlib import Path

from workers.child.fetch import obey
from workers.child.lifeline import ReportPipe

if __name__ == "__main__":
    pipe = ReportPipe()
    for folder in sys.argv[1:]:
        obey(Path(folder).absolute(), pipe)
