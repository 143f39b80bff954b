"""llama.cpp's shared libraries in a folder: found and told apart by their names alone."""

import re
from itertools import islice
from pathlib import Path

LIBRARY = "libllama.*so*"
VERSION = re.compile(r"libllama\.(?:v|so\.)(\d[\w.]*?)(?:\.so)?$")
MOST = 16


def library_version(folder: Path) -> str | None:
    """The version in the name of libllama in a folder, `unknown` if it has none; None: there is no such library."""
    found = sorted(file.name for file in islice(folder.rglob(LIBRARY), MOST))
    versions = [match[1] for name in found if (match := VERSION.match(name))]
    return (max(versions, key=len) if versions else "unknown") if found else None
