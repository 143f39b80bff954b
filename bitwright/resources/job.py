"""A job as an object: its state as of the last request, and its operations."""

from collections.abc import Iterator
from html import escape
from pathlib import Path

from rich.console import Console

from bitwright.client import Client
from bitwright.downloads import OnBytes, ignore_bytes
from bitwright.job_states import FINAL_STATUSES, JobStatus
from bitwright.report import Report
from bitwright.request import RequestView
from bitwright.views import ArtifactView, EventView, JobView


class Job:
    """A job of the service. Methods that change or read it there bring `view` up to date and return the job itself."""

    def __init__(self, client: Client, view: JobView) -> None:
        self._client = client
        self.view = view

    @property
    def id(self) -> str:
        """The job's id, "job_..."."""
        return self.view.id

    @property
    def status(self) -> JobStatus:
        """The status as of the last request."""
        return self.view.status

    @property
    def request(self) -> RequestView:
        """The full form of the request, every default filled in."""
        return self.view.request

    @property
    def report(self) -> Report | None:
        """Size, quality and times of a succeeded job."""
        return self.view.report

    @property
    def done(self) -> bool:
        """True if the job has reached a final status."""
        return self.status in FINAL_STATUSES

    def refresh(self) -> "Job":
        """Ask the service for the job as it is now."""
        self.view = self._client.job(self.id)
        return self

    def wait(self, *, progress: bool | None = None, check: bool = True) -> "Job":
        """Follow the job until it is final.

        Args:
            progress: show bars, or lines where bars cannot be shown; None: bars on a terminal and in a notebook.
            check: raise the error of a failed job.

        Raises:
            BitwrightError: the job failed; the class is that of its error's code.
        """
        console = Console(highlight=False)
        if progress or (progress is None and (console.is_terminal or console.is_jupyter)):
            from bitwright.cli.watch import follow_job  # noqa: PLC0415 (only a progress display needs the commands)

            self.view = follow_job(self._client, self.id, console)
        else:
            self.view = self._client.wait(self.id)
        if check and self.view.error is not None and self.status is JobStatus.FAILED:
            raise self.view.error.exception()
        return self

    def events(self, *, after: int = 0) -> Iterator[EventView]:
        """Events as they happen, from the one after `after` until the job is final."""
        return self._client.events(self.id, after=after)

    def cancel(self) -> "Job":
        """End the job; a running one stops within seconds."""
        self.view = self._client.cancel(self.id)
        return self

    def retry(self) -> "Job":
        """Queue a failed or cancelled job again; finished blocks are kept."""
        self.view = self._client.retry(self.id)
        return self

    def delete(self) -> None:
        """Remove the final job and its artifacts."""
        self._client.delete(self.id)

    def artifacts(self) -> list[ArtifactView]:
        """All files of the succeeded job."""
        return self._client.artifacts(self.id)

    def download(
        self,
        folder: str | Path,
        *,
        format: str | None = None,
        force: bool = False,
        on_bytes: OnBytes = ignore_bytes,
    ) -> list[Path]:
        """Bring the result into `folder`; the paths of its files. See `Client.download`."""
        return self._client.download(self.id, Path(folder), format=format, force=force, on_bytes=on_bytes)

    def __repr__(self) -> str:
        return f"Job({', '.join(f'{name}={value!r}' for name, value in self._facts().items())})"

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in self._rows())
        return f"<table>{rows}</table>"

    def _facts(self) -> dict[str, str]:
        view = self.view
        return {"id": view.id, "status": view.status.value, "model": view.model, "method": view.recipe or view.method}

    def _rows(self) -> Iterator[tuple[str, str]]:
        view = self.view
        yield from self._facts().items()
        if view.progress is not None and not self.done:
            progress = view.progress
            yield "progress", f"{progress.stage.value} {progress.done:.4g}/{progress.total:.4g} {progress.unit}"
        if view.error is not None:
            yield "error", f"{view.error.code}: {view.error.detail}"
        if view.report is not None:
            yield "bits per weight", f"{view.report.size.bits_per_weight:.3f}"
            if (quality := view.report.quality) is not None:
                yield "perplexity", f"{quality.perplexity_original:.3f} before, {quality.perplexity:.3f} after"
