"""Answers about a repository, which clients ask for before they read its files: commit, files, branches."""

import hashlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, Response

from app.api.auth import Reader
from app.api.deps import DatabaseOf
from app.api.http.documentation import problems, text_header
from app.api.hub.answers import HubRoute, NoEntry, NoRepository
from app.api.hub.repositories import Repository, find_repository
from app.domain.access import Principal, Scope
from app.store.hub.branches import MAIN, Branch
from app.store.models import Artifact, Job
from app.store.session import Database
from app.store.tenancy.tenants import tenant_name

router = APIRouter(tags=["hub"], route_class=HubRoute)
PAGE = 1000
"""Entries of a tree in one answer, as of the public Hub."""
NOTHING_THERE = problems("not_found")
ENTRIES = {200: {"description": "Entries.", "headers": {"Link": text_header("The next page.")}}, **NOTHING_THERE}

Recursive = Annotated[bool, Query(description="Files of folders, too.")]
Limit = Annotated[int, Query(ge=1, le=PAGE, description="Entries in one answer.")]
Cursor = Annotated[str | None, Query(description="Of the page before: its last path.")]
WithSizes = Annotated[bool, Query(description="Whether files have their sizes and hashes.")]


@router.get(
    "/hub/api/whoami-v2",
    summary="Owner of the key, for `hf auth whoami`",
    operation_id="hub_whoami",
    responses=problems(),
)
def whoami(principal: Reader, database: DatabaseOf) -> JSONResponse:
    """The tenant under the name of a user, and what the key may do."""
    with database.reading() as session:
        name = tenant_name(session, principal.tenant_id)
    role = "write" if principal.allows(Scope.SUBMIT) else "read"
    token = {"displayName": principal.key_id, "role": role}
    auth = {"type": "access_token", "accessToken": token}
    return JSONResponse(
        {"type": "user", "id": principal.tenant_id, "name": name, "fullname": name, "orgs": [], "auth": auth}
    )


@router.get(
    "/hub/api/models/{namespace}/{repository}",
    summary="A job as a repository",
    operation_id="hub_model",
    responses=NOTHING_THERE,
)
def model(
    namespace: str, repository: str, principal: Reader, database: DatabaseOf, blobs: WithSizes = False
) -> JSONResponse:
    """The repository `jobs/<id>`, `jobs/<name>` or `<org>/<name>` at its branch `main`: commit and files."""
    return _information(database, principal, namespace, repository, MAIN, with_sizes=blobs)


@router.get(
    "/hub/api/models/{namespace}/{repository}/revision/{revision:path}",
    summary="A job as a repository, at a revision",
    operation_id="hub_model_revision",
    responses=NOTHING_THERE,
)
def model_at(
    *, namespace: str, repository: str, revision: str, principal: Reader, database: DatabaseOf, blobs: WithSizes = False
) -> JSONResponse:
    """The repository at a branch or commit. `main` is the job's result; every checkpoint has a branch of its name."""
    return _information(database, principal, namespace, repository, revision, with_sizes=blobs)


@router.get(
    "/hub/api/models/{namespace}/{repository}/refs",
    summary="Branches of a job's repository",
    operation_id="hub_refs",
    responses=NOTHING_THERE,
)
def refs(namespace: str, repository: str, principal: Reader, database: DatabaseOf) -> JSONResponse:
    """All branches with their commits."""
    with database.reading() as session:
        found = find_repository(session, principal.tenant_id, namespace, repository)
    heads = [
        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": branch.commit}
        for name, branch in found.branches.items()
    ]
    return JSONResponse({"branches": heads, "converts": [], "tags": []})


@router.get(
    "/hub/api/models/{namespace}/{repository}/auth-check",
    summary="Whether the key opens the repository",
    operation_id="hub_auth_check",
    responses=NOTHING_THERE,
)
def auth_check(namespace: str, repository: str, principal: Reader, database: DatabaseOf) -> JSONResponse:
    """Nothing, if it does."""
    with database.reading() as session:
        find_repository(session, principal.tenant_id, namespace, repository)
    return JSONResponse({})


@router.get(
    "/hub/api/models/{namespace}/{repository}/tree/{revision}",
    summary="Files of a job's repository",
    operation_id="hub_tree",
    responses=ENTRIES,
)
def tree(
    *,
    namespace: str,
    repository: str,
    revision: str,
    request: Request,
    principal: Reader,
    database: DatabaseOf,
    recursive: Recursive = False,
    limit: Limit = PAGE,
    cursor: Cursor = None,
) -> JSONResponse:
    """Files and folders by path, in pages: the header `Link` has the address of the next one."""
    return _tree(request, database, principal, (namespace, repository), (revision, ""), recursive, limit, cursor)


@router.get(
    "/hub/api/models/{namespace}/{repository}/tree/{revision}/{folder:path}",
    summary="Files of a folder of a job's repository",
    operation_id="hub_tree_of_folder",
    responses=ENTRIES,
)
def tree_of_folder(
    *,
    namespace: str,
    repository: str,
    revision: str,
    folder: str,
    request: Request,
    principal: Reader,
    database: DatabaseOf,
    recursive: Recursive = False,
    limit: Limit = PAGE,
    cursor: Cursor = None,
) -> JSONResponse:
    """Files and folders in a folder by path, in pages."""
    return _tree(request, database, principal, (namespace, repository), (revision, folder), recursive, limit, cursor)


@router.get("/hub/api/models/{name}", include_in_schema=False)
def no_namespace(name: str, _: Reader) -> Response:
    """Nothing: every repository here has a namespace."""
    raise NoRepository(f"there is no repository {name!r}; jobs are jobs/<id>, jobs/<name> or <org>/<name>")


def _information(
    database: Database, principal: Principal, namespace: str, repository: str, revision: str, *, with_sizes: bool
) -> JSONResponse:
    with database.reading() as session:
        found = find_repository(session, principal.tenant_id, namespace, repository)
    branch = found.at(revision)
    siblings = [_sibling(path, file, with_sizes) for path, file in branch.files.items()]
    return JSONResponse({**_about(found), "sha": branch.commit, "siblings": siblings})


def _about(repository: Repository) -> dict[str, Any]:
    job = repository.job
    return {
        "_id": job.id,
        "id": repository.name,
        "modelId": repository.name,
        "author": repository.name.partition("/")[0],
        "private": True,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": _tags(job),
        "createdAt": _instant(job.created_at),
        "lastModified": _instant(job.finished_at or job.updated_at),
    }


def _tags(job: Job) -> list[str]:
    return [job.method, *job.request.get("formats", [])]


def _instant(at: datetime) -> str:
    """A time as the clients parse it: with a fraction and Z."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _sibling(path: str, file: Artifact, with_size: bool) -> dict[str, Any]:
    if not with_size:
        return {"rfilename": path}
    pointer = pointer_of(file)
    stored = {"sha256": file.sha256, "size": file.size, "pointerSize": len(pointer)}
    return {"rfilename": path, "size": file.size, "blobId": git_blob(pointer), "lfs": stored}


def _tree(
    request: Request,
    database: Database,
    principal: Principal,
    repository: tuple[str, str],
    place: tuple[str, str],
    recursive: bool,
    limit: int,
    cursor: str | None,
) -> JSONResponse:
    revision, folder = place[0], place[1].strip("/")
    with database.reading() as session:
        branch = find_repository(session, principal.tenant_id, *repository).at(revision)
    listed = dict(entries(branch, folder, recursive=recursive))
    if folder and not listed:
        raise NoEntry(f"there is no folder {folder!r} in {branch.commit}", branch.commit)
    paths = sorted(path for path in listed if cursor is None or path > cursor)
    page = [listed[path] for path in paths[:limit]]
    headers = {"X-Repo-Commit": branch.commit}
    if len(paths) > limit:
        query = urlencode({**request.query_params, "limit": limit, "cursor": paths[limit - 1]})
        headers["Link"] = f'<{request.url.replace(query=query)}>; rel="next"'
    return JSONResponse(page, headers=headers)


def entries(branch: Branch, folder: str, *, recursive: bool) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(path, entry) of everything in a folder, `""` being the root; with `recursive` in its folders, too."""
    start = f"{folder}/" if folder else ""
    for path, file in branch.files.items():
        if not path.startswith(start):
            continue
        parts = path.removeprefix(start).split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            above = start + "/".join(parts[:depth])
            yield above, {"type": "directory", "path": above, "size": 0, "oid": git_blob(above.encode())}
        if recursive or len(parts) == 1:
            yield path, _entry(path, file)


def _entry(path: str, file: Artifact) -> dict[str, Any]:
    pointer = pointer_of(file)
    stored = {"oid": file.sha256, "size": file.size, "pointerSize": len(pointer)}
    return {"type": "file", "path": path, "size": file.size, "oid": git_blob(pointer), "lfs": stored}


def pointer_of(file: Artifact) -> bytes:
    """The file that git keeps in place of a large one (git-lfs, pointer version 1). Here every file is a large one."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{file.sha256}\nsize {file.size}\n".encode()


def git_blob(content: bytes) -> str:
    """The id that git gives to a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
