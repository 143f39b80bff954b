"""How many processes compute a job together."""

from app.domain.jobs import JobRequest

LEAST_WINDOWS = 2
"""Windows of calibration for each rank: one to learn from, one that judges."""


def world_size(request: JobRequest, devices: int) -> int:
    """The ranks that a job gets of a worker's `devices`: the most that divide the method's batches evenly.

    Rather fewer ranks than devices than another batch: a step has as many sequences as its request asks for. A method
    that divides nothing gets one.
    """
    batch, windows = request.quantization.shared_batch(), request.calibration.num_samples
    shared = [n for n in range(2, devices + 1) if batch and batch % n == 0 and windows >= LEAST_WINDOWS * n]
    return max(shared, default=1)
