"""Number of processes that compute a job together."""

from app.domain.request.job_request import JobRequest

LEAST_WINDOWS = 2
"""Calibration sequences per process: one to learn from, one to validate."""


def world_size(request: JobRequest, devices: int) -> int:
    """The ranks that a job gets of a worker's `devices`: the most that divide the method's batches evenly.

    Rather fewer ranks than devices than another batch: a step has as many sequences as its request asks for. Where
    nothing is quantized by the batch, finetuning decides, whose batches need not be divided evenly; a job that shares
    neither gets one.
    """
    quantizes = request.base_job is None
    batch = request.quantization.shared_batch() if quantizes else 0
    most = min(devices, request.calibration.num_samples // LEAST_WINDOWS) if quantizes else devices
    if not batch:
        return max(1, min(most, 0 if request.finetune is None else request.finetune.batch_size))
    return max((n for n in range(2, most + 1) if batch % n == 0), default=1)
