"""`bitwright uploads`: files that were sent to the service, so that a request can name them again."""

from collections.abc import Iterable
from enum import StrEnum
from itertools import islice
from typing import Annotated

import typer
from rich.table import Table

from bitwright.cli.connection import DataDirOption, KeyOption, UrlOption, connect
from bitwright.cli.jobs import JsonOption, print_json
from bitwright.cli.render import format_age, format_bytes, out, tabbed
from bitwright.views import UploadView


class UploadStatus(StrEnum):
    """Completeness of an upload: all files have arrived, or not."""

    OPEN = "open"
    COMPLETE = "complete"


def list_uploads(
    status: Annotated[UploadStatus | None, typer.Option(help="Only uploads with this status.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many, newest first.")] = 20,
    as_json: JsonOption = False,
    url: UrlOption = None,
    key: KeyOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """List uploads, newest first; one line each, divided by tabs, when that is not for a terminal."""
    with connect(url, key, data_dir) as client:
        uploads = list(islice(client.uploads(limit=min(limit, 100), status=status), limit))
    console = out()
    if as_json:
        for upload in uploads:
            print_json(upload)
    elif console.is_terminal:
        console.print(uploads_table(uploads))
    else:
        for upload in uploads:
            typer.echo(upload_line(upload))


def uploads_table(uploads: Iterable[UploadView]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("upload", "status", "size", "created", "files"):
        table.add_column(column, overflow="fold", no_wrap=column == "upload")
    for upload in uploads:
        total = sum(file.size for file in upload.files)
        arrived = sum(file.offset for file in upload.files)
        size = format_bytes(total) if arrived == total else f"{format_bytes(arrived)} of {format_bytes(total)}"
        names = ", ".join(file.name for file in upload.files)
        table.add_row(upload.id, upload.status, size, format_age(upload.created_at), names)
    return table


def upload_line(upload: UploadView) -> str:
    """An upload as one line for programs: id, status, bytes, time of creation, names."""
    total, created = sum(file.size for file in upload.files), upload.created_at.isoformat(timespec="seconds")
    return tabbed(upload.id, upload.status, total, created, *(file.name for file in upload.files))
