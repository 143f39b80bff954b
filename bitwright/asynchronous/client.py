"""The client: one method per endpoint, and operations that combine several."""

import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from pydantic import BaseModel

from bitwright.asynchronous.admin import AsyncAdmin
from bitwright.asynchronous.downloads import download_artifact
from bitwright.asynchronous.following import follow
from bitwright.asynchronous.transport import AsyncTransport
from bitwright.asynchronous.uploads import send_files
from bitwright.asynchronous.waits import in_thread
from bitwright.asynchronous.webhooks import AsyncWebhooks
from bitwright.endpoint import DEFAULT_URL
from bitwright.errors import NotFound, RequestError
from bitwright.files.delivery import delivery
from bitwright.files.downloads import OnBytes, ignore_bytes, subfolder, target_path
from bitwright.files.folders import claim_folder
from bitwright.files.uploads import choose_files, describe_files
from bitwright.job_states import JobStatus, without_result
from bitwright.retries import RetryPolicy
from bitwright.tenancy import UsageView
from bitwright.views import (
    ArchitectureList,
    ArtifactView,
    EventPage,
    EventView,
    FormatView,
    JobView,
    MethodList,
    Page,
    PreflightView,
    PublicationView,
    UploadRequest,
    UploadView,
    View,
    WorkerView,
)

ViewT = TypeVar("ViewT", bound=View)


class AsyncClient:
    """Bitwright's HTTP API, one method per endpoint. Use one client per thread or event loop.

    Args:
        url: address of the service.
        key: API key, "bw_...".
        retry: how often and how long to try again.
        timeout: seconds without any byte after which an answer counts as lost.
    """

    def __init__(
        self, url: str = DEFAULT_URL, key: str | None = None, *, retry: RetryPolicy | None = None, timeout: float = 30.0
    ) -> None:
        self._transport = AsyncTransport(url, key, retry=retry or RetryPolicy(), timeout=timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    @property
    def admin(self) -> AsyncAdmin:
        """The operator's methods: tenants, keys, the audit log."""
        return AsyncAdmin(self._transport)

    @property
    def webhooks(self) -> AsyncWebhooks:
        """Addresses that the service calls, and the log of what went to them."""
        return AsyncWebhooks(self._transport)

    async def submit(
        self, body: Mapping[str, Any] | BaseModel, *, idempotency_key: str | None = None, hub_token: str | None = None
    ) -> JobView:
        """Queue a job. `body` is the shorthand or the full form of a request.

        A new key is generated per call, so that a repeated request never makes a second job; give
        `idempotency_key` to have the same safety across processes. `hub_token` fetches this job's model and texts; the
        service keeps it encrypted and erases it at the job's end.

        Raises:
            InvalidRequest: with all problems in `errors`.
            QuotaExceeded: the tenant has no room for it.
        """
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4()), **_token(hub_token)}
        return await self._read(JobView, "POST", "/v1/jobs", json=_plain(body), headers=headers)

    async def preflight(self, body: Mapping[str, Any] | BaseModel) -> PreflightView:
        """The full request that `submit` would queue, with estimates and warnings; nothing is stored."""
        # Nothing is stored, so any key makes a repeat safe.
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        query = {"dry_run": "true"}
        return await self._read(PreflightView, "POST", "/v1/jobs", params=query, json=_plain(body), headers=headers)

    async def job(self, job_id: str) -> JobView:
        """The job as it is now."""
        return await self._read(JobView, "GET", f"/v1/jobs/{job_id}")

    async def jobs_page(
        self,
        *,
        after: str | None = None,
        limit: int = 50,
        status: JobStatus | None = None,
        method: str | None = None,
        model: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Page[JobView]:
        """One page of jobs, newest first."""
        params: dict[str, Any] = {"limit": limit, "after": after, "status": status, "method": method, "model": model}
        params = {name: value for name, value in params.items() if value is not None}
        params |= {f"metadata.{name}": value for name, value in (metadata or {}).items()}
        return await self._read(Page[JobView], "GET", "/v1/jobs", params=params)

    async def jobs(self, **filters: Any) -> AsyncGenerator[JobView, None]:
        """All jobs that match, newest first, page by page. Filters as in `jobs_page`."""
        after = filters.pop("after", None)
        while True:
            page = await self.jobs_page(after=after, **filters)
            for job in page.items:
                yield job
            if (after := page.next_cursor) is None:
                return

    async def cancel(self, job_id: str) -> JobView:
        """End the job; a running one stops within seconds."""
        return await self._read(JobView, "POST", f"/v1/jobs/{job_id}/cancel")

    async def pause(self, job_id: str) -> JobView:
        """Hold the job; a running one is given back within seconds, with what it has finished."""
        return await self._read(JobView, "POST", f"/v1/jobs/{job_id}/pause")

    async def resume(self, job_id: str) -> JobView:
        """Let workers take a paused job again."""
        return await self._read(JobView, "POST", f"/v1/jobs/{job_id}/resume")

    async def retry(self, job_id: str, *, hub_token: str | None = None) -> JobView:
        """Queue a failed or cancelled job again; finished blocks are kept. Its own Hub token was erased at its end."""
        return await self._read(JobView, "POST", f"/v1/jobs/{job_id}/retry", headers=_token(hub_token))

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
    ) -> JobView:
        """Queue a job that makes other formats from the kept native checkpoint of a job that succeeded.

        Raises:
            InputError: a format cannot hold the result, or the job has none to export.
        """
        body = {"formats": list(formats), "verify": verify, "device": device, "priority": priority}
        given = {name: value for name, value in {**body, "metadata": metadata}.items() if value is not None}
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return await self._read(JobView, "POST", f"/v1/jobs/{job_id}/exports", json=given, headers=headers)

    async def preflight_export(self, job_id: str, formats: Sequence[str]) -> PreflightView:
        """The full request that `export` would queue, with warnings; nothing is stored.

        Raises:
            InputError: a format cannot hold the result, or the job has none to export.
        """
        given, query = {"formats": list(formats)}, {"dry_run": "true"}
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        path = f"/v1/jobs/{job_id}/exports"
        return await self._read(PreflightView, "POST", path, params=query, json=given, headers=headers)

    async def delete(self, job_id: str) -> None:
        """Remove a final job and its artifacts."""
        await self._transport.send("DELETE", f"/v1/jobs/{job_id}")

    async def events_page(self, job_id: str, *, after: int = 0, limit: int = 100) -> EventPage:
        """Stored events with a sequence above `after`."""
        params = {"after": after, "limit": limit}
        return await self._read(EventPage, "GET", f"/v1/jobs/{job_id}/events", params=params)

    def events(self, job_id: str, *, after: int = 0) -> AsyncGenerator[EventView, None]:
        """Events as they happen, from the one after `after` until the job is final; survives cut connections."""
        return follow(self._transport, job_id, after=after, get_job=self.job)

    async def wait(self, job_id: str, on_event: Callable[[EventView], None] | None = None) -> JobView:
        """Follow the job until it is final; the final job."""
        async with aclosing(self.events(job_id)) as events:
            async for event in events:
                if on_event is not None:
                    on_event(event)
        return await self.job(job_id)

    async def artifacts(self, job_id: str) -> list[ArtifactView]:
        """All files of a succeeded job."""
        return (await self._read(Page[ArtifactView], "GET", f"/v1/jobs/{job_id}/artifacts")).items

    async def download_artifact(self, artifact: ArtifactView, folder: Path, on_bytes: OnBytes = ignore_bytes) -> Path:
        """One file under `folder`, resumed if it is partly there, checked by its SHA-256."""
        return await download_artifact(self._transport, artifact, folder, on_bytes)

    async def download(
        self,
        job_id: str,
        folder: Path,
        *,
        format: str | None = None,
        force: bool = False,
        on_bytes: OnBytes = ignore_bytes,
    ) -> list[Path]:
        """The result of a job in `folder`, or with `format` that one checkpoint; the paths of its files.

        Without `format`: the first checkpoint that is not `native`, if there is one. Where an adapter belongs to it,
        both come, each in a subfolder named by its format. A download that was cut goes on where it was.

        Raises:
            Conflict: the job has not succeeded; or `folder` holds something else. `force` empties it, if it looks like
                a checkpoint.
            NotFound: the job has no such checkpoint.
            StorageError: a file does not have the hash that the service promised.
        """
        return await self.download_parts(
            await self.parts(job_id, folder, format=format), folder, force=force, on_bytes=on_bytes
        )

    async def parts(self, job_id: str, folder: Path, *, format: str | None = None) -> dict[Path, list[ArtifactView]]:
        """The artifacts that `download` would bring, by target folder: `folder` itself, or folders below it."""
        artifacts = await self.artifacts(job_id)
        kept = list(dict.fromkeys(artifact.format for artifact in artifacts))
        if not kept:
            raise without_result(job_id, (await self.job(job_id)).status)
        if format is not None and format not in kept:
            there = ", ".join(kept)
            raise NotFound(f"job {job_id} has no {format} checkpoint; it has: {there}", field="format", value=format)
        together = (format,) if format is not None else delivery(kept, (await self.job(job_id)).request)
        return {
            subfolder(folder, name) if len(together) > 1 else folder: [a for a in artifacts if a.format == name]
            for name in together
        }

    async def download_parts(
        self,
        parts: Mapping[Path, Sequence[ArtifactView]],
        folder: Path,
        *,
        force: bool = False,
        on_bytes: OnBytes = ignore_bytes,
    ) -> list[Path]:
        """Download what `parts` returned; arguments and errors as of `download`."""
        done, files = await in_thread(claim_folder, folder, parts, force=force), list[Path]()
        for destination, artifacts in parts.items():
            for artifact in artifacts:
                target = target_path(destination, artifact)
                if target in done:
                    on_bytes(artifact.size)
                else:
                    await self.download_artifact(artifact, destination, on_bytes)
                files.append(target)
        return files

    async def publish(
        self,
        job_id: str,
        hub: str,
        *,
        private: bool = True,
        force: bool = False,
        format: str | None = None,
        hub_token: str | None = None,
    ) -> PublicationView:
        """Send a succeeded job's result to a repository of the Hub, `org/name`; ask `publication` how that goes."""
        body = {"hub": hub, "private": private, "force": force, "format": format}
        return await self._read(
            PublicationView, "POST", f"/v1/jobs/{job_id}/publish", json=body, headers=_token(hub_token)
        )

    async def publication(self, job_id: str) -> PublicationView:
        """The latest publication of a job."""
        return await self._read(PublicationView, "GET", f"/v1/jobs/{job_id}/publish")

    async def upload(
        self, files: Sequence[Path], *, upload_id: str | None = None, on_bytes: OnBytes = ignore_bytes
    ) -> UploadView:
        """Send files, or those of a folder; with `upload_id`, go on with an upload that was cut off."""
        files = (await in_thread(choose_files, files)).files
        if upload_id is not None:
            return await send_files(self._transport, await self.upload_status(upload_id), files, on_bytes)
        body = UploadRequest(files=await in_thread(describe_files, files)).model_dump(mode="json")
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        upload = await self._read(UploadView, "POST", "/v1/uploads", json=body, headers=headers)
        return await send_files(self._transport, upload, files, on_bytes)

    async def upload_status(self, upload_id: str) -> UploadView:
        """An upload and how much of each file has arrived."""
        return await self._read(UploadView, "GET", f"/v1/uploads/{upload_id}")

    async def uploads_page(
        self, *, after: str | None = None, limit: int = 50, status: str | None = None
    ) -> Page[UploadView]:
        """One page of uploads, newest first; `status` is `open` or `complete`."""
        given = {"after": after, "limit": limit, "status": status}
        params = {name: value for name, value in given.items() if value is not None}
        return await self._read(Page[UploadView], "GET", "/v1/uploads", params=params)

    async def uploads(self, **filters: Any) -> AsyncGenerator[UploadView, None]:
        """All uploads, newest first, page by page. Filters as in `uploads_page`."""
        after = filters.pop("after", None)
        while True:
            page = await self.uploads_page(after=after, **filters)
            for upload in page.items:
                yield upload
            if (after := page.next_cursor) is None:
                return

    async def methods(self) -> MethodList:
        """Methods and recipes, with the JSON Schema of their parameters."""
        return await self._read(MethodList, "GET", "/v1/methods")

    async def formats(self) -> list[FormatView]:
        """Export formats and the runtimes that load them."""
        return (await self._read(Page[FormatView], "GET", "/v1/formats")).items

    async def architectures(self) -> ArchitectureList:
        """Model types that can be quantized, and reasons why others cannot."""
        return await self._read(ArchitectureList, "GET", "/v1/architectures")

    async def workers(self) -> list[WorkerView]:
        """Registered workers."""
        return (await self._read(Page[WorkerView], "GET", "/v1/workers")).items

    async def usage(self) -> UsageView:
        """Quotas of your tenant, what is used of them, and what it used month by month."""
        return await self._read(UsageView, "GET", "/v1/usage")

    async def ready(self) -> bool:
        """True if the service can take jobs now."""
        try:
            return (await self._transport.send("GET", "/readyz")).is_success
        except RequestError:
            return False

    async def _read(self, kind: type[ViewT], method: str, path: str, **options: Any) -> ViewT:
        """The answer as a `kind`; options as of `AsyncTransport.send`."""
        return kind.model_validate_json((await self._transport.send(method, path, **options)).content)


def _token(text: str | None) -> dict[str, str]:
    return {} if text is None else {"X-Hub-Token": text}


def _plain(body: Mapping[str, Any] | BaseModel) -> object:
    return body.model_dump(mode="json") if isinstance(body, BaseModel) else dict(body)
