"""`bitwright export`: other formats of a job's result, made by a job of its own."""

from typing import Annotated

import typer

from bitwright.cli.connection import DataDirOption, KeyOption, UrlOption, connect
from bitwright.cli.job_details import preflight_table
from bitwright.cli.jobs import JobArgument, JsonOption, parse_labels, print_json
from bitwright.cli.render import out
from bitwright.cli.watch import finish, follow_job


def export(
    job_id: JobArgument,
    formats: Annotated[
        list[str], typer.Option("--format", help="A format of GET /v1/formats. May be given several times.")
    ],
    verify: Annotated[
        str | None, typer.Option(help="files: the worker's runtimes read the checkpoints; off, the default: nothing.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Class of the worker: cpu (default) or any.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(help="A label, as name=value. May be given several times.")] = (
        None
    ),
    idempotency_key: Annotated[str | None, typer.Option(help="The same key never makes a second job.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and advise; queue nothing.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the job to its end.")] = False,
    as_json: JsonOption = False,
    url: UrlOption = None,
    key: KeyOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Make other formats of a succeeded job's result; prints the id of the job that makes them."""
    labels = parse_labels(metadata) or None
    with connect(url, key, data_dir) as client:
        if dry_run:
            answer = client.preflight_export(job_id, formats)
            print_json(answer) if as_json or not out().is_terminal else out().print(preflight_table(answer))
            return
        job = client.export(
            job_id, formats, verify=verify, device=device, metadata=labels, idempotency_key=idempotency_key
        )
        if not wait:
            if as_json:
                print_json(job)
            else:
                typer.echo(job.id)
            return
        job = client.wait(job.id) if as_json else follow_job(client, job.id, out())
        artifacts = client.artifacts(job.id)
    finish(job, artifacts, as_json=as_json)
