"""Limits of a child that handles a stranger's files, and the ways in which it can end: each of them is a result."""

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True)
class Limits:
    """The most that one order may take.

    seconds        of wall time
    memory_bytes   of all processes of the child's group together, mapped files not counted
    answer_bytes   of its answer
    file_bytes     of each file that it writes, its log included
    """

    seconds: float
    memory_bytes: int
    answer_bytes: int = 1 << 20
    file_bytes: int = 256 << 20


class Ended(StrEnum):
    """The end of an order."""

    ANSWERED = "answered"
    DIED = "died"
    TIMED_OUT = "timed out"
    TOO_MUCH_MEMORY = "too much memory"
    TOO_MUCH_OUTPUT = "too much output"


@dataclass(frozen=True)
class Outcome:
    """The answer to an order, a line without its end; empty unless `ended` is ANSWERED. `words` say it for people."""

    ended: Ended
    answer: bytes = b""
    words: str = ""


def last_lines(text: str, limit: int = 2048) -> str:
    """The end of a log, whole lines as far as they fit into `limit` bytes of UTF-8, else the end of the last one."""
    raw = text.strip().encode()
    if len(raw) <= limit:
        return text.strip()
    kept = raw[-limit:]
    _, newline, lines = kept.partition(b"\n")
    return (lines if newline and lines else kept).decode(errors="ignore").strip()
