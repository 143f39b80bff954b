"""Server-sent events: the wire format (HTML standard, section 9.2)."""

from dataclasses import dataclass

READ_TIMEOUT_SECONDS = 45.0
"""Three of the service's keep-alive comments: silence for longer means that the connection is dead."""


@dataclass
class ServerSentEvent:
    """One event of the wire: `id` is the last id seen, `data` its lines joined."""

    id: str = ""
    event: str = "message"
    data: str = ""


class EventParser:
    """Events from the lines of a `text/event-stream` body. An event that the stream's end cuts off never comes."""

    def __init__(self) -> None:
        self._last_id = ""
        self._event = ""
        self._data: list[str] = []

    def feed(self, line: str) -> ServerSentEvent | None:
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
