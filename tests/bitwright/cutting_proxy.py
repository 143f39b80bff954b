"""A TCP proxy on the loopback address that loses connections on purpose, at bytes that a test chooses."""

import socket
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self


@dataclass(frozen=True)
class Pass:
    """Forward everything."""


@dataclass(frozen=True)
class CutAnswer:
    """Forward the request, then break the connection after so many bytes of the answer."""

    after_bytes: int


@dataclass(frozen=True)
class Refuse:
    """Do not forward; answer as a busy front would."""

    status: int
    headers: str = "Retry-After: 0\r\n"


@dataclass(frozen=True)
class Corrupt:
    """Forward everything, with one byte of the answer changed, so many bytes before the answer's end (>= 1)."""

    at_byte: int


Fate = Pass | CutAnswer | Refuse | Corrupt


@dataclass
class CuttingProxy:
    """Each new connection takes the next fate of `plan`; `Pass` when there is none left."""

    upstream: tuple[str, int]
    plan: Sequence[Fate] = ()
    heard: list[bytes] = field(default_factory=list)
    """Bytes that each connection sent, in the order in which they began."""

    def __enter__(self) -> Self:
        self._fates = deque(self.plan)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._closing = False
        self._thread = threading.Thread(target=self._accept, name="proxy", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        # Closing a socket does not wake a thread that accepts on it; a connection does.
        with suppress(OSError), socket.create_connection(self._listener.getsockname()):
            pass
        self._thread.join()
        self._listener.close()
        self.cut_all()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def cut_all(self) -> None:
        """Break every connection that is open now."""
        for connection in list(self._open):
            _break(connection)

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            if self._closing:
                connection.close()
                return
            fate = self._fates.popleft() if self._fates else Pass()
            index = len(self.heard)
            self.heard.append(b"")
            threading.Thread(target=self._serve, args=(connection, fate, index), daemon=True).start()

    def _serve(self, connection: socket.socket, fate: Fate, index: int) -> None:
        self._open.add(connection)
        try:
            if isinstance(fate, Refuse):
                self._refuse(connection, fate, index)
                return
            with socket.create_connection(self.upstream) as upstream:
                self._open.add(upstream)
                requests = threading.Thread(
                    target=self._forward_request, args=(connection, upstream, index), daemon=True
                )
                requests.start()
                self._forward_answer(upstream, connection, fate)
                _break(upstream)
                _break(connection)
                requests.join()
                self._open.discard(upstream)
        finally:
            self._open.discard(connection)
            _break(connection)

    def _refuse(self, connection: socket.socket, fate: Refuse, index: int) -> None:
        while b"\r\n\r\n" not in self.heard[index]:
            self.heard[index] += connection.recv(65536)
        head = f"HTTP/1.1 {fate.status} Busy\r\n{fate.headers}Content-Length: 0\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode())

    def _forward_request(self, connection: socket.socket, upstream: socket.socket, index: int) -> None:
        with suppress(OSError):
            while data := connection.recv(65536):
                self.heard[index] += data
                upstream.sendall(data)
        _break(upstream)

    def _forward_answer(self, upstream: socket.socket, connection: socket.socket, fate: Fate) -> None:
        passed = 0
        with suppress(OSError):
            while data := upstream.recv(65536):
                if isinstance(fate, CutAnswer) and passed + len(data) >= fate.after_bytes:
                    connection.sendall(data[: fate.after_bytes - passed])
                    return
                if isinstance(fate, Corrupt) and passed <= fate.at_byte < passed + len(data):
                    changed = bytearray(data)
                    changed[fate.at_byte - passed] ^= 0xFF
                    data = bytes(changed)
                passed += len(data)
                connection.sendall(data)


def _break(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
