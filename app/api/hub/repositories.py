"""A finished job as a repository: a branch for its result, one for each checkpoint it keeps, a commit for each."""

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy.orm import Session

from app.api.hub.answers import NoEntry, NoRepository, NoRevision
from app.domain.request.job_name import JOBS, repository_of
from app.store.artifacts import ArtifactRepository
from app.store.hub.branches import Branch, branches
from app.store.hub.names import job_of_name
from app.store.ids import is_id
from app.store.jobs import JobRepository
from app.store.models import Artifact, Job
from bitwright.errors import NotFound
from bitwright.job_states import JobStatus


@dataclass(frozen=True)
class Repository:
    """A job that succeeded. `main` is its result; every other branch is the checkpoint of that name."""

    name: str
    job: Job
    branches: Mapping[str, Branch]

    def at(self, revision: str) -> Branch:
        """The branch of a name, or the one that has this commit.

        Raises:
            NoRevision: there is none.
        """
        if revision in self.branches:
            return self.branches[revision]
        for branch in self.branches.values():
            if branch.commit == revision:
                return branch
        there = ", ".join(self.branches)
        raise NoRevision(f"{self.name} has no revision {revision!r}; it has: {there}", value=revision)


def find_repository(session: Session, tenant_id: str, namespace: str, name: str) -> Repository:
    """The tenant's job that `namespace/name` stands for.

    Raises:
        NoRepository: there is none, or it has not succeeded.
    """
    job = _find_job(session, tenant_id, namespace, name)
    if job is None:
        raise NoRepository(f"there is no job {namespace}/{name} of yours", value=f"{namespace}/{name}")
    if job.status is not JobStatus.SUCCEEDED:
        detail = f"job {job.id} is {job.status.value}; its files are there once it has succeeded"
        raise NoRepository(detail, value=job.id)
    artifacts = ArtifactRepository(session, tenant_id).of_job(job.id)
    return Repository(name=repository_of(job.request.get("name") or job.id), job=job, branches=branches(job, artifacts))


def _find_job(session: Session, tenant_id: str, namespace: str, name: str) -> Job | None:
    if namespace == JOBS and is_id("job", name):
        try:
            return JobRepository(session, tenant_id).get(name)
        except NotFound:
            return None
    full = name if namespace == JOBS else f"{namespace}/{name}"
    return None if "\0" in full else job_of_name(session, tenant_id, full)


def file_of(branch: Branch, path: str) -> Artifact:
    """The file at a path.

    Raises:
        NoEntry: there is none.
    """
    if path not in branch.files:
        raise NoEntry(f"there is no file {path!r} in {branch.commit}", branch.commit)
    return branch.files[path]
