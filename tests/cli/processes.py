"""Commands run to their end, here or in a process of their own, and real processes looked at from outside."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest.mock import patch

from typer.testing import CliRunner

from app.settings import get_settings
from bitwright.cli.main import app


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    """True if the condition holds before the time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def alive(pid: int) -> bool:
    """True if the process runs; a zombie does not."""
    try:
        return _stat(pid)[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def descendants(pid: int) -> set[int]:
    """Every process below `pid`, in whatever group or session."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int(_stat(int(entry.name))[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    found, rest = set[int](), {pid}
    while rest:
        rest = {child for child, parent in parents.items() if parent in rest} - found
        found |= rest
    return found


def command_of(pid: int) -> str:
    """The command line of a process; "" if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def bitwright(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, with no settings but those given."""
    return subprocess.run(
        [sys.executable, "-m", "bitwright.cli", *arguments],
        capture_output=True,
        text=True,
        env={**clean_environment(), **environment},
        timeout=120,
        check=False,
    )


def command(*arguments: str, typed: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same in this process, for what needs no process of its own: interpreters take a second to start.

    typed   what the command reads from standard input

    What the command leaves in the environment, in the settings and in the process's umask is taken back.
    """
    get_settings.cache_clear()
    umask = os.umask(0o022)
    os.umask(umask)
    with patch.dict(os.environ, {**clean_environment(), **environment}, clear=True):
        done = CliRunner().invoke(app, arguments, input=typed)
    os.umask(umask)
    get_settings.cache_clear()
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def clean_environment() -> Mapping[str, str]:
    """This process's environment without settings of Bitwright, with wide output and no worker's spare."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BITWRIGHT_")}
    return {**kept, "COLUMNS": "200", "OMP_NUM_THREADS": "1", "BITWRIGHT_SPARES": "0"}


def _stat(pid: int) -> list[str]:
    """State, parent and so on: the fields after the command's name, which may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
