# Made from bitwright/asynchronous/service.py by `make client`: change it there.
"""`Bitwright`: the service's resources, each with `create`, `list` and `retrieve`."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

from bitwright.blocking.client import Client
from bitwright.blocking.job import Job
from bitwright.blocking.waits import PROGRESS_BY_DEFAULT
from bitwright.endpoint import api_key as environment_key
from bitwright.endpoint import find_endpoint, service_url
from bitwright.files.downloads import OnBytes, ignore_bytes
from bitwright.job_fields import JobFields, JsonObject, request_body
from bitwright.job_states import JobStatus
from bitwright.retries import RetryPolicy
from bitwright.views import (
    ArchitectureList,
    ArtifactView,
    EventView,
    FormatView,
    MethodList,
    PreflightView,
    UploadView,
    WorkerView,
)

Files = str | PathLike[str] | Sequence[str | PathLike[str]]


class Bitwright:
    """A Bitwright service.

    Args:
        base_url: address of the service; default: BITWRIGHT_URL, else the service that `bitwright serve` started here.
        api_key: key, "bw_..."; default: BITWRIGHT_KEY, else the key that such a service left for this user.
        retry: how often and how long to try again.
        timeout: seconds without any byte after which an answer counts as lost.

    Raises:
        InvalidSettings: the address is invalid.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        retry: RetryPolicy | None = None,
        timeout: float = 30.0,
    ) -> None:
        endpoint = find_endpoint(base_url or service_url(), api_key or environment_key(), None)
        self.base_url = endpoint.url
        self.client = Client(endpoint.url, endpoint.key, retry=retry, timeout=timeout)
        """The lower layer: one method per endpoint."""
        self.jobs = Jobs(self.client)
        self.uploads = Uploads(self.client)
        self.methods = Methods(self.client)
        self.formats = Formats(self.client)
        self.architectures = Architectures(self.client)
        self.workers = Workers(self.client)
        self.webhooks = self.client.webhooks

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self.client.close()


class _Resource:
    def __init__(self, client: Client) -> None:
        self._client = client


class Jobs(_Resource):
    """Jobs of this key's tenant."""

    def create(
        self,
        *,
        idempotency_key: str | None = None,
        hub_token: str | None = None,
        extra_body: JsonObject | None = None,
        **fields: Unpack[JobFields],
    ) -> Job:
        """Queue a job.

        Args:
            idempotency_key: the same key never makes a second job; default: a new one per call.
            hub_token: fetches this job's model and texts; kept encrypted, and erased at the job's end.
            extra_body: fields that this version of the client does not name.
            fields: the request.

        Raises:
            InvalidRequest: with all problems in `errors`.
        """
        body = request_body(fields, extra_body)
        view = self._client.submit(body, idempotency_key=idempotency_key, hub_token=hub_token)
        return Job(self._client, view)

    def preflight(self, *, extra_body: JsonObject | None = None, **fields: Unpack[JobFields]) -> PreflightView:
        """The full request that `create` would queue, with estimates and warnings; nothing is stored."""
        return self._client.preflight(request_body(fields, extra_body))

    def retrieve(self, job_id: str) -> Job:
        """The job as it is now."""
        return Job(self._client, self._client.job(job_id))

    def list(
        self,
        *,
        status: JobStatus | None = None,
        method: str | None = None,
        model: str | None = None,
        metadata: Mapping[str, str] | None = None,
        limit: int = 50,
    ) -> Iterator[Job]:
        """All jobs that match, newest first; `limit` is the page size of the requests."""
        jobs = self._client.jobs(status=status, method=method, model=model, metadata=metadata, limit=limit)
        return (Job(self._client, view) for view in jobs)

    def wait(self, job_id: str, *, progress: bool | None = PROGRESS_BY_DEFAULT, check: bool = True) -> Job:
        """Follow the job until it is final; see `Job.wait`."""
        return self.retrieve(job_id).wait(progress=progress, check=check)

    def events(self, job_id: str, *, after: int = 0) -> Generator[EventView, None, None]:
        """Events as they happen, from the one after `after` until the job is final."""
        return self._client.events(job_id, after=after)

    def cancel(self, job_id: str) -> Job:
        """End the job; a running one stops within seconds."""
        return Job(self._client, self._client.cancel(job_id))

    def pause(self, job_id: str) -> Job:
        """Hold the job; a running one is given back within seconds, with what it has finished."""
        return Job(self._client, self._client.pause(job_id))

    def resume(self, job_id: str) -> Job:
        """Let workers take a paused job again."""
        return Job(self._client, self._client.resume(job_id))

    def retry(self, job_id: str) -> Job:
        """Queue a failed or cancelled job again; finished blocks are kept."""
        return Job(self._client, self._client.retry(job_id))

    def preflight_export(self, job_id: str, formats: Sequence[str]) -> PreflightView:
        """The full request that `export` would queue, with warnings on what the formats will not have."""
        return self._client.preflight_export(job_id, formats)

    def export(
        self,
        job_id: str,
        formats: Sequence[str],
        *,
        verify: str | None = None,
        device: str | None = None,
        priority: int | None = None,
        metadata: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Make other formats of a succeeded job's result, in a job of its own; nothing is computed anew.

        Args:
            job_id: the job whose native checkpoint they are made from.
            formats: names of GET /v1/formats, without native.
            verify: "files" lets the worker's runtimes read the checkpoints; "off" (default).
            device: class of the worker, "cpu" (default) or "any".
            priority: higher runs first.
            metadata: labels of your own.
            idempotency_key: the same key never makes a second job; default: a new one per call.

        Raises:
            InputError: a format cannot hold the result, or the job has none to export.
        """
        view = self._client.export(
            job_id,
            formats,
            verify=verify,
            device=device,
            priority=priority,
            metadata=metadata,
            idempotency_key=idempotency_key,
        )
        return Job(self._client, view)

    def delete(self, job_id: str) -> None:
        """Remove a final job and its artifacts."""
        self._client.delete(job_id)

    def artifacts(self, job_id: str) -> Sequence[ArtifactView]:
        """All files of a succeeded job."""
        return self._client.artifacts(job_id)

    def download(
        self,
        job_id: str,
        folder: str | Path,
        *,
        format: str | None = None,
        force: bool = False,
        on_bytes: OnBytes = ignore_bytes,
    ) -> Sequence[Path]:
        """Bring the job's result into `folder`; the paths of its files. See `Client.download`."""
        return self._client.download(job_id, Path(folder), format=format, force=force, on_bytes=on_bytes)


class Uploads(_Resource):
    """Models and datasets that were sent to the service; a request names them by id."""

    def create(self, files: Files, *, upload_id: str | None = None, on_bytes: OnBytes = ignore_bytes) -> UploadView:
        """Send files, or those of a folder; with `upload_id`, go on with an upload that was cut off."""
        several = [files] if isinstance(files, str | PathLike) else files
        return self._client.upload([Path(file) for file in several], upload_id=upload_id, on_bytes=on_bytes)

    def retrieve(self, upload_id: str) -> UploadView:
        """An upload and how much of each file has arrived."""
        return self._client.upload_status(upload_id)

    def list(self, *, status: str | None = None, limit: int = 50) -> Generator[UploadView, None, None]:
        """All uploads, newest first; `status` is `open` or `complete`, `limit` the page size."""
        return self._client.uploads(status=status, limit=limit)


class Methods(_Resource):
    """Methods, adapters and recipes."""

    def list(self) -> MethodList:
        """All of them, with the JSON Schema of their parameters."""
        return self._client.methods()


class Formats(_Resource):
    """Export formats."""

    def list(self) -> Sequence[FormatView]:
        """All formats and the runtimes that load them."""
        return self._client.formats()


class Architectures(_Resource):
    """Model types."""

    def list(self) -> ArchitectureList:
        """All that can be quantized, and reasons why others cannot."""
        return self._client.architectures()


class Workers(_Resource):
    """Registered workers."""

    def list(self) -> Sequence[WorkerView]:
        """All workers."""
        return self._client.workers()
