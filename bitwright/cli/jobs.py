"""`jobs`, `show`, `cancel`, `pause`, `retry`, `download`, `methods`: one request each; `upload`, as many as needed."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from bitwright import Client
from bitwright.cli.connection import DataDirOption, KeyOption, UrlOption, connect
from bitwright.cli.job_details import brought, files_table, training_table
from bitwright.cli.render import (
    err,
    job_line,
    job_table,
    jobs_table,
    method_lines,
    methods_table,
    out,
    report_table,
    times_table,
)
from bitwright.errors import RequestError
from bitwright.files.downloads import OnBytes
from bitwright.files.uploads import choose_files
from bitwright.formats import ADAPTERS_ALONE
from bitwright.job_states import FINAL_STATUSES, JobStatus

JobArgument = Annotated[str, typer.Argument(help="Id of the job, job_...", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def list_jobs(
    status: Annotated[JobStatus | None, typer.Option(help="Only jobs with this status.")] = None,
    method: Annotated[str | None, typer.Option(help="Only jobs of this method or recipe.")] = None,
    model: Annotated[str | None, typer.Option(help="Only jobs on this model.")] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(help="Only jobs with this label, as name=value. May be given several times.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many, newest first.")] = 20,
    as_json: JsonOption = False,
    url: UrlOption = None,
    key: KeyOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """List jobs, newest first; one line each, divided by tabs, when that is not for a terminal."""
    filters = {"status": status, "method": method, "model": model, "metadata": parse_labels(metadata)}
    with connect(url, key, data_dir) as client:
        jobs = [job for job, _ in zip(client.jobs(limit=min(limit, 100), **filters), range(limit), strict=False)]
    if as_json:
        for job in jobs:
            print_json(job)
        return
    console = out()
    if console.is_terminal:
        console.print(jobs_table(jobs))
        return
    for job in jobs:
        typer.echo(job_line(job))


def show(
    job_id: JobArgument,
    as_json: JsonOption = False,
    url: UrlOption = None,
    key: KeyOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Show one job with its attempts and report."""
    with connect(url, key, data_dir) as client:
        job = client.job(job_id)
        artifacts = [] if as_json or job.status not in FINAL_STATUSES else client.artifacts(job_id)
    if as_json:
        print_json(job)
        return
    tables = [job_table(job)]
    if artifacts:
        tables.append(files_table(job, artifacts))
    if job.report is not None:
        trained = training_table(job.report)
        tables += [
            report_table(job.report, brought(job, artifacts)),
            *([] if trained is None else [trained]),
            times_table(job.report),
        ]
    for table in tables:
        out().print(table)
        out().print()


def cancel(job_id: JobArgument, url: UrlOption = None, key: KeyOption = None, data_dir: DataDirOption = None) -> None:
    """Cancel a job; a running one ends within seconds."""
    with connect(url, key, data_dir) as client:
        job = client.cancel(job_id)
    ending = "cancelled" if job.status is JobStatus.CANCELLED else "ends within seconds"
    out().print(f"{job.id} {ending}")


def pause(job_id: JobArgument, url: UrlOption = None, key: KeyOption = None, data_dir: DataDirOption = None) -> None:
    """Pause a job; a running one is given back within seconds, with its finished blocks and checkpoints."""
    with connect(url, key, data_dir) as client:
        job = client.pause(job_id)
    holding = "held" if job.status is JobStatus.QUEUED else "is held within seconds"
    out().print(f"{job.id} {holding}")


def resume(job_id: JobArgument, url: UrlOption = None, key: KeyOption = None, data_dir: DataDirOption = None) -> None:
    """Let workers take a paused job again."""
    with connect(url, key, data_dir) as client:
        job = client.resume(job_id)
    out().print(f"{job.id} {job.status.value}")


def retry(job_id: JobArgument, url: UrlOption = None, key: KeyOption = None, data_dir: DataDirOption = None) -> None:
    """Queue a failed or cancelled job again; its finished blocks are kept."""
    with connect(url, key, data_dir) as client:
        job = client.retry(job_id)
    out().print(f"{job.id} {job.status.value}")


def download(
    job_id: JobArgument,
    folder: Annotated[Path | None, typer.Argument(help="Where to; default: a folder named by the job's id.")] = None,
    format: Annotated[
        str | None,
        typer.Option("--format", help="One checkpoint alone; default: the first that is not native, and its adapter."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Empty the folder first, if it holds another checkpoint.")] = (
        False
    ),
    url: UrlOption = None,
    key: KeyOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Download a job's result; goes on where an earlier download was cut, and checks every file's SHA-256.

    A base and the adapter that belongs to it come together, each in a subfolder.
    """
    with connect(url, key, data_dir) as client:
        target = folder or Path(job_id)
        parts = download_checkpoint(client, job_id, target, format, force=force)
        print_parts(target, parts, [artifact.format for artifact in client.artifacts(job_id)])
    typer.echo(target)


def download_checkpoint(
    client: Client, job_id: str, folder: Path, format: str | None, *, force: bool = False
) -> dict[Path, str]:
    """Download with a progress bar on standard error (none when that is not a terminal); folder -> format."""
    parts = client.parts(job_id, folder, format=format)
    total = sum(artifact.size for artifacts in parts.values() for artifact in artifacts)
    with byte_bar("download", total) as on_bytes:
        client.download_parts(parts, folder, force=force, on_bytes=on_bytes)
    return {destination: artifacts[0].format for destination, artifacts in parts.items()}


def print_parts(folder: Path, parts: Mapping[Path, str], kept: Sequence[str]) -> None:
    """Print the contents of each folder, and the other formats that the job keeps, to standard error."""
    console = err()
    if len(parts) > 1:
        for destination, name in parts.items():
            what = "the adapter of that base" if name in ADAPTERS_ALONE else "the base"
            console.print(f"{destination}: {what}", soft_wrap=True, markup=False)
    others = sorted(set(kept) - set(parts.values()))
    if others:
        console.print(f"{folder} is not all: --format brings {', '.join(others)}", soft_wrap=True, markup=False)


def upload(
    files: Annotated[
        list[Path], typer.Argument(help="A dataset, or a model: its folder or its files.", show_default=False)
    ],
    resume: Annotated[str | None, typer.Option(help="Id of an upload of these files that was cut off.")] = None,
    url: UrlOption = None,
    key: KeyOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Send files to the service; prints the id that a request names as a dataset or a model."""
    chosen = choose_files(files)
    for path, why in chosen.left_out.items():
        err().print(f"left out: {path} ({why})", soft_wrap=True, markup=False)
    existing = [file for file in chosen.files if file.is_file()]
    with connect(url, key, data_dir) as client, byte_bar("upload", sum(f.stat().st_size for f in existing)) as on_bytes:
        sent = client.upload(chosen.files, upload_id=resume, on_bytes=on_bytes)
    typer.echo(sent.id)


@contextmanager
def byte_bar(what: str, total: int) -> Iterator[OnBytes]:
    """A progress bar on standard error, none when that is not a terminal; takes bytes as they move."""
    console = err()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


def methods(
    as_json: JsonOption = False, url: UrlOption = None, key: KeyOption = None, data_dir: DataDirOption = None
) -> None:
    """List quantization methods and recipes; one line each, divided by tabs, when that is not for a terminal."""
    with connect(url, key, data_dir) as client:
        listed = client.methods()
    if as_json:
        print_json(listed)
        return
    console = out()
    if console.is_terminal:
        console.print(methods_table(listed))
        return
    for line in method_lines(listed):
        typer.echo(line)


def parse_labels(labels: list[str] | None) -> dict[str, str]:
    """{"commit": "abc"} from ["commit=abc"].

    Raises:
        RequestError: one has no "=".
    """
    pairs = [label.partition("=") for label in labels or []]
    for name, equals, _ in pairs:
        if not equals or not name:
            hint = "e.g. --metadata commit=abc123"
            raise RequestError(f"{name!r} is not name=value", field="metadata", value=name, hint=hint)
    given = [name for name, _, _ in pairs]
    twice = next((name for name in given if given.count(name) > 1), None)
    if twice is not None:
        detail = f"the label {twice!r} is given twice"
        raise RequestError(detail, field="metadata", value=twice, hint="give each label once")
    return {name: value for name, _, value in pairs}


def print_json(view: BaseModel) -> None:
    """One JSON object on one line."""
    typer.echo(view.model_dump_json())
