"""One block, exported and read back before the hours are spent on all of them.

The first block is rounded to nearest in the job's own schemes and exported by the very writers of the job's formats, as
a checkpoint of one layer (`workers.engine.loads_here.cut`). Runtimes of the worker load it, and their logits are
compared with the engine's for the same numbers. They read beside the job: a failure ends it before the next
block is tuned, and training does not begin before all is known.

A failure may be the cut's: some types are no model with one layer. So the cut model is read unquantized then, and where
that fails too, nothing was checked.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from app.domain.format_rules import stored_formats
from app.domain.formats import EmbeddingRule, ExportFormat
from app.domain.methods import RTNSpec
from app.domain.runtimes import Runtime
from bitwright.errors import BitwrightError, RuntimeDidNotLoad
from bitwright.events import Stage
from bitwright.report import LoadReport
from workers.contracts.blocks import BlockTask
from workers.engine.export import kept_linears, left_beside, part_of
from workers.engine.job import Job
from workers.engine.loads_here.checks import Check, Probe
from workers.engine.loads_here.cut import CutCheckpoint, NotOneBlockError, first_block, untied, write_plain
from workers.engine.loads_here.reading import Reading
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.quantize.activations import Activations
from workers.engine.quantize.outer_matrices import plain_matrix
from workers.engine.quantize.registry import METHODS
from workers.formats.registry import open_writer, source_for
from workers.numerics.quantized import LinearResult

FOLDER = "reading"
"""In the workspace: the cut checkpoints, and the runtimes' logs and caches."""
FAILED = ("does_not_load", "differs")
BEFORE_TRAINING = "it holds what training makes, and the block is read before"


@dataclass(frozen=True)
class BlockCheck:
    """A check that runs beside the job.

    expected   logits of the block as it is quantized, fp32 (tokens, vocabulary)
    reports    of runtimes that were asked, when they are done
    skipped    of formats that nothing could be tried of
    """

    job: Job
    reading: Reading
    probe: Probe
    cut: CutCheckpoint | None
    reports: Future[list[LoadReport]] | None
    skipped: tuple[LoadReport, ...] = ()

    @property
    def is_known(self) -> bool:
        """True if `result` does not wait."""
        return self.reports is None or self.reports.done()

    def result(self) -> tuple[LoadReport, ...]:
        """The reports, when all are there.

        Raises:
            RuntimeDidNotLoad: a runtime does not load a format, or computes something else.
        """
        if self.reports is None:
            return self.skipped
        folder = self.job.workspace / FOLDER / "block"
        with self.job.clock.during(Stage.VERIFY):
            try:
                reports = self.reports.result()
                if any(report.result in FAILED for report in reports):
                    reports = self._blamed(reports)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        self.job.reporter.progress(Stage.VERIFY, 1, 1, "blocks")
        return (*reports, *self.skipped)

    def _blamed(self, reports: list[LoadReport]) -> list[LoadReport]:
        """The reports, none of them a failure, since the cut model does not load as it is.

        Raises:
            RuntimeDidNotLoad: it does, so that failures are the format's.
        """
        assert self.cut is not None  # noqa: S101 - for the type checker
        folder = self.job.workspace / FOLDER / "block" / "plain"
        write_plain(self.cut, folder)
        if Runtime.TRANSFORMERS in self.job.order.runtimes:
            check = Check.of(ExportFormat.MERGED, Runtime.TRANSFORMERS, self.job.order)
            plain = self.reading.read(check, folder, self.probe, block_logits(self.job, self.probe, {}), level="block")
            if plain.result != "loads":
                why = f"its first block alone is no model to transformers, quantized or not: {plain.detail}"
                return [_not_checked(report, why) for report in reports]
        raise failure(next(report for report in reports if report.result in FAILED))


def begin(job: Job, checks: list[Check], reading: Reading) -> BlockCheck:
    """Write the block, and let the runtimes read it meanwhile."""
    job.reporter.progress(Stage.VERIFY, 0, 1, "blocks")
    probe = Probe.of(job.model.checkpoint.folder, job.model.known_tokens)
    able = [check for check in checks if not check.format.info.is_adapter]
    left = tuple(skipped(check, BEFORE_TRAINING) for check in checks if check.format.info.is_adapter)
    try:
        cut = first_block(job.model)
        results = rounded_block(job)
        expected = block_logits(job, probe, dequantized(job.model, results))
    except (NotOneBlockError, BitwrightError) as error:
        why = error.detail if isinstance(error, BitwrightError) else str(error)
        return BlockCheck(job, reading, probe, None, None, (*(skipped(check, why) for check in able), *left))
    pool = ThreadPoolExecutor(1, thread_name_prefix="reading")
    reports = pool.submit(_read_all, job, able, reading, probe, cut, results, expected)
    pool.shutdown(wait=False)
    return BlockCheck(job, reading, probe, cut, reports, left)


@torch.no_grad()
def rounded_block(job: Job) -> dict[str, LinearResult]:
    """Linears of the first block, embeddings and head where they are quantized, by full name, on the host.

    Linears are rounded to nearest; embeddings are those of the result, and so is the head, but for columns' weights.
    """
    model, outer = job.model, (job.model.layout.embeddings, job.model.layout.head)
    prefix = model.layout.block(0)
    own = [name for name in model.block_linears(0) if f"{prefix}.{name}" in job.schemes]
    with model.loaded(prefix):
        results = _rounded(job, model.blocks[0], prefix, own)
    return results | {name: plain_matrix(job, name) for name in outer if name in job.schemes}


def dequantized(model: StreamedModel, results: Mapping[str, LinearResult]) -> dict[str, Tensor]:
    """Weights by full parameter name; a tied head is the quantized embeddings."""
    weights = {f"{name}.weight": result.dequantize() for name, result in results.items()}
    embeddings = weights.get(f"{model.layout.embeddings}.weight")
    tied = {f"{model.layout.head}.weight": embeddings} if model.tied and embeddings is not None else {}
    return weights | tied


def _rounded(job: Job, module: nn.Module, prefix: str, names: Sequence[str]) -> dict[str, LinearResult]:
    """Linears inside a module by the method that rounds to nearest, with the schemes of the job."""
    full = {name: f"{prefix}.{name}" for name in names}
    empty = torch.empty(0, 0, 0, dtype=job.model.dtype)
    task = BlockTask(
        index=0,
        block=module,
        forward=_unused,
        inputs=empty,
        inputs_fp=empty,
        targets=empty,
        schemes={name: job.schemes[full[name]] for name in names},
        second_moments={},
        scale_dtype=job.plan.scale_dtype,
        device=job.model.device,
        seed=job.seed,
        micro_batch=1,
        tick=lambda _: None,
        tune=_unused,
    )
    made = METHODS["rtn"].quantize_block(task, RTNSpec()).linears
    return {full[name]: result.to(torch.device("cpu")) for name, result in made.items()}


def _unused(*_: Any, **__: Any) -> Any:
    raise TypeError("rounding to nearest looks at weights alone")


@torch.no_grad()
def block_logits(job: Job, probe: Probe, weights: Mapping[str, Tensor]) -> Tensor:
    """Logits of a model of the first block alone, fp32 (tokens, vocabulary) on the host.

    weights   in place of the model's own, by full parameter name
    """
    model, given = job.model, {name: weight.to(job.model.device) for name, weight in weights.items()}
    with model.loaded(*model.layout.outer, given=given):
        activations = Activations(model, probe.ids, job.plan, keep_inputs=False)
    with model.loaded(model.layout.block(0), given=given):
        activations.advance_quantized(0, model.blocks[0])
    with model.loaded(*model.after_blocks, given=given):
        return model.logits(activations.quantized.to(model.device))[0].float().cpu()


def write_block(job: Job, name: ExportFormat, cut: CutCheckpoint, results: Mapping[str, LinearResult]) -> Path:
    """The checkpoint of the block in a format, by its own writer."""
    folder = job.workspace / FOLDER / "block" / name.value
    model = job.model
    outer = model.layout.embeddings
    embeddings = outer if outer in results else None
    source = source_for(name, cut, None if embeddings is None else untied(cut, model))
    writer = open_writer(folder, name, source, stored_formats(job.request.formats), embeddings=embeddings)
    if embeddings is not None and model.tied and name.info.embeddings is EmbeddingRule.UNIFORM:
        writer.add_linear(model.layout.head, results[embeddings], module=model.layout.head)
    for linear, result in results.items():
        writer.add_linear(model.names.linear_name(linear), result, module=linear, part=part_of(model, linear))
    for linear, part in left_beside(model, list(results)):
        if linear.startswith(model.layout.block(0) + "."):
            writer.add_part(model.names.linear_name(linear), model.names.read(f"{linear}.weight"), part)
    later = tuple(model.layout.block(index) + "." for index in range(1, len(model.blocks)))
    writer.finish(ignored=[each for each in kept_linears(model, results) if not each.startswith(later)])
    return folder


def failure(report: LoadReport) -> RuntimeDidNotLoad:
    """The error of a block that a runtime does not read."""
    does = "does not load" if report.result == "does_not_load" else "misreads"
    return RuntimeDidNotLoad(
        f"{report.runtime} {report.version or ''} {does} one block as {report.format}: {report.detail}",
        field="formats",
        value=report.format,
        hint="ask for another format or scheme, or set verify to off if it is served elsewhere",
    )


def _read_all(
    job: Job,
    checks: list[Check],
    reading: Reading,
    probe: Probe,
    cut: CutCheckpoint,
    results: Mapping[str, LinearResult],
    expected: Tensor,
) -> list[LoadReport]:
    """In a thread beside the job; a format that does not hold the block is no fault of a runtime."""
    reports, folders = list[LoadReport](), dict[ExportFormat, Path]()
    for check in checks:
        started = time.perf_counter()
        try:
            if check.format not in folders:
                folders[check.format] = write_block(job, check.format, cut, results)
        except BitwrightError as error:
            reports.append(skipped(check, error.detail))
            continue
        report = reading.read(check, folders[check.format], probe, expected, level="block")
        reports.append(report.model_copy(update={"seconds": time.perf_counter() - started}))
    return reports


def skipped(check: Check, why: str) -> LoadReport:
    """The report of a format of which no block could be tried."""
    return LoadReport(
        format=check.format.value,
        runtime=check.runtime.value,
        version=check.where.version,
        read="block",
        result="not_checked",
        detail=why,
    )


def _not_checked(report: LoadReport, why: str) -> LoadReport:
    return report.model_copy(update={"result": "not_checked", "detail": why, "difference": None})
