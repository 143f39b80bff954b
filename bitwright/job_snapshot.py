"""State of a job as of the last request, and its display in a terminal and in a notebook."""

from collections.abc import Iterator
from html import escape

from bitwright.job_states import FINAL_STATUSES, JobStatus
from bitwright.report import Report
from bitwright.request import RequestView
from bitwright.views import JobView


class JobSnapshot:
    """A job as the service described it last; `Job` and `AsyncJob` add the requests."""

    def __init__(self, view: JobView) -> None:
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

    def raise_failure(self) -> None:
        """Raise the error of a failed job; return for any other.

        Raises:
            BitwrightError: the class is that of the error's code.
        """
        if self.view.error is not None and self.status is JobStatus.FAILED:
            raise self.view.error.exception()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._facts().items())})"

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
            size = view.report.size
            bits = f"{size.bits_per_weight_model:.3f} of the model, {size.bits_per_weight:.3f} of quantized linears"
            yield "bits per weight", bits
            if (quality := view.report.quality) is not None:
                yield "perplexity", f"{quality.perplexity_original:.3f} before, {quality.perplexity:.3f} after"
