"""Keys that have just been found good, and their tenants' policies, so that a caller's next request asks for neither.

What changes a key or its tenant is seen at once by the process that does it (`forget`), and by every other one within
`KNOWN_SECONDS`.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Generic, TypeVar

from sqlalchemy.orm import Session

from app.domain.access import Principal
from app.store.session import Database
from app.store.tenancy.tenants import Policy

KNOWN_SECONDS = 1.0
"""A revoked key is good for so long at the most, in processes that did not revoke it."""
MOST_KNOWN = 10_000

Value = TypeVar("Value")


class KnownKeys:
    """One per process, for any thread. It keeps hashes of keys alone, and refusals not at all.

    ask          the principal of a key by the database; raises `Unauthenticated`
    ask_policy   the policy of a tenant by the database
    """

    def __init__(
        self, ask: Callable[[str], Principal], ask_policy: Callable[[str], Policy], seconds: float = KNOWN_SECONDS
    ) -> None:
        self._principals = _Lately(ask, seconds)
        self._policies = _Lately(ask_policy, seconds)

    def known(self, plaintext: str) -> Principal | None:
        """The principal of a key that was found good a moment ago; None: `look_up` tells."""
        return self._principals.known(_digest(plaintext))

    def look_up(self, plaintext: str) -> Principal:
        """The principal of a key by the database.

        Raises:
            Unauthenticated: see `authenticate`.
        """
        return self._principals.look_up(_digest(plaintext), plaintext)

    def policy(self, tenant_id: str) -> Policy:
        """The policy of a tenant, as it was a moment ago at the most."""
        digest = tenant_id.encode()
        return self._policies.known(digest) or self._policies.look_up(digest, tenant_id)

    @contextmanager
    def changing(self, database: Database) -> Iterator[Session]:
        """A transaction that changes a key or a tenant: what is known of them is forgotten as it ends."""
        try:
            with database.transaction() as session:
                yield session
        finally:
            self.forget()

    def forget(self) -> None:
        """Ask anew: this process has just changed a key or a tenant."""
        self._principals.forget()
        self._policies.forget()


class _Lately(Generic[Value]):
    """Answers of the last moment, by what stands for the question."""

    def __init__(self, ask: Callable[[str], Value], seconds: float) -> None:
        self._ask = ask
        self._seconds = seconds
        self._lock = threading.Lock()
        self._found: dict[bytes, tuple[float, Value]] = {}
        self._changes = 0

    def known(self, digest: bytes) -> Value | None:
        found = self._found.get(digest)
        return found[1] if found is not None and monotonic() < found[0] else None

    def look_up(self, digest: bytes, question: str) -> Value:
        changes, until = self._changes, monotonic() + self._seconds
        value = self._ask(question)
        with self._lock:
            if changes == self._changes:  # else what was read may be from before the change
                self._make_room()
                self._found[digest] = (until, value)
        return value

    def forget(self) -> None:
        with self._lock:
            self._changes += 1
            self._found = {}

    def _make_room(self) -> None:
        if len(self._found) >= MOST_KNOWN:
            at = monotonic()
            self._found = {digest: found for digest, found in self._found.items() if at < found[0]}
        if len(self._found) >= MOST_KNOWN:
            self._found = {}


def _digest(plaintext: str) -> bytes:
    return hashlib.sha256(plaintext.encode(errors="surrogateescape")).digest()
