"""A job's computation from order to checkpoints: its stages in the order of time.

A job without a model has one stage, which does everything.
"""

from dataclasses import replace
from pathlib import Path

from app.domain.attempt_lines import ResultLine
from workers.disk.orders import AttemptOrder
from workers.engine import evaluate, export, exports, finetune, goal, quantize, weights_only
from workers.engine.device.process_group import joined
from workers.engine.job import Job
from workers.engine.loads_here.stage import Verification, verification
from workers.engine.opening import open_job
from workers.engine.report import Results
from workers.engine.reporter import Reporter
from workers.engine.untrusted.asking import JobInput


def run(order: AttemptOrder, workspace: Path, reporter: Reporter) -> ResultLine:
    """Does what `order` says. Checkpoints go to `workspace`/output/<format>, finished blocks to `workspace`/state.

    Raises:
        InputError: the model, its data or the request's numbers do not fit together.
        InvalidRequest: the head is to be quantized but is the embeddings, of which the request does not speak.
        FormatCannotHold: a format of the request cannot hold this model.
        RuntimeDidNotLoad: a runtime of the worker does not read one block of the result.
    """
    inputs = JobInput.of(order, workspace, rank=0)
    inputs.ask()
    with verification(order, workspace) as checks:
        inputs.try_model()
        reporter.log("model_tried", limited=inputs.limited)
        if order.request.exports:
            inputs.texts()  # the tokenizer is tried before this process loads it
            return exports.run(order, workspace, reporter, checks.exported)
        if weights_only.chosen(order):
            inputs.texts()
            return weights_only.run(order, workspace, reporter, checks.weights)
        with open_job(order, workspace, reporter, 0, inputs) as job:
            return export.run(*_computed(job, checks), checks.files)


def assist(order: AttemptOrder, workspace: Path, rank: int) -> None:
    """The same up to the export, mute: what every other process of an order does while the first is in `run`.

    Raises what `run` raises, and where it does, unless only this process meets the cause.
    """
    if order.request.exports:
        return  # one process reads and writes files
    inputs = JobInput.of(order, workspace, rank)
    inputs.try_model()
    if weights_only.chosen(order):
        return
    with open_job(order, workspace, Reporter(lambda _: None), rank, inputs) as job:
        _computed(job)


def _computed(job: Job, checks: Verification | None = None) -> tuple[Job, Results]:
    """The stages that all processes of the job go through together; one of them has `checks` beside."""
    with joined(job.processes, job.order.rendezvous, job.model.device):
        job = quantize.prepare(job)
        job, quantized, tuned = goal.make(job, quantize.run if checks is None else checks.checked(quantize.run))
        # Two or three tensors of (sequences, length, width), whose memory finetuning may need.
        quantized = replace(quantized, calibration=None)
        if checks is not None and job.request.finetune is not None:
            checks.demand_block()
        finetuned = finetune.run(job, quantized.head)
        evaluated = evaluate.run(job, quantized, finetuned)
        if checks is not None:
            checks.demand_block()
    return job, Results(
        quantized.blocks, quantized.embeddings_report, quantized.head_report, tuned, finetuned, evaluated
    )
