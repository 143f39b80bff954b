"""Results side by side: size against distance, settings and figures in columns."""

import re
from typing import Annotated

from fastapi import Query, Request
from starlette.responses import Response

from app.api.deps import DatabaseOf
from app.api.pages.curves import Chart
from app.api.pages.jobs import MOST_COMPARED
from app.api.pages.rendering import page
from app.api.pages.session import VisitorOf, page_router
from app.api.representations import job_view
from app.store.job_pages import JobFilters
from app.store.jobs import JobRepository
from bitwright.cli.comparison import Compared, doubts, figure_rows, settings_rows, size_and_distance, unbeaten
from bitwright.errors import InvalidRequest
from bitwright.job_states import JobStatus
from bitwright.report import Report

router = page_router()

OFFERED = 30
"""The latest jobs that the page offers to compare."""
MEGABYTE = 1e6


@router.get("/compare")
def compare(
    request: Request,
    found: VisitorOf,
    database: DatabaseOf,
    jobs: Annotated[str, Query(max_length=400, description="Ids, divided by blanks or commas.")] = "",
) -> Response:
    """The comparison; without jobs, a choice of them."""
    ids = list(dict.fromkeys(one for one in re.split(r"[\s,]+", jobs) if one))
    if len(ids) > MOST_COMPARED:
        hint = f"leave some out: {MOST_COMPARED} fit side by side"
        raise InvalidRequest(f"{len(ids)} jobs are too many", field="jobs", value=len(ids), hint=hint)
    with database.reading() as session:
        repository = JobRepository(session, found.principal.tenant_id)
        views = [job_view(repository.get(job_id), []) for job_id in ids]
        latest = repository.page(after=None, limit=OFFERED, filters=JobFilters(status=JobStatus.SUCCEEDED)).items
        offered = [job_view(job) for job in latest]
    compared = [Compared(view.id, view.report) for view in views if view.report is not None]
    points = [size_and_distance(one.report) for one in compared]
    return page(
        request,
        "compare",
        visitor=found,
        jobs=[view for view in views if view.report is not None],
        without=[view for view in views if view.report is None],
        offered=[view for view in offered if view.id not in ids],
        settings=settings_rows(compared),
        figures=figure_rows(compared),
        doubts=doubts(compared) if len(compared) > 1 else [],
        ahead=unbeaten(points),
        charts=[one for one in (_against(compared, "KL"), _against(compared, "perplexity")) if one is not None],
        most=MOST_COMPARED,
    )


def _against(compared: list[Compared], what: str) -> Chart | None:
    """Size against a figure: each result a series of one point, and a line through those that no other one beats."""
    points = [_point(one.report, what) for one in compared]
    names = [f"{n}: {one.report.method}" for n, one in enumerate(compared, start=1)]
    known = [(point, name) for point, name in zip(points, names, strict=True) if point is not None]
    if len(known) < 2:
        return None
    x = tuple(sorted({point[0] for point, _ in known}))

    def placed(own: dict[float, float]) -> tuple[float | None, ...]:
        return tuple(own.get(position) for position in x)

    front = dict(points[index] or (0.0, 0.0) for index in unbeaten(points))
    series = {name: placed(dict([point])) for point, name in known}
    title = f"Size against {what}: left and low is better"
    return Chart(title, "MB", what, x, {"not beaten by another": placed(front), **series}, joined=False)


def _point(report: Report, what: str) -> tuple[float, float] | None:
    if report.quality is None:
        return None
    value = report.quality.kl_divergence if what == "KL" else report.quality.perplexity
    return round(report.size.bytes_quantized / MEGABYTE, 4), value
