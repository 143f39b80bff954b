"""The blocking client, made from the asynchronous one; `make client` writes it.

The source awaits every request, pause and piece of work on a file; without `async` and `await` it is the blocking
client. `waits.py` is what differs, and is written by hand on both sides. A test holds that the files are those that
this module makes.
"""

import re
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

FOLDER = Path(__file__).resolve().parents[2] / "bitwright"
BY_HAND = frozenset({"__init__.py", "waits.py"})
NOTICE = "# Made from bitwright/asynchronous/{} by `make client`: change it there.\n"
NAMES = MappingProxyType(
    {
        "aclosing": "closing",
        "aclose": "close",
        "aread": "read",
        "aiter_bytes": "iter_bytes",
        "asynccontextmanager": "contextmanager",
        "__aenter__": "__enter__",
        "__aexit__": "__exit__",
        "asynchronous": "blocking",
    }
)
RULES = (
    (r"\basync (?=def\b|with\b|for\b)", ""),
    (r"\(await ((?:[^()]|\([^()]*\))*)\)(?=\.)", r"\1"),
    (r"\bawait ", ""),
    (r"\bAwaitable\[(\w+)\]", r"\1"),
    (r"\bAsyncGenerator\[(\w+), None\]", r"Generator[\1, None, None]"),
    (r"\bAsync(?=[A-Z])", ""),
    (r"for (\w+) in ([\w.]+):\n +yield \1\n", r"yield from \2\n"),
    (r", Awaitable\b", ""),
    (rf"\b({'|'.join(NAMES)})\b", lambda match: NAMES[match[1]]),
)


def blocking(source: str) -> str:
    """A module of the asynchronous client as one of the blocking client, with its imports in order."""
    for pattern, replacement in RULES:
        source = re.sub(pattern, replacement, source)
    for arguments in (["check", "--quiet", "--fix", "--select", "I"], ["format", "--quiet"]):
        command = [sys.executable, "-m", "ruff", *arguments, "--stdin-filename", str(FOLDER / "blocking/x.py"), "-"]
        source = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
    return source


def modules() -> dict[Path, str]:
    """Path and content of each module that is made."""
    sources = sorted(path for path in (FOLDER / "asynchronous").glob("*.py") if path.name not in BY_HAND)
    return {
        FOLDER / "blocking" / path.name: NOTICE.format(path.name) + blocking(path.read_text(encoding="utf-8"))
        for path in sources
    }


def main() -> None:
    """Write the blocking client."""
    for path, content in modules().items():
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
