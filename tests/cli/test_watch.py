"""Output of `watch` for a job's events, on a terminal and elsewhere."""

import io
from datetime import UTC, datetime, timedelta

from rich.console import Console
from rich.progress import Progress, TextColumn

from bitwright.cli.watch import LiveView, PlainView
from bitwright.events import BlockEvent, ErrorData, Event, LogEvent, MetricEvent, ProgressEvent, Stage, StatusEvent
from bitwright.job_states import JobStatus
from bitwright.views import EventView

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def stored(event: Event, seconds: float = 0.0) -> EventView:
    return EventView(sequence=1, created_at=START + timedelta(seconds=seconds), attempt=1, event=event)


def quantize(done: float, eta: float | None = None) -> ProgressEvent:
    return ProgressEvent(stage=Stage.QUANTIZE, done=done, total=30, unit="blocks", eta_seconds=eta)


def plain(*events: EventView) -> list[str]:
    text = io.StringIO()
    view = PlainView(Console(file=text, width=40))
    for event in events:
        view.show(event)
    return text.getvalue().splitlines()


def test_plain_lines_are_never_wrapped() -> None:
    error = ErrorData(code="attempt_killed", detail="the process was ended by signal 9 after some time")
    failed = StatusEvent(status=JobStatus.QUEUED, attempt=1, error=error)
    assert plain(stored(failed)) == [f"03:04:05 queued, attempt 1: attempt_killed: {error.detail}"]


def test_plain_progress_comes_at_the_start_of_a_stage_and_every_ten_seconds() -> None:
    lines = plain(*(stored(quantize(second), second) for second in range(25)))
    assert lines == [f"03:04:{5 + s:02d} quantize {s}/30 blocks" for s in (0, 10, 20)]


def test_blocks_and_metrics_are_shown_and_logs_are_not() -> None:
    block = BlockEvent(index=2, total=30, name="model.layers.2", loss_initial=0.5, loss=0.25, seconds=75)
    lines = plain(
        stored(block), stored(MetricEvent(name="perplexity", value=12.5)), stored(LogEvent(event="detail_for_few"))
    )
    assert lines == ["03:04:05 block 3/30 loss 0.5 -> 0.25 in 1 min 15 s", "03:04:05 perplexity 12.5"]


def test_live_bars_show_eta_and_loss_and_are_full_when_the_next_stage_begins() -> None:
    columns = [TextColumn("{task.fields[amount]}|{task.fields[note]}")]
    with Progress(*columns, console=Console(file=io.StringIO(), force_terminal=True)) as progress:
        view = LiveView(progress)
        view.show(stored(BlockEvent(index=0, total=30, name="b", loss_initial=0.5, loss=0.25, seconds=1)))
        view.show(stored(quantize(29.5, eta=61)))
        bar = progress.tasks[0]
        assert (bar.fields["amount"], bar.fields["note"]) == ("29.5/30 blocks", "1 min 01 s left, loss 0.5 -> 0.25")
        view.show(stored(ProgressEvent(stage=Stage.STORE, done=500_000, total=4e6, unit="bytes")))
        assert (bar.completed, bar.fields["amount"], bar.fields["note"]) == (30, "30/30 blocks", "")
        assert progress.tasks[1].fields["amount"] == "500 kB of 4 MB"
