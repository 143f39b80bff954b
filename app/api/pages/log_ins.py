"""A limit on log-in attempts that fail: so many for an address in a while, in each process."""

import ipaddress
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from bitwright.errors import TooManyRequests

FAILURES = 10
WINDOW_SECONDS = 300.0
MOST_ADDRESSES = 10_000
"""Addresses that are remembered, the last ones to fail."""
IPV6_PREFIX = 64
"""Bits of an IPv6 address that a provider gives to one customer."""


class LogIns:
    """Failed attempts by address, for any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._failed: OrderedDict[str, deque[float]] = OrderedDict()

    def check(self, address: str) -> None:
        """Nothing, if the address may try again.

        Raises:
            TooManyRequests: it has failed too often a moment ago.
        """
        with self._lock:
            recent = self._recent(whose(address))
        if len(recent) >= FAILURES:
            wait = int(recent[0] + WINDOW_SECONDS - self._clock()) + 1
            raise TooManyRequests(f"{FAILURES} attempts to log in have failed", hint=f"wait {wait} seconds")

    def failed(self, address: str) -> None:
        """Note that an attempt has failed."""
        key = whose(address)
        with self._lock:
            recent = self._recent(key)
            recent.append(self._clock())
            self._failed[key] = recent
            self._failed.move_to_end(key)
            while len(self._failed) > MOST_ADDRESSES:
                self._failed.popitem(last=False)

    def _recent(self, key: str) -> "deque[float]":
        """The failures that count still; the lock is held."""
        found, since = self._failed.get(key, deque(maxlen=FAILURES)), self._clock() - WINDOW_SECONDS
        while found and found[0] <= since:
            found.popleft()
        return found


def whose(address: str) -> str:
    """The address, or of an IPv6 one the network that its owner has."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if ip.version == 4:
        return str(ip)
    return str(ipaddress.ip_network((ip, IPV6_PREFIX), strict=False))
