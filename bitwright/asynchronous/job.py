"""A job as an object: its state as of the last request, and its operations."""

from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Self

from rich.console import Console

from bitwright.asynchronous.client import AsyncClient
from bitwright.asynchronous.waits import PROGRESS_BY_DEFAULT
from bitwright.files.downloads import OnBytes, ignore_bytes
from bitwright.job_snapshot import JobSnapshot
from bitwright.views import ArtifactView, EventView, JobView


class AsyncJob(JobSnapshot):
    """A job of the service. Methods that change or read it there bring `view` up to date and return the job itself."""

    def __init__(self, client: AsyncClient, view: JobView) -> None:
        super().__init__(view)
        self._client = client

    async def refresh(self) -> Self:
        """Ask the service for the job as it is now."""
        self.view = await self._client.job(self.id)
        return self

    async def wait(self, *, progress: bool | None = PROGRESS_BY_DEFAULT, check: bool = True) -> Self:
        """Follow the job until it is final.

        Args:
            progress: show bars, or lines where bars cannot be shown; None: bars on a terminal and in a notebook.
            check: raise the error of a failed job.

        Raises:
            BitwrightError: the job failed; the class is that of its error's code.
        """
        console = Console(highlight=False)
        if progress or (progress is None and (console.is_terminal or console.is_jupyter)):
            from bitwright.cli.watch import shown_on  # noqa: PLC0415 (only a progress display needs the commands)

            with shown_on(console) as show:
                self.view = await self._client.wait(self.id, on_event=show)
        else:
            self.view = await self._client.wait(self.id)
        if check:
            self.raise_failure()
        return self

    def events(self, *, after: int = 0) -> AsyncGenerator[EventView, None]:
        """Events as they happen, from the one after `after` until the job is final."""
        return self._client.events(self.id, after=after)

    async def cancel(self) -> Self:
        """End the job; a running one stops within seconds."""
        self.view = await self._client.cancel(self.id)
        return self

    async def pause(self) -> Self:
        """Hold the job; a running one is given back within seconds, with what it has finished."""
        self.view = await self._client.pause(self.id)
        return self

    async def resume(self) -> Self:
        """Let workers take the paused job again."""
        self.view = await self._client.resume(self.id)
        return self

    async def retry(self) -> Self:
        """Queue a failed or cancelled job again; finished blocks are kept."""
        self.view = await self._client.retry(self.id)
        return self

    async def export(self, formats: Sequence[str]) -> "AsyncJob":
        """Make other formats of the succeeded job's result; the job that makes them. See `AsyncJobs.export`."""
        return AsyncJob(self._client, await self._client.export(self.id, formats))

    async def delete(self) -> None:
        """Remove the final job and its artifacts."""
        await self._client.delete(self.id)

    async def artifacts(self) -> list[ArtifactView]:
        """All files of the succeeded job."""
        return await self._client.artifacts(self.id)

    async def download(
        self,
        folder: str | Path,
        *,
        format: str | None = None,
        force: bool = False,
        on_bytes: OnBytes = ignore_bytes,
    ) -> list[Path]:
        """Bring the result into `folder`; the paths of its files. See `AsyncClient.download`."""
        return await self._client.download(self.id, Path(folder), format=format, force=force, on_bytes=on_bytes)
