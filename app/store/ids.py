"""Prefixed ids that sort by time: `job_` and 26 characters, 48 bits of milliseconds and 80 random bits."""

import re
import secrets
import threading
import time
from typing import Literal

from bitwright.errors import NotFound

ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
"""Crockford's base 32 in lower case, in ASCII order, so that text order is time order."""

Prefix = Literal["job", "art", "upl", "key", "tnt", "wrk", "aud", "whe", "whd", "msg"]
RANDOM_BITS = 80
SHAPE = re.compile(rf"[a-z]{{3}}_[{ALPHABET}]{{26}}")


class _Sequence:
    """Numbers that only grow within this process, even when many are taken in one millisecond."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def take(self) -> int:
        fresh = (time.time_ns() // 1_000_000 << RANDOM_BITS) | secrets.randbits(RANDOM_BITS)
        with self._lock:
            self._last = max(fresh, self._last + 1)
            return self._last


_SEQUENCE = _Sequence()


def new_id(prefix: Prefix) -> str:
    """A new id; of two made by one process, the later one is greater."""
    number = _SEQUENCE.take()
    digits = (ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))
    return f"{prefix}_{''.join(digits)}"


def is_id(prefix: Prefix, text: str) -> bool:
    """True if `text` has the shape of an id with this prefix."""
    return text.startswith(prefix + "_") and SHAPE.fullmatch(text) is not None


def id_pattern(prefix: Prefix) -> str:
    """The shape of an id with this prefix, for a JSON schema."""
    return f"^{prefix}_[{ALPHABET}]{{26}}$"


def require_id(prefix: Prefix, text: str, kind: str) -> str:
    """`text`, if it has an id's shape.

    Raises:
        NotFound: it has not, so nothing of that kind can have it.
    """
    if not is_id(prefix, text):
        raise NotFound(f"there is no {kind} {text[:64]!r}", value=text)
    return text
