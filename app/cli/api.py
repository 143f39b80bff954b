"""`bitwright api`: the API alone, as installations of several processes start it."""

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from app.cli.environment import apply
from app.cli.private_files import keep_private
from app.logs import configure_logging
from app.settings import Settings, warn_of_unknown_variables
from bitwright.cli.connection import DataDirOption
from bitwright.errors import Conflict

HostOption = Annotated[str | None, typer.Option(help="Address to bind.", show_default="127.0.0.1")]
PortOption = Annotated[
    int | None, typer.Option(min=0, max=65535, help="Port to bind; 0: any free one.", show_default="8080")
]


def api(data_dir: DataDirOption = None, host: HostOption = None, port: PortOption = None) -> None:
    """Run the API for the configured database; SIGTERM ends it within seconds."""
    from app.cli.api_server import Server  # noqa: PLC0415 (needs the `api` extra)

    settings = apply({"data_dir": data_dir, "host": host, "port": port})
    keep_private(settings)
    with bound_socket(settings) as listener:
        configure_logging(settings)
        warn_of_unknown_variables()
        server = Server()
        # uvicorn raises the signal again once all has ended; the exit code is to say that it has.
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            server.run(sockets=[listener])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if not server.started:
        raise typer.Exit(1)


@contextmanager
def bound_socket(settings: Settings) -> Iterator[socket.socket]:
    """A socket on the configured address, bound before anything starts, so that a taken port costs nothing.

    Raises:
        Conflict: the address is not to be had.
    """
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _not_to_be_had(settings, error) from error
    with listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise _not_to_be_had(settings, error) from error
        yield listener


def _not_to_be_had(settings: Settings, error: OSError) -> Conflict:
    detail = f"cannot listen on {settings.host}:{settings.port}: {error.strerror}"
    return Conflict(detail, hint="choose another --port; 0 is any")
