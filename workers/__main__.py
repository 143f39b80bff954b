"""`python -m workers`: one worker, serving one class of device."""

import sys

import structlog

from app.logs import configure_logging
from app.settings import settings_or_exit, warn_of_unknown_variables
from app.store.blobs import open_blobs
from app.store.ids import new_id
from app.store.session import Database
from bitwright.job_states import DeviceClass
from workers.supervise.capacity import capacity
from workers.supervise.celery_app import run_worker
from workers.supervise.context import WorkerContext
from workers.supervise.kernels import Kernels
from workers.supervise.runtimes import WarmReader, found_runtimes
from workers.supervise.spares.pool import Spares

log = structlog.get_logger("workers")


def main(attempt_module: str = "workers.child.attempt") -> int:
    """Run a worker with the settings of the environment; the process's exit code."""
    settings = settings_or_exit()
    configure_logging(settings)
    warn_of_unknown_variables()
    if not settings.broker_url:
        log.error("broker_not_configured", hint="set BITWRIGHT_BROKER_URL, or run `bitwright serve`")
        return 2
    try:
        machine = capacity(settings.device, settings.workspace_dir, settings.devices)
    except RuntimeError as error:
        log.error("device_missing", reason=str(error))
        return 2
    database, reader = Database(settings.database_url), WarmReader(settings.workspace_dir)
    worker_id = f"{settings.worker_name}.{new_id('wrk')}"
    on_cpu = machine.device is DeviceClass.CPU  # nothing else runs compiled loops
    kernels = Kernels(settings.kernel_dir, float(settings.lease_seconds)) if on_cpu else None
    spares = Spares(attempt_module, worker_id, settings, machine, kernels)
    context = WorkerContext(
        worker_id=worker_id,
        capacity=machine,
        settings=settings,
        database=database,
        blobs=open_blobs(settings.blob_url),
        attempt_module=attempt_module,
        runtimes=found_runtimes(settings),
        reader=reader,
        spares=spares,
        kernels=kernels,
    )
    try:
        run_worker(context)
    finally:
        spares.close()
        if kernels is not None:
            kernels.close()
        reader.close()
        database.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
