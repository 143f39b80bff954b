"""`AsyncBitwright`: the service's resources, each with `create`, `list` and `retrieve`."""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

from bitwright.asynchronous.client import AsyncClient
from bitwright.asynchronous.job import AsyncJob
from bitwright.asynchronous.waits import PROGRESS_BY_DEFAULT
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


class AsyncBitwright:
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
        self.client = AsyncClient(endpoint.url, endpoint.key, retry=retry, timeout=timeout)
        """The lower layer: one method per endpoint."""
        self.jobs = AsyncJobs(self.client)
        self.uploads = AsyncUploads(self.client)
        self.methods = AsyncMethods(self.client)
        self.formats = AsyncFormats(self.client)
        self.architectures = AsyncArchitectures(self.client)
        self.workers = AsyncWorkers(self.client)
        self.webhooks = self.client.webhooks

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self.client.close()


class _Resource:
    def __init__(self, client: AsyncClient) -> None:
        self._client = client


class AsyncJobs(_Resource):
    """Jobs of this key's tenant."""

    async def create(
        self,
        *,
        idempotency_key: str | None = None,
        hub_token: str | None = None,
        extra_body: JsonObject | None = None,
        **fields: Unpack[JobFields],
    ) -> AsyncJob:
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
        view = await self._client.submit(body, idempotency_key=idempotency_key, hub_token=hub_token)
        return AsyncJob(self._client, view)

    async def preflight(self, *, extra_body: JsonObject | None = None, **fields: Unpack[JobFields]) -> PreflightView:
        """The full request that `create` would queue, with estimates and warnings; nothing is stored."""
        return await self._client.preflight(request_body(fields, extra_body))

    async def retrieve(self, job_id: str) -> AsyncJob:
        """The job as it is now."""
        return AsyncJob(self._client, await self._client.job(job_id))

    def list(
        self,
        *,
        status: JobStatus | None = None,
        method: str | None = None,
        model: str | None = None,
        metadata: Mapping[str, str] | None = None,
        limit: int = 50,
    ) -> AsyncIterator[AsyncJob]:
        """All jobs that match, newest first; `limit` is the page size of the requests."""
        jobs = self._client.jobs(status=status, method=method, model=model, metadata=metadata, limit=limit)
        return (AsyncJob(self._client, view) async for view in jobs)

    async def wait(self, job_id: str, *, progress: bool | None = PROGRESS_BY_DEFAULT, check: bool = True) -> AsyncJob:
        """Follow the job until it is final; see `AsyncJob.wait`."""
        return await (await self.retrieve(job_id)).wait(progress=progress, check=check)

    def events(self, job_id: str, *, after: int = 0) -> AsyncGenerator[EventView, None]:
        """Events as they happen, from the one after `after` until the job is final."""
        return self._client.events(job_id, after=after)

    async def cancel(self, job_id: str) -> AsyncJob:
        """End the job; a running one stops within seconds."""
        return AsyncJob(self._client, await self._client.cancel(job_id))

    async def pause(self, job_id: str) -> AsyncJob:
        """Hold the job; a running one is given back within seconds, with what it has finished."""
        return AsyncJob(self._client, await self._client.pause(job_id))

    async def resume(self, job_id: str) -> AsyncJob:
        """Let workers take a paused job again."""
        return AsyncJob(self._client, await self._client.resume(job_id))

    async def retry(self, job_id: str) -> AsyncJob:
        """Queue a failed or cancelled job again; finished blocks are kept."""
        return AsyncJob(self._client, await self._client.retry(job_id))

    async def preflight_export(self, job_id: str, formats: Sequence[str]) -> PreflightView:
        """The full request that `export` would queue, with warnings on what the formats will not have."""
        return await self._client.preflight_export(job_id, formats)

    async def export(
        self,
        job_id: str,
        formats: Sequence[str],
        *,
        verify: str | None = None,
        device: str | None = None,
        priority: int | None = None,
        metadata: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> AsyncJob:
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
        view = await self._client.export(
            job_id,
            formats,
            verify=verify,
            device=device,
            priority=priority,
            metadata=metadata,
            idempotency_key=idempotency_key,
        )
        return AsyncJob(self._client, view)

    async def delete(self, job_id: str) -> None:
        """Remove a final job and its artifacts."""
        await self._client.delete(job_id)

    async def artifacts(self, job_id: str) -> Sequence[ArtifactView]:
        """All files of a succeeded job."""
        return await self._client.artifacts(job_id)

    async def download(
        self,
        job_id: str,
        folder: str | Path,
        *,
        format: str | None = None,
        force: bool = False,
        on_bytes: OnBytes = ignore_bytes,
    ) -> Sequence[Path]:
        """Bring the job's result into `folder`; the paths of its files. See `AsyncClient.download`."""
        return await self._client.download(job_id, Path(folder), format=format, force=force, on_bytes=on_bytes)


class AsyncUploads(_Resource):
    """Models and datasets that were sent to the service; a request names them by id."""

    async def create(
        self, files: Files, *, upload_id: str | None = None, on_bytes: OnBytes = ignore_bytes
    ) -> UploadView:
        """Send files, or those of a folder; with `upload_id`, go on with an upload that was cut off."""
        several = [files] if isinstance(files, str | PathLike) else files
        return await self._client.upload([Path(file) for file in several], upload_id=upload_id, on_bytes=on_bytes)

    async def retrieve(self, upload_id: str) -> UploadView:
        """An upload and how much of each file has arrived."""
        return await self._client.upload_status(upload_id)

    def list(self, *, status: str | None = None, limit: int = 50) -> AsyncGenerator[UploadView, None]:
        """All uploads, newest first; `status` is `open` or `complete`, `limit` the page size."""
        return self._client.uploads(status=status, limit=limit)


class AsyncMethods(_Resource):
    """Methods, adapters and recipes."""

    async def list(self) -> MethodList:
        """All of them, with the JSON Schema of their parameters."""
        return await self._client.methods()


class AsyncFormats(_Resource):
    """Export formats."""

    async def list(self) -> Sequence[FormatView]:
        """All formats and the runtimes that load them."""
        return await self._client.formats()


class AsyncArchitectures(_Resource):
    """Model types."""

    async def list(self) -> ArchitectureList:
        """All that can be quantized, and reasons why others cannot."""
        return await self._client.architectures()


class AsyncWorkers(_Resource):
    """Registered workers."""

    async def list(self) -> Sequence[WorkerView]:
        """All workers."""
        return await self._client.workers()
