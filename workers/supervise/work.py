"""The work of a worker: it takes no job from a message, but asks the database until there is none left.

Before each claim it takes back what lost workers held, so that no job waits for a sweep that is not there.
"""

import structlog

from app.store.attempts import Claim, claim
from app.store.endings import requeue_lost
from bitwright.errors import Unavailable
from bitwright.job_states import DeviceClass
from workers.supervise.attempt.attempt_runner import supervise
from workers.supervise.context import WorkerContext
from workers.supervise.tenancy import terms_of

log = structlog.get_logger(__name__)


def work(context: WorkerContext, device_class: str) -> int:
    """Claim, supervise, claim again until there is nothing to do; how many attempts were run.

    A message for another class of device (an old one, a queue by mistake) is logged and dropped.
    """
    if device_class != context.device.value:
        log.warning("message_for_another_device", wanted=device_class, device=context.device.value)
        return 0
    attempts = 0
    while not context.stopping.is_set() and (claimed := _next(context)) is not None:
        supervise(context, claimed)
        attempts += 1
    return attempts


def _next(context: WorkerContext) -> Claim | None:
    try:
        with context.database.transaction() as session:
            lost = requeue_lost(session)
            claimed = claim(
                session,
                worker_id=context.worker_id,
                device_class=DeviceClass(context.device),
                lease_seconds=context.settings.lease_seconds,
                terms=terms_of(context.settings, context.device, context.capacity.devices),
            )
    except Unavailable:
        log.warning("claim_failed")
        return None
    for job_id, _device in lost:
        log.warning("job_taken_back", job_id=job_id)
    return claimed
