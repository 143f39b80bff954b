"""Judgement of a job's model before its weights are fetched, by the rules that a folder is judged by on submission."""

import shutil
from pathlib import Path

from app.domain.capacity import MARGIN, too_small
from app.domain.estimates import estimate
from app.domain.fit import can_do_without_model, misfits, refusal
from app.domain.inputs.inspection import CheckpointFiles, inspect_checkpoint
from bitwright.errors import DiskFull, ExceedsCapacity
from bitwright.events import LogEvent
from workers.child.lifeline import ReportPipe
from workers.disk.orders import FetchOrder

ESTIMATES = "estimates"
"""Event of the log with what the job is estimated to need."""


def examine(order: FetchOrder, files: CheckpointFiles, report: ReportPipe) -> int:
    """Refuse a job that will fail, and report what it needs. Bytes of disk that its results take, at least.

    Raises:
        InputError, InvalidRequest: the model is none that can be quantized, or the request does not fit it.
        ExceedsCapacity: the job needs much more than this worker has.
    """
    request = order.request
    if request is None:
        return 0
    inspection = inspect_checkpoint(files, any_type=can_do_without_model(request))
    problems = misfits(request, inspection)
    if problems:
        raise refusal(problems)
    estimates = estimate(request, inspection)
    short = too_small(estimates, order.capacity)
    if short is not None:
        hint = "fewer or shorter calibration sequences need less; or start a larger worker"
        raise ExceedsCapacity(f"this worker could not hold the job: {short}", field="model", hint=hint)
    plain = {name: value for name, value in estimates.items() if isinstance(value, int | float)}
    seconds = {f"seconds_{device}": value for device, value in estimates["seconds"].items()}
    report.write(LogEvent(event=ESTIMATES, fields={**plain, **seconds}))
    return int(estimates["disk_bytes"] / MARGIN)


def require_disk(download: int, into: Path, results: int, beside: Path, repo_id: str) -> None:
    """Check that so many bytes can be downloaded, and that the job's results will fit.

    into, beside   folders that are there, for the download and for the results

    Raises:
        DiskFull: a disk has less left.
    """
    shared = into.stat().st_dev == beside.stat().st_dev
    for folder, needed, what in (
        (into, download, "the checkpoint"),
        (beside, results + (download if shared else 0), "the checkpoint with the job's results"),
    ):
        free = shutil.disk_usage(folder).free
        if needed > free:
            hint = "free space on the worker, and retry; or ask for fewer formats"
            detail = f"{what} takes {needed} bytes or more, the worker's disk has {free} left"
            raise DiskFull(detail, value=repo_id, hint=hint)
