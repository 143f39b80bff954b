"""`report` and `compare`: the page of a job's report, and reports side by side."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.table import Table
from rich.text import Text

from bitwright import Client
from bitwright.cli.comparison import Compared, Row, doubts, figure_rows, settings_rows, size_and_distance, unbeaten
from bitwright.cli.connection import DataDirOption, KeyOption, UrlOption, connect
from bitwright.cli.jobs import JobArgument, JsonOption
from bitwright.cli.render import err, out, tabbed
from bitwright.errors import InvalidRequest, NotFound
from bitwright.formats import first_choice
from bitwright.job_states import without_result
from bitwright.report import Report

PAGE, DOCUMENT = "report.html", "report.json"


def report(
    job_id: JobArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to; default: the job's id with -report.html.")
    ] = None,
    format: Annotated[
        str | None, typer.Option("--format", help="The report as it lies in this checkpoint; its load lines differ.")
    ] = None,
    show: Annotated[
        bool | None, typer.Option("--open/--no-open", help="Open it in a browser; default: on a terminal.")
    ] = None,
    url: UrlOption = None,
    key: KeyOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Save the page of a job's report and open it; prints where it is."""
    target = output or Path(f"{job_id}-{PAGE}")
    with connect(url, key, data_dir) as client:
        save_page(client, job_id, target, format)
    typer.echo(target)
    if out().is_terminal if show is None else show:
        typer.launch(target.resolve().as_uri())


def save_page(client: Client, job_id: str, target: Path, format: str | None) -> None:
    """Download the page in one of a job's checkpoints.

    Raises:
        Conflict: the job has no result yet.
        NotFound: there is no such checkpoint, or it is older than pages are.
    """
    artifacts = client.artifacts(job_id)
    kept = list(dict.fromkeys(artifact.format for artifact in artifacts))
    if not kept:
        raise without_result(job_id, client.job(job_id).status, "report")
    name = format or first_choice(kept)
    if name not in kept:
        raise NotFound(f"job {job_id} has no {name} checkpoint; it has: {', '.join(kept)}", field="format", value=name)
    found = [artifact for artifact in artifacts if artifact.format == name and artifact.path == PAGE]
    if not found:
        hint = f"`bitwright show {job_id}` prints the report of a job of an earlier release"
        raise NotFound(f"the {name} checkpoint of job {job_id} has no {PAGE}", value=name, hint=hint)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".report-") as folder:
        client.download_artifact(found[0], Path(folder)).replace(target)


def compare(
    results: Annotated[
        list[str],
        typer.Argument(help="Two or more: ids of jobs, checkpoint folders, or report.json files.", show_default=False),
    ],
    as_json: JsonOption = False,
    url: UrlOption = None,
    key: KeyOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Put the reports of results side by side: settings, sizes, quality, time. Lines divided by tabs in a pipe."""
    if len(results) < 2:
        hint = "name at least two: jobs, checkpoint folders or report.json files"
        raise InvalidRequest("one result has nothing to be compared with", field="results", value=results[0], hint=hint)
    if all(Path(name).exists() for name in results):
        compared = [Compared(name, read_report(Path(name))) for name in results]
    else:
        with connect(url, key, data_dir) as client:
            compared = [result_of(client, name) for name in results]
    settings, figures = settings_rows(compared), figure_rows(compared)
    if as_json:
        typer.echo(json.dumps(_as_json(compared), indent=2))
        return
    if out().is_terminal:
        out().print(comparison_table(compared, settings, figures))
    else:
        typer.echo(tabbed("", *(result.name for result in compared)))
        for row in (*settings, *figures):
            typer.echo(tabbed(row.name, *row.texts))
    for doubt in doubts(compared):
        err().print(f"careful: {doubt}", style="yellow", soft_wrap=True, markup=False)


def read_report(path: Path) -> Report:
    """The report of a checkpoint folder, or of its report.json.

    Raises:
        InvalidRequest: there is none that this version reads.
    """
    file = path / DOCUMENT if path.is_dir() else path
    try:
        return Report.model_validate_json(file.read_bytes())
    except OSError as error:
        hint = f"name a folder with a {DOCUMENT}, that file, or a job's id"
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}", value=str(path), hint=hint) from error
    except ValidationError as error:
        what = f"{error.errors()[0]['loc']}: {error.errors()[0]['msg']}"
        hint = "it may be of a newer release: update `bitwright`"
        raise InvalidRequest(f"{file} is no report of Bitwright: {what}", value=str(path), hint=hint) from error


def comparison_table(compared: Sequence[Compared], settings: Sequence[Row], figures: Sequence[Row]) -> Table:
    """Settings that differ are yellow, the best of each figure is green; last, which results no other one beats."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for result in compared:
        table.add_column(result.name, overflow="fold", justify="right")
    for row in settings:
        style = "yellow" if row.differs else ""
        table.add_row(row.name, *(Text(text, style=style) for text in row.texts))
    table.add_section()
    for row in figures:
        texts = [Text(text, style="bold green" if n == row.best else "") for n, text in enumerate(row.texts)]
        table.add_row(row.name, *texts)
    ahead = unbeaten([size_and_distance(result.report) for result in compared])
    table.add_row("not beaten by another", *("yes" if n in ahead else "" for n in range(len(compared))))
    return table


def result_of(client: Client, name: str) -> Compared:
    """The result that a name stands for: a job's id, or a path that is there.

    Raises:
        Conflict: the job has no report.
        NotFound: there is no such job.
        InvalidRequest: the path holds no report.
    """
    return Compared(name, read_report(Path(name))) if Path(name).exists() else _of_job(client, name)


def _of_job(client: Client, job_id: str) -> Compared:
    job = client.job(job_id)
    if job.report is None:
        raise without_result(job_id, job.status, "report")
    return Compared(job_id, job.report)


def _as_json(compared: Sequence[Compared]) -> dict[str, object]:
    ahead = unbeaten([size_and_distance(result.report) for result in compared])
    rows = [*settings_rows(compared), *figure_rows(compared)]
    return {
        "results": [result.name for result in compared],
        "rows": {row.name: list(row.texts) for row in rows},
        "best": {row.name: compared[row.best].name for row in rows if row.best is not None},
        "unbeaten": [compared[index].name for index in ahead],
        "doubts": doubts(compared),
    }
