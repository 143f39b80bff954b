"""The fenced blocks of the documents: what runs, what does not, and why.

A comment on the line before a fence says what is not so:

    <!-- not run: KIND: the reason -->      it runs nowhere in the tests
    <!-- slow: the reason -->               it runs in the slow tests alone

A document that needs what others made says so anywhere, with their paths from the root of the repository:

    <!-- follows: DOCUMENT DOCUMENT -->     its session begins with the files of their sessions
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.documentation import ROOT

SHELLS = frozenset({"sh", "bash", "shell", "console", "shell-session", "zsh"})
PYTHONS = frozenset({"python", "py", "python3", "pycon"})
FILES = frozenset({"yaml", "yml"})
"""Blocks whose first line is a comment with a file's name are that file."""

FENCE = re.compile(r"^ {0,3}(?P<ticks>`{3,}|~{3,}) *(?P<language>[\w-]*)[^`\n]*$")
MARK = re.compile(r"<!-- (?:not run: (?P<kind>[\w.-]+): (?P<why>.+)|slow: (?P<slow>.+)) -->")
FOLLOWS = re.compile(r"^<!-- follows: (?P<documents>.+) -->$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    line        of its fence, from 1
    kind, why   of a block that is not run
    slow        why it runs in the slow tests alone
    """

    document: Path
    line: int
    language: str
    text: str
    kind: str | None = None
    why: str | None = None
    slow: str | None = None

    @property
    def name(self) -> str:
        return f"{self.document.relative_to(ROOT).as_posix()}:{self.line}"

    @property
    def is_code(self) -> bool:
        """True if a reader would run it."""
        return self.language in SHELLS or self.language in PYTHONS

    @property
    def runs(self) -> bool:
        """True if a test runs it, or writes it as a file for those that run."""
        return (self.is_code or self.language in FILES) and self.kind is None


def documents() -> list[Path]:
    """The pages for users: the README and everything in docs, decisions left out."""
    pages = sorted(path for path in (ROOT / "docs").rglob("*.md") if "adr" not in path.parts)
    return [ROOT / "README.md", *pages]


def blocks_of(document: Path) -> list[Block]:
    """All fenced blocks, first to last."""
    return list(read_blocks(document, document.read_text(encoding="utf-8")))


def followed_by(document: Path) -> list[Path]:
    """The documents that a document follows."""
    marks = FOLLOWS.findall(document.read_text(encoding="utf-8"))
    return [ROOT / path for mark in marks for path in mark.split()]


def read_blocks(document: Path, text: str) -> Iterator[Block]:
    """The fenced blocks of a document's text.

    Raises:
        ValueError: a fence that is not closed.
    """
    lines, number = text.splitlines(), 0
    while number < len(lines):
        opened = FENCE.match(lines[number])
        number += 1
        if opened is None:
            continue
        start, body = number, list[str]()
        while number < len(lines) and lines[number].strip() != opened["ticks"]:
            body.append(lines[number])
            number += 1
        if number == len(lines):
            raise ValueError(f"{document}:{start}: the fence is not closed")
        number += 1
        mark = MARK.fullmatch(lines[start - 2].strip()) if start >= 2 else None
        marked = mark.groupdict() if mark else {}
        yield Block(document, start, opened["language"], "\n".join(body) + "\n", **marked)
