"""An asynchronous client behind the blocking one's interface, so that one test body runs over both."""

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, Self

from bitwright.job_snapshot import JobSnapshot


class EventLoopThread:
    """An event loop in a thread of its own, to which any thread may give work."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="event loop")
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The coroutine's result, or what it raises."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        self.run(self._loop.shutdown_asyncgens())
        self.run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Driven:
    """An object of the asynchronous client; what it would make a caller await is waited for in the call."""

    def __init__(self, inner: Any, loop: EventLoopThread | None = None) -> None:
        self._inner = inner
        self._loop = loop or EventLoopThread()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the client and its event loop."""
        self._loop.run(self._inner.close())
        self._loop.close()

    def __getattr__(self, name: str) -> Any:
        return self._wrapped(getattr(self._inner, name))

    def __repr__(self) -> str:
        return repr(self._inner).removeprefix("Async")

    def _wrapped(self, value: Any) -> Any:
        if value is self._inner:
            return self
        if inspect.iscoroutine(value):
            return self._wrapped(self._loop.run(value))
        if inspect.isasyncgen(value):
            return self._iterated(value)
        if inspect.ismethod(value):
            return lambda *args, **kwargs: self._wrapped(value(*args, **kwargs))
        ours = type(value).__module__.startswith("bitwright.asynchronous")
        return Driven(value, self._loop) if ours or isinstance(value, JobSnapshot) else value

    def _iterated(self, items: AsyncIterator[Any]) -> Iterator[Any]:
        end = object()

        async def following() -> Any:
            return await anext(items, end)

        while (item := self._loop.run(following())) is not end:
            yield self._wrapped(item)
