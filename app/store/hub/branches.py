"""Files of a job as a Hub has them: a branch for its result, one for each checkpoint it keeps, a commit for each."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from app.store.models import Artifact, Job
from bitwright.files.delivery import delivery

MAIN = "main"
LAYOUT = b"bitwright commit 1\n"
"""Part of every commit's id: a change of how files are laid out changes it."""


@dataclass(frozen=True)
class Branch:
    """Files by path, and the id of the commit that holds them: 40 hexadecimal digits, decided by them alone."""

    commit: str
    files: Mapping[str, Artifact]


def branches(job: Job, artifacts: Sequence[Artifact]) -> dict[str, Branch]:
    """All branches of a job with these files; `main` comes first.

    The result's model is at the root of `main`. An adapter that belongs to it is in a folder of its name.
    """
    kept: dict[str, dict[str, Artifact]] = {}
    for artifact in artifacts:
        kept.setdefault(artifact.format, {})[artifact.path] = artifact
    if not kept:
        return {MAIN: _branch({})}
    first, *others = delivery(list(kept), job.request)
    result = {**kept[first], **{f"{each}/{path}": file for each in others for path, file in kept[each].items()}}
    return {MAIN: _branch(result), **{name: _branch(files) for name, files in kept.items()}}


def _branch(files: Mapping[str, Artifact]) -> Branch:
    digest = hashlib.sha256(LAYOUT)
    for path in sorted(files):
        digest.update(f"{len(path.encode())} {path} {files[path].sha256}\n".encode())
    return Branch(commit=digest.hexdigest()[:40], files={path: files[path] for path in sorted(files)})
