"""`AsyncBitwright`: the resources of `Bitwright` for programs with an event loop.

Every call runs the blocking one in a thread, so both have one source for retries, resumed transfers and event streams.
A cancelled call is left alone: its thread ends with its request.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, Unpack

from bitwright.downloads import OnBytes, ignore_bytes
from bitwright.job_states import JobStatus
from bitwright.report import Report
from bitwright.request import RequestView
from bitwright.resources.blocking import Bitwright, Files
from bitwright.resources.job import Job
from bitwright.resources.job_fields import JobFields, JsonObject
from bitwright.transport import RetryPolicy
from bitwright.views import ArtifactView, EventView, FormatView, JobView, MethodList, PreflightView, UploadView

ItemT = TypeVar("ItemT")


class AsyncBitwright:
    """A Bitwright service; arguments and errors as of `Bitwright`."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        retry: RetryPolicy | None = None,
        timeout: float = 30.0,
    ) -> None:
        self._blocking = Bitwright(base_url, api_key, retry=retry, timeout=timeout)
        self.base_url = self._blocking.base_url
        self.jobs = AsyncJobs(self._blocking)
        self.uploads = AsyncUploads(self._blocking)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await asyncio.to_thread(self._blocking.close)

    async def methods(self) -> MethodList:
        """Methods, adapters and recipes, with the JSON Schema of their parameters."""
        return await asyncio.to_thread(self._blocking.methods.list)

    async def formats(self) -> Sequence[FormatView]:
        """Export formats and the runtimes that load them."""
        return list(await asyncio.to_thread(self._blocking.formats.list))


class AsyncJob:
    """A job; see `Job`."""

    def __init__(self, job: Job) -> None:
        self._job = job

    @property
    def view(self) -> JobView:
        """The job as of the last request."""
        return self._job.view

    @property
    def id(self) -> str:
        """The job's id, "job_..."."""
        return self._job.id

    @property
    def status(self) -> JobStatus:
        """The status as of the last request."""
        return self._job.status

    @property
    def request(self) -> RequestView:
        """The full form of the request, every default filled in."""
        return self._job.request

    @property
    def report(self) -> Report | None:
        """Size, quality and times of a succeeded job."""
        return self._job.report

    async def refresh(self) -> "AsyncJob":
        """Ask the service for the job as it is now."""
        await asyncio.to_thread(self._job.refresh)
        return self

    async def wait(self, *, progress: bool = False, check: bool = True) -> "AsyncJob":
        """Follow the job until it is final; see `Job.wait`."""
        await asyncio.to_thread(self._job.wait, progress=progress, check=check)
        return self

    def events(self, *, after: int = 0) -> AsyncIterator[EventView]:
        """Events as they happen, until the job is final."""
        return _in_threads(self._job.events(after=after))

    async def cancel(self) -> "AsyncJob":
        """End the job; a running one stops within seconds."""
        await asyncio.to_thread(self._job.cancel)
        return self

    async def retry(self) -> "AsyncJob":
        """Queue a failed or cancelled job again; finished blocks are kept."""
        await asyncio.to_thread(self._job.retry)
        return self

    async def delete(self) -> None:
        """Remove the final job and its artifacts."""
        await asyncio.to_thread(self._job.delete)

    async def artifacts(self) -> list[ArtifactView]:
        """All files of the succeeded job."""
        return await asyncio.to_thread(self._job.artifacts)

    async def download(
        self,
        folder: str | Path,
        *,
        format: str | None = None,
        force: bool = False,
        on_bytes: OnBytes = ignore_bytes,
    ) -> list[Path]:
        """Bring the result into `folder`; `on_bytes` is called in another thread."""
        return await asyncio.to_thread(self._job.download, folder, format=format, force=force, on_bytes=on_bytes)

    def __repr__(self) -> str:
        return f"Async{self._job!r}"

    def _repr_html_(self) -> str:
        return self._job._repr_html_()


class AsyncJobs:
    """Jobs of this key's tenant; see `Jobs`."""

    def __init__(self, blocking: Bitwright) -> None:
        self._jobs = blocking.jobs

    async def create(
        self,
        *,
        idempotency_key: str | None = None,
        extra_body: JsonObject | None = None,
        **fields: Unpack[JobFields],
    ) -> AsyncJob:
        """Queue a job; see `Jobs.create`."""

        def create() -> Job:
            return self._jobs.create(idempotency_key=idempotency_key, extra_body=extra_body, **fields)

        return AsyncJob(await asyncio.to_thread(create))

    async def preflight(self, *, extra_body: JsonObject | None = None, **fields: Unpack[JobFields]) -> PreflightView:
        """The full request that `create` would queue, with estimates and warnings; nothing is stored."""

        def preflight() -> PreflightView:
            return self._jobs.preflight(extra_body=extra_body, **fields)

        return await asyncio.to_thread(preflight)

    async def retrieve(self, job_id: str) -> AsyncJob:
        """The job as it is now."""
        return AsyncJob(await asyncio.to_thread(self._jobs.retrieve, job_id))

    async def list(
        self,
        *,
        status: JobStatus | None = None,
        method: str | None = None,
        model: str | None = None,
        metadata: Mapping[str, str] | None = None,
        limit: int = 50,
    ) -> AsyncIterator[AsyncJob]:
        """All jobs that match, newest first; `limit` is the page size of the requests."""
        jobs = self._jobs.list(status=status, method=method, model=model, metadata=metadata, limit=limit)
        async for job in _in_threads(jobs):
            yield AsyncJob(job)


class AsyncUploads:
    """Models and datasets that were sent to the service; see `Uploads`."""

    def __init__(self, blocking: Bitwright) -> None:
        self._uploads = blocking.uploads

    async def create(
        self, files: Files, *, upload_id: str | None = None, on_bytes: OnBytes = ignore_bytes
    ) -> UploadView:
        """Send files, or those of a folder; `on_bytes` is called in another thread."""
        return await asyncio.to_thread(self._uploads.create, files, upload_id=upload_id, on_bytes=on_bytes)

    async def retrieve(self, upload_id: str) -> UploadView:
        """An upload and how much of each file has arrived."""
        return await asyncio.to_thread(self._uploads.retrieve, upload_id)

    def list(self, *, status: str | None = None, limit: int = 50) -> AsyncIterator[UploadView]:
        """All uploads, newest first; `status` is `open` or `complete`, `limit` the size of the pages."""
        return _in_threads(self._uploads.list(status=status, limit=limit))


async def _in_threads(items: Iterator[ItemT]) -> AsyncIterator[ItemT]:
    """The items of a blocking iterator; each is waited for in a thread."""
    end = object()
    while (item := await asyncio.to_thread(next, items, end)) is not end:
        yield item  # type: ignore[misc]
