"""The whole of an export: every linear once from the native checkpoint to each writer, the rest copied as it is.

Memory: a linear at a time, and what all writers hold of a shard together (`HELD_BYTES`). Disk: the native checkpoint,
which is a link to the store's files where that is possible, and the new ones. An attempt begins anew: a linear takes
milliseconds.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path

import torch

from app.domain.attempt_lines import ResultLine
from app.domain.fit import refusal
from app.domain.format_rules import head_problems
from app.domain.formats import EmbeddingRule, ExportFormat
from app.domain.inputs.architectures import HEAD
from bitwright.errors import InternalError
from bitwright.events import Stage
from bitwright.report import LoadReport, Report
from workers.disk.orders import AttemptOrder
from workers.engine.clock import StageClock, peak_memory
from workers.engine.exports.native_source import NativeSource, Untied
from workers.engine.reporter import Reporter
from workers.engine.stored_scales import CODE as SCALES_ROUNDED
from workers.engine.stored_scales import StoredScales, caches_left_out
from workers.formats.cards.identity import Identity
from workers.formats.cards.model_card import stored_bytes
from workers.formats.format import InputWriter, Writer
from workers.formats.registry import check_model, open_writer, source_for
from workers.formats.shards import HELD_BYTES

OUTPUT = "output"
EVERY = 16
"""Linears between two words on progress."""


@dataclass(frozen=True)
class Finished:
    """Checkpoints that lack only their report, to be tried.

    output       their folder, by format
    source       folder of the native checkpoint, with the model's tokenizer
    config       the model's, decoded
    parameters   of the model
    """

    output: Path
    source: Path
    config: Mapping[str, object]
    parameters: int


ReadExport = Callable[[Finished, Reporter], tuple[LoadReport, ...]]
"""Everything that is known of whether runtimes load finished checkpoints."""


@torch.no_grad()
def run(order: AttemptOrder, workspace: Path, reporter: Reporter, read: ReadExport) -> ResultLine:
    """Write the formats of the order's request; checkpoints go to `workspace`/output/<format>.

    read   tries the checkpoints, which lack only their report

    Raises:
        CorruptCheckpoint: the native checkpoint cannot be read.
        FormatCannotHold: a format would have to change a weight.
    """
    if order.base_job_path is None or order.request.base_job is None:
        raise InternalError("the order has no folder of the job that is to be exported", field="base_job")
    clock = StageClock(Stage.LOAD, reporter.spans.enter)
    reporter.progress(Stage.LOAD, 0, 1, "checkpoints")
    spec, formats = order.request.quantization, order.request.formats
    source = NativeSource.open(Path(order.base_job_path) / ExportFormat.NATIVE, kv_cache=spec.kv_cache is not None)
    before = source.report()
    for problem in head_problems(formats, spec, tied=source.tied):
        raise refusal([problem])
    check_model(formats, source, str(source.config.get("model_type")), source.shapes)
    reporter.progress(Stage.LOAD, 1, 1, "checkpoints")
    clock.enter(Stage.EXPORT)
    writers, scales = _writers(workspace / OUTPUT, source, formats, Identity.of(before)), StoredScales()
    _write(source, writers, scales, reporter)
    if order.request.verify == "files":
        clock.enter(Stage.VERIFY)
    parameters = sum(prod(tensor.shape) for tensor in source.tensors.values())
    loads = read(Finished(workspace / OUTPUT, source.folder, source.config, parameters), reporter)
    clock.enter(Stage.EXPORT)
    sizes = {name.value: stored_bytes(workspace / OUTPUT / name.value, name.info.weight_files) for name in formats}
    report = _report(before, order, clock, scales, reporter).model_copy(
        update={"loads": loads, "size": before.size.model_copy(update={"bytes_files": sizes})}
    )
    for writer in writers.values():
        writer.describe(report)
    total = len(source.linears) + 1
    reporter.progress(Stage.EXPORT, total, total, "linears")
    source.stored.close()
    return ResultLine(report=report, checkpoints={name.value: f"{OUTPUT}/{name.value}" for name in writers})


def _writers(
    folder: Path, source: NativeSource, formats: Collection[ExportFormat], identity: Identity
) -> Mapping[ExportFormat, Writer]:
    """A writer for each format; those that store a tied head besides quantized embeddings see it in their source."""
    embeddings = source.embeddings
    untied = Untied(source, embeddings) if embeddings is not None and source.tied else None
    return {
        name: open_writer(
            folder / name.value,
            name,
            source_for(name, source, untied),
            formats,
            identity=identity,
            held_bytes=HELD_BYTES // len(formats),
            embeddings=embeddings,
        )
        for name in formats
    }


def _write(
    source: NativeSource, writers: Mapping[ExportFormat, Writer], scales: StoredScales, reporter: Reporter
) -> None:
    """Every checkpoint but its report."""
    total = len(source.linears) + 1
    for done, name in enumerate(source.linears, start=1):
        result, part = source.linear(name), source.parts.get(name)
        for export_format, writer in writers.items():
            own = scales.of(export_format, name, result)
            writer.add_linear(name, own, part=part)
            if name == source.embeddings and source.tied and export_format.info.embeddings is EmbeddingRule.UNIFORM:
                writer.add_linear(HEAD, own, module=HEAD)
        if done % EVERY == 0:
            reporter.progress(Stage.EXPORT, done, total, "linears")
    for writer in writers.values():
        for name, weight, place in source.kept_parts():
            writer.add_part(name, weight, place)
        for attention, cache in source.kv_scales():
            writer.add_kv_scales(attention, cache)
        if isinstance(writer, InputWriter):
            for name, squares in source.inputs.items():
                writer.add_inputs(name, squares)
        writer.finish()
        for code, message in writer.warnings.items():
            reporter.warning(code, message)
    for message in scales.warnings().values():
        reporter.warning(SCALES_ROUNDED, message)
    for code, message in caches_left_out(writers if source.caches else ()):
        reporter.warning(code, message)


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
