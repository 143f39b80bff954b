"""A job's computation from order to checkpoints: its stages in the order of time.

A job without a model has one stage, which does everything.
"""

from dataclasses import replace
from pathlib import Path

from app.domain.attempt_lines import ResultLine
from workers.disk.orders import AttemptOrder
from workers.engine import evaluate, export, finetune, goal, quantize, weights_only
from workers.engine.device.process_group import joined
from workers.engine.job import Job
from workers.engine.opening import open_job
from workers.engine.report import Results
from workers.engine.reporter import Reporter


def run(order: AttemptOrder, workspace: Path, reporter: Reporter) -> ResultLine:
    """Does what `order` says. Checkpoints go to `workspace`/output/<format>, finished blocks to `workspace`/state.

    Raises:
        InputError: the model, its data or the request's numbers do not fit together.
        InvalidRequest: the head is to be quantized but tied to the embeddings.
        FormatCannotHold: a format of the request cannot hold this model.
    """
    if weights_only.chosen(order):
        return weights_only.run(order, workspace, reporter)
    with open_job(order, workspace, reporter, rank=0) as job:
        return export.run(*_computed(job))


def assist(order: AttemptOrder, workspace: Path, rank: int) -> None:
    """The same up to the export, mute: what every other process of an order does while the first is in `run`.

    Raises what `run` raises, and where it does, unless only this process meets the cause.
    """
    if weights_only.chosen(order):
        return  # one process reads and writes files
    with open_job(order, workspace, Reporter(lambda _: None), rank) as job:
        _computed(job)


def _computed(job: Job) -> tuple[Job, Results]:
    """The stages that all processes of the job go through together."""
    with joined(job.processes, job.order.rendezvous, job.model.device):
        job = quantize.prepare(job)
        job, quantized, tuned = goal.make(job)
        # Two or three tensors of (sequences, length, width), whose memory finetuning may need.
        quantized = replace(quantized, calibration=None)
        finetuned = finetune.run(job, quantized.head)
        evaluated = evaluate.run(job, quantized, finetuned)
    return job, Results(quantized.blocks, quantized.head_report, tuned, finetuned, evaluated)
