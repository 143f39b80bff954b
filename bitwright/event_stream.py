"""Server-sent events: the wire format (HTML standard, section 9.2)."""

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass

LINE_END = re.compile(r"\r\n|\n|\r")
"""All that ends a line here. `str.splitlines`, by which httpx reads lines, ends one at U+2028, U+2029 and U+0085 too,
which JSON may hold as they are."""

READ_TIMEOUT_SECONDS = 45.0
"""Three of the service's keep-alive comments: silence for longer means that the connection is dead."""


@dataclass
class ServerSentEvent:
    """One event of the wire: `id` is the last id seen, `data` its lines joined."""

    id: str = ""
    event: str = "message"
    data: str = ""


class EventParser:
    """Events from the bytes of a `text/event-stream` body. An event that the stream's end cuts off never comes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""
        self._last_id = ""
        self._event = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[ServerSentEvent]:
        """The events that these bytes complete, wherever they are cut."""
        self._rest += self._decoder.decode(chunk)
        # A carriage return at the end may be half of a line's end.
        held = "\r" if self._rest.endswith("\r") else ""
        *lines, self._rest = LINE_END.split(self._rest.removesuffix(held))
        self._rest += held
        for line in lines:
            if (event := self._line(line)) is not None:
                yield event

    def _line(self, line: str) -> ServerSentEvent | None:
        """The event that this line completes, without its line end."""
        if line == "":
            event = ServerSentEvent(self._last_id, self._event or "message", "\n".join(self._data))
            complete = bool(self._data)
            self._event, self._data = "", []
            return event if complete else None
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._last_id = value
        return None
