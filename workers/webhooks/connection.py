"""Connections to receivers: the name is asked once, every address is judged, and the judged one is connected to.

Nothing comes between the check and the connection, so a name that answers differently a moment later changes nothing.
The time for a whole try is one deadline over all of its reads and writes: a receiver that sends a byte a second gains
nothing.
"""

import socket
import ssl
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import httpcore

from app.domain.webhooks.addresses import Allowed, may_reach

Resolve = Callable[[str, int], Sequence[str]]
MOST_ADDRESSES = 16


class ForbiddenAddress(httpcore.ConnectError):
    """The receiver's name leads to an address that messages do not go to."""


class OutOfTime(httpcore.TimeoutException):
    """The try has lasted as long as it may."""


def addresses_of(host: str, port: int) -> list[str]:
    """Addresses that a name has now, by the system's resolver."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


@dataclass(frozen=True)
class Deadline:
    """The time at which a try ends, of the monotonic clock."""

    at: float

    @classmethod
    def within(cls, seconds: float) -> "Deadline":
        """So many seconds from now."""
        return cls(time.monotonic() + seconds)

    def left(self) -> float:
        """Seconds that are left.

        Raises:
            OutOfTime: none are.
        """
        left = self.at - time.monotonic()
        if left <= 0:
            raise OutOfTime("the receiver took too long")
        return left


class CheckedBackend(httpcore.NetworkBackend):
    """The way of one try into the network."""

    def __init__(
        self, allowed: Allowed, deadline: Deadline, resolver: ThreadPoolExecutor, resolve: Resolve = addresses_of
    ) -> None:
        self._allowed = allowed
        self._deadline = deadline
        self._resolver = resolver
        self._resolve = resolve

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002 (the deadline is over all)
        local_address: str | None = None,  # noqa: ARG002
        socket_options: Iterable[Any] | None = None,  # noqa: ARG002
    ) -> httpcore.NetworkStream:
        """A connection to the first of the name's addresses that takes one.

        Raises:
            ForbiddenAddress: one of them is not to be connected to.
            ConnectError: there is none, or none takes a connection.
            OutOfTime: that took too long.
        """
        addresses = self._lookup(host, port)
        for address in addresses:
            if not may_reach(host, ip_address(address.partition("%")[0]), self._allowed):
                raise ForbiddenAddress(f"{host} has the address {address}, which is not on the public internet")
        last: Exception = httpcore.ConnectError(f"{host} has no address")
        for address in addresses:
            try:
                plain = httpcore.SyncBackend().connect_tcp(address, port, timeout=self._deadline.left())
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                last = error
            else:
                return _TimedStream(plain, self._deadline)
        raise last

    def _lookup(self, host: str, port: int) -> Sequence[str]:
        answer: Future[Sequence[str]] = self._resolver.submit(self._resolve, host, port)
        try:
            return answer.result(self._deadline.left())[:MOST_ADDRESSES]
        except FutureTimeout:
            raise OutOfTime(f"the name {host} was not resolved in time") from None
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"the name {host} was not resolved: {error}") from error


class _TimedStream(httpcore.NetworkStream):
    """A connection whose every step ends at the deadline."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        return self._stream.read(max_bytes, timeout=self._deadline.left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002
        self._stream.write(buffer, timeout=self._deadline.left())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002
    ) -> httpcore.NetworkStream:
        secured = self._stream.start_tls(ssl_context, server_hostname, timeout=self._deadline.left())
        return _TimedStream(secured, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
