"""Curves of a job for the pages' chart library: from its events while it runs, from its report afterwards."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from app.store.events import StoredEvent
from bitwright.events import BlockEvent, MetricEvent
from bitwright.report import Report

MOST_POINTS = 240
"""Points of a curve: of more, every n-th, and the last one."""
EVENT_TYPES = ("block", "metric")

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """Curves over one axis.

    x        positions that any curve has, rising
    series   by name: a value for each position, None where that curve has none
    joined   whether the points of a curve are joined by a line
    """

    title: str
    x_title: str
    y_title: str
    x: tuple[float, ...]
    series: Mapping[str, tuple[float | None, ...]]
    joined: bool = True

    @property
    def data(self) -> str:
        """The chart as JSON, for the script that draws it."""
        return json.dumps(
            {
                "x": self.x,
                "series": [{"name": name, "values": values} for name, values in self.series.items()],
                "x_title": self.x_title,
                "y_title": self.y_title,
                "joined": self.joined,
            },
            separators=(",", ":"),
        )


def chart(title: str, x_title: str, y_title: str, curves: Mapping[str, Points], *, joined: bool = True) -> Chart | None:
    """The curves that have points; None where none has."""
    thinned = {name: dict(thin(points)) for name, points in curves.items() if points}
    if not thinned:
        return None
    x = sorted({position for points in thinned.values() for position in points})
    series = {name: tuple(_rounded(points.get(position)) for position in x) for name, points in thinned.items()}
    return Chart(title, x_title, y_title, tuple(x), series, joined)


def thin(points: Points) -> Points:
    """At most about `MOST_POINTS` of the points, the last one among them."""
    if len(points) <= MOST_POINTS:
        return points
    kept = list(points[:: -(-len(points) // MOST_POINTS)])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def of_events(events: Iterable[StoredEvent]) -> list[Chart]:
    """Curves of what a running job has told; of what was told twice, the later counts."""
    start, loss = dict[float, float](), dict[float, float]()
    metrics: dict[str, dict[float, float]] = {}
    for stored in events:
        event = stored.event
        if isinstance(event, BlockEvent):
            if event.loss_initial is not None:
                start[event.index] = event.loss_initial
            if event.loss is not None:
                loss[event.index] = event.loss
        elif isinstance(event, MetricEvent) and event.step is not None:
            metrics.setdefault(event.name, {})[event.step] = event.value
    training = {"training": metrics.get("loss", {}), "held out": metrics.get("validation_loss", {})}
    rate = {"learning rate": metrics.get("learning_rate", {})}
    found = [
        chart("Loss of each block", "block", "loss", _ordered({"at the start": start, "result": loss})),
        chart("Training loss, nats per token", "step", "loss", _ordered(training)),
        chart("Learning rate", "step", "rate", _ordered(rate)),
    ]
    return [one for one in found if one is not None]


def of_report(report: Report) -> list[Chart]:
    """Curves of a finished job."""
    blocks, run = report.blocks, report.finetuning
    losses = {
        "at the start": [(b.index, b.loss_initial) for b in blocks if b.loss_initial is not None],
        "result": [(b.index, b.loss) for b in blocks if b.loss is not None],
    }
    errors = {"output error": [(b.index, b.output_error) for b in blocks if b.output_error is not None]}
    training = {
        "training": [] if run is None else [(p.step, p.loss) for p in run.losses],
        "held out": [] if run is None else [(p.step, p.loss) for p in run.validations],
    }
    found = [
        chart("Loss of each block", "block", "loss", losses),
        chart("Relative error of each block's output", "block", "error", errors),
        chart("Training loss, nats per token", "step", "loss", training),
    ]
    return [one for one in found if one is not None]


def _ordered(curves: Mapping[str, Mapping[float, float]]) -> dict[str, Points]:
    return {name: sorted(points.items()) for name, points in curves.items()}


def _rounded(value: float | None) -> float | None:
    """Six digits are more than a screen shows."""
    return None if value is None else float(f"{value:.6g}")
