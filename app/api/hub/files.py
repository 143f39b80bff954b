"""Files of a repository: the bytes of a job's artifacts, with the headers that clients of a Hub go by."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api.artifacts import RESPONSES, send_artifact
from app.api.auth import Reader
from app.api.deps import BlobsOf, DatabaseOf, LaterOf
from app.api.http.content import IMMUTABLE, REVALIDATED
from app.api.hub.answers import HubRoute, NoRepository
from app.api.hub.repositories import file_of, find_repository

router = APIRouter(tags=["hub"], route_class=HubRoute)


@router.get(
    "/hub/{namespace}/{repository}/resolve/{revision}/{path:path}",
    summary="Download a file of a job's repository",
    operation_id="hub_file",
    response_class=Response,
    responses=RESPONSES,
)
def get_file(
    *,
    namespace: str,
    repository: str,
    revision: str,
    path: str,
    request: Request,
    principal: Reader,
    database: DatabaseOf,
    blobs: BlobsOf,
    later: LaterOf,
) -> Response:
    """The bytes of a file, or one range of them. `ETag` is its SHA-256, `X-Repo-Commit` the commit that it is of."""
    with database.reading() as session:
        branch = find_repository(session, principal.tenant_id, namespace, repository).at(revision)
    file = file_of(branch, path)
    headers = {
        "Cache-Control": IMMUTABLE if revision == branch.commit else REVALIDATED,
        "X-Repo-Commit": branch.commit,
        "X-Linked-Size": str(file.size),
        "X-Linked-ETag": f'"{file.sha256}"',
    }
    return send_artifact(file, request, principal, database, blobs, later, more_headers=headers)


@router.head(
    "/hub/{namespace}/{repository}/resolve/{revision}/{path:path}",
    summary="Headers of a file of a job's repository",
    operation_id="head_hub_file",
    response_class=Response,
    responses=RESPONSES,
)
def head_file(
    *,
    namespace: str,
    repository: str,
    revision: str,
    path: str,
    request: Request,
    principal: Reader,
    database: DatabaseOf,
    blobs: BlobsOf,
    later: LaterOf,
) -> Response:
    """Headers of the GET, without the bytes: clients ask for these first."""
    return get_file(
        namespace=namespace,
        repository=repository,
        revision=revision,
        path=path,
        request=request,
        principal=principal,
        database=database,
        blobs=blobs,
        later=later,
    )


@router.api_route("/hub/{name}/resolve/{_revision}/{_path:path}", methods=["GET", "HEAD"], include_in_schema=False)
def no_namespace(name: str, _: Reader) -> Response:
    """Nothing: every repository here has a namespace."""
    raise NoRepository(f"there is no repository {name!r}; jobs are jobs/<id>, jobs/<name> or <org>/<name>")
