"""`python -m tests.workers.scripted_worker`: the real worker, whose attempts follow a script."""

import sys

from workers.__main__ import main

if __name__ == "__main__":
    sys.exit(main(attempt_module="tests.workers.scripted_attempt"))
