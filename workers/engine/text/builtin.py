"""The builtin text: the running Python's own reference text and docstrings, which every machine has without a download.

It takes seconds to find. A worker finds it once and writes it into a file, which its attempts read; where there is no
such file, or one of another Python, a process finds it itself.
"""

import ast
import json
import os
import pydoc_data.topics
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress
from copy import copy
from functools import cache
from itertools import tee
from pathlib import Path

from workers.disk.orders import BUILTIN_TEXT

SHORTEST_DOCSTRING = 100
"""Characters; shorter ones say little."""
SKIPPED_FOLDERS = frozenset({"test", "tests", "site-packages", "dist-packages", "__pycache__", "idlelib", "pydoc_data"})


def builtin_documents() -> Iterator[str]:
    """The language reference of `pydoc_data.topics`, then the standard library's docstrings; each text once.

    Where nothing is found ahead, a process looks no farther than somebody has read, and once.
    """
    return copy(_builtin())


def write_found() -> None:
    """Write all of it into the file that the environment names, for processes of the same Python."""
    found = {"python": sys.version, "texts": list(_once(_reference_texts()))}
    Path(os.environ[BUILTIN_TEXT]).write_text(json.dumps(found))


@cache
def _builtin() -> Iterator[str]:
    """Never advanced itself; its copies share what they have found."""
    return tee(_once(_found_ahead() or _reference_texts()), 1)[0]


def _found_ahead() -> list[str]:
    """The texts of the file that the environment names; none where it is of no use."""
    with suppress(KeyError, OSError, ValueError):
        found = json.loads(Path(os.environ[BUILTIN_TEXT]).read_text())
        if found["python"] == sys.version:
            return [str(text) for text in found["texts"]]
    return []


def _once(texts: Iterable[str]) -> Iterator[str]:
    seen = set()
    for text in texts:
        if text not in seen:
            seen.add(text)
            yield text


def _reference_texts() -> Iterator[str]:
    topics = pydoc_data.topics.topics
    yield from (topics[name] for name in sorted(topics))
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        if not SKIPPED_FOLDERS & set(file.relative_to(root).parts):
            yield from _docstrings(file)


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= SHORTEST_DOCSTRING:
                yield text
            pending.extend(reversed(node.body))
