"""The shell command by which this installation's `bitwright` is called."""

import shutil
import sys
from pathlib import Path

NAME = "bitwright"


def how_to_call() -> str | None:
    """The way to call the command in a shell where its name alone is not found; None where it is."""
    script = Path(sys.executable).with_name(NAME)
    on_path = shutil.which(NAME)
    if not script.exists() or (on_path is not None and Path(on_path).resolve() == script.resolve()):
        return None
    activate = script.with_name("activate")
    direct = f"`{_short(script)}`"
    return f"{direct}, or `{NAME}` after `source {_short(activate)}`" if activate.exists() else direct


def _short(path: Path) -> str:
    """The path as it is typed from here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
