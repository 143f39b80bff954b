"""The whole of a job without a model: judged by names and shapes, quantized tensor by tensor, written as it goes.

Memory: a tensor at a time, mapped from its file, and what the writers hold of a shard (`HELD_BYTES` each). Disk: the
source and the result; shards are written once, and become the checkpoint's by another name.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from app.domain.attempt_lines import ResultLine
from app.domain.fit import can_do_without_model, does_without_model, refusal, without_model_problems
from app.domain.format_rules import head_problems, stored_formats
from app.domain.formats import ExportFormat
from app.domain.inputs.architectures import is_accepted
from app.domain.methods import WeightSpec
from app.domain.methods.module_rules import unties
from app.domain.mixes import bound
from app.domain.weight_targets import (
    HEAD_TENSOR,
    KeptPart,
    Target,
    Targets,
    embeddings_tensor,
    has_head,
    weight_targets,
)
from bitwright.events import BlockEvent, Stage
from bitwright.report import LoadReport
from workers.disk.orders import AttemptOrder
from workers.engine.clock import StageClock
from workers.engine.fingerprint import code_version, fingerprint, library_versions
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.reporter import Reporter
from workers.engine.stored_scales import CODE as SCALES_ROUNDED
from workers.engine.stored_scales import StoredScales
from workers.engine.weights_only.finished_parts import FinishedLinear, FinishedPart, FinishedParts
from workers.engine.weights_only.parts import parts_of
from workers.engine.weights_only.result import identity_of, report_of, with_files
from workers.engine.weights_only.tensors import TensorPass
from workers.formats.format import PartWriter
from workers.formats.registry import check_model, open_part_writers
from workers.formats.shards import SHARD_BYTES
from workers.formats.written_part import WrittenPart
from workers.numerics.quantized import StoredBits

OUTPUT = "output"
PART_BYTES = SHARD_BYTES
"""Bytes of the source that a killed attempt may cost."""
NOT_READ = "no model was built (weights only): nothing was evaluated"
NOT_EVALUATED = (
    "no model was built (weights only): nothing was evaluated, and nothing has tried whether a runtime loads the result"
)


ReadWeights = Callable[[Checkpoint, Reporter, Path], tuple[LoadReport, ...]]
"""Everything that is known of whether runtimes load the checkpoints in a folder."""


def chosen(order: AttemptOrder) -> bool:
    """True if the job runs without a model: as it asks, or because its model's type is not an accepted one."""
    request = order.request
    if request.quantization.asks_for_weights_alone():
        return True
    if not can_do_without_model(request):
        return False
    accepted = is_accepted(Checkpoint.open(Path(order.model_path)).config)
    return does_without_model(request, accepted=accepted)


def run(order: AttemptOrder, workspace: Path, reporter: Reporter, read: ReadWeights) -> ResultLine:
    """Quantize and write every tensor; checkpoints go to `workspace`/output/<format>.

    read   tries the checkpoints, which lack only their report

    Raises:
        InputError, InvalidRequest: the checkpoint or the request's numbers do not fit together.
        FormatCannotHold: a format of the request needs a model, or would have to change a weight.
    """
    clock = StageClock(Stage.LOAD, reporter.spans.enter)
    reporter.progress(Stage.LOAD, 0, 1, "models")
    checkpoint = seen(Checkpoint.open(Path(order.model_path)), order.request.quantization)
    request = bound(order.request, checkpoint.config, not has_head(checkpoint.tensors))
    order = order.model_copy(update={"request": request})
    targets = _judged(order, checkpoint, reporter)
    reporter.progress(Stage.LOAD, 1, 1, "models")
    clock.enter(Stage.QUANTIZE)
    formats = stored_formats(order.request.formats)
    finished = FinishedParts(workspace / "state" / "weights-only", _fingerprint(order, checkpoint))
    matrix = targets.embeddings
    writers = open_part_writers(
        workspace / OUTPUT,
        formats,
        checkpoint,
        identity_of(order),
        finished.folder,
        embeddings=None if matrix is None else matrix.name,
        untied=None
        if matrix is None or has_head(checkpoint.tensors)
        else checkpoint.untied(matrix.tensor, HEAD_TENSOR),
    )
    with ExitStack() as stack:
        for writer in writers.values():
            stack.callback(writer.abandon)
        scales = _write_parts(order, checkpoint, targets, finished, writers, reporter)
        for message in scales.warnings().values():
            reporter.warning(SCALES_ROUNDED, message)
        clock.enter(Stage.EXPORT)
        for writer in writers.values():
            writer.finish(ignored=tuple(targets.left_alone))
            for code, message in writer.warnings.items():
                reporter.warning(code, message)
    if order.request.verify == "files":
        clock.enter(Stage.VERIFY)
    loads = read(checkpoint, reporter, workspace / OUTPUT)
    clock.enter(Stage.EXPORT)
    report = report_of(order, checkpoint, targets, finished.parts, finished.resumed, clock, reporter)
    report = report.model_copy(update={"scales_rounded": scales.report(), "loads": loads})
    report = with_files(report, workspace / OUTPUT, writers)
    for writer in writers.values():
        writer.describe(report)
    reporter.progress(Stage.EXPORT, 1, 1, "checkpoints")
    checkpoint.close()
    return ResultLine(report=report, checkpoints={name.value: f"{OUTPUT}/{name.value}" for name in writers})


def seen(checkpoint: Checkpoint, spec: WeightSpec) -> Checkpoint:
    """The checkpoint with a head besides, where that alone is to be quantized and is the embeddings."""
    embeddings = embeddings_tensor(checkpoint.tensors)
    if not unties(spec) or has_head(checkpoint.tensors) or embeddings is None:
        return checkpoint
    return checkpoint.untied(embeddings, HEAD_TENSOR)


def _judged(order: AttemptOrder, checkpoint: Checkpoint, reporter: Reporter) -> Targets:
    """The linears that are quantized; the caller is told of the rest."""
    request = order.request
    problems = without_model_problems(request)
    if problems:
        raise refusal(problems)
    targets = weight_targets(checkpoint.tensors, checkpoint.config, request.quantization)
    for problem in head_problems(request.formats, request.quantization, tied=not has_head(checkpoint.tensors)):
        raise refusal([problem])
    shapes = {target.name: target.shape for target in targets.linears}
    check_model(request.formats, checkpoint, str(checkpoint.config.get("model_type")), shapes)
    reporter.warning("not_evaluated", NOT_READ if request.verify == "files" else NOT_EVALUATED)
    for reason, count in Counter(targets.left_alone.values()).most_common():
        example = next(name for name, why in targets.left_alone.items() if why == reason)
        reporter.log("tensors_left_alone", reason=reason, count=count, example=example)
    misfits = [name for name, why in targets.left_alone.items() if "no whole groups" in why]
    if misfits:
        text = f"{len(misfits)} linears stay as they are, as {misfits[0]}: {targets.left_alone[misfits[0]]}"
        reporter.warning("linears_left_alone", text)
    return targets


def _fingerprint(order: AttemptOrder, checkpoint: Checkpoint) -> str:
    """sha256 of everything that decides the parts' bytes."""
    return fingerprint(
        {
            "request": order.request.model_dump(mode="json", include={"quantization", "formats"}),
            "model": checkpoint.digest(order.model_pin),
            "code": code_version(),
            "libraries": library_versions(),
            "part_bytes": PART_BYTES,
        }
    )


def _write_parts(
    order: AttemptOrder,
    checkpoint: Checkpoint,
    targets: Targets,
    finished: FinishedParts,
    writers: Mapping[ExportFormat, PartWriter],
    reporter: Reporter,
) -> StoredScales:
    """All parts that no earlier attempt has finished; what was rounded of scales, by any."""
    by_tensor: dict[str, list[Target | KeptPart]] = {}
    everything: list[Target | KeptPart] = [*targets.linears, *targets.kept]
    for linear in everything:
        by_tensor.setdefault(linear.tensor, []).append(linear)
    parts, total = parts_of(checkpoint.tensors, PART_BYTES), len(checkpoint.tensors)
    finished.adopt(partial(_whole, writers))
    for part in finished.parts:
        for name, writer in writers.items():
            writer.adopt(part.written[name.value])
    scales = StoredScales(finished.parts[-1].errors if finished.parts else {})
    spec, formats = order.request.quantization, order.request.formats
    tensor_pass = TensorPass(checkpoint, spec, formats, by_tensor, targets.joined, scales)
    if finished.resumed:
        reporter.log("parts_resumed", parts=finished.resumed)
        for part in finished.parts:
            if not order.is_told(part.index):  # its attempt died before it could
                reporter.block(_part_event(part, parts))
    done = sum(len(names) for names in parts[: finished.resumed])
    for index, names in enumerate(parts[finished.resumed :], start=finished.resumed):
        linears: list[FinishedLinear] = []
        started = time.perf_counter()
        bits = StoredBits()
        for tensor in names:
            made = tensor_pass.write(tensor, writers)
            linears += made.linears
            bits += made.bits
            done += 1
            reporter.progress(Stage.QUANTIZE, done, total, "tensors")
        written = {name.value: writer.seal() for name, writer in writers.items()}
        finished.finish(written, tuple(linears), bits, scales.report())
        reporter.block(_part_event(finished.parts[index], parts), started)
    return scales


def _part_event(part: FinishedPart, parts: Sequence[Sequence[str]]) -> BlockEvent:
    """The event of a part that is durable; `parts` are the names of all parts' tensors."""
    seconds = sum(linear.seconds for linear in part.linears)
    return BlockEvent(index=part.index, total=len(parts), name=f"{parts[part.index][0]} ...", seconds=seconds)


def _whole(writers: Mapping[ExportFormat, PartWriter], written: Mapping[str, WrittenPart]) -> bool:
    """True if every format has its shards of a part."""
    return all(name.value in written and writer.holds(written[name.value]) for name, writer in writers.items())
