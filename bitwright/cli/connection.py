"""Options of every command that talks to a service: its address, the key, the data folder."""

from pathlib import Path
from typing import Annotated

import typer

from bitwright import Client
from bitwright.endpoint import find_endpoint

UrlOption = Annotated[
    str | None, typer.Option("--url", envvar="BITWRIGHT_URL", help="Address of the service.", show_default=False)
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        "--key", envvar="BITWRIGHT_KEY", show_envvar=True, show_default=False, help="API key; better in the variable."
    ),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        envvar="BITWRIGHT_DATA_DIR",
        help="Folder of the embedded service; default: the user's data folder.",
        show_default=False,
        file_okay=False,
    ),
]


def connect(url: str | None, key: str | None, data_dir: Path | None) -> Client:
    """A client for `find_endpoint`."""
    endpoint = find_endpoint(url, key, data_dir)
    return Client(endpoint.url, endpoint.key)
