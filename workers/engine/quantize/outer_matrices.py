"""Embeddings and head, the matrices outside the blocks: rounded to nearest with searched scales, where asked for.

Embeddings come before the first block, so that the quantized stream X_q starts from what ships; the head comes after
the last one, when the second moments of its inputs can be read off X_q. A head that is tied to the embeddings is the
same matrix: it is quantized once, and both use it.
"""

import torch
from torch import Tensor

from bitwright.report import LinearReport
from workers.engine.finished_blocks import FinishedBlocks
from workers.engine.job import Job
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.quantize.activations import Activations, second_moments, sum_moments
from workers.engine.quantize.block_report import report_of_matrix
from workers.numerics.quantized import LinearResult
from workers.numerics.searched_matrix import quantize_matrix

HEAD_TOKENS = 8192
"""Tokens of calibration text whose second moments weigh a head's columns."""


def quantize_embeddings(job: Job) -> LinearReport | None:
    """Makes the quantized embeddings durable, if they are to be quantized and no earlier attempt did it.

    Raises:
        NumericalFailure: a weight is not finite.
    """
    name, finished = job.model.layout.embeddings, job.finished_blocks
    if name not in job.schemes:
        return None
    with job.model.loaded(name):
        original = job.model.model.get_parameter(f"{name}.weight")
        if finished.embeddings is None:
            made = job.base_job.linear(name) if job.base_job is not None else _rounded(job, name, original, None)
            finished.save_embeddings(name, made)
        finished.settle()
        return report_of_matrix(name, original, finished.load_embeddings()[name])


def substitutes(model: StreamedModel, finished: FinishedBlocks) -> dict[str, Tensor]:
    """Replacement of the embedding matrix in the quantized model, on the host, by parameter; empty if it stays."""
    results = finished.load_embeddings()
    return {f"{name}.weight": result.to(model.device).dequantize().cpu() for name, result in results.items()}


def quantized_head(job: Job, calibration: Activations | None) -> tuple[LinearReport | None, Tensor | None]:
    """Report and dequantized weight of the head once all blocks are done; (None, None) where it stays as it is.

    A tied head is the quantized embeddings, and has no report of its own.
    """
    head, index, finished = job.model.layout.head, len(job.model.blocks), job.finished_blocks
    if head not in job.schemes:
        embeddings = finished.load_embeddings() if job.model.tied else {}
        return None, next((result.dequantize() for result in embeddings.values()), None)
    with job.model.loaded(head):
        original = job.model.model.get_parameter(f"{head}.weight")
        if index >= finished.resumed:
            moments = None if job.base_job is not None else _moments(job, calibration)
            made = job.base_job.linear(head) if job.base_job is not None else _rounded(job, head, original, moments)
            finished.save(index, {head: made}, None)
            finished.settle()
        result = finished.load(index)[head]
        return report_of_matrix(head, original, result), result.dequantize()


def plain_matrix(job: Job, name: str) -> LinearResult:
    """The quantized embeddings, or the head by weights alone, on the host."""
    with job.model.loaded(name):
        return _rounded(job, name, job.model.model.get_parameter(f"{name}.weight"), None).to(torch.device("cpu"))


def plain_embeddings(job: Job) -> dict[str, Tensor]:
    """Replacement of the embedding matrix as it will be, on the host, by parameter; empty if it stays."""
    name = job.model.layout.embeddings
    return {f"{name}.weight": plain_matrix(job, name).dequantize()} if name in job.schemes else {}


def plain_head(job: Job) -> Tensor:
    """The dequantized head of a job that looks at weights alone, on the host."""
    return plain_matrix(job, job.model.layout.head).dequantize()


def _rounded(job: Job, name: str, original: Tensor, moments: Tensor | None) -> LinearResult:
    return LinearResult(quantize_matrix(original, job.schemes[name], job.plan.scale_dtype, moments))


def _moments(job: Job, calibration: Activations | None) -> Tensor | None:
    """Second moments of the head's inputs in the quantized model, (in,); None where no text is read.

    One row of the head stands for it, so that its inputs are made and no logits.
    """
    if calibration is None:
        return None
    model, states = job.model, calibration.quantized
    head = model.linears()[model.layout.head]
    length = max(1, HEAD_TOKENS // max(1, len(job.texts.calibration.ids) if job.texts.calibration else 1))
    with model.loaded(*model.after_blocks):
        first = {f"{model.layout.head}.{leaf}": value[:1] for leaf, value in head.named_parameters(recurse=False)}
        with model.filled(first), second_moments({"head": head}) as moments:
            for row in states:
                model.logits(row[None, :length].to(model.device))
            sum_moments(job.processes, moments, {"head": head})
    return moments["head"]
