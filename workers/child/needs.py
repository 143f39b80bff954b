"""Memory that a job will need, told by its attempt before it is taken: a worker may hold some that it can give back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from app.domain.estimates import estimate
from app.domain.fit import can_do_without_model
from app.domain.inputs.inspection import FolderFiles, inspect_checkpoint
from bitwright.errors import BitwrightError, OverLimit
from bitwright.events import LogEvent
from workers.child.lifeline import ReportPipe
from workers.disk.orders import AttemptOrder

MARGIN, BESIDE_BYTES = 2.0, 4 << 30
"""A job's need is told within a factor of about two; libraries and a device's runtime come on top."""
NAMES = ("host_memory_bytes", "device_memory_bytes")
WEIGHTS = frozenset({".safetensors", ".gguf"})
GIB = 1 << 30
MemorySetting = Literal["plan", "off"] | int
"""By the job's plan, any, or so many bytes."""
NEEDS = "memory_needed"
"""Event of the log with `host_memory_bytes` and `device_memory_bytes`, right within a factor of about two."""


def needs_of(order: AttemptOrder) -> dict[str, int]:
    """Bytes that an order's job will need, by name; empty where its model cannot be judged: the engine will say why."""
    if not order.model_path:
        base = Path(order.base_job_path) if order.base_job_path is not None else None
        size = 0 if base is None else sum(file.stat().st_size for file in base.rglob("*") if file.is_file())
        return dict(zip(NAMES, (size, 0), strict=True)) if size else {}
    request, files = order.request, FolderFiles(Path(order.model_path))
    try:
        needed = estimate(request, inspect_checkpoint(files, any_type=can_do_without_model(request)))
    except (BitwrightError, OSError, ValueError):
        return {}
    return {name: int(needed[name]) for name in NAMES}


def tell_needs(order: AttemptOrder, report: ReportPipe) -> dict[str, int]:
    """Report what the order's job will need, if that is known: bytes by name."""
    needed = needs_of(order)
    if needed:
        report.write(LogEvent(event=NEEDS, fields=dict(needed)))
    return needed


def limit_of(order: AttemptOrder, needed: Mapping[str, object]) -> int | None:
    """The bytes that this process may hold, which its supervisor watches as well; None: any."""
    return plan_limit(needed, device=order.device, setting=order.memory, ranks=order.world_size) if needed else None


def mapped_bytes(order: AttemptOrder) -> int:
    """Size of the weights' files, which are mapped for as long as the job lasts."""
    folders = [Path(folder) for folder in (order.model_path, order.base_job_path) if folder]
    files = (file for folder in folders for file in folder.rglob("*") if file.suffix in WEIGHTS and file.is_file())
    return sum(file.stat().st_size for file in files)


def plan_limit(needed: Mapping[str, object], *, device: str, setting: MemorySetting, ranks: int = 1) -> int | None:
    """The bytes of the host that each process of a job may hold, which says what it needs; None: any."""
    if setting == "off":
        return None
    if isinstance(setting, int):
        return setting
    host, beside = (value if isinstance(value, int) else 0 for value in map(needed.get, NAMES))
    # What would lie on a GPU lies on the host where there is none.
    need = host + (beside if device == "cpu" else 0)
    return int(MARGIN * need) + BESIDE_BYTES * max(1, ranks)


def over_limit(limit: int, held: int | None = None) -> OverLimit:
    """The error of an attempt that takes more than its plan."""
    took = f"the attempt took {held / GIB:.1f} GiB of memory" if held is not None else "the attempt wanted more memory"
    hint = (
        "ask for fewer or shorter sequences; where the job is right, the operator sets BITWRIGHT_ATTEMPT_MEMORY to more"
    )
    detail = f"{took}, and its plan has {limit / GIB:.1f}"
    return OverLimit(detail, field="model", value=limit, hint=hint)
