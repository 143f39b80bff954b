"""From durable blocks and trained adapters to checkpoints: each linear once through its merge and every writer."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from app.domain.attempt_lines import ResultLine
from app.domain.format_rules import stored_formats
from app.domain.formats import EmbeddingRule, ExportFormat
from app.domain.request.goal_problems import sized_formats
from bitwright.events import Stage
from bitwright.formats import ADAPTER_FOLDER
from bitwright.report import AdapterReport, LoadReport, Report
from workers.adapters.attaching import report, stored
from workers.adapters.merging import MergeProof
from workers.engine.device.read_ahead import read_ahead
from workers.engine.goal.outcome import with_files
from workers.engine.job import Job
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.report import Results, identity_of, report_of, size_of
from workers.engine.shipped import TrainedAdapters
from workers.engine.stored_scales import CODE as SCALES_ROUNDED
from workers.engine.stored_scales import StoredScales, caches_left_out
from workers.formats.adapter_file import describe_adapter, write_adapter
from workers.formats.cards.identity import Identity
from workers.formats.cards.model_card import stored_bytes
from workers.formats.format import InputWriter, Writer
from workers.formats.registry import open_writers
from workers.formats.stored_linear import StoredPart
from workers.numerics.quantized import LinearResult, StoredBits

OUTPUT = "output"
"""Folder of a workspace that holds a folder per checkpoint."""


ReadFiles = Callable[[Job, TrainedAdapters | None], tuple[LoadReport, ...]]
"""Everything that is known of whether runtimes load the result."""


def run(job: Job, results: Results, read: ReadFiles | None = None) -> ResultLine:
    """Writes every format from the durable blocks, and the same report into each.

    read   tries the checkpoints, which lack only their report

    Raises:
        FormatCannotHold: a format would have to change a weight.
        MisalignedAdapter, OffsetNotRepresentable: an adapter cannot be folded in.
    """
    job.clock.enter(Stage.EXPORT)
    trained, evaluated = None if results.finetuned is None else results.finetuned.trained, results.evaluated
    exported = _write(job, trained, identity_of(job, results))
    job.reporter.log("files_written", formats=", ".join(name.value for name in exported.writers))
    if read is not None:
        results = replace(results, loads=read(job, trained))
        job.clock.enter(Stage.EXPORT)
    adapter = exported.adapter
    if adapter is not None and evaluated is not None:
        adapter = adapter.model_copy(update={"before_merge": evaluated.before_merge})
    size = size_of(job, exported.stored, exported.weights).model_copy(
        update={"bytes_files": weight_bytes(job.workspace / OUTPUT, exported.writers)}
    )
    report = report_of(job, results, size).model_copy(
        update={
            "adapter": adapter,
            "scales_rounded": exported.scales.report(),
            "goal": with_files(job.prepared.goal, _file_sizes(job)),
            "warnings": tuple(job.reporter.warnings),
        }
    )
    checkpoints = _describe(job, trained, exported, report)
    job.model.checkpoint.close()
    return ResultLine(report=report, checkpoints=checkpoints)


def weight_bytes(folder: Path, formats: Collection[ExportFormat]) -> dict[str, int]:
    """Bytes of the weight files of finished checkpoints, by their folder under `folder`."""
    return {name.value: stored_bytes(folder / name.value, name.info.weight_files) for name in formats}


@dataclass
class Exported:
    """Checkpoints that lack only their report.

    stored, weights   bits of all quantized linears as they ship, and how many weights they are
    proofs            of the merges of adapters
    scales            those of each format
    """

    writers: Mapping[ExportFormat, Writer]
    stored: StoredBits = field(default_factory=StoredBits)
    weights: int = 0
    adapter: AdapterReport | None = None
    proofs: list[MergeProof] = field(default_factory=list)
    scales: StoredScales = field(default_factory=StoredScales)


def _write(job: Job, trained: TrainedAdapters | None, identity: Identity) -> Exported:
    """Every checkpoint but its report; a block is read while the one before it is packed."""
    model, finished, folder = job.model, job.finished_blocks, job.workspace / OUTPUT
    total, bases = len(finished.blocks), dict[str, LinearResult]()
    exported = Exported(_writers(job, folder, identity))
    for name, embeddings in finished.load_embeddings().items():
        _write_linear(model, name, embeddings, trained, exported)
        _write_tied_head(model, embeddings, exported)
    with closing(read_ahead(finished.load, total, torch.device("cpu"))) as blocks:
        for done, block in enumerate(blocks, start=1):
            for name, base in block.items():
                _write_linear(model, name, base, trained, exported)
            if trained is not None:
                bases |= {name: _outline(base) for name, base in block.items() if name in trained.modules}
            for name, part in left_beside(model, list(block)):
                for writer in exported.writers.values():
                    writer.add_part(model.names.linear_name(name), model.names.read(f"{name}.weight"), part)
            for name, tensor in finished.parameters(done - 1).items():
                for writer in exported.writers.values():
                    writer.add_tensor(model.sources[name], tensor)
            for name, scales in finished.caches(done - 1).items():
                for writer in exported.writers.values():
                    writer.add_kv_scales(model.names.module_name(name), scales)
            for name, squares in finished.inputs(done - 1).items():
                for writer in exported.writers.values():
                    if isinstance(writer, InputWriter):
                        writer.add_inputs(model.names.linear_name(name), squares)
            job.reporter.progress(Stage.EXPORT, done, total + 1, "blocks")
    _finish(exported.writers.values(), kept_linears(model, job.schemes))
    for writer in exported.writers.values():
        for code, message in writer.warnings.items():
            job.reporter.warning(code, message)
    for message in exported.scales.warnings().values():
        job.reporter.warning(SCALES_ROUNDED, message)
    for code, message in caches_left_out(() if job.spec.kv_cache is None else exported.writers):
        job.reporter.warning(code, message)
    if trained is not None:
        exported.adapter = report(trained.spec, trained.modules, bases, exported.proofs, trained.merge)
        kept = {name: stored(module) for name, module in trained.modules.items()}
        write_adapter(folder / ADAPTER_FOLDER, trained.spec.kind, kept)
    return exported


def _finish(writers: Collection[Writer], ignored: Collection[str]) -> None:
    """Let all writers write their files at once: each mostly waits for the disk.

    Raises:
        Exception: what the first writer that failed raised, when the others have ended.
    """
    with ThreadPoolExecutor(len(writers), thread_name_prefix="export") as threads:
        ended = [threads.submit(writer.finish, ignored=ignored) for writer in writers]
    for each in ended:
        each.result()


def _writers(job: Job, folder: Path, identity: Identity) -> Mapping[ExportFormat, Writer]:
    """A writer for each format; those that store a tied head besides quantized embeddings see it in their source."""
    model, formats, name = job.model, stored_formats(job.request.formats), job.model.layout.embeddings
    if name not in job.schemes:
        return open_writers(folder, formats, model.checkpoint, identity)
    untied, stored = model.checkpoint, model.names.own_name(f"{name}.weight")
    if model.tied and stored is not None:
        untied = model.checkpoint.untied(stored, f"{model.layout.head}.weight")
    return open_writers(folder, formats, model.checkpoint, identity, embeddings=name, untied=untied)


def _write_tied_head(model: StreamedModel, embeddings: LinearResult, exported: Exported) -> None:
    """The head that is the quantized embeddings, to writers that store it by itself."""
    head = model.layout.head
    for export_format, writer in exported.writers.items():
        if model.tied and export_format.info.embeddings is EmbeddingRule.UNIFORM:
            writer.add_linear(head, exported.scales.of(export_format, head, embeddings), module=head)


def _write_linear(
    model: StreamedModel, name: str, base: LinearResult, trained: TrainedAdapters | None, exported: Exported
) -> None:
    """One linear, with its adapter merged as the request says, to every writer."""
    result = base
    if trained is not None:
        merged = trained.finished(name, base)
        result = merged.result
        exported.proofs += [] if merged.proof is None else [merged.proof]
    exported.stored += result.stored_bits()
    exported.weights += result.weight.codes.numel()
    source, part = model.names.linear_name(name), part_of(model, name)
    for export_format, writer in exported.writers.items():
        writer.add_linear(source, exported.scales.of(export_format, source, result), module=name, part=part)


def part_of(model: StreamedModel, name: str) -> StoredPart | None:
    """The place of a linear's weight in a tensor of the checkpoint that holds more, or holds it transposed."""
    parameter = f"{name}.weight"
    place, rows = model.names.place(parameter), model.model.get_submodule(name).get_parameter("weight").shape[0]
    if place is not None:
        stored, piece = place
        start, stop, step = piece.rows.indices(
            model.names.model.state[piece.parameter].shape[2 if piece.transposed else 1]
        )
        return StoredPart(of=stored, index=piece.index, rows=(start, stop, step), transposed=piece.transposed)
    if parameter in model.transposed:
        return StoredPart(of=model.sources[parameter], rows=(0, rows, 1), transposed=True)
    return None


def kept_linears(model: StreamedModel, quantized: Collection[str]) -> tuple[str, ...]:
    """Every linear of the model that stays as it is, routers and other parts of a larger model included."""
    linears = [name for name, module in model.model.named_modules() if isinstance(module, nn.Linear)]
    return tuple(name for name in linears if name not in quantized)


def left_beside(model: StreamedModel, quantized: Sequence[str]) -> Iterator[tuple[str, StoredPart]]:
    """Linears that are not quantized but share a tensor of the checkpoint with some that are."""
    shared = {part.of for name in quantized if (part := part_of(model, name)) is not None and part.index is not None}
    for parameter in model.names.slices if shared else ():
        name, place = parameter.removesuffix(".weight"), model.names.place(parameter)
        if place is not None and place[0] in shared and name not in quantized:
            part = part_of(model, name)
            if part is not None:
                yield name, part


def _file_sizes(job: Job) -> dict[str, int]:
    """Bytes of the weight files of every packed checkpoint that was asked for."""
    return {
        name.value: stored_bytes(job.workspace / OUTPUT / name.value, name.info.weight_files)
        for name in sized_formats(job.request.formats)
    }


def _describe(job: Job, trained: TrainedAdapters | None, exported: Exported, full: Report) -> dict[str, str]:
    """The report into every checkpoint; their folders by format, relative to the workspace."""
    for writer in exported.writers.values():
        writer.describe(full)
    names = [name.value for name in exported.writers]
    if trained is not None:
        folder = job.workspace / OUTPUT / ADAPTER_FOLDER
        describe_adapter(folder, trained.spec.kind, full, job.model.checkpoint.folder)
        names.append(ADAPTER_FOLDER)
    steps = len(job.finished_blocks.blocks) + 1
    job.reporter.progress(Stage.EXPORT, steps, steps, "blocks")
    return {name: f"{OUTPUT}/{name}" for name in names}


def _outline(result: LinearResult) -> LinearResult:
    """The result without its codes, which the report only counts."""
    return LinearResult(replace(result.weight, codes=result.weight.codes.to("meta")))
