"""`python -m tests.supervise.scripted_worker`: the real worker, whose attempts follow a script."""

import sys

from workers.__main__ import main

if __name__ == "__main__":
    sys.exit(main(attempt_module="tests.supervise.scripted_attempt"))
