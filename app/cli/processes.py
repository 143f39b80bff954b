"""`worker`, `sweep` and `migrate`: the parts that `serve` runs together, one by one for a larger installation."""

import os
import sys
from typing import Annotated

import typer

from app.cli.environment import apply, use_data_dir
from app.cli.private_files import keep_private
from bitwright.cli.connection import DataDirOption
from bitwright.cli.render import out
from bitwright.errors import RequestError


def worker_command() -> tuple[str, ...]:
    """The command of one worker process. It takes everything from BITWRIGHT_* variables."""
    return (sys.executable, "-P", "-m", "workers")


def sweep_command() -> tuple[str, ...]:
    """The command of the sweep."""
    return (sys.executable, "-P", "-m", "workers.sweep")


def worker(
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.", show_default="auto")] = None,
    data_dir: DataDirOption = None,
) -> None:
    """Run one worker for the configured database and broker."""
    settings = apply({"data_dir": data_dir, "device": device})
    if not settings.broker_url:
        raise RequestError(
            "a worker needs a broker", field="broker_url", hint="set BITWRIGHT_BROKER_URL, or run `bitwright serve`"
        )
    keep_private(settings)
    _become(worker_command())


def sweep(data_dir: DataDirOption = None) -> None:
    """Run the sweep: it takes back lost jobs and notifies idle workers."""
    keep_private(use_data_dir(data_dir))
    _become(sweep_command())


def migrate(data_dir: DataDirOption = None) -> None:
    """Bring the database to the newest schema."""
    from app.store.session import migrate as upgrade  # noqa: PLC0415 (needs the `api` extra)

    settings = use_data_dir(data_dir)
    keep_private(settings)
    upgrade(settings.database_url)
    out().print("the database has the newest schema")


def _become(command: tuple[str, ...]) -> None:
    """Replace this process, so that signals and the exit code are the program's own."""
    sys.stdout.flush()
    os.execv(command[0], command)  # noqa: S606
