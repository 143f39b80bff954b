"""A connection's way to a server, which can be cut, fall silent, or lose an answer: a TCP port that leads to a socket.

The bytes go through a thread of this process, as through a network between two machines.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

COMMIT = b"COMMIT\x00"
"""The statement as libpq sends it, in either of its protocols."""
CHUNK = 1 << 16
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Link:
    """Connections from a port of `host` to the server behind a Unix socket.

    answers_lost   how often a commit was done and its answer thrown away with the connection
    """

    def __init__(self, socket: Path, host: str = "127.0.0.1") -> None:
        self._socket = socket
        self._host = host
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="link", daemon=True)
        self._open = asyncio.Event()
        self._refuses = False
        self._losing = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.answers_lost = 0
        self.port = 0

    def cut(self) -> None:
        """End all connections, and refuse new ones until `mend`."""
        self._do(self._cut)

    def silence(self) -> None:
        """Hold every byte back, in both directions, until `mend`."""
        self._do(self._open.clear)

    def lose_answers(self, count: int) -> None:
        """Of the next commits, throw the answers away with their connections."""
        self._do(lambda: setattr(self, "_losing", count))

    def mend(self) -> None:
        """Let everything through again."""
        self._do(self._mend)

    def _cut(self) -> None:
        self._refuses = True
        for writer in self._writers:
            writer.transport.abort()

    def _mend(self) -> None:
        self._refuses, self._losing = False, 0
        self._open.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._open.wait()
            if self._refuses:
                return
            there = await asyncio.open_unix_connection(str(self._socket))
            self._writers |= {writer, there[1]}
            await self._carry((reader, writer), there)
        except OSError:
            pass  # the server is away, or one end is
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _carry(self, here: Streams, there: Streams) -> None:
        """Pass bytes on until one end closes."""
        lost = asyncio.Event()
        ways = [
            asyncio.ensure_future(self._forth(here[0], there[1], lost)),
            asyncio.ensure_future(self._back(there[0], here[1], lost)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for writer in (here[1], there[1]):
                writer.transport.abort()
                self._writers.discard(writer)

    async def _forth(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lost: asyncio.Event) -> None:
        while data := await reader.read(CHUNK):
            await self._open.wait()
            if self._losing and COMMIT in data:
                self._losing -= 1
                lost.set()
            writer.write(data)
            await writer.drain()

    async def _back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lost: asyncio.Event) -> None:
        while data := await reader.read(CHUNK):
            await self._open.wait()
            if lost.is_set():
                self.answers_lost += 1
                return
            writer.write(data)
            await writer.drain()

    def _do(self, action: Callable[[], object]) -> None:
        """Act in the link's thread, and wait until it is done."""

        async def act() -> None:
            action()

        self._run(act())

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _start(self) -> None:
        self._open.set()
        server = await asyncio.start_server(self._serve, self._host, 0)
        self.port = server.sockets[0].getsockname()[1]
        self._server = server

    async def _stop(self) -> None:
        self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(TimeoutError):
            self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
