"""Memory that a job will need, told by its attempt before it is taken: a worker may hold some that it can give back."""

from pathlib import Path

from app.domain.estimates import estimate
from app.domain.fit import can_do_without_model
from app.domain.inputs.inspection import FolderFiles, inspect_checkpoint
from bitwright.errors import BitwrightError
from bitwright.events import LogEvent
from workers.child.lifeline import ReportPipe
from workers.disk.orders import AttemptOrder

NEEDS = "memory_needed"
"""Event of the log with `host_memory_bytes` and `device_memory_bytes`, right within a factor of about two."""


def tell_needs(order: AttemptOrder, report: ReportPipe) -> None:
    """Report what the order's job will need; nothing where its model cannot be judged, which the engine will say."""
    if not order.model_path:
        return
    request, files = order.request, FolderFiles(Path(order.model_path))
    try:
        needed = estimate(request, inspect_checkpoint(files, any_type=can_do_without_model(request)))
    except (BitwrightError, OSError, ValueError):
        return
    sizes = {name: int(needed[name]) for name in ("host_memory_bytes", "device_memory_bytes")}
    report.write(LogEvent(event=NEEDS, fields=dict(sizes)))
