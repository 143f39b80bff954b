"""The files that a tenant's jobs made."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.store.ids import require_id
from app.store.models import Artifact, Job
from bitwright.errors import NotFound


class ArtifactRepository:
    """The artifacts of one tenant's jobs."""

    def __init__(self, session: Session, tenant_id: str) -> None:
        self._session = session
        self._tenant_id = tenant_id

    def of_job(self, job_id: str) -> Sequence[Artifact]:
        """A job's artifacts by format and path; none while it has not ended.

        Raises:
            NotFound: the tenant has no such job.
        """
        require_id("job", job_id, "job")
        where = (Job.id == job_id, Job.tenant_id == self._tenant_id)
        if self._session.scalars(select(Job.id).where(*where)).one_or_none() is None:
            raise NotFound(f"there is no job {job_id}", value=job_id)
        query = select(Artifact).where(Artifact.job_id == job_id, Artifact.tenant_id == self._tenant_id)
        # Sorted here: databases differ in how they order text, and archives must not.
        return sorted(self._session.scalars(query), key=lambda artifact: (artifact.format, artifact.path))

    def get(self, artifact_id: str) -> Artifact:
        """One artifact.

        Raises:
            NotFound: the tenant has no such artifact.
        """
        require_id("art", artifact_id, "artifact")
        where = (Artifact.id == artifact_id, Artifact.tenant_id == self._tenant_id)
        artifact = self._session.scalars(select(Artifact).where(*where)).one_or_none()
        if artifact is None:
            raise NotFound(f"there is no artifact {artifact_id}", value=artifact_id)
        return artifact
