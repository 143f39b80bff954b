"""One try at a publication: its files from the blob store, the child that commits them, the record of its end."""

import shutil
import time
from pathlib import Path
from threading import Event

import structlog
from pydantic import TypeAdapter, ValidationError

from app.domain.attempt_lines import PublicationLine, PublishedLine, RefusedLine
from app.hub.environment import network_variables
from app.store.artifacts import ArtifactRepository
from app.store.blobs import materialise
from app.store.hub.branches import MAIN, branches
from app.store.hub.publications import (
    PublicationClaim,
    end_publication,
    release_publication,
    renew_publication,
    succeed_publication,
)
from app.store.jobs import JobRepository
from app.store.tenancy.hub_tokens import Vault, token_of
from bitwright.errors import AttemptKilled, BitwrightError, InvalidRequest, NotFound, SourceForbidden, StorageError
from workers.child.lifeline import ATTEMPT, JOB_ID
from workers.disk.orders import PublishOrder
from workers.supervise.child_env import ALWAYS
from workers.supervise.child_process import ChildProcess, child_environment
from workers.supervise.context import WorkerContext

POLL_SECONDS = 0.25
PLAIN = {"HF_HUB_DISABLE_XET": "1"}
"""Every Hub takes files by LFS over HTTP; Xet is the public one's, and its client asks no other whether it has it."""
LINES: TypeAdapter[PublicationLine] = TypeAdapter(PublicationLine)

log = structlog.get_logger(__name__)


class _Stopped(Exception):
    """The worker is to end, or holds the publication no more."""


def publish(context: WorkerContext, claim: PublicationClaim, stopping: Event) -> None:
    """Try it, and note how it ended; nothing, if it is held no more."""
    folder = context.settings.data_dir / "publish" / claim.job_id
    wait = 0.0
    try:
        shutil.rmtree(folder, ignore_errors=True)
        told = _run(context, claim, folder, _token(context, claim), stopping)
        if isinstance(told, PublishedLine):
            with context.database.transaction() as session:
                succeed_publication(session, claim, {"url": told.url, "commit": told.commit})
            log.info("published", job_id=claim.job_id, repository=claim.publish.hub, commit=told.commit)
            return
        error, wait = told.error.exception(), float(told.wait_seconds)
    except _Stopped:
        with context.database.transaction() as session:
            release_publication(session, claim)
        return
    except BitwrightError as caught:
        error = caught
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    with context.database.transaction() as session:
        final = end_publication(session, claim, error, wait)
    log.warning("not_published", job_id=claim.job_id, attempt=claim.attempt, code=error.code, final=final)


def _token(context: WorkerContext, claim: PublicationClaim) -> str:
    """The token of the job or its tenant: the service's own, which fetches for all, writes for nobody."""
    with context.database.reading() as session:
        vault = Vault(context.settings.token_keys)
        token = token_of(session, vault, tenant_id=claim.tenant_id, job_id=claim.job_id)
    if token is None:
        hint = f"POST /v1/jobs/{claim.job_id}/publish with the header X-Hub-Token"
        raise SourceForbidden("neither the job nor its tenant has a Hub token to write with", hint=hint)
    return token


def _run(
    context: WorkerContext, claim: PublicationClaim, folder: Path, token: str, stopping: Event
) -> PublishedLine | RefusedLine:
    """Lay out the files, and run the child on them to its end."""
    files = folder / "files"
    _lay_out(context, claim, files)
    order = PublishOrder(
        job_id=claim.job_id,
        repository=claim.publish.hub,
        private=claim.publish.private,
        force=claim.publish.force,
        folder=str(files),
    )
    (folder / "publish.json").write_text(order.model_dump_json())
    variables = network_variables() | {JOB_ID: claim.job_id, ATTEMPT: str(claim.attempt)}
    variables |= {"HF_TOKEN": token, "HF_HOME": str(folder / "cache"), **PLAIN}
    if context.settings.hub_endpoint:
        variables["HF_ENDPOINT"] = context.settings.hub_endpoint
    lease = float(context.settings.lease_seconds)
    with ChildProcess(
        ["workers.child.publish", str(folder)],
        environment=child_environment(ALWAYS | variables),
        log_path=folder / "publish.log",
        silence_seconds=lease,
    ) as child:
        lines = _heard(context, claim, child, lease, stopping)
        code = child.finish()
    for line in reversed(lines):
        try:
            return LINES.validate_json(line)
        except ValidationError:
            continue
    raise AttemptKilled(f"the process that publishes ended with exit code {code}", value=code)


def _heard(
    context: WorkerContext, claim: PublicationClaim, child: ChildProcess, lease: float, stopping: Event
) -> list[bytes]:
    """All lines of the child until its end; meanwhile the publication is held.

    Raises:
        _Stopped: it cannot be held, or the worker is to end.
    """
    lines: list[bytes] = []
    renewed = time.monotonic()
    while not child.ended():
        lines += child.lines(POLL_SECONDS)
        if stopping.is_set():
            raise _Stopped
        if time.monotonic() - renewed > lease / 3:
            renewed = time.monotonic()
            with context.database.transaction() as session:
                if not renew_publication(session, claim, lease):
                    raise _Stopped
    return lines + child.remaining_lines()


def _lay_out(context: WorkerContext, claim: PublicationClaim, files: Path) -> None:
    """The files to publish, under their paths in the repository.

    Raises:
        InvalidRequest: the job has no such checkpoint, or is no more.
        StorageError: the store has lost a file's bytes.
    """
    wanted = claim.publish.format or MAIN
    try:
        with context.database.reading() as session:
            job = JobRepository(session, claim.tenant_id).get(claim.job_id)
            there = branches(job, ArtifactRepository(session, claim.tenant_id).of_job(claim.job_id))
    except NotFound as error:
        raise InvalidRequest(error.detail, field="publish", hint="its job was deleted") from error
    if wanted not in there or not there[wanted].files:
        hint = f"it has: {', '.join(there)}"
        raise InvalidRequest(f"the job keeps no {wanted}", field="publish.format", value=wanted, hint=hint)
    for path, artifact in there[wanted].files.items():
        target = (files / path).resolve()
        if not target.is_relative_to(files.resolve()):
            raise StorageError(f"artifact {artifact.id} names a file outside its folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not materialise(context.blobs, artifact.sha256, target):
            raise StorageError(f"the bytes of artifact {artifact.id} are missing in the blob store")
