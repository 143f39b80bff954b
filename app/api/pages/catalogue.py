"""Pages on models of earlier jobs, methods and formats, workers and usage."""

from fastapi import Request
from starlette.responses import Response

from app.api.deps import DatabaseOf
from app.api.pages.rendering import page
from app.api.pages.session import VisitorOf, page_router
from app.api.workers import get_workers
from app.domain.adapters import ADAPTERS
from app.domain.formats import FORMATS
from app.domain.inputs.architectures import ARCHITECTURES
from app.domain.methods import METHODS
from app.store.tenancy.totals import models_of, usage_of
from app.store.workers import waiting

router = page_router()
LATEST_JOBS = 1000
"""Jobs whose models are shown."""


@router.get("/models")
def show_models(request: Request, found: VisitorOf, database: DatabaseOf) -> Response:
    """Models of the visitor's jobs, and the types that are accepted."""
    with database.reading() as session:
        models = models_of(session, found.principal.tenant_id, LATEST_JOBS)
    types = sorted({(name, info.title) for name, info in ARCHITECTURES.items()})
    return page(request, "models", visitor=found, models=models, types=types, latest=LATEST_JOBS)


@router.get("/catalogue")
def show_catalogue(request: Request, found: VisitorOf) -> Response:
    """Methods, adapters, formats and the runtimes that load them."""
    formats = [
        (name.value, info, list(dict.fromkeys((row.runtime, row.support.value) for row in info.runtimes)))
        for name, info in FORMATS.items()
    ]
    return page(request, "catalogue", visitor=found, methods=METHODS, adapters=ADAPTERS, formats=formats)


@router.get("/workers")
def show_workers(request: Request, found: VisitorOf, database: DatabaseOf) -> Response:
    """The workers that were alive a moment ago, and what waits for them."""
    alive = get_workers(found.principal, database).items
    with database.reading() as session:
        queue = waiting(session)
    return page(request, "workers", visitor=found, workers=alive, queue=queue)


@router.get("/usage")
def show_usage(request: Request, found: VisitorOf, database: DatabaseOf) -> Response:
    """Totals of the visitor's tenant."""
    with database.reading() as session:
        usage = usage_of(session, found.principal.tenant_id)
    return page(request, "usage", visitor=found, usage=usage)
