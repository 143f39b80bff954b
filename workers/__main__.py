"""`python -m workers`: one worker, serving one class of device."""

import os
import sys
from pathlib import Path

import structlog

from app.logs import configure_logging
from app.settings import Settings, settings_or_exit, warn_of_unknown_variables
from app.store.blobs import open_blobs
from app.store.ids import new_id
from app.store.session import Database
from app.tracing import open_tracing
from bitwright.errors import InvalidSettings
from workers.disk.handover import demand_way
from workers.disk.orders import BUILTIN_TEXT
from workers.supervise.capacity import capacity
from workers.supervise.celery_app import run_worker
from workers.supervise.child_env import attempt_user, compiled_folder
from workers.supervise.context import WorkerContext
from workers.supervise.kernels import Kernels
from workers.supervise.runtimes import WarmReader, found_runtimes
from workers.supervise.spares.pool import FOLDER as SPARES
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
    try:
        tracing = open_tracing(settings, "bitwright-worker")
    except InvalidSettings as error:
        log.error(error.code, detail=error.detail, hint=error.hint)
        return 2
    user = attempt_user(settings)
    if user is not None:
        try:
            _make_way(settings, user)
        except InvalidSettings as error:
            log.error(error.code, detail=error.detail, hint=error.hint)
            return 2
    kernels = Kernels(settings.kernel_dir, float(settings.lease_seconds))
    reader = WarmReader(settings.workspace_dir, user, {BUILTIN_TEXT: str(kernels.builtin_text)})
    database, worker_id = Database(settings.database_url), f"{settings.worker_name}.{new_id('wrk')}"
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
        tracing=tracing,
    )
    if settings.worker_metrics_port is not None:
        context.metrics.serve(settings.worker_metrics_host, settings.worker_metrics_port)
    try:
        run_worker(context)
    finally:
        spares.close()
        if kernels is not None:
            kernels.close()
        reader.close()
        database.close()
        if tracing is not None:
            tracing.close()
    return 0


def _make_way(settings: Settings, user: int) -> None:
    """Let the user that attempts run as get to its workspaces, and keep what Triton compiles for it."""
    own = (settings.workspace_dir / SPARES, compiled_folder(settings, user))
    for folder in own:
        folder.mkdir(parents=True, exist_ok=True)
    # It imports from these folders as long as it lives.
    for folder in (*own, *(Path(prefix) / "lib" for prefix in (sys.prefix, sys.base_prefix)), Path(__file__)):
        demand_way(folder, user)
    os.chown(compiled_folder(settings, user), user, user)


if __name__ == "__main__":
    sys.exit(main())
