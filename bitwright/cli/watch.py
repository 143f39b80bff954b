"""`bitwright watch`: a job as it runs. Live bars on a terminal, plain lines elsewhere."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Annotated, Protocol

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from bitwright import Client
from bitwright.cli.connection import DataDirOption, KeyOption, UrlOption, connect
from bitwright.cli.job_details import brought
from bitwright.cli.jobs import JobArgument, print_json
from bitwright.cli.render import err, format_amount, format_seconds, out, print_error, queue_text, report_table
from bitwright.events import (
    BlockEvent,
    CheckpointEvent,
    Event,
    MetricEvent,
    ProgressEvent,
    Stage,
    StatusEvent,
    WarningEvent,
)
from bitwright.job_states import FINAL_STATUSES, JobStatus
from bitwright.views import ArtifactView, EventView, JobView

PLAIN_SECONDS = 10.0
"""Seconds between two plain lines of progress within one stage."""


def watch(
    job_id: JobArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print every event as a JSON line.")] = False,
    url: UrlOption = None,
    key: KeyOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Follow a job to its end; the exit code tells how it ended. Ctrl-C leaves the job running."""
    with connect(url, key, data_dir) as client:
        job = client.wait(job_id, on_event=print_json) if as_json else follow_job(client, job_id, out())
        artifacts = client.artifacts(job_id)
    finish(job, artifacts, as_json=as_json)


def finish(job: JobView, artifacts: Sequence[ArtifactView], *, as_json: bool) -> None:
    """Print the outcome; the sizes are those of the files that the job keeps.

    Raises:
        typer.Exit: with 1, when the job did not succeed.
    """
    if as_json:
        print_json(job)
    if job.status is JobStatus.SUCCEEDED:
        if not as_json and job.report is not None:
            out().print(report_table(job.report, brought(job, artifacts)))
        return
    err().print(f"{job.id} {job.status.value}")
    if job.error is not None:
        print_error(job.error.exception())
    raise typer.Exit(1)


def follow_job(client: Client, job_id: str, console: Console) -> JobView:
    """Show the job's events on `console` until it is final; the final job."""
    if waits := waiting_text(client, job_id):
        console.print(waits, soft_wrap=True)
    with shown_on(console) as show:
        return client.wait(job_id, on_event=show)


def waiting_text(client: Client, job_id: str) -> str | None:
    """The place of a job in the queue, and whether a worker is there to take it; None where it does not wait."""
    job = client.job(job_id)
    if job.queue is None:
        return None
    place = queue_text(job.queue)
    return place if client.workers() else f"{place}; no worker is alive: `bitwright serve` or `worker` starts one"


@contextmanager
def shown_on(console: Console) -> Iterator[Callable[[EventView], None]]:
    """A function that shows one event after the other on `console`: as bars, or as lines where there can be none."""
    if not (console.is_terminal or (console.is_jupyter and find_spec("ipywidgets"))):
        yield PlainView(console).show
        return
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield LiveView(progress).show


class View(Protocol):
    """Shows one event after the other."""

    def show(self, stored: EventView) -> None: ...


class LiveView:
    """One bar per stage, with the remaining time and the loss of the latest block."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[Stage, TaskID] = {}
        self._latest: ProgressEvent | None = None
        self._loss = ""

    def show(self, stored: EventView) -> None:
        """Move a bar, or print a line above the bars."""
        event = stored.event
        if isinstance(event, BlockEvent):
            self._loss = loss_text(event)
        elif isinstance(event, MetricEvent) and event.step is not None:
            self._loss = f"loss {event.value:.3g}" if event.name == "loss" else self._loss
        elif isinstance(event, ProgressEvent):
            self._move(event)
        elif line := line_of(event):
            self._progress.console.print(line)

    def _move(self, event: ProgressEvent) -> None:
        if event.stage not in self._bars:
            self._complete_latest()
            self._bars[event.stage] = self._progress.add_task(event.stage.value, total=event.total, amount="", note="")
        self._latest = event
        note = [f"{format_seconds(event.eta_seconds)} left"] if event.eta_seconds is not None else []
        if event.stage in (Stage.QUANTIZE, Stage.FINETUNE) and self._loss:
            note.append(self._loss)
        self._progress.update(
            self._bars[event.stage],
            completed=event.done,
            total=event.total,
            amount=format_amount(event),
            note=", ".join(note),
        )

    def _complete_latest(self) -> None:
        """Fill the bar of the stage that the next one follows: its last progress may not have been kept."""
        if self._latest is not None:
            full = self._latest.model_copy(update={"done": self._latest.total})
            bar = self._bars[full.stage]
            self._progress.update(bar, completed=full.done, amount=format_amount(full), note="")
            self._progress.stop_task(bar)


class PlainView:
    """One line per event; progress at the start of a stage and every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage: Stage | None = None
        self._shown_at = 0.0

    def show(self, stored: EventView) -> None:
        """Print a line, or nothing."""
        event, moment = stored.event, stored.created_at
        if isinstance(event, ProgressEvent):
            at = moment.timestamp()
            if event.stage is self._stage and at - self._shown_at < PLAIN_SECONDS:
                return
            self._stage, self._shown_at = event.stage, at
        if line := line_of(event):
            self._console.print(Text(f"{moment:%H:%M:%S} ") + line, soft_wrap=True)


def line_of(event: Event) -> Text | None:
    """An event as a line; None for logs, which serve the search for a cause."""
    if isinstance(event, StatusEvent):
        why = f": {event.error.code}" if event.error is not None else ""
        if event.error is not None and event.status not in FINAL_STATUSES:  # `finish` prints the rest of those
            why += f": {event.error.detail}"
        attempt = f", attempt {event.attempt}" if event.attempt else ""
        return Text(f"{event.status.value}{attempt}{why}")
    if isinstance(event, ProgressEvent):
        eta = f", {format_seconds(event.eta_seconds)} left" if event.eta_seconds is not None else ""
        return Text(f"{event.stage.value} {format_amount(event)}{eta}")
    if isinstance(event, BlockEvent):
        return Text(f"block {event.index + 1}/{event.total} {loss_text(event)} in {format_seconds(event.seconds)}")
    if isinstance(event, MetricEvent):
        at = "" if event.step is None else f"step {event.step} "
        return Text(f"{at}{event.name} {event.value:.6g}")
    if isinstance(event, CheckpointEvent):
        return Text(f"step {event.step}/{event.total} is durable")
    if isinstance(event, WarningEvent):
        return Text(f"warning {event.code}: {event.message}", style="yellow")
    return None


def loss_text(event: BlockEvent) -> str:
    """The block's loss before and after tuning."""
    if event.loss is None:
        return ""
    if event.loss_initial is None:
        return f"loss {event.loss:.3g}"
    return f"loss {event.loss_initial:.3g} -> {event.loss:.3g}"
