"""`python -m tests.supervise.kernel_child`: what `workers.child.kernels` does, but for the compiling."""

import os
import sys
from pathlib import Path

from workers.child.lifeline import follow_supervisor

follow_supervisor()
Path(os.environ["NUMBA_CACHE_DIR"], "loop.nbc").write_bytes(b"code")
sys.exit(int(os.environ.get("TORCH_TEST_EXIT", "0")))
