"""The job that a request starts from: whether it is the caller's, has succeeded, and still has what is needed of it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from app.domain.inputs.inspection import CONFIG
from app.domain.methods import WeightSpec
from app.domain.request.base_job import (
    DESCRIPTION,
    INPUTS,
    REPORT,
    BaseJob,
    Folded,
    continued_adapter,
    is_read,
    named_job,
)
from app.domain.request.exports import Kept
from app.domain.request.job_request import JobRequest
from app.store.artifacts import ArtifactRepository
from app.store.blobs import BlobStore
from app.store.jobs import JobRepository
from app.store.models import Artifact, Job
from bitwright.errors import FieldProblem, InputError, NotFound, SourceNotFound, StorageError, UnusableBaseJob
from bitwright.job_states import JobStatus

MAX_DESCRIPTION_BYTES = 64 << 20
ANEW = "or leave base_job out to quantize anew"


def find_base_job(
    body: object, jobs: JobRepository, artifacts: ArtifactRepository, blobs: BlobStore, replayed: Job | None = None
) -> BaseJob | None:
    """The base job that a body names; None if it names none.

    replayed   what the request's Idempotency-Key stands for: it is there even if its start is gone by now

    Raises:
        SourceNotFound: this tenant has no such job.
        UnusableBaseJob: it has not succeeded, lacks files, or has an adapter that cannot go on.
    """
    job_id = named_job(body) if isinstance(body, Mapping) else None
    if job_id is None:
        return None
    try:
        return _base_job(job_id, jobs, artifacts, blobs)
    except InputError:
        if replayed is None or replayed.request.get("base_job") != job_id:
            raise
        return _as_taken_over(job_id, replayed)


def exported_job(
    job_id: str, jobs: JobRepository, artifacts: ArtifactRepository, blobs: BlobStore
) -> tuple[JobRequest, Kept]:
    """The request of a job that other formats are to be made of, and what its native checkpoint says of itself.

    Raises:
        NotFound: this tenant has no such job.
        UnusableBaseJob: it has not succeeded, lacks files, or its adapter is not in its native checkpoint.
    """
    job, stored = jobs.get(job_id), artifacts.of_job(job_id)
    request = _succeeded(job)
    if request.exports:
        detail = f"job {job_id} is an export itself, and keeps no native checkpoint"
        raise _refusal(UnusableBaseJob, detail, f"export the job that it started from, {request.base_job}", job_id)
    adapter = continued_adapter(request.model_dump(mode="json"))
    if adapter is not None and adapter["kind"] != "lora":
        detail = f"job {job_id} has a {adapter['kind']} beside its weights, which no other format holds"
        hint = "finetune with merge, which puts it into the weights, and export that job"
        raise _refusal(UnusableBaseJob, detail, hint, job_id)
    files = {(file.format, file.path): file for file in stored if file.format == "native"}
    _demand_native(job_id, files, blobs, (DESCRIPTION, REPORT, CONFIG))
    linears = _description(job_id, files, blobs)
    return request, Kept(linears, _json(job_id, files["native", CONFIG], blobs), inputs=("native", INPUTS) in files)


def _base_job(job_id: str, jobs: JobRepository, artifacts: ArtifactRepository, blobs: BlobStore) -> BaseJob:
    try:
        job, stored = jobs.get(job_id), artifacts.of_job(job_id)
    except NotFound as error:
        hint = f"GET /v1/jobs lists yours; name one that succeeded, {ANEW}"
        raise _refusal(SourceNotFound, error.detail, hint, job_id) from error
    request = _succeeded(job)
    full = request.model_dump(mode="json")
    _demand_adapter(job_id, full)
    description = _description(job_id, _demand_files(job_id, full, stored, blobs), blobs)
    return BaseJob(job_id, full, _revision(job.report), _folded(request.quantization, description))


def _succeeded(job: Job) -> JobRequest:
    """The request of a job that has succeeded."""
    job_id = job.id
    if job.status is not JobStatus.SUCCEEDED:
        hint = f"wait until it has succeeded, {ANEW}"
        raise _refusal(UnusableBaseJob, f"job {job_id} is {job.status.value}, not succeeded", hint, job_id)
    try:
        request = JobRequest.model_validate(job.request)
    except ValidationError as error:
        detail = f"job {job_id} was made by another version, whose request this one does not understand"
        raise _refusal(UnusableBaseJob, detail, f"submit it again, {ANEW}", job_id) from error
    return request


def _revision(report: Mapping[str, Any] | None) -> str | None:
    """The commit of the Hub model that a report names; another version's may name it elsewhere."""
    model = (report or {}).get("model")
    revision = model.get("revision") if isinstance(model, Mapping) else None
    return revision if isinstance(revision, str) else None


def _as_taken_over(job_id: str, replayed: Job) -> BaseJob:
    """The base job as far as a job that started from it states: enough to see whether a request is the same again."""
    folded: Folded | None = "offsets" if replayed.request["formats"] == ["native"] else None
    return BaseJob(job_id, {**replayed.request, "merge": None}, folded=folded)


def _demand_adapter(job_id: str, request: Mapping[str, Any]) -> None:
    adapter = continued_adapter(request)
    if adapter is not None and adapter["kind"] == "bayesian-lora":
        detail = f"job {job_id} has trained a bayesian-lora: its gates are decided, and what is stored is rounded"
        hint = "train it in one job with more steps; without base_job the same request and seed give the same codes"
        raise _refusal(UnusableBaseJob, detail, hint, job_id)


def _demand_files(
    job_id: str, request: Mapping[str, Any], stored: Sequence[Artifact], blobs: BlobStore
) -> dict[tuple[str, str], Artifact]:
    """The files that are read, all of them there."""
    files = {(file.format, file.path): file for file in stored if is_read(request, file.format, file.path)}
    adapter = continued_adapter(request)
    wanted = {"native"} | ({"adapter"} if adapter is not None and adapter["kind"] != "lora" else set())
    missing = sorted(wanted - {checkpoint for checkpoint, _ in files})
    _demand_there(job_id, files, blobs, missing + (["native"] if ("native", DESCRIPTION) not in files else []))
    return files


def _demand_native(
    job_id: str, files: Mapping[tuple[str, str], Artifact], blobs: BlobStore, wanted: Sequence[str]
) -> None:
    """The native checkpoint is there, with these files."""
    lost = ["native"] if not files else [f"native/{name}" for name in wanted if ("native", name) not in files]
    _demand_there(job_id, files, blobs, lost)


def _demand_there(
    job_id: str, files: Mapping[tuple[str, str], Artifact], blobs: BlobStore, missing: Sequence[str]
) -> None:
    """Nothing is missing, and the bytes of every file are in the store."""
    gone = [*missing, *(f"{file.format}/{file.path}" for file in files.values() if not blobs.exists(file.sha256))]
    if gone:
        detail = f"job {job_id} has no {gone[0]} any more, which holds what it made bit for bit"
        raise _refusal(UnusableBaseJob, detail, f"submit it again, {ANEW}", job_id)


def _description(job_id: str, files: Mapping[tuple[str, str], Artifact], blobs: BlobStore) -> dict[str, Any]:
    """The entries of `bitwright.json` by quantized linear."""
    file = files["native", DESCRIPTION]
    try:
        linears: dict[str, Any] = _json(job_id, file, blobs)["linears"]
        return {name: dict(linear) for name, linear in linears.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(job_id, file) from error


def _json(job_id: str, file: Artifact, blobs: BlobStore) -> dict[str, Any]:
    """A file of a checkpoint, decoded."""
    try:
        if file.size > MAX_DESCRIPTION_BYTES:
            raise ValueError(f"{file.size} bytes")
        with blobs.open(file.sha256) as stream:
            return dict(json.loads(stream.read()))
    except (ValueError, TypeError, RecursionError, StorageError) as error:
        raise _unreadable(job_id, file) from error


def _unreadable(job_id: str, file: Artifact) -> InputError:
    detail = f"{file.path} of job {job_id} cannot be read"
    return _refusal(UnusableBaseJob, detail, f"submit it again, {ANEW}", job_id)


def _folded(spec: WeightSpec, linears: Mapping[str, Mapping[str, Any]]) -> Folded | None:
    """The part of the weights that holds an adapter, if they are stored otherwise than their spec says; else None."""
    if any(linear.get("offset") for linear in linears.values()):
        return "offsets"
    for name, linear in linears.items():
        scheme = spec.scheme_of(name)
        if scheme is not None and scheme.symmetric and linear.get("symmetric") is False:
            return "zero_points"
    return None


def _refusal(kind: type[InputError], detail: str, hint: str, job_id: str) -> InputError:
    problem = FieldProblem(field="base_job", code=kind.code, detail=f"{detail}; {hint}", value=job_id)
    return kind(detail, field="base_job", value=job_id, hint=hint, errors=(problem,))
