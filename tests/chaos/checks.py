"""Checks of what must hold after the faults: of jobs, artifacts, blocks, processes, files, leases and messages."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from hashlib import sha256
from pathlib import Path

import redis
from sqlalchemy import func, select

from app.inspection.own_folder import PREFIX, remove_left
from app.store.blobs import open_blobs
from app.store.models import Artifact, Attempt, Event, Job, Tenant, UploadFile
from app.store.upkeep.garbage import collect_blobs
from app.store.upkeep.kept_files import forget_kept
from bitwright.job_states import JobStatus
from tests.chaos.service import Service
from tests.supervise.bench import wait_for

OF_WORKERS = frozenset({"reading", "spares"})
"""Folders of workers, not of jobs: logs and caches. A worker removes those of spares that ended a day ago."""


def results(service: Service, job_id: str, folder: Path) -> dict[str, str]:
    """sha256 of every file of tensors of a job, downloaded by its tenant; all files' bytes are those they should be."""
    client = service.clients[service.tenants[job_id]]
    found = {}
    for artifact in client.artifacts(job_id):
        path = client.download_artifact(artifact, folder / job_id)
        digest = sha256(path.read_bytes()).hexdigest()
        if digest != artifact.sha256:
            service.complain(f"{job_id}: {artifact.path} has another hash than was told")
        if path.suffix == ".safetensors":
            found[f"{artifact.format}/{artifact.path}"] = digest
    return found


def check_results(service: Service, expected: Mapping[str, Mapping[str, str]], folder: Path) -> int:
    """Every job's tensors are those that its recipe gives undisturbed; the number of files compared."""
    compared = 0
    for job_id, recipe in service.jobs.items():
        found = results(service, job_id, folder)
        compared += len(found)
        if not found or found != expected[recipe]:
            service.complain(f"{job_id}: {recipe} has other tensors than undisturbed: {found}")
    return compared


def check_rows(service: Service) -> dict[str, int]:
    """Jobs, attempts and events agree with each other; counts for the record."""
    with service.installation.database.reading() as session:
        jobs = session.scalars(select(Job)).all()
        owners = {tenant.id: tenant.name for tenant in session.scalars(select(Tenant))}
        attempts: dict[str, list[Attempt]] = {job.id: [] for job in jobs}
        for attempt in session.scalars(select(Attempt).order_by(Attempt.number)):
            attempts[attempt.job_id].append(attempt)
        events: dict[str, list[Event]] = {job.id: [] for job in jobs}
        for event in session.scalars(select(Event).order_by(Event.sequence)):
            events[event.job_id].append(event)
    if {job.id for job in jobs} != set(service.jobs):
        service.complain(f"the database has {len(jobs)} jobs, {len(service.jobs)} were submitted")
    for job in jobs:
        if owners[job.tenant_id] != service.tenants.get(job.id):
            service.complain(f"{job.id} belongs to {owners[job.tenant_id]}")
        told, kept = events[job.id], service.kept_every
        for problem in (*_of_job(job), *_of_attempts(job, attempts[job.id]), *_of_events(job, told, kept)):
            service.complain(f"{job.id}: {problem}")
    for job in jobs:
        service.story.tell("job", job=job.id, attempts=[_told(attempt) for attempt in attempts[job.id]])
    every = [attempt for of_job in attempts.values() for attempt in of_job]
    codes = Counter((attempt.error or {}).get("code", attempt.status.value) for attempt in every)
    blocks = [event for of_job in events.values() for event in of_job if event.data["type"] == "block"]
    return {"jobs": len(jobs), "attempts": len(every), "blocks_computed": len(blocks), **codes}


def _told(attempt: Attempt) -> dict[str, object]:
    """What there is to know of an attempt."""
    error = (attempt.error or {}).get("code")
    times = {"from": str(attempt.started_at), "to": str(attempt.finished_at), "blocks": attempt.blocks_done}
    return {"number": attempt.number, "worker": attempt.worker_id, "end": error or attempt.status.value, **times}


def _of_job(job: Job) -> Iterator[str]:
    if job.status is not JobStatus.SUCCEEDED:
        yield f"it is {job.status.value}: {job.error}"
    if job.lease_expires_at is not None or job.worker_id is not None:
        yield f"{job.worker_id} holds it still"
    if job.error is not None or job.report is None:
        yield "it has an error, or no report"


def _of_attempts(job: Job, attempts: list[Attempt]) -> Iterator[str]:
    if [attempt.number for attempt in attempts] != list(range(1, job.attempt + 1)):
        yield f"its attempts are {[attempt.number for attempt in attempts]}, the last {job.attempt}"
    good = [attempt.number for attempt in attempts if attempt.status is JobStatus.SUCCEEDED]
    if good != [job.attempt]:
        yield f"attempts {good} of {job.attempt} succeeded"
    if any(attempt.finished_at is None for attempt in attempts):
        yield "an attempt has no end"


def _of_events(job: Job, events: list[Event], kept_every: float | None) -> Iterator[str]:
    if [event.sequence for event in events] != list(range(1, job.last_event + 1)):
        yield "its events are not numbered in turn"
    if events and events[-1].data.get("status") != JobStatus.SUCCEEDED.value:
        yield f"its last event is {events[-1].data}"
    numbers = [event.attempt for event in events]
    if numbers != sorted(numbers):
        yield "an attempt wrote after the next one had begun"
    computed = [event.data["index"] for event in events if event.data["type"] == "block"]
    total = {event.data["total"] for event in events if event.data["type"] == "block"}
    lost = len({event.attempt for event in events}) - 1
    # A block whose event was lost with its worker is adopted without one: the report has all.
    if kept_every is not None:
        lost += _lost_with_hosts(events, kept_every)
    if total and (len(computed) > max(total) + max(lost, 0) or not set(computed) <= set(range(max(total)))):
        yield f"it computed blocks {Counter(computed)} in {job.attempt} attempts"


def _lost_with_hosts(events: list[Event], kept_every: float) -> int:
    """Blocks that all attempts but the last had finished since they last kept any for other hosts, as times tell.

    To keep them takes a while, too: as long again as the interval, and a second.
    """
    count = 0
    for number in sorted({event.attempt for event in events})[:-1]:
        own = [event for event in events if event.attempt == number]
        since = own[-1].created_at - timedelta(seconds=2 * kept_every + 1)
        count += sum(event.data["type"] == "block" and event.created_at >= since for event in own)
    return count


def check_messages(service: Service) -> None:
    """No message is left where workers listen, none is held back, and no job is claimed."""
    with redis.Redis(port=service.installation.broker_port, decode_responses=True) as broker:
        wait_for(lambda: not broker.llen("work.cpu"), 60, what="an empty queue")
        for name in broker.scan_iter("unacked*"):
            if broker.type(name) in ("hash", "zset") and (broker.hlen if broker.type(name) == "hash" else broker.zcard)(
                name
            ):
                service.complain(f"the broker holds messages in {name}")


def own_processes(service: Service) -> dict[int, str]:
    """Every process that was started for this installation, by its environment: ids and command lines."""
    mark = f"BITWRIGHT_BROKER_URL={service.installation.variables['BITWRIGHT_BROKER_URL']}".encode()
    temporary = f"TMPDIR={service.installation.folder / 'tmp'}".encode()
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            variables = (process / "environ").read_bytes().split(b"\0")
            state = (process / "stat").read_text().rsplit(")", 1)[1].split()[0]
            if (mark in variables or temporary in variables) and state not in "ZX":
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
    return {pid: line for pid, line in found.items() if pid != os.getpid()}


def check_files(service: Service) -> dict[str, int]:
    """Nothing is left on disk but what rows name; the blobs of attempts that were lost are collected."""
    folder = service.installation.folder
    disks = [folder / "disks" / part for part in service.hosts] or [folder / "data"]
    blobs = open_blobs(service.installation.variables.get("BITWRIGHT_BLOB_URL", f"file://{folder}/data/blobs"))
    with service.installation.database.transaction() as session:
        forget_kept(session, older_than_seconds=0)  # as the sweep does every ten minutes
    collected = collect_blobs(service.installation.database, blobs, grace_seconds=0)
    with service.installation.database.reading() as session:
        named = set(session.scalars(select(Artifact.sha256))) | set(session.scalars(select(UploadFile.sha256)))
        count = session.scalar(select(func.count()).select_from(Artifact))
    kept = {entry.sha256 for entry in blobs.entries()}
    if kept != named:
        service.complain(f"{len(kept - named)} blobs without a row, {len(named - kept)} rows without a blob")
    places = [disk / place for disk in disks for place in ("workspaces", "blobs/incoming")]
    left = [path for place in places if place.exists() for path in place.iterdir()]
    left = [path for path in left if path.name not in OF_WORKERS]
    if left:
        service.complain(f"files are left: {sorted(map(str, left))[:20]}")
    temporary = list((service.installation.folder / "tmp").iterdir())
    for path in temporary:
        if path.name.startswith(PREFIX):  # of an API that was killed: the next one removes it when it is a minute old
            os.utime(path, (0, 0))
            remove_left(path)
    remaining = sorted(path.name for path in temporary if path.exists())
    if remaining:
        service.complain(f"temporary files are left: {remaining[:20]}")
    return {"artifacts": count or 0, "blobs": len(kept), "blobs_collected": len(collected)}
