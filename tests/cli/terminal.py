"""A command with a terminal of its own, as a person has it."""

import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from tests.cli.processes import clean_environment


def on_terminal(*arguments: str, cwd: Path | None = None) -> tuple[int, str]:
    """Exit code and all that the command shows on a terminal of 200 columns, colours left out."""
    ours, its = pty.openpty()
    environment = {**clean_environment(), "TERM": "xterm"}
    command = [sys.executable, "-m", "bitwright.cli", *arguments]
    try:
        running = subprocess.Popen(
            command, stdin=its, stdout=its, stderr=its, env=environment, cwd=cwd, start_new_session=True
        )
    finally:
        os.close(its)
    shown = bytearray()
    with os.fdopen(ours, "rb", buffering=0) as screen, suppress(OSError):  # EIO: the other end is closed
        while chunk := screen.read(65536):
            shown += chunk
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    return running.wait(60), plain.replace("\r\n", "\n")
