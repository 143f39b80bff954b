"""The whole of an export: every linear once from the native checkpoint to each writer, the rest copied as it is.

Memory: a linear at a time, and what all writers hold of a shard together (`HELD_BYTES`). Disk: the native checkpoint,
which is a link to the store's files where that is possible, and the new ones. An attempt begins anew: a linear takes
milliseconds.
"""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch

from app.domain.attempt_lines import ResultLine
from app.domain.formats import ExportFormat
from bitwright.errors import InternalError
from bitwright.events import Stage
from bitwright.report import Report
from workers.disk.orders import AttemptOrder
from workers.engine.clock import StageClock, peak_memory
from workers.engine.exports.native_source import NativeSource
from workers.engine.reporter import Reporter
from workers.engine.stored_scales import CODE as SCALES_ROUNDED
from workers.engine.stored_scales import StoredScales
from workers.formats.cards.identity import Identity
from workers.formats.format import Writer
from workers.formats.registry import check_model, open_writer
from workers.formats.shards import HELD_BYTES

OUTPUT = "output"
EVERY = 16
"""Linears between two words on progress."""


@torch.no_grad()
def run(order: AttemptOrder, workspace: Path, reporter: Reporter) -> ResultLine:
    """Write the formats of the order's request; checkpoints go to `workspace`/output/<format>.

    Raises:
        CorruptCheckpoint: the native checkpoint cannot be read.
        FormatCannotHold: a format would have to change a weight.
    """
    if order.base_job_path is None or order.request.base_job is None:
        raise InternalError("the order has no folder of the job that is to be exported", field="base_job")
    clock = StageClock(Stage.LOAD)
    reporter.progress(Stage.LOAD, 0, 1, "checkpoints")
    source = NativeSource.open(Path(order.base_job_path) / ExportFormat.NATIVE)
    before, formats = source.report(), order.request.formats
    check_model(formats, source, str(source.config.get("model_type")), source.shapes)
    reporter.progress(Stage.LOAD, 1, 1, "checkpoints")
    clock.enter(Stage.EXPORT)
    identity = Identity.of(before)
    writers = {
        name: open_writer(
            workspace / OUTPUT / name.value,
            name,
            source,
            formats,
            identity=identity,
            held_bytes=HELD_BYTES // len(formats),
        )
        for name in formats
    }
    scales = StoredScales()
    _write(source, writers, scales, reporter)
    report = _report(before, order, clock, scales, reporter)
    for writer in writers.values():
        writer.describe(report)
    reporter.progress(Stage.EXPORT, len(source.linears) + 1, len(source.linears) + 1, "linears")
    source.stored.close()
    return ResultLine(report=report, checkpoints={name.value: f"{OUTPUT}/{name.value}" for name in writers})


def _write(
    source: NativeSource, writers: Mapping[ExportFormat, Writer], scales: StoredScales, reporter: Reporter
) -> None:
    """Every checkpoint but its report."""
    total = len(source.linears) + 1
    for done, name in enumerate(source.linears, start=1):
        result, part = source.linear(name), source.parts.get(name)
        for export_format, writer in writers.items():
            writer.add_linear(name, scales.of(export_format, name, result), part=part)
        if done % EVERY == 0:
            reporter.progress(Stage.EXPORT, done, total, "linears")
    for name, weight, place in source.kept_parts():
        for writer in writers.values():
            writer.add_part(name, weight, place)
    for writer in writers.values():
        writer.finish()
        for code, message in writer.warnings.items():
            reporter.warning(code, message)
    for message in scales.warnings().values():
        reporter.warning(SCALES_ROUNDED, message)


def _report(before: Report, order: AttemptOrder, clock: StageClock, scales: StoredScales, reporter: Reporter) -> Report:
    """The report of the job that made the result, with what this one did to it."""
    about_formats = tuple(name.value for name in ExportFormat)
    kept = [warning for warning in before.warnings if not warning.startswith(about_formats)]
    return before.model_copy(
        update={
            "version": version("bitwright"),
            "device": order.device,
            "plan": {"device": "cpu", "export": True, "threads": torch.get_num_threads()},
            "exported_from": order.request.base_job,
            "seconds": clock.seconds(),
            "peak_memory": peak_memory(torch.device("cpu")),
            "blocks_computed": 0,
            "blocks_resumed": 0,
            "scales_rounded": scales.report(),
            "warnings": (*kept, *reporter.warnings),
        }
    )
