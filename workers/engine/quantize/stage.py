"""The stage that quantizes every block, and embeddings and head where a request names them."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from bitwright.events import Stage
from bitwright.report import BlockReport, LinearReport
from workers.engine.job import Job
from workers.engine.quantize.activations import Activations
from workers.engine.quantize.block_pass import BlockPass
from workers.engine.quantize.block_progress import block_event
from workers.engine.quantize.outer_matrices import quantize_embeddings, quantized_head, substitutes
from workers.engine.text.sequences import Sequences
from workers.engine.tune.tuner import Tuner


@dataclass(frozen=True)
class Quantized:
    """The result of the stage, beside the finished blocks.

    head                     its dequantized weight, where it is quantized; of a tied model that of the embeddings
    calibration, evaluation  activations after the last block; None where no such text is read
    further                  those of the sequences that only end-to-end steps see: of X_q the embeddings
    """

    blocks: tuple[BlockReport, ...]
    head: Tensor | None
    head_report: LinearReport | None
    embeddings_report: LinearReport | None
    calibration: Activations | None
    evaluation: Activations | None
    further: Activations | None = None


def run(job: Job, ready: Callable[[], object] = lambda: None) -> Quantized:
    """Finishes every block that an earlier attempt has not finished; all of them are durable then.

    ready   called before each block is given to a method that tunes, when the passes through it are done, and may
            refuse to go on

    Raises:
        NumericalFailure: a weight or an output is not finite; it says whether the original model's is.
        InternalError: the processes have computed different weights for a block.
    """
    model, spec, texts, finished = job.model, job.spec, job.texts, job.finished_blocks
    observed = texts.calibration if spec.observes_inputs() or spec.measures_inputs() else None
    finished.adopt(job.fingerprint())
    embeddings = quantize_embeddings(job)
    with model.loaded(*model.layout.outer):
        observed_ids = None if observed is None else observed.ids
        calibration = _activations(job, observed_ids, keep_inputs=spec.needs_original_inputs())
        evaluation = _activations(job, texts.evaluated, reference=job.reference)
        further = _activations(job, _further(job, observed))
    given = substitutes(model, finished)
    for activations in (calibration, evaluation, further):
        if activations is not None and given:
            activations.substitute(model, given)
    if finished.resumed:
        job.reporter.log("blocks_resumed", blocks=finished.resumed)
        _tell(job)
    job.clock.enter(Stage.QUANTIZE)
    tuner = Tuner(job.reporter.log, job.processes)
    blocks = BlockPass(
        job, calibration, evaluation, tuner, ready if spec.observes_inputs() else lambda: None, further=further
    )
    reports = blocks.run()
    finished.settle()
    head_report, head = quantized_head(job, calibration)
    outer = [report.name for report in (embeddings, head_report) if report is not None]
    if outer and job.base_job is None:
        verb = "is" if len(outer) == 1 else "are"
        job.reporter.warning("head_rounded", f"{' and '.join(outer)} {verb} rounded to nearest: only blocks are tuned")
    tuner.release()
    return Quantized(reports, head, head_report, embeddings, calibration, evaluation, further)


def _tell(job: Job) -> None:
    """Blocks of earlier attempts that died between making them durable and telling of them."""
    for block in job.finished_blocks.blocks:
        if block.report is None:
            continue
        event = block_event(block.report, len(job.model.blocks), job.rounds_before)
        if event.milestone is not None and not job.order.is_told(event.milestone):
            job.reporter.block(event)


def _further(job: Job, observed: Sequences | None) -> Tensor | None:
    """The sequences that only end-to-end steps see, where there are such steps and one for each process."""
    if observed is None or observed.further is None or not job.spec.end_to_end_steps():
        return None
    return observed.further if len(observed.further) >= job.processes.size else None


def _activations(
    job: Job, ids: Tensor | None, *, keep_inputs: bool = False, reference: bool = False
) -> Activations | None:
    """Activations of this process's share of the sequences; the model's `outer` must be loaded."""
    if ids is None:
        return None
    return Activations(job.model, job.processes.share(ids), job.plan, keep_inputs=keep_inputs, reference=reference)
