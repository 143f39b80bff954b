"""The finished checkpoints, read back: a stage after the export, which costs what loading them costs.

A failure keeps the files, and warns: somebody may serve them elsewhere. A request that requires a runtime misses its
requirement then.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from app.domain.formats import ExportFormat
from bitwright.events import Stage
from bitwright.report import LoadReport
from workers.engine.job import Job
from workers.engine.loads_here.checks import Check, Probe
from workers.engine.loads_here.comparison import ROUTED
from workers.engine.loads_here.reading import HOST_SHARE, Reading
from workers.engine.loads_here.side_by_side import Words
from workers.engine.quantize.activations import Activations
from workers.engine.reporter import Reporter
from workers.engine.shipped import Key, Replay, Shipment, TrainedAdapters, shipments_of
from workers.machine import host_memory

TOKENS = 16
"""That a runtime writes."""


@dataclass(frozen=True)
class Way:
    """The way to load a checkpoint that is read, and what it gives then.

    base       checkpoint that an adapter is loaded beside; None: it stands alone
    expected   logits, fp32 (tokens, vocabulary); None: nothing is known of them
    looser     times so far as usual they may be off
    """

    base: ExportFormat | None = None
    expected: Tensor | None = None
    looser: float = 1.0


def read_files(
    checks: Sequence[Check],
    reading: Reading,
    reporter: Reporter,
    output: Path,
    probe: Probe,
    way_of: Callable[[ExportFormat], Way],
    parameters: int,
    words: Words | None = None,
) -> tuple[LoadReport, ...]:
    """Every check's report; a warning for each that fails.

    output       folder of the checkpoints, by format
    parameters   of the model, which a runtime holds in 16 bits
    words        the text of what a checkpoint writes, beside the original's
    """
    reports = list[LoadReport]()
    reporter.progress(Stage.VERIFY, 0, len(checks), "checkpoints")
    for done, check in enumerate(checks, start=1):
        if too_large(parameters):
            reports.append(_too_large(check, parameters))
        else:
            way = way_of(check.format)
            base = None if way.base is None else output / way.base.value
            folder = output / check.format.value
            report = reading.read(
                *(check, folder, probe, way.expected),
                level="files",
                base=base,
                tokens=TOKENS,
                looser=way.looser,
                words=words,
            )
            reports.append(report)
        reporter.progress(Stage.VERIFY, done, len(checks), "checkpoints")
    for report in reports:
        if report.result != "loads":
            reporter.warning(f"runtime_{report.result}", _warning(report))
    return tuple(reports)


class ShippedLogits:
    """The engine's logits of what a job ships, made once for checkpoints of the same numbers."""

    def __init__(self, job: Job, trained: TrainedAdapters | None, probe: Probe) -> None:
        self._job, self._probe = job, probe
        self._replay = Replay(job.model, job.finished_blocks, trained)
        self._looser = ROUTED if any(".experts." in name for name in job.model.linears()) else 1.0
        self._made: dict[Key, Tensor] = {}

    def way(self, name: ExportFormat) -> Way:
        """The way that a format's checkpoint is read: alone, or an adapter beside its base."""
        for shipment in shipments_of(self._job):
            if name.info.is_adapter and shipment.adapter == name.value:
                return Way(ExportFormat(shipment.checkpoints[0]), self._logits(shipment), self._looser)
            if shipment.adapter is None and name.value in shipment.checkpoints:
                return Way(None, self._logits(shipment), self._looser)
        return Way()

    @torch.no_grad()
    def _logits(self, shipment: Shipment) -> Tensor:
        if shipment.key not in self._made:
            model, job = self._job.model, self._job
            with model.loaded(*model.layout.outer):
                activations = Activations(model, self._probe.ids, job.plan, keep_inputs=False)
            self._replay.run(activations, shipment)
            head = self._replay.head(shipment)
            given = {} if head is None else {f"{model.layout.head}.weight": head}
            with model.loaded(*model.after_blocks, given=given):
                logits = model.logits(activations.quantized.to(model.device))[0]
            self._made[shipment.key] = logits.float().cpu()
        return self._made[shipment.key]


def too_large(parameters: int) -> bool:
    """True if the machine has no memory for a model in 16 bits."""
    return 2 * parameters > HOST_SHARE * host_memory()


def _too_large(check: Check, parameters: int) -> LoadReport:
    have = host_memory() / (1 << 30)
    return LoadReport(
        format=check.format.value,
        runtime=check.runtime.value,
        version=check.where.version,
        read="files",
        result="not_checked",
        detail=f"it would take {2 * parameters / (1 << 30):.0f} GiB of memory, and the machine has {have:.0f}",
    )


def _warning(report: LoadReport) -> str:
    said = {"does_not_load": "does not load", "differs": "misreads", "not_checked": "has not tried to load"}
    lines = (report.detail or "").strip().splitlines()
    return (
        f"{report.runtime} {report.version or ''} {said[report.result]} {report.format}: {lines[-1] if lines else ''}"
    )
