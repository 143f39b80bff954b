"""HTTP connections of a load generator: a request and its answer over one socket, at a tenth of what a client takes.

The generator shares the machine with what it measures, so that a client's own milliseconds would be measured, too.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Connections:
    """Connections to one service, as many as are in use at once, with a key.

    Answers must say their length, as this service's do.
    """

    address: str
    key: str
    _idle: list[Connection] = field(default_factory=list)

    async def ask(self, method: str, path: str, body: object = None) -> tuple[int, bytes]:
        """Status and body of an answer.

        Raises:
            OSError, asyncio.IncompleteReadError: the connection broke.
        """
        sent = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: service\r\nAuthorization: Bearer {self.key}\r\n"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(sent)}\r\n"
        while self._idle:
            connection = self._idle.pop()
            with suppress(OSError, asyncio.IncompleteReadError):  # the service has ended one that lay idle
                return await self._exchange(connection, head.encode() + b"\r\n" + sent)
        return await self._exchange(await self._open(), head.encode() + b"\r\n" + sent)

    async def _exchange(self, connection: Connection, request: bytes) -> tuple[int, bytes]:
        reader, writer = connection
        writer.write(request)
        answer = await reader.readuntil(b"\r\n\r\n")
        lines = answer.split(b"\r\n")
        length = next(int(line[15:]) for line in lines if line[:15].lower() == b"content-length:")
        content = await reader.readexactly(length)
        self._idle.append(connection)
        return int(lines[0].split(b" ")[1]), content

    async def _open(self) -> Connection:
        parts = urlsplit(self.address)
        return await asyncio.open_connection(parts.hostname, parts.port)

    def close(self) -> None:
        """Close those that are idle."""
        for _, writer in self._idle:
            writer.close()


@asynccontextmanager
async def connected(address: str, key: str) -> AsyncIterator[Connections]:
    """Connections that are closed at the end."""
    connections = Connections(address, key)
    try:
        yield connections
    finally:
        connections.close()
