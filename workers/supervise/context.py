"""Context of a worker process: made once at its start, given to everything that supervises."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from app.settings import Settings
from app.store.blobs import BlobStore
from app.store.session import Database
from app.tracing import Tracing
from bitwright.job_states import DeviceClass
from workers.disk.orders import RuntimePlace
from workers.supervise.capacity import Capacity
from workers.supervise.kernels import Kernels
from workers.supervise.metrics import WorkerMetrics
from workers.supervise.runtimes import WarmReader
from workers.supervise.spares.pool import Spares


@dataclass(frozen=True)
class WorkerContext:
    """One worker: its name in the store, its machine, and what it reads and writes.

    stopping        set when the process was asked to end: the attempt in hand is given back
    attempt_module  what `python -m` runs for an attempt; the tests of supervision bring their own
    runtimes        what there is to read results in, by name
    reader          the child that does, and that reads what jobs are made of; None: attempts do without
    kernels         compiled loops that attempts begin with; None: each compiles what it needs
    spares          processes that wait to be attempts; None: each attempt is started when its job is there
    tracing         the way to a collector of traces; None: there is none
    """

    worker_id: str
    capacity: Capacity
    settings: Settings
    database: Database
    blobs: BlobStore
    stopping: threading.Event = field(default_factory=threading.Event)
    attempt_module: str = "workers.child.attempt"
    runtimes: Mapping[str, RuntimePlace] = field(default_factory=dict)
    reader: WarmReader | None = None
    spares: Spares | None = None
    kernels: Kernels | None = None
    metrics: WorkerMetrics = field(default_factory=WorkerMetrics)
    tracing: Tracing | None = None

    @property
    def device(self) -> DeviceClass:
        """The class of device that this worker serves."""
        return self.capacity.device
