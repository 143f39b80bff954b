"""`bitwright publish`: a job's result on the Hub."""

import time
from pathlib import Path
from typing import Annotated

import typer

from bitwright.cli.connection import DataDirOption, KeyOption, UrlOption, connect
from bitwright.cli.jobs import JobArgument, JsonOption, print_json
from bitwright.cli.render import err, print_error
from bitwright.cli.submit import read_token
from bitwright.job_states import PublicationStatus

POLL_SECONDS = 2.0


def publish(
    job_id: JobArgument,
    hub: Annotated[str, typer.Argument(help="Repository on the Hub, org/name.", show_default=False)],
    public: Annotated[bool, typer.Option("--public", help="Make it public, where it is made.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Commit on top of somebody else's commit; other files are kept.")
    ] = False,
    format: Annotated[str | None, typer.Option("--format", help="This checkpoint alone.")] = None,
    hub_token_file: Annotated[
        Path | None, typer.Option(help="File with a Hub token that may write there; forgotten at the end.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the Hub's answer; the exit code tells.")] = False,
    as_json: JsonOption = False,
    url: UrlOption = None,
    key: KeyOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Send a succeeded job's files to a repository of the Hub, private unless --public. Prints the commit's page."""
    token = None if hub_token_file is None else read_token(hub_token_file)
    with connect(url, key, data_dir) as client:
        told = client.publish(job_id, hub, private=not public, force=force, format=format, hub_token=token)
        while wait and told.status not in (PublicationStatus.DONE, PublicationStatus.FAILED):
            time.sleep(POLL_SECONDS)
            told = client.publication(job_id)
    if as_json:
        print_json(told)
    else:
        typer.echo(told.url or told.status.value)
    if told.status is PublicationStatus.FAILED:
        err().print(f"{job_id} was not published")
        if told.error is not None:
            print_error(told.error.exception())
        raise typer.Exit(1)
