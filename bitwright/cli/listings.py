"""`artifacts`, `delete`, `formats`, `workers`: a job's files, the end of a job, and what the service has."""

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

import typer
from pydantic import BaseModel
from rich.table import Table

from bitwright.cli.connection import DataDirOption, KeyOption, UrlOption, connect
from bitwright.cli.jobs import JobArgument, JsonOption, print_json
from bitwright.cli.render import format_age, format_bytes, out, tabbed
from bitwright.errors import RequestError
from bitwright.views import FormatView, WorkerView

ViewT = TypeVar("ViewT", bound=BaseModel)
Cells = Callable[[ViewT], Sequence[object]]


def artifacts(
    job_id: JobArgument,
    as_json: JsonOption = False,
    url: UrlOption = None,
    key: KeyOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """List the files of a succeeded job; one line each, divided by tabs, when that is not for a terminal."""
    with connect(url, key, data_dir) as client:
        files = client.artifacts(job_id)
    _list(
        files,
        as_json,
        ("format", "file", "size", "sha256"),
        lambda file: (file.format, file.path, format_bytes(file.size), file.sha256[:16]),
        lambda file: (file.id, file.format, file.path, file.size, file.sha256),
    )


def delete(
    job_id: JobArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    url: UrlOption = None,
    key: KeyOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Delete a finished job with its events and files; it cannot be brought back."""
    if not yes:
        _ask(f"Delete {job_id} with all its files?")
    with connect(url, key, data_dir) as client:
        client.delete(job_id)
    out().print(f"{job_id} deleted")


def _ask(question: str) -> None:
    """Go on if the answer is yes.

    Raises:
        typer.Abort: it is no.
        RequestError: nobody is there to answer.
    """
    try:
        agreed = typer.confirm(question)
    except typer.Abort as abort:
        if sys.stdin.isatty():
            raise
        typer.echo(err=True)
        hint = "add --yes where nobody can be asked"
        raise RequestError("the question has no answer", field="yes", hint=hint) from abort
    if not agreed:
        raise typer.Abort


def formats(
    as_json: JsonOption = False, url: UrlOption = None, key: KeyOption = None, data_dir: DataDirOption = None
) -> None:
    """List checkpoint formats and what loads them; one line each, divided by tabs, when that is not for a terminal."""
    with connect(url, key, data_dir) as client:
        listed = client.formats()
    _list(
        listed,
        as_json,
        ("format", "what it is", "loads in"),
        lambda each: (each.name, each.summary, ", ".join(_runtimes(each)) or "Bitwright"),
        lambda each: (each.name, each.title, ",".join(_runtimes(each))),
    )


def workers(
    as_json: JsonOption = False, url: UrlOption = None, key: KeyOption = None, data_dir: DataDirOption = None
) -> None:
    """List workers and what each is at; one line each, divided by tabs, when that is not for a terminal."""
    with connect(url, key, data_dir) as client:
        listed = client.workers()
    _list(
        listed,
        as_json,
        ("worker", "device", "job", "seen", "reads results in"),
        lambda each: (each.id, each.device, each.job_id or "", format_age(each.last_seen_at), _reads(each)),
        lambda each: (each.id, each.device, each.job_id or "", each.last_seen_at.isoformat(timespec="seconds")),
    )


def _runtimes(listed: FormatView) -> list[str]:
    return list(dict.fromkeys(runtime.runtime for runtime in listed.runtimes))


def _reads(worker: WorkerView) -> str:
    return ", ".join(f"{name} {version}" for name, version in (worker.runtimes or {}).items())


def _list(
    views: Sequence[ViewT], as_json: bool, columns: Sequence[str], cells: Cells[ViewT], fields: Cells[ViewT]
) -> None:
    """Print views: JSON for programs that ask for it, a table in a terminal, else a line each divided by tabs."""
    console = out()
    if as_json:
        for view in views:
            print_json(view)
    elif console.is_terminal:
        table = Table(box=None, pad_edge=False)
        for column in columns:
            table.add_column(column, overflow="fold")
        for view in views:
            table.add_row(*map(str, cells(view)))
        console.print(table)
    else:
        for view in views:
            typer.echo(tabbed(*fields(view)))
