"""`bitwright check`: a job from a request in the repository, judged against an earlier result, for CI."""

from pathlib import Path
from time import monotonic
from typing import Annotated

import typer

from bitwright import Client
from bitwright.cli.comparison import Compared
from bitwright.cli.connection import DataDirOption, KeyOption, UrlOption, connect
from bitwright.cli.gates import Check, Outcome, failure, gates, judge, verdict
from bitwright.cli.jobs import parse_labels
from bitwright.cli.render import err
from bitwright.cli.reports import result_of
from bitwright.cli.submit import read_request, read_token, set_section
from bitwright.cli.summaries import MARKS, append, junit, markdown, write_junit
from bitwright.cli.watch import follow_job
from bitwright.errors import BitwrightError, RequestError
from bitwright.views import JobView

Share = Annotated[float, typer.Option(min=0.0, help="Allowed growth against the baseline; 0.05 is 5%.")]


def check(
    file: Annotated[Path, typer.Argument(help="The request: YAML or JSON, as for submit -f.", show_default=False)],
    baseline: Annotated[
        str | None,
        typer.Option(help="A job's id, a checkpoint folder or a report.json to hold the result against."),
    ] = None,
    allow_kl: Share = 0.05,
    allow_perplexity: Share = 0.01,
    allow_size: Share = 0.01,
    summary: Annotated[Path | None, typer.Option(help="Add a Markdown summary to this file.")] = None,
    junit_file: Annotated[Path | None, typer.Option("--junit", help="Write the checks as JUnit XML.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(help="A label, name=value.")] = None,
    idempotency_key: Annotated[str | None, typer.Option(help="The same key never makes a second job.")] = None,
    hub_token_file: Annotated[Path | None, typer.Option(help="File with a Hub token for this job alone.")] = None,
    url: UrlOption = None,
    key: KeyOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Submit a request, wait for the job, and judge its result; for CI.

    Prints the job's id. Ends with 0 if every check passed; 1 if one was missed or the job failed; 2 if the request, the
    key or the baseline is not valid; 3 if the service cannot be reached. The summary is written in each case.
    """
    started, limits = monotonic(), gates(allow_kl, allow_perplexity, allow_size)
    subject, results = str(file), list[Compared]()
    try:
        body = read_request(file)
        set_section(body, "metadata", parse_labels(metadata))
        token = None if hub_token_file is None else read_token(hub_token_file)
        with connect(url, key, data_dir) as client:
            before = None if baseline is None else result_of(client, baseline)
            job = _followed(client, body, idempotency_key, token)
        subject = job.id
        results = _results(job, before)
        checks = judge(job, before, limits)
    except BitwrightError as error:
        checks = [failure(error, "the request is valid" if isinstance(error, RequestError) else "the service answers")]
        _tell(subject, checks, results, monotonic() - started, summary, junit_file)
        raise
    _tell(subject, checks, results, monotonic() - started, summary, junit_file)
    if verdict(checks) is not Outcome.PASSED:
        raise typer.Exit(1)


def _followed(client: Client, body: dict[str, object], idempotency_key: str | None, token: str | None) -> JobView:
    """The job at its end; its id is printed first, so that it is known whatever comes after."""
    job = client.submit(body, idempotency_key=idempotency_key, hub_token=token)
    typer.echo(job.id)
    return follow_job(client, job.id, err())


def _results(job: JobView, baseline: Compared | None) -> list[Compared]:
    own = [] if job.report is None else [Compared(job.id, job.report)]
    return [*own, *([] if baseline is None else [baseline])] if own else []


def _tell(
    subject: str,
    checks: list[Check],
    results: list[Compared],
    seconds: float,
    summary: Path | None,
    junit_file: Path | None,
) -> None:
    for each in checks:
        err().print(f"{MARKS[each.outcome]}: {each.name}: {each.detail}", soft_wrap=True, markup=False, highlight=False)
    if summary is not None:
        append(summary, markdown(subject, checks, results))
    if junit_file is not None:
        write_junit(junit_file, junit(subject, checks, seconds))
