"""The `bitwright` command: its groups, and the exit codes of errors.

0  done; with --wait, watch and demo: the job succeeded
1  the job failed or missed a requirement, or the service failed
2  bad request: a flag, the request, the key or an id is wrong
3  the service cannot be reached
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from bitwright.cli import check, exports, jobs, listings, publish, reports, submit, uploads, watch, webhooks
from bitwright.cli.operator import OPERATOR_COMMANDS, installed_commands, operator_command
from bitwright.cli.render import print_error
from bitwright.errors import BitwrightError, InputError, RequestError, Unavailable

EXIT_FAILED, EXIT_BAD_REQUEST, EXIT_UNREACHABLE = 1, 2, 3
EXIT_INTERRUPTED = 130
DISTRIBUTIONS = ("bitwright", "bitwright-service")


def exit_code(error: BitwrightError) -> int:
    """The exit code for scripts, by the kind of the error."""
    if isinstance(error, Unavailable):
        return EXIT_UNREACHABLE
    return EXIT_BAD_REQUEST if isinstance(error, RequestError | InputError) else EXIT_FAILED


class ReportingGroup(TyperGroup):
    """Prints a `BitwrightError` as a few lines, without a traceback, and exits with its code.

    The operator's commands are imported when one is called, or for the list of all.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        """The user's commands, then the operator's where the service is installed."""
        return [*super().list_commands(ctx), *installed_commands()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name; None if there is none."""
        if cmd_name in OPERATOR_COMMANDS:
            return operator_command(cmd_name)
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except BitwrightError as error:
            print_error(error)
            raise typer.Exit(exit_code(error)) from error
        except KeyboardInterrupt as interrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from interrupt


app = typer.Typer(
    cls=ReportingGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def installed() -> str:
    """Versions of what is installed here, a line each: the client, and the service if it is."""
    lines = []
    for name in DISTRIBUTIONS:
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return "\n".join(lines)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(installed())
        raise typer.Exit


@app.callback(
    help="Quantization as a service: submit a language model, get back a checkpoint that simply loads.",
)
def bitwright(
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of all commands."""


app.command()(submit.submit)
app.command()(check.check)
app.command()(watch.watch)
app.command("jobs")(jobs.list_jobs)
app.command()(jobs.show)
app.command()(jobs.cancel)
app.command()(jobs.pause)
app.command()(jobs.resume)
app.command()(jobs.retry)
app.command()(exports.export)
app.command()(publish.publish)
app.command()(reports.report)
app.command()(reports.compare)
app.command()(jobs.download)
app.command()(listings.artifacts)
app.command()(listings.delete)
app.command()(jobs.upload)
app.command("uploads")(uploads.list_uploads)
app.add_typer(webhooks.app, name="webhooks")
app.command()(jobs.methods)
app.command()(listings.formats)
app.command()(listings.workers)
