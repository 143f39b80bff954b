"""The tenant of a claimed job: folders that it may read, and the Hub token that fetches for it."""

from dataclasses import dataclass, replace

from app.domain.inputs.roots import roots_of
from app.settings import Settings
from app.store.attempts import Claim, Terms
from app.store.tenancy.hub_tokens import Vault, token_of
from app.store.tenancy.tenants import policy_of
from bitwright.job_states import DeviceClass
from workers.supervise.context import WorkerContext


@dataclass(frozen=True)
class OwnToken:
    """A Hub token of a job or of its tenant. Its text is shown by no representation."""

    tenant_id: str
    text: str

    def __repr__(self) -> str:
        return f"OwnToken({self.tenant_id})"


def terms_of(settings: Settings, device: DeviceClass, devices: int) -> Terms:
    """Terms of this worker's attempts, at the present price."""
    return Terms(
        devices=devices,
        price_micros=settings.price_micros(device.value),
        running_jobs=settings.tenant_quotas.running_jobs,
    )


def for_tenant(context: WorkerContext, claim: Claim) -> WorkerContext:
    """The worker's context with the folders that the job's tenant may read now."""
    with context.database.reading() as session:
        policy = policy_of(session, claim.tenant_id, context.settings.tenant_quotas)
    roots = roots_of(context.settings.model_roots, policy.model_roots)
    return replace(context, settings=context.settings.model_copy(update={"model_roots": roots}))


def own_token(context: WorkerContext, claim: Claim) -> OwnToken | None:
    """The Hub token of the job or of its tenant; None: the service's fetches.

    Raises:
        StorageError: it was encrypted with a key that this worker does not have.
    """
    with context.database.reading() as session:
        vault = Vault(context.settings.token_keys)
        text = token_of(session, vault, tenant_id=claim.tenant_id, job_id=claim.job_id)
    return None if text is None else OwnToken(claim.tenant_id, text)
